// The forward kernel for groups of a multiple of 32 bytes and 8 or 9 taps, out of a window in shared memory (window.h).
//
// A warp takes batches of eight pixels. Four threads of a pixel work out its taps, two each, and leave them in shared memory; a
// ninth tap of each pixel is worked out before. Then each of the four goes through all taps with 16 or 32 bytes of the
// channels, of all four corners or of those on its side: a warp reads 512 bytes of cells an instruction without bank conflicts.
#include "forward.h"
#include "window.h"

namespace dcnv4 {
namespace {

constexpr int kQuad = 4;  // threads of a pixel: q works out taps q and q + 4
// Of a pixel's taps in shared memory, in odd number: then those of eight pixels lie in eight banks.
constexpr int kRow = odd(2 * kQuad);
constexpr int kMostWideThreads = 448;  // of a block with cells of 128 bytes, whose threads hold more

// Which pixel of a batch four threads have. Eight threads read and write at once, and two pixels whose numbers differ by four
// then write their taps to different banks.
DCNV4_DEVICE int pixel_of(int quad) { return quad / 2 + quad % 2 * (kBatch / 2); }
// The two also read cells from different banks, as one is `odd`.
DCNV4_DEVICE bool is_odd(int pixel) { return pixel % kBatch >= kBatch / 2; }

// A tap whose corners lie in the window, or in the zeros behind it where it adds nothing.
struct NearTap {
  float lx, ly, weight;
  uint32_t cell;  // where its upper left corner lies
};

// Taps in shared memory, `length` of them: put by the thread that has worked one out, visited by those of its pixel:
// add(weight, at, below), the cell at so many bytes, or that below it.
template <int UNITS>
struct StagedTaps;

// Cells of 32 bytes: half of a pixel's threads take the left corners, half the right ones, each side out of a plane of its own.
template <>
struct StagedTaps<2> {
  struct alignas(16) Side {
    float top, bottom;
    uint32_t cell;
  };
  static constexpr int bytes = 2 * sizeof(Side);
  static constexpr int spare = 2;  // entries between the planes, so that they lie in different banks

  Side* first;
  int length;
  DCNV4_DEVICE StagedTaps(char* at, int length) : first(reinterpret_cast<Side*>(at)), length(length) {}

  DCNV4_DEVICE void put(int place, bool, const NearTap& tap) const {
    const Corners<float> weights = corner_weights(tap.lx, tap.ly, tap.weight, 1.0f);
    first[place] = {weights.w00, weights.w10, tap.cell};
    first[place + length] = {weights.w01, weights.w11, tap.cell};
  }
  template <class Add>
  DCNV4_DEVICE void visit(int place, int side, Add add) const {
    const Side tap = first[side * length + place];
    add(tap.top, tap.cell, false);
    add(tap.bottom, tap.cell, true);
  }
};

// Cells of 64 bytes, half of the banks: an odd pixel reads cells of odd number before those of even number.
template <>
struct StagedTaps<4> {
  static constexpr int bytes = sizeof(Four<float>) + sizeof(uint2);
  static constexpr int spare = 0;

  Four<float>* weights;
  uint2* places;
  DCNV4_DEVICE StagedTaps(char* at, int length)
      : weights(reinterpret_cast<Four<float>*>(at)), places(reinterpret_cast<uint2*>(weights + length)) {}

