// The gradient of `value` for groups of a multiple of 32 bytes and 8 or 9 taps, gathered by cells out of sorted taps.
//
// A block takes a tile of output pixels, one group and a slice of its channels. It sorts what the tile's taps give to the cells
// of its window (window.h), counting, and writes the sum of each cell once: to grad_value itself where the block has all of the
// map, else as one reduction a cell and tile to `sums`. Taps beyond the window are reduced one by one.
//
// gather_sorted: sorts corners by cell. A few threads own a cell and go through what falls on it, multiply-adding rows of
// grad_output from shared memory. Cells are taken in the order of how much falls on them, so that those of one warp are done
// together.
//
// gather_matrix, for 16-bit types: sorts taps by columns of two rows of the window. A warp owns sixteen cells, whose sums are a
// product of weights and rows of grad_output.
#include "backward.h"
#include "window.h"

namespace dcnv4 {
namespace {

constexpr int kMostBatches = 2;        // of a warp; what is known of their taps stays in registers while they are sorted
constexpr int kMostSortThreads = 448;  // of a block; two have the registers they need
constexpr int kLengths = 64;           // cells are told apart by how much falls on them, up to this

// What a corner of a tap gives to its cell: `weight` times the row of grad_output that lies `row` bytes on.
struct alignas(8) Entry {
  float weight;
  uint32_t row;
};

// Shared memory: rows of grad_output (pixels, UNITS pieces), entries by cell, where each cell's start, one number a warp, cells
// of each length, which taps of a batch are far, and the cells in order. This much of it is not counted by cell or pixel.
constexpr int64_t kCellBytes = sizeof(int) + sizeof(uint16_t);
constexpr int64_t kFixedBytes = (kMostSortThreads / kWarp + kLengths + 3) * int64_t(sizeof(int)) +
                                kMostSortThreads / kWarp * kMostBatches * int64_t(sizeof(uint2));

// Which cells a block has to write: all of the map's where it has the whole of it, else those that anything falls on.
template <bool WHOLE>
DCNV4_DEVICE bool has_to_write(const dcnv4_problem& p, const Window& w, const WindowOrigin& o, int cell, int length) {
  if (!WHOLE) return length != 0;
  const int row = w.by_width.quotient(cell), x = o.x + cell - row * w.width, y = o.y + row;
  return uint32_t(x) < uint32_t(p.W) && uint32_t(y) < uint32_t(p.H);
}

// Adds what the taps of `far` give to their corners, by a whole warp, one reduction a corner and four channels. Their numbers
// come from global memory: where runs lay, other things lie by now.
template <class T, int CHANNELS, int TAPS>
DCNV4_DEVICE void add_far(const dcnv4_problem& p, const Window& w, const WindowOrigin& o, int index, const T* offset_mask,
                          const char* gradients, uint32_t far, float* sums_map, int64_t sums_stride) {
  const TileTaps<T, TAPS, false> tile(w, o, offset_mask);
  const TilePixel pixel = tile_pixel(p, w, o, index);
  for (; far != 0; far &= far - 1) {
    const int k = __ffs(int(far)) - 1;
    const WindowTap tap = tile.template tap<false, true>(p, w, o, index, pixel, k, w.grid_x[k], w.grid_y[k]);
    const Corners<float> weights = corner_weights(tap.lx, tap.ly, tap.weight, 1.0f);
    for (int i = int(threadIdx.x % kWarp); i < CHANNELS; i += kWarp) {
      const int c = i % kCorners, channel = i / kCorners * 4, x = tap.x + o.x + c % 2, y = tap.y + o.y + c / 2;
      const float weight = c == 0 ? weights.w00 : c == 1 ? weights.w01 : c == 2 ? weights.w10 : weights.w11;
      float part[4];
      load<T, 4>(gradients + (pixel.number * w.output_bytes + uint32_t(channel * int(sizeof(T)))), part);
#pragma unroll
      for (int e = 0; e < 4; ++e) part[e] *= weight;
      const bool inside = x >= 0 && y >= 0 && x < int(p.W) && y < int(p.H);
      const uint32_t cell = inside ? uint32_t(y) * uint32_t(p.W) + uint32_t(x) : 0;
      add_if(inside, sums_map + (uint64_t(cell) * uint64_t(sums_stride) + channel), part);
    }
  }
}

// The same for all of a block's batches, a bit a tap in `far_of`.
template <class T, int CHANNELS, int TAPS>
DCNV4_DEVICE void add_all_far(const dcnv4_problem& p, const Window& w, const WindowOrigin& o, const T* offset_mask,
                              const char* gradients, const uint2* far_of, float* sums_map, int64_t sums_stride) {
  constexpr int pixels = kSlots / TAPS;
  const int warps = int(blockDim.x / kWarp);
  for (int batch = int(threadIdx.x / kWarp); batch * pixels < w.pixels; batch += warps) {
    const uint2 bits = far_of[batch];
    const uint32_t far[kSlotRounds] = {bits.x, bits.y};
    if ((far[0] | far[1]) == 0) continue;
#pragma unroll 1
    for (int of = 0; of < pixels; ++of)
      add_far<T, CHANNELS, TAPS>(p, w, o, batch * pixels + of, offset_mask, gradients, far_slots<TAPS>(far, of), sums_map,
                                 sums_stride);
  }
}

// Where each list starts, in place of how long it is; behind the last its end. Every thread sums a run of lengths, the warps'
// totals follow. visit(list, length), also of what comes behind the last.
template <class Visit>
DCNV4_DEVICE void find_starts(int* starts, int lists, int* totals, Visit visit) {
  const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp);
  const int run_length = (lists + int(blockDim.x)) / int(blockDim.x), first = int(threadIdx.x) * run_length;
  int own = 0;
  for (int i = first; i < min(first + run_length, lists); ++i) own += starts[i];
  int before = sum_of_lanes(own);
  if (lane == kWarp - 1) totals[warp] = before;
  before -= own;
  __syncthreads();
  for (int i = 0; i < warp; ++i) before += totals[i];
  for (int i = first; i < min(first + run_length, lists + 1); ++i) {
    const int length = starts[i];
    starts[i] = before;
    before += length;
    visit(i, length);
  }
}

template <class T, int UNITS, int TAPS, bool WHOLE>
__global__ void __launch_bounds__(kMostSortThreads, 2)
    gather_sorted(const __grid_constant__ dcnv4_problem p, const __grid_constant__ Window w, const T* __restrict__ offset_mask,
                  const T* __restrict__ grad_output, T* __restrict__ grad_value, float* __restrict__ sums,
                  int64_t sums_stride) {
  constexpr int N = 16 / int(sizeof(T)), cell_bytes = UNITS * 16, pixels = kSlots / TAPS;
  const WindowOrigin o = window_origin(p, w);
  const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp), warps = int(blockDim.x / kWarp);
  const int channel = o.g * int(p.D) + o.slice * UNITS * N;
  const char* gradients = reinterpret_cast<const char*>(image_of(grad_output, o, w.output_image) + channel);
  const int64_t first_cell = int64_t(o.n) * p.H * p.W;
  float* sums_map = sums + first_cell * sums_stride + channel;

