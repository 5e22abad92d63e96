// The gradient of offset_mask out of a window in shared memory (window.h), for 8 or 9 taps and groups of 64 or 128 bytes.
//
// A warp works out a batch of taps, finds the dot products of grad_output with their corners, leaves them in shared memory, and
// the threads that worked out the taps turn them into gradients.
//
// dot_window: a thread holds 16 bytes of one pixel's channels and all corners of all taps; eight or four threads then add up.
//
// dot_matrix, for 16-bit types: a warp has one pixel at a time, or two of groups of 64 bytes. The corners of its taps, 8
// channels each, are rows of matrices A; the columns of B hold grad_output, each turned by another number of pieces of 8
// channels. So every row of A may begin its channels elsewhere, and eight corners touch every bank once; of its row of the
// product a corner wants the column that turns as far as it does. Of 64 bytes there are four turns: the other four columns are
// another pixel's.
#include "backward.h"
#include "window.h"

namespace dcnv4 {
namespace {

// Two blocks of so many threads have the registers they need; of fewer where dot_matrix needs more.
constexpr int kMostDotThreads = 384, kFewerDotThreads = 320, kMostWideDotThreads = 256;

// Where the dot products of a pixel of a batch lie, in floats: a row of four a tap, in odd number.
template <int TAPS>
constexpr DCNV4_HD int dots_length() {
  return odd(TAPS) * kCorners;
}

// What is left of a tap until its dot products are known.
struct DotTap {
  float lx, ly, weight;
  uint32_t pixel;  // in the output map
};
constexpr uint32_t kNoPixel = ~uint32_t(0);

// Works out the taps of a batch, and what is left of them: place(slot, tap) says where their corners lie.
template <class T, int TAPS, bool RUNS, class Place>
DCNV4_DEVICE void work_out_dots(const dcnv4_problem& p, const Window& w, const WindowOrigin& o, int batch,
                                const TileTaps<T, TAPS, RUNS>& tile, const TapSlot (&slots)[kSlotRounds],
                                uint32_t (&far)[kSlotRounds], DotTap (&taps)[kSlotRounds], Place place) {
#pragma unroll
  for (int r = 0; r < kSlotRounds; ++r) taps[r].pixel = kNoPixel;
  work_out_slots<false>(p, w, o, batch, tile, slots, far, [&](int r, const TilePixel& pixel, const WindowTap& tap) {
    taps[r] = {tap.lx, tap.ly, tap.near || tap.far ? tap.weight : 0, pixel.live ? pixel.number : kNoPixel};
    place(r, slots[r], tap);
  });
#pragma unroll
  for (int r = 0; r < kSlotRounds; ++r) taps[r].pixel = keep(taps[r].pixel);
}

// The gradients of a batch's taps from the dot products at `dots`, by the threads that worked the taps out.
template <class T, int TAPS, bool RUNS>
DCNV4_DEVICE void write_gradients(const dcnv4_problem& p, const Window& w, const WindowOrigin& o,
                                  const TileTaps<T, TAPS, RUNS>& tile, int batch, const TapSlot (&slots)[kSlotRounds],
                                  const DotTap (&taps)[kSlotRounds], const float* dots, T* rows) {
  const int lane = int(threadIdx.x % kWarp);
  const uint32_t run_bytes = uint32_t(p.grad_offset_mask_stride) * uint32_t(sizeof(T));
#pragma unroll
  for (int r = 0; r < kSlotRounds; ++r) {
    const TapSlot& slot = slots[r];
    if (taps[r].pixel == kNoPixel) continue;
    // The same number either way: in odd number taps have no gaps between pixels.
    const int at = TAPS == odd(TAPS) ? r * kWarp + lane : slot.of * odd(TAPS) + slot.k;
    const Four<float> of = *reinterpret_cast<const Four<float>*>(dots + at * kCorners);
    Corners<float> corners{of.v[0], of.v[1], of.v[2], of.v[3]};
    TapGradient<float> gradient = tap_gradient(corners, taps[r].lx, taps[r].ly, taps[r].weight, w.scale);
    if (!(fabsf(gradient.weight) < bits_to_float(0x7f800000u))) {
      // A corner outside the map counts as zero, whatever grad_output is, and so do all four of a tap that is not used. Zeros
      // in the window, multiplied by infinity, are not enough. What is not finite in a corner is so in the gradient of the
      // weight.
      const int index = batch * (kSlots / TAPS) + slot.of;
      const WindowTap tap =
          tile.template tap<false, false>(p, w, o, index, tile_pixel(p, w, o, index), slot.k, slot.grid_x, slot.grid_y);
      const Inside inside(p, o, tap);
      const bool used = tap.near || tap.far, top = used && inside.top, bottom = used && inside.bottom;
      if (!top || !inside.left) corners.w00 = 0;
      if (!top || !inside.right) corners.w01 = 0;
      if (!bottom || !inside.left) corners.w10 = 0;
      if (!bottom || !inside.right) corners.w11 = 0;
      gradient = tap_gradient(corners, taps[r].lx, taps[r].ly, taps[r].weight, w.scale);
    }
    char* run = reinterpret_cast<char*>(rows) + uint64_t(taps[r].pixel) * run_bytes;
    T *pair = reinterpret_cast<T*>(run + uint32_t(slot.k) * uint32_t(2 * sizeof(T))),
      *alone = reinterpret_cast<T*>(run + (2 * TAPS + uint32_t(slot.k)) * uint32_t(sizeof(T)));
    const float x[1] = {gradient.x}, y[1] = {gradient.y}, weight[1] = {gradient.weight};
    store<T, 1>(pair, x);
    store<T, 1>(pair + 1, y);
    store<T, 1>(alone, weight);
  }
}

// Channels behind the last group's are padding: their gradient is zero.
template <class T, int TAPS>
DCNV4_DEVICE void write_padding(const dcnv4_problem& p, const Window& w, const WindowOrigin& o, T* image) {
  const int used = int(p.G) * 3 * TAPS, padding = int(p.P) - used;
  if (o.g + 1 < int(p.G) || padding == 0) return;
  for (int i = int(threadIdx.x); i < w.pixels; i += int(blockDim.x)) {
    const TilePixel pixel = tile_pixel(p, w, o, i);
    if (!pixel.live) continue;
    T* row = at_pixel(image, pixel.number, p.grad_offset_mask_stride) + used;
    for (int c = 0; c < padding; ++c) row[c] = round_one<T>(0);
  }
}

// Dot products of the corners of a batch's far taps (a bit a slot), from global memory: PIECES threads a tap, each with 16
// bytes of the channels. `gradients`: grad_output of the image's first pixel and this group, `map` likewise.
static_assert(kSlotRounds == 2, "a word of far taps each");
template <int PIECES, class T, int TAPS, bool RUNS>
DCNV4_DEVICE void dot_far(const dcnv4_problem& p, const Window& w, const WindowOrigin& o, const TileTaps<T, TAPS, RUNS>& tile,
                          int batch, const T* map, const T* gradients, const uint32_t (&far)[kSlotRounds], float* dots) {
  constexpr int N = 16 / int(sizeof(T)), pixels = kSlots / TAPS, at_once = kWarp / PIECES;
  const int lane = int(threadIdx.x % kWarp), piece = lane % PIECES;
#pragma unroll 1
  for (int r = 0; r < kSlotRounds; ++r) {
#pragma unroll 1
    for (uint32_t rest = r == 0 ? far[0] : far[1]; rest != 0;) {
      // Of the next taps each takes its own.
      uint32_t mine = rest;
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        if (i < lane / PIECES) mine &= mine - 1;
        rest &= rest - 1;
      }
      const bool has_tap = mine != 0;
      const int slot = r * kWarp + (has_tap ? __ffs(int(mine)) - 1 : 0), of = slot / TAPS, k = slot - of * TAPS;
      float dot[kCorners] = {};
      if (has_tap) {
        const int index = batch * pixels + of;
        const TilePixel pixel = tile_pixel(p, w, o, index);
        const WindowTap tap = tile.template tap<false, false>(p, w, o, index, pixel, k, w.grid_x[k], w.grid_y[k]);
        const Inside inside(p, o, tap);
        float gradient[N];
        load<T, N>(at_pixel(gradients + piece * N, pixel.number, p.output_stride), gradient);
        const char* cell = reinterpret_cast<const char*>(map + piece * N);
        cell += int64_t(tap.y + o.y) * int64_t(w.row_bytes) + int64_t(tap.x + o.x) * int64_t(w.value_bytes);
#pragma unroll
        for (int c = 0; c < kCorners; ++c) {
          float corner[N];
          load_if<T, N>((c % 2 ? inside.right : inside.left) && (c / 2 ? inside.bottom : inside.top),
                        cell + c % 2 * int64_t(w.value_bytes) + c / 2 * int64_t(w.row_bytes), corner);
#pragma unroll
          for (int i = 0; i < N; ++i) dot[c] += gradient[i] * corner[i];
        }
      }
#pragma unroll
      for (int c = 0; c < kCorners; ++c) {
#pragma unroll
        for (int d = PIECES / 2; d > 0; d /= 2) dot[c] += __shfl_xor_sync(0xffffffffu, dot[c], d);
      }
      if (has_tap && piece == 0)
        *reinterpret_cast<Four<float>*>(dots + of * dots_length<TAPS>() + k * kCorners) = {{dot[0], dot[1], dot[2], dot[3]}};
    }
  }
}

// ---- By threads.

template <int TAPS>
constexpr DCNV4_HD int64_t thread_bytes() {
  return (kSlots / TAPS * (dots_length<TAPS>() + odd(TAPS)) * 4 + 15) / 16 * 16;
}

template <class T, int UNITS, int TAPS, bool RUNS>
__global__ void __launch_bounds__(kMostDotThreads, 2)
    dot_window(const __grid_constant__ dcnv4_problem p, const __grid_constant__ Window w, const __grid_constant__ Errand errand,
               uint32_t first_block, const __grid_constant__ BulkMap value_map, const __grid_constant__ BulkMap mask_map,
               const __grid_constant__ BulkMap, const T* __restrict__ value, const T* __restrict__ offset_mask,
               const T* __restrict__ grad_output, T* __restrict__ grad_offset_mask) {
  constexpr int N = 16 / int(sizeof(T)), items = kWarp / UNITS, cell_bytes = UNITS * 16;
  constexpr int pixels = kSlots / TAPS;
  const WindowOrigin o = window_origin(p, w, blockIdx.x + first_block);
  const int lane = int(threadIdx.x % kWarp), warp = warp_index(), warps = int(blockDim.x / kWarp);
  const int64_t first_output = int64_t(o.n) * p.Ho * p.Wo;
  const int channel = o.g * int(p.D);
  const T* map = image_of(value, o, w.value_image) + channel;
  const T* gradients = image_of(grad_output, o, w.output_image) + channel;
  T* image = grad_offset_mask + first_output * p.grad_offset_mask_stride;

  char* window = window_of<T, TAPS, RUNS>(w);
  const uint32_t pitch_bytes = uint32_t(w.pitch) * cell_bytes, nowhere = pitch_bytes * uint32_t(w.height);
  char* barriers = window + nowhere + pitch_bytes + 2 * cell_bytes;
  float* dots = reinterpret_cast<float*>(barriers + kWindowBarriers + warp * thread_bytes<TAPS>());
  uint32_t* places = reinterpret_cast<uint32_t*>(dots + pixels * dots_length<TAPS>());
  const LateWait earlier{blockIdx.x < errand.late_blocks};
  earlier.wait(false);
  const TileTaps<T, TAPS, RUNS> tile(w, o, offset_mask);
  start_window<UNITS>(p, w, o, tile, value_map, mask_map, map, channel * int(sizeof(T)), window, barriers);
  clear_nowhere<cell_bytes>(window + nowhere, pitch_bytes);
  if (errand.vectors != 0 && !earlier.late) run_errand<T>(errand);
  TapSlot slots[kSlotRounds];
  find_slots<TAPS, false>(w, slots);
  wait_for_runs<RUNS>(barriers);

  const int item = lane / UNITS, unit = lane % UNITS;
  const char* cells = window + unit * 16;
  for (int batch = warp; batch * pixels < w.pixels; batch += warps) {
    uint32_t far[kSlotRounds];
    DotTap taps[kSlotRounds];
    work_out_dots<T, TAPS>(p, w, o, batch, tile, slots, far, taps, [&](int, const TapSlot& slot, const WindowTap& tap) {
      places[slot.of * odd(TAPS) + slot.k] = tap.near ? uint32_t(tap.y * w.pitch + tap.x) * cell_bytes : nowhere;
    });
    __syncwarp();
    if (batch == warp) wait_for_cells<RUNS>(barriers);

#pragma unroll 1
    for (int pass = 0; pass < pixels; pass += items) {
      // Of seven pixels the last is done twice.
      const int of = min(pass + item, pixels - 1);
      const TilePixel pixel = tile_pixel(p, w, o, batch * pixels + of);
      float gradient[N];
      load<T, N>(reinterpret_cast<const char*>(gradients) + (pixel.number * w.output_bytes + uint32_t(unit) * 16), gradient);
      float* to = dots + of * dots_length<TAPS>();
#pragma unroll 3
      for (int k = 0; k < TAPS; ++k) {
        const char* at = cells + places[of * odd(TAPS) + k];
        float sums[kCorners] = {};
#pragma unroll
        for (int c = 0; c < kCorners; ++c) {
          float corner[N];
          load_shared<T, N>(at + c % 2 * cell_bytes + c / 2 * pitch_bytes, corner);
#pragma unroll
          for (int i = 0; i < N; ++i) sums[c] += gradient[i] * corner[i];
        }
        // Halves of the threads take the upper and the lower corners, halves of those the left and the right one.
        const bool lower = (unit & (UNITS / 2)) != 0, right = (unit & (UNITS / 4)) != 0;
        float two[2];
#pragma unroll
        for (int c = 0; c < 2; ++c)
          two[c] = (lower ? sums[2 + c] : sums[c]) + __shfl_xor_sync(0xffffffffu, lower ? sums[c] : sums[2 + c], UNITS / 2);
        float one = (right ? two[1] : two[0]) + __shfl_xor_sync(0xffffffffu, right ? two[0] : two[1], UNITS / 4);
        if (UNITS == 8) one += __shfl_xor_sync(0xffffffffu, one, 1);
        if ((UNITS == 4 || unit % 2 == 0) && pass + item < pixels) to[k * kCorners + 2 * int(lower) + int(right)] = one;
      }
    }
    __syncwarp();
    if ((far[0] | far[1]) != 0) {
      dot_far<UNITS>(p, w, o, tile, batch, map, gradients, far, dots);
      __syncwarp();
    }
    write_gradients(p, w, o, tile, batch, slots, taps, dots, image + o.g * 3 * TAPS);
    __syncwarp();  // before the next taps take the place of these
  }
  write_padding<T, TAPS>(p, w, o, image);
  earlier.wait(true);
}

// ---- By matrices.

// Words of a pixel of a batch: where its taps lie. Rows of A have two taps a thread, read at once.
constexpr int kPlaceWords = 12;

// How many pixels share the columns of a B.
constexpr DCNV4_HD int pixels_together(int halves) { return halves == 1 ? 2 : 1; }

template <int HALVES, int TAPS>
constexpr DCNV4_HD int64_t matrix_bytes() {
  constexpr int rows = round_up_to(kSlots / TAPS, pixels_together(HALVES));
  return rows * (dots_length<TAPS>() + kPlaceWords) * 4;
}

// HALVES of 64 bytes a cell.
template <class T, int HALVES, int TAPS, bool RUNS>
__global__ void __launch_bounds__(HALVES == 2            ? kMostWideDotThreads
                                  : DCNV4_MORE_REGISTERS ? kFewerDotThreads
                                                         : kMostDotThreads,
                                  2)
    dot_matrix(const __grid_constant__ dcnv4_problem p, const __grid_constant__ Window w, const __grid_constant__ Errand errand,
               uint32_t first_block, const __grid_constant__ BulkMap value_map, const __grid_constant__ BulkMap mask_map,
               const __grid_constant__ BulkMap gradient_map, const T* __restrict__ value, const T* __restrict__ offset_mask,
               const T* __restrict__ grad_output, T* __restrict__ grad_offset_mask) {
  constexpr int pieces = 4 * HALVES, cell_bytes = 64 * HALVES;
  constexpr int pixels = kSlots / TAPS;
  constexpr int together = pixels_together(HALVES), rows = int(round_up_to(pixels, together));
  // More would not fit the registers; where threads stand in for matrix units it would be long.
  constexpr int unrolled = HALVES == 1 && DCNV4_MATRIX_UNITS && RUNS ? 2 : 1;
  WindowOrigin o = window_origin(p, w, blockIdx.x + first_block);
  const int lane = int(threadIdx.x % kWarp), warp = warp_index(), warps = int(blockDim.x / kWarp);
  const int64_t first_output = int64_t(o.n) * p.Ho * p.Wo;
  const int channel = o.g * int(p.D);
  const T* map = image_of(value, o, w.value_image) + channel;
  const T* gradients = image_of(grad_output, o, w.output_image) + channel;
  T* image = grad_offset_mask + first_output * p.grad_offset_mask_stride;

  // Places are counted from the start of the block's shared memory; the window begins with a multiple of 128.
  char* shared = dynamic_shared();
  const uint32_t window_at = window_offset<T, TAPS, RUNS>(w);
  char* window = shared + window_at;
  const uint32_t pitch_bytes = uint32_t(w.pitch) * cell_bytes, nowhere = pitch_bytes * uint32_t(w.height);
  char* barriers = window + nowhere + pitch_bytes + 2 * cell_bytes;
  Kept* kept = kept_of(barriers);
  const uint32_t rows_at =
      window_at + round_up_to(nowhere + pitch_bytes + 2 * cell_bytes + kWindowBarriers, uint32_t(kBulkAlignment));
  char* gradient_rows = shared + rows_at;  // (pixels), and a batch more, which the last batch may read to no effect
  float* dots =
      reinterpret_cast<float*>(gradient_rows + (w.pixels + pixels) * cell_bytes + warp * matrix_bytes<HALVES, TAPS>());
  uint32_t* places = reinterpret_cast<uint32_t*>(dots + rows * dots_length<TAPS>());
  const LateWait earlier{blockIdx.x < errand.late_blocks};
  earlier.wait(false);
  const TileTaps<T, TAPS, RUNS> tile(w, o, offset_mask);
  start_window<pieces>(p, w, o, tile, value_map, mask_map, map, channel * int(sizeof(T)), window, barriers,
                       w.pixels * cell_bytes);
  if (!RUNS) {
    for (uint32_t i = threadIdx.x; i < uint32_t(w.pixels) * pieces; i += blockDim.x)  // where there is no pixel, another's
      copy_async(gradient_rows + i * 16, reinterpret_cast<const char*>(gradients) +
                                             tile_pixel(p, w, o, int(i / pieces)).number * w.output_bytes + i % pieces * 16);
  } else if (threadIdx.x == 0) {
    start_bulk(gradient_map, gradient_rows, barriers + kBarrierBytes, channel * int(sizeof(T)) / 4, o.tile_x, o.tile_y,
               int(o.n));
  }
  clear_nowhere<cell_bytes>(window + nowhere, pitch_bytes);
  if (threadIdx.x == 0) *kept = {o.x, o.y, image + o.g * 3 * TAPS, map, gradients};
  if (errand.vectors != 0 && !earlier.late) run_errand<T>(errand);
  TapSlot slots[kSlotRounds];
  find_slots<TAPS, RUNS>(w, slots);  // fetched by threads, there are not the registers
  wait_for_runs<RUNS>(barriers);

  o.x = kept->x;
  o.y = kept->y;
  // As a row of A: matrices 0 and 1 of a load are of four taps at one piece of the channels, 2 and 3 at the next piece. A row's
  // piece i is that of number i ^ turn. Of eight taps a thread has two, one a load.
  const int row = lane % 8, matrix = lane / 8, turn = HALVES == 1 ? row / 2 : row;
  const uint32_t corner = window_at + uint32_t(row % 2 * cell_bytes) + uint32_t(row / 2 % 2) * pitch_bytes;
  const uint32_t own_corner = corner + uint32_t(matrix / 2 ^ turn) * 16;
  // Of ninth taps pieces 0 and 1 are eight upper rows, pieces 2 and 3 eight lower ones.
  const uint32_t ninth_corner = corner + uint32_t((matrix % 2 * 2 + matrix / 2) ^ turn) * 16;
  const uint32_t* own_places = places + (matrix % 2 * 2 + row / kCorners) * 2;
  const uint32_t* ninth_places = places + (together == 2 ? row / kCorners * kPlaceWords : 0) + (kMostTaps - 1);
  // As a column of B: grad_output at the same turn, of the first of two pixels or of the second; at piece i it is own_words ^
  // 16 i.
  const int q = lane % 4, column = lane / 4;
  const uint32_t own_words = rows_at + uint32_t(column / pieces * cell_bytes + column % pieces * 16 + q * 4);
  // As a row of C: which column it wants of the first pixel, and in which number the lane holds that, of one of the pixels.
  const int wanted = HALVES == 1 ? column / 2 : column, own_pixel = together == 2 ? q / 2 : 0;
  const bool holds = wanted / 2 == (together == 2 ? q % 2 : q), high = wanted % 2 != 0;
  // Of the eight rows of ninth taps four are the first pixel's and four the second's.
  const int ninth_pixel = together == 2 ? column / kCorners : 0;
  const bool holds_ninth = wanted / 2 + 2 * ninth_pixel == q && (together == 2 || column < kCorners);
  float* own_dots = dots + own_pixel * dots_length<TAPS>() + column / kCorners * 2 * kCorners + column % kCorners;
  float* ninth_dots = dots + ninth_pixel * (dots_length<TAPS>() - kCorners) + column + (kMostTaps - 1) * kCorners;
  // Behind the last of an odd number of pixels: what is read there has no effect.
  if (rows > pixels && lane == 0) places[pixels * kPlaceWords + kMostTaps - 1] = nowhere;

  for (int batch = warp; batch * pixels < w.pixels; batch += warps) {
    uint32_t far[kSlotRounds];
    DotTap taps[kSlotRounds];
    work_out_dots<T, TAPS>(p, w, o, batch, tile, slots, far, taps, [&](int r, const TapSlot& slot, const WindowTap& tap) {
      const int at = r * kWarp + lane + (kPlaceWords - TAPS) * slot.of;
      places[at] = tap.near ? uint32_t(tap.y) * pitch_bytes + uint32_t(tap.x) * cell_bytes : nowhere;
    });
    __syncwarp();
    if (batch == warp) wait_for_cells<RUNS>(barriers);

    const uint32_t batch_words = own_words + uint32_t(batch * pixels * cell_bytes);
#pragma unroll(unrolled)
    for (int of = 0; of < pixels; of += together) {
      // All that says where to read comes before the dot products are stored: behind a store the compiler would let it wait.
      uint2 own_at[together];
#pragma unroll
      for (int pixel = 0; pixel < together; ++pixel)
        own_at[pixel] = *reinterpret_cast<const uint2*>(own_places + (of + pixel) * kPlaceWords);
      const uint32_t ninth_at = TAPS == 9 ? ninth_places[of * kPlaceWords] + ninth_corner : 0;
      uint32_t b[pieces];
#pragma unroll
      for (int i = 0; i < pieces; ++i)
        b[i] = *reinterpret_cast<const uint32_t*>(shared + ((batch_words + uint32_t(of * cell_bytes)) ^ uint32_t(i * 16)));
      float own[4];  // of the two taps that row `column` of either matrix has
#pragma unroll
      for (int pixel = 0; pixel < together; ++pixel) {
        if (of + pixel >= pixels) continue;
        const uint32_t first_at = own_at[pixel].x + own_corner, second_at = own_at[pixel].y + own_corner;
        float first[4] = {}, second[4] = {};
#pragma unroll
        for (int i = 0; i < pieces; i += 2) {
          uint32_t a[4];
          load_matrices<4, false>(shared + (first_at ^ uint32_t(i * 16)), a);
          multiply_matrices<T, 2>(first, a, b[i], b[i + 1]);
          load_matrices<4, false>(shared + (second_at ^ uint32_t(i * 16)), a);
          multiply_matrices<T, 2>(second, a, b[i], b[i + 1]);
        }
        const float numbers[4] = {high ? first[1] : first[0], high ? second[1] : second[0], high ? first[3] : first[2],
                                  high ? second[3] : second[2]};
#pragma unroll
        for (int i = 0; i < 4; ++i) own[i] = pixel == 0 || own_pixel == pixel ? numbers[i] : own[i];
      }
      float upper[4] = {}, lower[4] = {};  // of ninth taps
      if (TAPS == 9) {
#pragma unroll
        for (int i = 0; i < pieces; i += 4) {
          // Of the first product the upper eight rows are wanted, of the second the lower ones.
          uint32_t a[4];
          load_matrices<4, false>(shared + (ninth_at ^ uint32_t(i * 16)), a);
          multiply_matrices<T, 2>(upper, a, b[i], b[i + 1]);
          multiply_matrices<T, 2>(lower, a, b[i + 2], b[i + 3]);
        }
      }
      if (holds) {
#pragma unroll
        for (int i = 0; i < 4; ++i) own_dots[of * dots_length<TAPS>() + (i / 2 * 4 + i % 2) * kCorners] = own[i];
      }
      if (TAPS == 9 && holds_ninth) ninth_dots[of * dots_length<TAPS>()] = high ? upper[1] + lower[3] : upper[0] + lower[2];
    }
    __syncwarp();
    if ((far[0] | far[1]) != 0) {
      dot_far<pieces>(p, w, o, tile, batch, static_cast<const T*>(kept->value), static_cast<const T*>(kept->gradients), far,
                      dots);
      __syncwarp();
    }
    write_gradients(p, w, o, tile, batch, slots, taps, dots, static_cast<T*>(kept->rows));
    __syncwarp();  // before the next taps take the place of these
  }
  write_padding<T, TAPS>(p, w, o, image);
  earlier.wait(true);
}

template <class T>
using DotKernel = void (*)(dcnv4_problem, Window, Errand, uint32_t, BulkMap, BulkMap, BulkMap, const T*, const T*, const T*,
                           T*);

// What is to be launched.
struct DotCall {
  const BackwardCall& backward;
  Part part;
  const Errand& errand;
  Ahead ahead;
};

// Cuts a window's blocks to those of a part, from `first` on; false where two launches would cost more than they hide: that the
// last blocks of each leave multiprocessors idle, half the time of a wave of blocks.
bool take_part(const dcnv4_problem& p, Part part, Window& w, uint32_t& first) {
  constexpr int64_t enough_waves = 5;
  if (part == Part::all) return true;
  if (w.blocks < (forced(p, kForceWindow) ? 2 : enough_waves * w.resident)) return false;
  const int64_t half = w.blocks / 2;
  if (part == Part::second) first = uint32_t(half);
  w.blocks = part == Part::first ? half : w.blocks - half;
  return true;
}

// MATRICES: rows of grad_output lie in shared memory.
template <class T, int TAPS, bool RUNS, bool MATRICES>
int32_t start(const DotCall& dots, DotKernel<T> kernel, int64_t cell, int64_t warp, int64_t most_threads) {
  const BackwardCall& call = dots.backward;
  const dcnv4_problem& p = call.p;
  WindowBytes bytes{cell, RUNS ? kRunBytes<T, TAPS> : 0, warp, window_fixed<RUNS>(cell), 1, kWarp * 16 / cell};
  if (MATRICES) bytes.pixel += cell, bytes.fixed += kSlots / TAPS * cell + kBulkAlignment;
  bytes.most_threads = most_threads;
  bytes.blocks = 2;
  bytes.whole = sizeof(T) == 4 && !RUNS ? INT32_MAX : 0;  // as forward does
  bytes.batch = kSlots / TAPS;
  if (RUNS)
    bytes.cost = sizeof(T) == 2 ? WindowCost{3.8, 0.095, 0.0018, 0.1, 1} : WindowCost{8.2, 0.03, 0.0035, 0.2, 0.4};
  else
    bytes.cost = sizeof(T) == 2 ? WindowCost{10, 0.03, 0.008, 0, 0} : WindowCost{6, 0.02, 0.008, 0, 0};
  Window w = plan_window(p, 1, bytes);
  // Whole maps with cells of 128 bytes by threads: fewer than three blocks a multiprocessor are slower than none.
  if (w.blocks == 0 || (bytes.whole && 3 * (w.shared + 1024) > shared_total(p.device))) return DCNV4_NO_KERNEL;
  BulkMap value_map{}, mask_map{}, gradient_map{};
  if (RUNS && !make_maps<T, TAPS>(p, w, call.value, cell, call.offset_mask, value_map, mask_map)) return DCNV4_NO_KERNEL;
  if (RUNS && MATRICES && !output_map(p, w, call.grad_output, cell, gradient_map)) return DCNV4_NO_KERNEL;
  uint32_t first_block = 0;
  if (!take_part(p, dots.part, w, first_block)) return DCNV4_NO_KERNEL;
  // Blocks of the first wave fill what the kernel ahead leaves idle at its end; those after them find it done.
  const Errand errand = divide_errand(dots.errand, w.blocks, w.resident, dots.ahead == Ahead::ours);
  return launch(earliest_start(p), kernel, w.blocks, w.threads, w.shared, call.stream, p, w, errand, first_block, value_map,
                mask_map, gradient_map, static_cast<const T*>(call.value), static_cast<const T*>(call.offset_mask),
                static_cast<const T*>(call.grad_output), static_cast<T*>(call.grad_offset_mask));
}

template <class T, int TAPS, bool RUNS>
int32_t run_cells(const DotCall& dots) {
  const dcnv4_problem& p = dots.backward.p;
  const int64_t bytes = p.D * int64_t(sizeof(T));
  if constexpr (sizeof(T) == 2) {
    // Before sm_80 threads would have to do what matrix units do.
    if (architecture(p.device) < 80) return DCNV4_NO_KERNEL;
    if (bytes == 128)
      return start<T, TAPS, RUNS, true>(dots, dot_matrix<T, 2, TAPS, RUNS>, 128, matrix_bytes<2, TAPS>(), kMostWideDotThreads);
    if (bytes == 64)
      return start<T, TAPS, RUNS, true>(dots, dot_matrix<T, 1, TAPS, RUNS>, 64, matrix_bytes<1, TAPS>(),
                                        architecture(p.device) < kMoreRegisters ? kMostDotThreads : kFewerDotThreads);
  } else {
    if (bytes == 128)
      return start<T, TAPS, RUNS, false>(dots, dot_window<T, 8, TAPS, RUNS>, 128, thread_bytes<TAPS>(), kMostDotThreads);
    if (bytes == 64)
      return start<T, TAPS, RUNS, false>(dots, dot_window<T, 4, TAPS, RUNS>, 64, thread_bytes<TAPS>(), kMostDotThreads);
  }
  return DCNV4_NO_KERNEL;
}

template <class T, int TAPS>
int32_t run_taps(const DotCall& dots) {
  if (can_have_runs(dots.backward.p, dots.backward.offset_mask)) {
    const int32_t status = run_cells<T, TAPS, true>(dots);
    if (status != DCNV4_NO_KERNEL || dots.part != Part::all) return status;  // both parts the same way
  }
  return run_cells<T, TAPS, false>(dots);
}

template <class T>
int32_t run_type(const DotCall& dots) {
  const int taps = taps_of(dots.backward.p);
  return taps == 9 ? run_taps<T, 9>(dots) : taps == 8 ? run_taps<T, 8>(dots) : int32_t(DCNV4_NO_KERNEL);
}

}  // namespace

int32_t differentiate_window(const BackwardCall& call, Part part, const Errand& errand, Ahead ahead) {
  const dcnv4_problem& p = call.p;
  const int64_t element = element_bytes(p.dtype);
  // Behind softmax every tap's gradient needs those of the others.
  if (p.softmax || !aligned(call.value, p.value_stride, element, 16) ||
      !aligned(call.grad_output, p.output_stride, element, 16))
    return DCNV4_NO_KERNEL;
  const DotCall dots{call, part, errand, ahead};
  switch (p.dtype) {
    case DCNV4_FLOAT32:
      return run_type<float>(dots);
    case DCNV4_BFLOAT16:
      return run_type<bf16>(dots);
    case DCNV4_FLOAT16:
      return run_type<f16>(dots);
    default:
      return DCNV4_NO_KERNEL;
  }
}

}  // namespace dcnv4
