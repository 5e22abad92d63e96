// Taps sorted by columns of two rows of the window (scatter_sorted.h), for 16-bit types. A warp owns sixteen cells, whose sums
// are a product of weights and rows of grad_output.
#include "scatter_sorted.h"

namespace dcnv4 {
namespace {

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
// Of an entry it is also kept where its row of grad_output lies; there the two lowest bits tell which rows of the pair it is
// for.
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
  PairEntry* entries = reinterpret_cast<PairEntry*>(dynamic_shared());     // (most)
  char* rows = reinterpret_cast<char*>(entries + most);                    // (pixels, UNITS pieces)
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
  find_slots<TAPS>(w, slots);
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

// The window of a block and the groups of its cells.
struct MatrixPlan {
  Window w{};
  Groups groups{};
};
// No blocks where it cannot be.
MatrixPlan plan_of(const dcnv4_problem& p) {
  MatrixPlan plan;
  const int taps = taps_of(p);
  const Slicing slicing = slicing_of(p);
  if ((taps != 8 && taps != 9) || slicing.bytes == 0 || element_bytes(p.dtype) != 2) return plan;
  if (architecture(p.device) < 80 || forced(p, kForceThreads)) return plan;
  const int64_t fixed = kStep * kPairEntryBytes + kMostSortThreads / kWarp * kMostBatches * int64_t(sizeof(uint2)) +
                        kBarrierBytes + (1 + kMostSortThreads / kWarp + 2) * int64_t(sizeof(int));
  WindowBytes bytes{int64_t(sizeof(int)), slicing.bytes + taps * 2 * kPairEntryBytes, 0, fixed, 0};
  bytes.cost = WindowCost{5, 0.07, 0.025, 1};
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
  return plan;
}

template <class T, int UNITS, int TAPS>
int32_t run(const BackwardCall& call, const MatrixPlan& plan, float* sums, int64_t sums_stride) {
  const dcnv4_problem& p = call.p;
  const T* offset_mask = static_cast<const T*>(call.offset_mask);
  const Window& w = plan.w;
  BulkMap mask_map{};
  const bool runs = can_have_runs(p, offset_mask) && runs_map<T, TAPS>(p, w, offset_mask, mask_map);
  const auto start = [&](auto kernel) {
    return launch(earliest_start(p), kernel, w.blocks, w.threads, w.shared, call.stream, p, w, plan.groups, mask_map,
                  offset_mask, static_cast<const T*>(call.grad_output), static_cast<T*>(call.grad_value), sums, sums_stride);
  };
  if (runs) return sums ? start(gather_matrix<T, UNITS, TAPS, false, true>) : start(gather_matrix<T, UNITS, TAPS, true, true>);
  return sums ? start(gather_matrix<T, UNITS, TAPS, false, false>) : start(gather_matrix<T, UNITS, TAPS, true, false>);
}

template <class T, int TAPS>
int32_t run_units(const BackwardCall& call, float* sums, int64_t sums_stride) {
  const MatrixPlan plan = plan_of(call.p);
  const int64_t bytes = slicing_of(call.p).bytes;
  if (bytes == 128) return run<T, 8, TAPS>(call, plan, sums, sums_stride);
  if (bytes == 64) return run<T, 4, TAPS>(call, plan, sums, sums_stride);
  return run<T, 2, TAPS>(call, plan, sums, sums_stride);
}

template <class T>
int32_t run_type(const BackwardCall& call, float* sums, int64_t sums_stride) {
  return taps_of(call.p) == 9 ? run_units<T, 9>(call, sums, sums_stride) : run_units<T, 8>(call, sums, sums_stride);
}

}  // namespace

Window plan_matrices(const dcnv4_problem& p) { return plan_of(p).w; }

int32_t gather_by_matrices(const BackwardCall& call, float* sums, int64_t sums_stride) {
  return call.p.dtype == DCNV4_BFLOAT16 ? run_type<bf16>(call, sums, sums_stride) : run_type<f16>(call, sums, sums_stride);
}

}  // namespace dcnv4