  const int cells = w.width * w.height;
  char* rows = dynamic_shared();
  Entry* entries = reinterpret_cast<Entry*>(rows + w.pixels * cell_bytes);     // (pixels * TAPS * corners)
  int* starts = reinterpret_cast<int*>(entries + w.pixels * TAPS * kCorners);  // (cells + 1)
  int* counts = starts + cells + 1;                                            // (warps)
  int* lengths = counts + warps;                                               // (kLengths + 1): cells of each, then where
  uint2* far_of =
      reinterpret_cast<uint2*>(lengths + kLengths + 1 + (cells + warps) % 2);    // (batches): a bit a tap beyond the window
  uint16_t* order = reinterpret_cast<uint16_t*>(far_of + kMostBatches * warps);  // (cells)

  wait_for_earlier();
  for (int i = int(threadIdx.x); i < w.pixels * UNITS; i += int(blockDim.x)) {
    const TilePixel pixel = tile_pixel(p, w, o, i / UNITS);
    copy_async(rows + i * 16,
               gradients + (pixel.number * w.output_bytes + uint32_t(i % UNITS) * 16));  // read by live taps alone
  }
  for (int i = int(threadIdx.x); i <= cells; i += int(blockDim.x)) starts[i] = 0;
  for (int i = int(threadIdx.x); i <= kLengths; i += int(blockDim.x)) lengths[i] = 0;
  TapSlot slots[kSlotRounds];
#pragma unroll
  for (int r = 0; r < kSlotRounds; ++r) slots[r] = tap_slot<TAPS>(r * kWarp + lane);
  __syncthreads();