  DCNV4_DEVICE void put(int place, bool odd, const NearTap& tap) const {
    constexpr uint32_t cell_bytes = 64;
    const uint32_t right = (tap.cell ^ (odd ? cell_bytes : 0)) & cell_bytes;  // of the corners that are read first
    const float from_right = 1 - tap.lx, top = tap.weight * (1 - tap.ly), bottom = tap.weight * tap.ly;
    const float first = right ? tap.lx : from_right, second = right ? from_right : tap.lx;
    weights[place] = {{top * first, top * second, bottom * first, bottom * second}};
    places[place] = make_uint2(tap.cell + right, tap.cell + cell_bytes - right);
  }
  template <class Add>
  DCNV4_DEVICE void visit(int place, int, Add add) const {
    const Four<float> weight = weights[place];
    const uint2 at = places[place];
    add(weight.v[0], at.x, false);
    add(weight.v[1], at.y, false);
    add(weight.v[2], at.x, true);
    add(weight.v[3], at.y, true);
  }
};

// Cells of 128 bytes, of which a thread has two pieces: an odd pixel reads the second half of a cell before the first. What is
// read of a tap is as little as can be, for cells alone keep shared memory busy.
template <>
struct StagedTaps<8> {
  struct alignas(16) Entry {
    float top, bottom, lx;
    uint32_t cell;
  };
  static constexpr int bytes = sizeof(Entry);
  static constexpr int spare = 0;

  Entry* first;
  DCNV4_DEVICE StagedTaps(char* at, int) : first(reinterpret_cast<Entry*>(at)) {}