  // Taps, their cells, and the number of each corner among those of its cell, from 1 on, two in a word; 0 for none.
  float lx[kMostBatches][kSlotRounds], ly[kMostBatches][kSlotRounds], weight[kMostBatches][kSlotRounds];
  int cell_of[kMostBatches][kSlotRounds];
  uint32_t upper[kMostBatches][kSlotRounds], lower[kMostBatches][kSlotRounds];
#pragma unroll
  for (int b = 0; b < kMostBatches; ++b) {
    const int batch = warp + b * warps;
    uint32_t far[kSlotRounds] = {};
#pragma unroll
    for (int r = 0; r < kSlotRounds; ++r) upper[b][r] = lower[b][r] = 0;
    if (batch * pixels >= w.pixels) continue;
    work_out_slots<true>(
        p, w, o, batch, TileTaps<T, TAPS, false>(w, o, offset_mask), slots, far,
        [&](int r, const TilePixel&, const WindowTap& tap) {
          lx[b][r] = tap.lx;
          ly[b][r] = tap.ly;
          weight[b][r] = tap.weight;
          if (!tap.near) return;
          cell_of[b][r] = tap.y * w.width + tap.x;
          int* count = starts + cell_of[b][r];
          const Inside inside(p, o, tap);
          const auto number = [](bool live, int* of) { return live ? uint32_t(atomicAdd(of, 1) + 1) : 0u; };
          upper[b][r] = number(inside.top && inside.left, count) | number(inside.top && inside.right, count + 1) << 16;
          count += w.width;
          lower[b][r] = number(inside.bottom && inside.left, count) | number(inside.bottom && inside.right, count + 1) << 16;
        });
    if (!WHOLE && lane == 0) far_of[batch] = make_uint2(far[0], far[1]);
  }
  __syncthreads();

  const auto length_of = [](int count) { return min(count, kLengths - 1); };
  find_starts(starts, cells, counts, [&](int cell, int count) {
    if (cell < cells && has_to_write<WHOLE>(p, w, o, cell, count)) atomicAdd(lengths + length_of(count), 1);
  });
  __syncthreads();

  // Where the cells of each length begin in the order, the longest first; behind them how many there are.
  if (warp == 0) {
    constexpr int each = kLengths / kWarp;
    int of[each], mine = 0;
#pragma unroll
    for (int i = 0; i < each; ++i) mine += of[i] = lengths[kLengths - 1 - (lane * each + i)];
    int above = sum_of_lanes(mine);
    if (lane == kWarp - 1) lengths[kLengths] = above;
    above -= mine;
#pragma unroll
    for (int i = 0; i < each; ++i) {
      lengths[kLengths - 1 - (lane * each + i)] = above;
      above += of[i];
    }
  }
#pragma unroll
  for (int b = 0; b < kMostBatches; ++b) {
#pragma unroll
    for (int r = 0; r < kSlotRounds; ++r) {
      if ((upper[b][r] | lower[b][r]) == 0) continue;
      const uint32_t row = uint32_t(((warp + b * warps) * pixels + slots[r].of) * cell_bytes);
      const Corners<float> weights = corner_weights(lx[b][r], ly[b][r], weight[b][r], 1.0f);
      const int* start = starts + cell_of[b][r];
      const auto enter = [&](uint32_t number, int first_entry, float share) {
        if (number != 0) entries[first_entry + int(number) - 1] = {share, row};
      };
      enter(upper[b][r] & 0xffffu, start[0], weights.w00);
      enter(upper[b][r] >> 16, start[1], weights.w01);
      enter(lower[b][r] & 0xffffu, start[w.width], weights.w10);
      enter(lower[b][r] >> 16, start[w.width + 1], weights.w11);
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < cells; i += int(blockDim.x)) {
    const int count = starts[i + 1] - starts[i];
    if (has_to_write<WHOLE>(p, w, o, i, count)) order[atomicAdd(lengths + length_of(count), 1)] = uint16_t(i);
  }
  copy_async_wait();
  __syncthreads();

  const int unit = lane % UNITS, used = lengths[kLengths];
  const char* own_rows = rows + unit * 16;
  for (int i = int(threadIdx.x / UNITS); i < used; i += int(blockDim.x / UNITS)) {
    const int cell = order[i];
    const int cell_y = w.by_width.quotient(cell), x = o.x + cell - cell_y * w.width, y = o.y + cell_y;
    const int begin = starts[cell], end = starts[cell + 1];
    float total[N] = {};
#pragma unroll 2
    for (const Entry* entry = entries + begin; entry < entries + end; ++entry) {
      const Entry one = *entry;
      float gradient[N];
      load_shared<T, N>(own_rows + one.row, gradient);
#pragma unroll
      for (int i = 0; i < N; ++i) total[i] += one.weight * gradient[i];
    }
    const uint32_t number = uint32_t(y) * uint32_t(p.W) + uint32_t(x);
    if (WHOLE) {
      store<T, N>(grad_value + (first_cell + number) * p.grad_value_stride + channel + unit * N, total);
    } else {
      add_if(true, sums_map + (uint64_t(number) * uint64_t(sums_stride) + unit * N), total);
    }
  }

  if (!WHOLE) add_all_far<T, UNITS * N, TAPS>(p, w, o, offset_mask, gradients, far_of, sums_map, sums_stride);
}

// ---- By matrices.

// A product of matrices adds to the cells of a group what sixteen entries give them: eight columns of two rows of the window,
// rows of A; the entries are columns of A and rows of B, whose columns are channels. Lists of entries are kept by pairs of
// rows and the column of the tap's cell, `pitch` keys a pair; so a group's lists, from the column to its left on, are one
// stretch. A thread, which has one column of the window, knows of each entry by its number whether it is one of the column's
// own list, of the list to the left, or gives it nothing: then A has a zero.
constexpr int kGroupColumns = 8, kStep = 16;
struct Groups {
  int32_t pitch, pairs;
  int32_t count;  // of groups
  Divisor by_columns;
};

// What a tap gives to the two rows of a pair, in its own column and in the next. A weight is the sum of two 16-bit numbers, of
// what one alone could not hold.
struct alignas(8) PairColumn {
  uint32_t upper, lower;
};
struct alignas(16) PairEntry {
  PairColumn left, right;
};
// Of an entry it is also kept where its row of grad_output lies; there the two lowest bits tell which rows of the pair it is for.
constexpr uint32_t kUpper = 1, kLower = 2;
constexpr int64_t kPairEntryBytes = sizeof(PairEntry) + sizeof(uint16_t);

// What the lesser number of a weight is multiplied by: an f16 would not be fine enough.
template <class T>
constexpr float kFiner = std::is_same<T, f16>::value ? 2048.0f : 1.0f;

// Of a weight that is not finite, or a part of one, all is in one number.
template <class T>
DCNV4_DEVICE uint32_t split_weight(float weight, bool finite) {
  const float high = to_compute(round_one<T>(weight));
  return pack(T{}, high, finite ? (weight - high) * kFiner<T> : 0.0f);
}
template <class T>
DCNV4_DEVICE float join_weight(uint32_t word) {
  float high, low;
  unpack(T{}, word, high, low);
  return high + low * (1 / kFiner<T>);
}

// One instruction each, which the compiler makes two of.
DCNV4_DEVICE uint32_t low_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(a, b, 0x5410);
#else
  return (a & 0xffffu) | b << 16;
#endif
}
DCNV4_DEVICE uint32_t high_halves(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(a, b, 0x7632);
#else
  return a >> 16 | (b & 0xffff0000u);
#endif
}

// Raises a number in shared memory by one and returns what it was, by one thread. Of an addition the compiler makes one of the
// warp's threads together first.
DCNV4_DEVICE int take_next(int* number) {
#if defined(__CUDA_ARCH__)
  return int(atomicInc(reinterpret_cast<unsigned*>(number), ~0u));
#else
  return atomicAdd(number, 1);
#endif
}

// Whether a pair of numbers holds one that is infinite or NaN: then bit 15 or bit 31.
template <class T>
DCNV4_DEVICE uint32_t not_finite(uint32_t pair) {
  constexpr uint32_t exponents = std::is_same<T, bf16>::value ? 0x7f807f80u : 0x7c007c00u,
                     lowest = std::is_same<T, bf16>::value ? 0x00800080u : 0x04000400u;
  return (pair & exponents) + lowest;
}
constexpr uint32_t kNotFinite = 0x80008000u;

template <class T, int UNITS, int TAPS, bool WHOLE, bool RUNS>
__global__ void __launch_bounds__(kMostSortThreads, 2)
    gather_matrix(const __grid_constant__ dcnv4_problem p, const __grid_constant__ Window w,
                  const __grid_constant__ Groups groups, const __grid_constant__ BulkMap mask_map,
                  const T* __restrict__ offset_mask, const T* __restrict__ grad_output, T* __restrict__ grad_value,
                  float* __restrict__ sums, int64_t sums_stride) {
  constexpr int N = 8, cell_bytes = UNITS * 16, pixels = kSlots / TAPS;
  constexpr int tiles = UNITS == 8 ? 4 : UNITS, passes = UNITS / tiles;  // of eight columns of B; as many as registers allow
  const WindowOrigin o = window_origin(p, w);
  const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp), warps = int(blockDim.x / kWarp);
  const int channel = o.g * int(p.D) + o.slice * UNITS * N;
  const char* gradients = reinterpret_cast<const char*>(image_of(grad_output, o, w.output_image) + channel);
  const int64_t first_cell = int64_t(o.n) * p.H * p.W;
  float* sums_map = sums + first_cell * sums_stride + channel;
  T* value_map = grad_value + first_cell * p.grad_value_stride + channel;

  const int keys = groups.pairs * groups.pitch, most = w.pixels * TAPS * 2 + kStep;
  // Where entries come to lie when the taps are known, the runs lie until then.
  PairEntry* entries = reinterpret_cast<PairEntry*>(dynamic_shared());               // (most)
  char* rows = reinterpret_cast<char*>(entries + most);                              // (pixels, UNITS pieces)
  uint2* far_of = reinterpret_cast<uint2*>(rows + w.pixels * cell_bytes);  // (batches): a bit a tap beyond the window
  char* barrier = reinterpret_cast<char*>(far_of + kMostBatches * warps);
  int* starts = reinterpret_cast<int*>(barrier + kBarrierBytes);    // (keys + 1)
  int* counts = starts + keys + 1;                                  // (warps)
  int* next_group = counts + warps;                                 // the next to be taken
  int* hostile = next_group + 1;                                    // whether grad_output has inf or NaN here
  uint16_t* entry_rows = reinterpret_cast<uint16_t*>(hostile + 1);  // (most)

  wait_for_earlier();
  const TileTaps<T, TAPS, RUNS> tile(w, o, offset_mask);
  if (RUNS && threadIdx.x == 0) {
    expect_bulk(barrier, uint32_t(w.pixels) * kRunBytes<T, TAPS>);
    start_bulk(mask_map, dynamic_shared(), barrier, tile.first_word(), o.tile_x, o.tile_y, int(o.n));
  }
  for (int i = int(threadIdx.x); i < keys + 1 + warps + 2; i += int(blockDim.x)) starts[i] = 0;

  // Rows of grad_output. Of each 32 bytes the even words go to one piece of 16 bytes and the odd ones to the next, so that the
  // columns a lane gets of two products are neighbours. Pieces change places from row to row, to be read eight rows at a time.
  uint32_t odd_bits = 0;