  DCNV4_DEVICE void put(int place, bool, const NearTap& tap) const {
    first[place] = {tap.weight * (1 - tap.ly), tap.weight * tap.ly, tap.lx, tap.cell};
  }
  template <class Add>
  DCNV4_DEVICE void visit(int place, int, Add add) const {
    const Entry tap = first[place];
    add(tap.top - tap.top * tap.lx, tap.cell, false);
    add(tap.top * tap.lx, tap.cell + 128, false);
    add(tap.bottom - tap.bottom * tap.lx, tap.cell, true);
    add(tap.bottom * tap.lx, tap.cell + 128, true);
  }
};

// Staged taps of a warp's batch, and the ninth taps of a batch, behind which a bit tells of each whether it is far.
template <int UNITS>
struct Room {
  using Taps = StagedTaps<UNITS>;
  static constexpr int rows = kBatch * kRow + Taps::spare, ninths = kBatch + Taps::spare;
  static constexpr int far_at = ninths * Taps::bytes;
  static constexpr int batch_bytes = rows * Taps::bytes, ninths_bytes = far_at + 16;
};

// What tells warps that the ninth taps are there. With RUNS none waits for the others to work them out before it needs them.
template <int TAPS, bool RUNS>
constexpr int kNinthsBarrier = TAPS == 9 && RUNS ? round_up_to(kBarrierBytes, 16) : 0;

// RUNS: what comes from offset_mask lies in shared memory too, and all of it was fetched as boxes.
template <class T, int UNITS, int TAPS, bool RUNS>
__global__ void __launch_bounds__(UNITS == 8 ? kMostWideThreads : kMostWindowThreads, kWindowBlocks)
    sample_window(const __grid_constant__ dcnv4_problem p, const __grid_constant__ Window w,
                  const __grid_constant__ BulkMap value_map, const __grid_constant__ BulkMap mask_map,
                  const T* __restrict__ value, const T* __restrict__ offset_mask, T* __restrict__ output) {
  constexpr int N = 16 / int(sizeof(T)), cell_bytes = UNITS * 16;
  constexpr int pieces = UNITS == 8 ? 2 : 1, sides = UNITS == 2 ? 2 : 1;  // of a thread, of a cell's threads
  constexpr int unrolled = UNITS == 4 ? 8 : sizeof(T) == 4 ? 2 : 4;       // as far as registers allow
  const WindowOrigin o = window_origin(p, w);
  const int lane = int(threadIdx.x % kWarp), warp = warp_index(), warps = int(blockDim.x / kWarp);
  const int channel = o.g * int(p.D) + o.slice * UNITS * N;
  const T* map = image_of(value, o, w.value_image) + channel;

  // Behind the window two rows whose first two cells are zeros, for taps that add nothing; barriers, that of the ninth taps the
  // last; each warp's taps; the ninth taps.
  char* shared = dynamic_shared();
  const uint32_t window_at = window_offset<T, TAPS, RUNS>(w);
  char* window = shared + window_at;
  const uint32_t pitch_bytes = uint32_t(w.pitch) * cell_bytes, nowhere = pitch_bytes * uint32_t(w.height);
  char* barriers = window + nowhere + pitch_bytes + 2 * cell_bytes;
  using Taps = StagedTaps<UNITS>;
  using Room = dcnv4::Room<UNITS>;
  char *ninths_come = barriers + kWindowBarriers, *staged = ninths_come + kNinthsBarrier<TAPS, RUNS>;
  const Taps rows(staged + warp * Room::batch_bytes, Room::rows);
  char* ninths = staged + warps * Room::batch_bytes;

  wait_for_earlier();
  const TileTaps<T, TAPS, RUNS> taps(w, o, offset_mask);
  start_window<UNITS>(p, w, o, taps, value_map, mask_map, map, channel * int(sizeof(T)), window, barriers);
  // Behind the boxes, which are what all wait for. All threads arrive, also those that have no ninth taps to work out.
  if (kNinthsBarrier<TAPS, RUNS> != 0 && threadIdx.x == 0) expect_arrivals(ninths_come, int(blockDim.x));
  clear_nowhere<cell_bytes>(window + nowhere, pitch_bytes);
  wait_for_runs<RUNS>(barriers);

  // A far tap is left to be added afterwards.
  const auto near_tap = [&](const WindowTap& tap) {
    return NearTap{tap.lx, tap.ly, tap.near ? tap.weight : 0.0f,
                   tap.near ? uint32_t(tap.y * w.pitch + tap.x) * cell_bytes : nowhere};
  };
  if (TAPS == 9) {
    // From the last warp on, which may have a batch less than the first.
    for (int chunk = warps - 1 - warp; chunk * kWarp < w.pixels; chunk += warps) {
      const int index = chunk * kWarp + lane;
      const WindowTap tap = taps.template tap<true, true>(p, w, o, min(index, w.pixels - 1), tile_pixel(p, w, o, index),
                                                          kMostTaps - 1, w.grid_x[kMostTaps - 1], w.grid_y[kMostTaps - 1]);
      const uint32_t far = __ballot_sync(0xffffffffu, tap.far);
      const int batch = index / kBatch, of = index % kBatch;
      if (batch * kBatch >= w.pixels) continue;
      char* at = ninths + batch * Room::ninths_bytes;
      Taps(at, Room::ninths).put(of, is_odd(of), near_tap(tap));
      if (of == 0) *reinterpret_cast<uint32_t*>(at + Room::far_at) = far >> lane & 0xffu;
    }
    if (RUNS)
      arrive(ninths_come);
    else
      __syncthreads();
  }

  const int quad = lane / kQuad, q = lane % kQuad, of = pixel_of(quad), side = sides == 2 ? q / UNITS : 0;
  const bool odd = is_odd(of);
  const float grid_x[2] = {w.grid_x[q], w.grid_x[q + kQuad]}, grid_y[2] = {w.grid_y[q], w.grid_y[q + kQuad]};
  int own[pieces];  // of a cell
#pragma unroll
  for (int i = 0; i < pieces; ++i) own[i] = pieces == 2 ? q + (odd == (i == 0) ? kQuad : 0) : q % UNITS;
  uint32_t own_at[pieces];
#pragma unroll
  for (int i = 0; i < pieces; ++i) own_at[i] = window_at + uint32_t(side * cell_bytes + own[i] * 16);
  const char* lower = shared + pitch_bytes;
  T* result = image_of(output, o, w.output_image) + channel;
#pragma unroll 1
  for (int batch = warp; batch * kBatch < w.pixels; batch += warps) {
    const int index = batch * kBatch + of;
    const TilePixel pixel = tile_pixel(p, w, o, index);
    uint32_t far[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int k = q + r * kQuad;
      const WindowTap tap = taps.template tap<true, true>(p, w, o, min(index, w.pixels - 1), pixel, k, grid_x[r], grid_y[r]);
      far[r] = __ballot_sync(0xffffffffu, tap.far);
      rows.put(of * kRow + k, odd, near_tap(tap));
    }
    __syncwarp();
    if (batch == warp) wait_for_cells<RUNS>(barriers);

    float sums[pieces][N] = {};
    const auto add = [&](float weight, uint32_t at, bool below) {
#pragma unroll
      for (int i = 0; i < pieces; ++i) {
        float corner[N];
        load_shared<T, N>((below ? lower : shared) + (own_at[i] + at), corner);
#pragma unroll
        for (int n = 0; n < N; ++n) sums[i][n] += weight * corner[n];
      }
    };
#pragma unroll(unrolled)
    for (int k = 0; k < 2 * kQuad; ++k) rows.visit(of * kRow + k, side, add);
    if (kNinthsBarrier<TAPS, RUNS> != 0 && batch == warp) wait_for_arrivals(ninths_come);
    char* ninth = ninths + batch * Room::ninths_bytes;
    if (TAPS == 9) Taps(ninth, Room::ninths).visit(of, side, add);

    const uint32_t far_here = TAPS == 9 ? *reinterpret_cast<const uint32_t*>(ninth + Room::far_at) : 0;
    if ((far[0] | far[1] | far_here) != 0) {
      // Each is worked out anew by the threads of its pixel; its corners come from global memory.
      uint32_t todo =
          (far[0] >> (quad * kQuad) & 0xfu) | (far[1] >> (quad * kQuad) & 0xfu) << kQuad | (far_here >> of & 1) << (2 * kQuad);
#pragma unroll 1
      for (; todo != 0; todo &= todo - 1) {
        const int k = __ffs(int(todo)) - 1;
        const WindowTap tap = taps.template tap<true, true>(p, w, o, index, pixel, k, w.grid_x[k], w.grid_y[k]);
        const Corners<float> weights = corner_weights(tap.lx, tap.ly, tap.weight, 1.0f);
        const Inside inside(p, o, tap);
        const char* cell = reinterpret_cast<const char*>(map);
        cell += int64_t(tap.y + o.y) * int64_t(w.row_bytes) + int64_t(tap.x + o.x) * int64_t(w.value_bytes);
#pragma unroll
        for (int i = 0; i < pieces; ++i) {
          const char* corner = cell + own[i] * 16;
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            // Both loads are on their way before the first is waited for.
            const bool across = row == 0 ? inside.top : inside.bottom;
            const bool left = across && inside.left && side == 0, right = across && inside.right && (sides == 1 || side == 1);
            float left_corner[N], right_corner[N];
            load_if<T, N>(left, corner, left_corner);
            load_if<T, N>(right, corner + w.value_bytes, right_corner);
            const float left_weight = row == 0 ? weights.w00 : weights.w10, right_weight = row == 0 ? weights.w01 : weights.w11;
#pragma unroll
            for (int n = 0; n < N; ++n) {
              if (left) sums[i][n] += left_weight * left_corner[n];
              if (right) sums[i][n] += right_weight * right_corner[n];
            }
            corner += w.row_bytes;
          }
        }
      }
    }

    T* to = at_pixel(result, pixel.number, p.output_stride);
    if constexpr (sides == 2) {
      // Each side takes half of the channels.
      float half[N / 2];
#pragma unroll
      for (int n = 0; n < N / 2; ++n) {
        const float give = side ? sums[0][n] : sums[0][n + N / 2], keep = side ? sums[0][n + N / 2] : sums[0][n];
        half[n] = keep + __shfl_xor_sync(0xffffffffu, give, UNITS);
      }
      if (pixel.live) store<T, N / 2>(to + own[0] * N + side * (N / 2), half);
    } else {
#pragma unroll
      for (int i = 0; i < pieces; ++i)
        if (pixel.live) store<T, N>(to + own[i] * N, sums[i]);
    }
    __syncwarp();  // before the next taps take the place of these
  }
}

template <class T, int UNITS, int TAPS, bool RUNS>
int32_t run(const ForwardCall& call, int64_t slices) {
  const dcnv4_problem& p = call.p;
  constexpr int64_t cell = UNITS * 16;
  constexpr int64_t fixed = window_fixed<RUNS>(cell) + kNinthsBarrier<TAPS, RUNS>;
  WindowBytes bytes{cell, RUNS ? kRunBytes<T, TAPS> : 0, Room<UNITS>::batch_bytes, fixed, 1, kWarp * 16 / cell};
  if (TAPS == 9) {
    // Of whole batches.
    bytes.pixel += Room<UNITS>::ninths_bytes / kBatch;
    bytes.fixed += Room<UNITS>::ninths_bytes / kBatch * (kBatch - 1);
  }
  // Where threads fetch, cells cost more, and tiles are better larger.
  if (RUNS) bytes.cost = {1.9, 0.18, 0.0005, 1.5, 1};
  if (UNITS == 8) {
    // Cells of 128 bytes leave little room beside the halo of a tile: worth while for whole maps, and with runs, where tiles
    // cost less, in fp32. In halves of 64 bytes every tap is worked out twice.
    bytes.whole = !RUNS ? INT32_MAX : sizeof(T) == 4 || forced(p, kForceWindow) ? 0 : 256;
    bytes.most_threads = kMostWideThreads;
    bytes.cost = {3, 0.048, 0.0021, 0.05, 0.5};
  }
  Window w = plan_window(p, slices, bytes);
  if (TAPS == 9) w.shared -= (w.pixels + kBatch - 1) % kBatch * (Room<UNITS>::ninths_bytes / kBatch);
  BulkMap value_map{}, mask_map{};
  if (w.blocks == 0 || (RUNS && !make_maps<T, TAPS>(p, w, call.value, cell, call.offset_mask, value_map, mask_map)))
    return DCNV4_NO_KERNEL;
  return launch(earliest_start(p), sample_window<T, UNITS, TAPS, RUNS>, w.blocks, w.threads, w.shared, call.stream, p, w,
                value_map, mask_map, static_cast<const T*>(call.value), static_cast<const T*>(call.offset_mask),
                static_cast<T*>(call.output));
}

template <class T, int TAPS, bool RUNS>
int32_t run_units(const ForwardCall& call) {
  const Slicing slicing = slicing_of(call.p);
  if constexpr (RUNS || sizeof(T) == 4) {
    if (slicing.bytes == 128) {
      const int32_t status = run<T, 8, TAPS, RUNS>(call, slicing.slices);
      if (status != DCNV4_NO_KERNEL || (!RUNS && !forced(call.p, kForceWindow))) return status;
    }
  }
  if (slicing.bytes >= 64) return run<T, 4, TAPS, RUNS>(call, slicing.slices * slicing.bytes / 64);
  if (slicing.bytes == 32) return run<T, 2, TAPS, RUNS>(call, slicing.slices);
  return DCNV4_NO_KERNEL;
}

template <class T, int TAPS>
int32_t run_taps(const ForwardCall& call) {
  if (can_have_runs(call.p, call.offset_mask)) {
    const int32_t status = run_units<T, TAPS, true>(call);
    if (status != DCNV4_NO_KERNEL) return status;
  }
  return run_units<T, TAPS, false>(call);
}

template <class T>
int32_t run_type(const ForwardCall& call) {
  const int taps = taps_of(call.p);
  return taps == 9 ? run_taps<T, 9>(call) : taps == 8 ? run_taps<T, 8>(call) : int32_t(DCNV4_NO_KERNEL);
}

}  // namespace

int32_t forward_window(const ForwardCall& call) {
  const dcnv4_problem& p = call.p;
  const int64_t element = element_bytes(p.dtype);
  if (!aligned(call.value, p.value_stride, element, 16) || !aligned(call.output, p.output_stride, element, 16))
    return DCNV4_NO_KERNEL;
  switch (p.dtype) {
    case DCNV4_FLOAT32:
      return run_type<float>(call);
    case DCNV4_BFLOAT16:
      return run_type<bf16>(call);
    case DCNV4_FLOAT16:
      return run_type<f16>(call);
    default:
      return DCNV4_NO_KERNEL;
  }
}

}  // namespace dcnv4