#pragma unroll 2
  for (int i = int(threadIdx.x); i < w.pixels * UNITS; i += int(blockDim.x)) {
    const int index = i / UNITS, unit = i % UNITS;
    const TilePixel pixel = tile_pixel(p, w, o, index);
    const uint4 words =
        __ldg(reinterpret_cast<const uint4*>(gradients + (pixel.number * w.output_bytes + uint32_t(unit) * 16)));
    odd_bits |= not_finite<T>(words.x) | not_finite<T>(words.y) | not_finite<T>(words.z) | not_finite<T>(words.w);
    const int turn = index * UNITS / 8 % UNITS;
    char* row = rows + index * cell_bytes + unit % 2 * 8;
    *reinterpret_cast<uint2*>(row + (unit / 2 * 2 ^ turn) * 16) = make_uint2(words.x, words.z);
    *reinterpret_cast<uint2*>(row + ((unit / 2 * 2 + 1) ^ turn) * 16) = make_uint2(words.y, words.w);
  }
  TapSlot slots[kSlotRounds];
#pragma unroll
  for (int r = 0; r < kSlotRounds; ++r) slots[r] = tap_slot<TAPS>(r * kWarp + lane);
  __syncthreads();
  if (RUNS) wait_for_bulk(barrier);
  if ((odd_bits & kNotFinite) != 0) *hostile = 1;

  // Taps, their cells, and their number among those of a key, from 1 on; of one in an odd row also among those of the pair
  // below, in the upper half of a word. 0 for none.
  float lx[kMostBatches][kSlotRounds], ly[kMostBatches][kSlotRounds], weight[kMostBatches][kSlotRounds];
  int key_of[kMostBatches][kSlotRounds];
  uint32_t number[kMostBatches][kSlotRounds];
#pragma unroll
  for (int b = 0; b < kMostBatches; ++b) {
    const int batch = warp + b * warps;
    uint32_t far[kSlotRounds] = {};
#pragma unroll
    for (int r = 0; r < kSlotRounds; ++r) number[b][r] = 0;
    if (batch * pixels >= w.pixels) continue;
    work_out_slots<true>(p, w, o, batch, tile, slots, far, [&](int r, const TilePixel&, const WindowTap& tap) {
      lx[b][r] = tap.lx;
      ly[b][r] = tap.ly;
      weight[b][r] = tap.weight;
      if (!tap.near) return;
      key_of[b][r] = (tap.y >> 1) * groups.pitch + tap.x;
      int* count = starts + key_of[b][r];
      number[b][r] = uint32_t(atomicAdd(count, 1) + 1);
      if (tap.y & 1) number[b][r] |= uint32_t(atomicAdd(count + groups.pitch, 1) + 1) << 16;
    });
    if (!WHOLE && lane == 0) far_of[batch] = make_uint2(far[0], far[1]);
  }
  __syncthreads();

  find_starts(starts, keys, counts, [](int, int) {});
  __syncthreads();

#pragma unroll
  for (int b = 0; b < kMostBatches; ++b) {
#pragma unroll
    for (int r = 0; r < kSlotRounds; ++r) {
      if (number[b][r] == 0) continue;
      const uint32_t index = uint32_t((warp + b * warps) * pixels + slots[r].of);
      const uint32_t row = index * cell_bytes + index * UNITS / 8 % UNITS * 16;
      const Corners<float> weights = corner_weights(lx[b][r], ly[b][r], weight[b][r], 1.0f);
      const bool finite = fabsf(weight[b][r]) < bits_to_float(0x7f800000u);
      const uint32_t top_left = split_weight<T>(weights.w00, finite), top_right = split_weight<T>(weights.w01, finite);
      const uint32_t bottom_left = split_weight<T>(weights.w10, finite), bottom_right = split_weight<T>(weights.w11, finite);
      const auto enter = [&](int key, uint32_t number, const PairEntry& entry, uint32_t rows_of) {
        const int at = starts[key] + int(number) - 1;
        entries[at] = entry;
        entry_rows[at] = uint16_t(row | rows_of);
      };
      const uint32_t below = number[b][r] >> 16;
      const bool odd = below != 0;
      enter(key_of[b][r], number[b][r] & 0xffffu,
            {{odd ? 0 : top_left, odd ? top_left : bottom_left}, {odd ? 0 : top_right, odd ? top_right : bottom_right}},
            odd ? kLower : kUpper | kLower);
      if (odd) enter(key_of[b][r] + groups.pitch, below, {{bottom_left, 0}, {bottom_right, 0}}, kUpper);
    }
  }
  if (threadIdx.x < kStep) entry_rows[starts[keys] + int(threadIdx.x)] = 0;  // read behind the last entry, to no effect
  __syncthreads();

  const auto is_inside = [&](int column, int row) {
    return uint32_t(o.x + column) < uint32_t(p.W) && uint32_t(o.y + row) < uint32_t(p.H);
  };
  // Four sums of a cell, of the group's channels or those from `vector` fours on. 32 bits count a map's sums.
  const auto write = [&](bool used, int column, int row, int vector, const float (&values)[4]) {
    const uint32_t cell = uint32_t(o.y + row) * uint32_t(p.W) + uint32_t(o.x + column);
    if (WHOLE) {
      if (used) store<T, 4>(at_pixel(value_map, cell, p.grad_value_stride) + vector * 4, values);
    } else {
      if (used) add_if(true, sums_map + cell * uint32_t(sums_stride) + vector * 4, values);
    }
  };
  if (*hostile == 0) {
    const int q = lane % 4, g = lane / 4, half = lane / 16;
#pragma unroll 1
    for (;;) {
      int item = 0;
      if (lane == 0) item = take_next(next_group);
      item = __shfl_sync(0xffffffffu, item, 0);
      const int group = item / passes, pass = item % passes;
      if (group >= groups.count) break;
      // From the middle on: there are most entries.
      const int turn = groups.by_columns.quotient(group),
                column = (group - turn * int(groups.by_columns.divisor)) * kGroupColumns;
      const int pair = (groups.pairs - 1) / 2 + (turn % 2 ? (turn + 1) / 2 : -(turn / 2));
      const int first_key = pair * groups.pitch + column;
      const int begin = starts[max(first_key - 1, 0)], end = starts[first_key + kGroupColumns];
      if (!WHOLE && begin == end) continue;
      // The list to the left of the thread's column, and behind it the column's own.
      const int own_key = first_key + g, left_begin = starts[max(own_key - 1, 0)];
      const uint32_t left_length = uint32_t(starts[own_key] - left_begin), both = uint32_t(starts[own_key + 1] - left_begin);
      const PairEntry* next = entries + begin + q * 2;
      uint32_t number = uint32_t(begin + q * 2 - left_begin);
      constexpr bool finer = kFiner<T> != 1.0f;
      float totals[tiles][4] = {}, low_totals[finer ? tiles : 1][4] = {};
#pragma unroll 1
      for (int e = begin; e < end; e += kStep, next += kStep, number += kStep) {
        uint32_t high[4], low[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          PairColumn of[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const PairColumn* column = number + uint32_t(i * 8 + j) < left_length ? &next->right : &next->left;
            const uint2 words = load_shared_if(number + uint32_t(i * 8 + j) < both, column + (i * 8 + j) * 2);
            of[j] = {words.x, words.y};
          }
          high[2 * i] = low_halves(of[0].upper, of[1].upper);
          high[2 * i + 1] = low_halves(of[0].lower, of[1].lower);
          low[2 * i] = high_halves(of[0].upper, of[1].upper);
          low[2 * i + 1] = high_halves(of[0].lower, of[1].lower);
        }
        const uint32_t row = (entry_rows[e + lane % kStep] & ~15u) ^ uint32_t((pass * tiles + half) * 16);
#pragma unroll
        for (int t = 0; t < tiles; t += 2) {
          uint32_t b[4];
          load_matrices<4, true>(rows + (row ^ uint32_t(t * 16)), b);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            multiply_matrices<T, 2>(totals[t + i], high, b[2 * i], b[2 * i + 1]);
            multiply_matrices<T, 2>(finer ? low_totals[finer ? t + i : 0] : totals[t + i], low, b[2 * i], b[2 * i + 1]);
          }
        }
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const bool inside = is_inside(column + g, 2 * pair + row);
#pragma unroll
        for (int t = 0; t < tiles; t += 2) {
          float values[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            values[i] = totals[t + i / 2][2 * row + i % 2];
            if (finer) values[i] += low_totals[finer ? t + i / 2 : 0][2 * row + i % 2] * (1 / kFiner<T>);
          }
          const bool used = WHOLE || values[0] != 0 || values[1] != 0 || values[2] != 0 || values[3] != 0;
          write(inside && used, column + g, 2 * pair + row, (pass * tiles + t) * 2 + q, values);
        }
      }
    }
  } else {
    // Zero times infinity must be added where it is due and nowhere else: by threads, each one cell and four channels.
    constexpr int vectors = UNITS * 2;
    for (int i = int(threadIdx.x); i < keys * 2 * vectors; i += int(blockDim.x)) {
      const int vector = i % vectors, cell = i / vectors, row = cell / groups.pitch, column = cell % groups.pitch;
      const int key = row / 2 * groups.pitch + column, begin = starts[max(key - 1, 0)], end = starts[key + 1];
      float values[4] = {};
      bool used = WHOLE;
      for (int e = begin; e < end; ++e) {
        const uint32_t entry_row = entry_rows[e];
        if ((entry_row >> (row % 2) & 1) == 0) continue;
        const PairEntry& entry = entries[e];
        const PairColumn& of = e < starts[key] ? entry.right : entry.left;
        const float weight = join_weight<T>(row % 2 ? of.lower : of.upper);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float pair[2];
          load_shared<T, 2>(rows + ((entry_row & ~15u) ^ uint32_t((vector / 4 * 2 + h) * 16)) + vector % 4 * 4, pair);
#pragma unroll
          for (int j = 0; j < 2; ++j) values[2 * h + j] += weight * pair[j];
        }
        used = true;
      }
      write(used && is_inside(column, row), column, row, vector, values);
    }
  }

  if (!WHOLE) add_all_far<T, UNITS * N, TAPS>(p, w, o, offset_mask, gradients, far_of, sums_map, sums_stride);
}

// What a problem's gradient is gathered with; w.blocks = 0 where it cannot be.
struct SortedPlan {
  Window w{};
  Groups groups{};
  bool matrices = false;
};

Window plan_blocks(const dcnv4_problem& p, int taps, const Slicing& slicing, WindowBytes bytes) {
  bytes.most_threads = kMostSortThreads;
  bytes.blocks = 2;
  bytes.most_pixels_a_warp = kSlots / taps * kMostBatches;
  bytes.batch = kSlots / taps;
  // A whole map's sums are written at once; others are cleared before and rounded after.
  WindowBytes whole = bytes;
  whole.whole = INT32_MAX;
  const Window w = plan_window(p, slicing.slices, whole);
  return w.blocks != 0 ? w : plan_window(p, slicing.slices, bytes);
}

Window plan_threads(const dcnv4_problem& p, int taps, const Slicing& slicing) {
  WindowBytes bytes{kCellBytes, slicing.bytes + taps * kCorners * int64_t(sizeof(Entry)), 0, kFixedBytes, 0};
  bytes.cost = p.dtype == DCNV4_FLOAT32 ? WindowCost{5, 0.01, 0.0015, 1} : WindowCost{5, 0.07, 0.010, 1};
  return plan_blocks(p, taps, slicing, bytes);
}

// By matrices, where the device has them; no blocks where they cannot.
SortedPlan plan_matrices(const dcnv4_problem& p, int taps, const Slicing& slicing) {
  SortedPlan plan;
  if (p.dtype == DCNV4_FLOAT32 || forced(p, kForceThreads)) return plan;
  if (architecture(p.device) < 80) return plan;
  const int64_t fixed = kStep * kPairEntryBytes + kMostSortThreads / kWarp * kMostBatches * int64_t(sizeof(uint2)) +
                        kBarrierBytes + (1 + kMostSortThreads / kWarp + 2) * int64_t(sizeof(int));
  WindowBytes bytes{int64_t(sizeof(int)), slicing.bytes + taps * 2 * kPairEntryBytes, 0, fixed, 0};
  bytes.cost = WindowCost{5, 0.07, 0.010, 1};
  plan.w = plan_blocks(p, taps, slicing, bytes);
  if (plan.w.blocks == 0) return plan;
  const int64_t columns = divide_up(plan.w.width, kGroupColumns);
  plan.groups.pitch = int32_t(columns * kGroupColumns);
  plan.groups.pairs = int32_t(divide_up(plan.w.height, 2));
  plan.groups.count = int32_t(columns * plan.groups.pairs);
  plan.groups.by_columns = divisor_of(columns);
  // Whole groups may be more than the window's cells.
  plan.w.shared = fixed + plan.w.pixels * bytes.pixel + plan.groups.pitch * plan.groups.pairs * int64_t(sizeof(int));
  if (plan.w.shared > shared_limit(p.device)) plan.w.blocks = 0;
  plan.matrices = plan.w.blocks != 0;
  return plan;
}

SortedPlan plan_sorted(const dcnv4_problem& p) {
  const int taps = taps_of(p);
  const Slicing slicing = slicing_of(p);
  SortedPlan plan;
  if ((taps != 8 && taps != 9) || slicing.bytes == 0 || p.dtype == DCNV4_FLOAT64) return plan;
  plan = plan_matrices(p, taps, slicing);
  if (!plan.matrices) plan.w = plan_threads(p, taps, slicing);
  return plan;
}

template <class T, int UNITS, int TAPS>
int32_t run(const BackwardCall& call, const SortedPlan& plan, float* sums, int64_t sums_stride) {
  const dcnv4_problem& p = call.p;
  const T *offset_mask = static_cast<const T*>(call.offset_mask), *grad_output = static_cast<const T*>(call.grad_output);
  T* grad_value = static_cast<T*>(call.grad_value);
  const Window& w = plan.w;
  if constexpr (sizeof(T) == 2) {
    if (plan.matrices) {
      BulkMap mask_map{};
      const bool runs = can_have_runs(p, offset_mask) && runs_map<T, TAPS>(p, w, offset_mask, mask_map);
      const auto start = [&](auto kernel) {
        return launch(earliest_start(p), kernel, w.blocks, w.threads, w.shared, call.stream, p, w, plan.groups, mask_map,
                      offset_mask, grad_output, grad_value, sums, sums_stride);
      };
      if (runs)
        return sums ? start(gather_matrix<T, UNITS, TAPS, false, true>) : start(gather_matrix<T, UNITS, TAPS, true, true>);
      return sums ? start(gather_matrix<T, UNITS, TAPS, false, false>) : start(gather_matrix<T, UNITS, TAPS, true, false>);
    }
  }
  const auto start = [&](auto kernel) {
    return launch(earliest_start(p), kernel, w.blocks, w.threads, w.shared, call.stream, p, w, offset_mask, grad_output,
                  grad_value, sums, sums_stride);
  };
  return sums ? start(gather_sorted<T, UNITS, TAPS, false>) : start(gather_sorted<T, UNITS, TAPS, true>);
}

template <class T, int TAPS>
int32_t run_units(const BackwardCall& call, const SortedPlan& plan, float* sums, int64_t sums_stride) {
  const int64_t bytes = slicing_of(call.p).bytes;
  if (bytes == 128) return run<T, 8, TAPS>(call, plan, sums, sums_stride);
  if (bytes == 64) return run<T, 4, TAPS>(call, plan, sums, sums_stride);
  return run<T, 2, TAPS>(call, plan, sums, sums_stride);
}

template <class T>
int32_t run_type(const BackwardCall& call, float* sums, int64_t sums_stride) {
  const SortedPlan plan = plan_sorted(call.p);
  return taps_of(call.p) == 9 ? run_units<T, 9>(call, plan, sums, sums_stride) : run_units<T, 8>(call, plan, sums, sums_stride);
}

}  // namespace

Sorted can_scatter_sorted(const dcnv4_problem& p) {
  const Window w = plan_sorted(p).w;
  if (w.blocks == 0) return Sorted::no;
  const bool whole = w.tiles_x.divisor == 1 && w.tiles_y.divisor == 1 && w.width >= p.W + 2 && w.height >= p.H + 2;
  return whole ? Sorted::whole : Sorted::tiles;
}

int32_t scatter_sorted(const BackwardCall& call, float* sums, int64_t sums_stride) {
  switch (call.p.dtype) {
    case DCNV4_FLOAT32:
      return run_type<float>(call, sums, sums_stride);
    case DCNV4_BFLOAT16:
      return run_type<bf16>(call, sums, sums_stride);
    case DCNV4_FLOAT16:
      return run_type<f16>(call, sums, sums_stride);
    default:
      return DCNV4_NO_KERNEL;
  }
}

}  // namespace dcnv4
