// Taps sorted by columns of two rows of the window (scatter_sorted.h), for 16-bit types. A warp owns sixteen cells, whose sums
// are a product of weights and rows of grad_output.
#include "scatter_sorted.h"

namespace dcnv4 {
namespace {

// A product of matrices adds to the cells of a group what sixteen entries give them: eight columns of two rows of the window,
// rows of A; the entries are columns of A and rows of B, whose columns are channels. Lists of entries are kept by pairs of
// rows and the column of the tap's cell, `pitch` keys a pair; so a group's lists, from the column to its left on, are one
// stretch. A thread, which has one column of the window, knows of each entry by its number whether it is of the column's own
// list or the list to the left; of others A has a zero.
constexpr int kGroupColumns = 8, kStep = 16;
struct Groups {
  int32_t pitch, pairs;
  int32_t count;       // of groups
  int32_t run_length;  // keys that a thread adds up
  Divisor by_columns;
};

// What an entry gives to a column of a pair of rows, the upper one's in the lower halves of words. A weight is the sum of two
// 16-bit numbers, of what one alone could not hold. With starts[key] the number of a list's first entry, what entry e gives to
// its own column lies at starts[key] + e, and to the next one at starts[key + 1] + e: what a column gets, by the list to its
// left and then by its own, lies in order, and for all of it the place is the number and one start.
struct alignas(8) PairColumn {
  uint32_t high, low;
};
constexpr int kEntryColumns = 2;
// Of an entry it is also kept where its row of grad_output lies; there the two lowest bits tell which rows of the pair it is
// for.
constexpr uint32_t kUpper = 1, kLower = 2;
constexpr int64_t kPairEntryBytes = kEntryColumns * sizeof(PairColumn) + sizeof(uint16_t);

// What the lesser number of a weight is multiplied by: an f16 would not be fine enough.
template <class T>
constexpr float kFiner = std::is_same<T, f16>::value ? 2048.0f : 1.0f;

template <class T>
DCNV4_DEVICE PairColumn split_weights(float upper, float lower) {
  const uint32_t high = pack(T{}, upper, lower);
  float high_upper, high_lower;
  unpack(T{}, high, high_upper, high_lower);
  return {high, pack(T{}, (upper - high_upper) * kFiner<T>, (lower - high_lower) * kFiner<T>)};
}
// The weight of row 0 or 1 of the pair. Of one that is not finite the lesser number is NaN.
template <class T>
DCNV4_DEVICE float join_weight(const PairColumn& column, int row) {
  const auto number = [&](uint32_t pair) { return to_compute(T{uint16_t(pair >> 16 * row)}); };
  const float high = number(column.high), low = number(column.low);
  return low == low ? high + low * (1 / kFiner<T>) : high;
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

// Raises a number in shared memory by one and returns what it was, by one thread. Of an addition, or an increment that never
// comes to its limit, the compiler makes one of the warp's threads together first, in ten instructions.
DCNV4_DEVICE int take_next(int* number) {
#if defined(__CUDA_ARCH__)
  return int(atomicInc(reinterpret_cast<unsigned*>(number), 0x7fffffffu));
#else
  return atomicAdd(number, 1);
#endif
}

// Adds to `marks` zero times a pair of numbers: from then on it is_marked, if one of them is infinite or NaN.
template <class T>
DCNV4_DEVICE void mark_not_finite(uint32_t pair, uint32_t& marks) {
  constexpr bool is_bf16 = std::is_same<T, bf16>::value;
#if DCNV4_MATRIX_UNITS
  if constexpr (is_bf16)
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(marks) : "r"(pair), "r"(0u));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(marks) : "r"(pair), "r"(0u));
#else
  constexpr uint32_t exponents = is_bf16 ? 0x7f807f80u : 0x7c007c00u, lowest = is_bf16 ? 0x00800080u : 0x04000400u;
  if ((((pair & exponents) + lowest) & 0x80008000u) != 0) marks = 0x7fff7fffu;
#endif
}
DCNV4_DEVICE bool is_marked(uint32_t marks) { return (marks & 0x7fff7fffu) != 0; }

// How the 16-byte pieces of a row of grad_output change places.
template <int UNITS>
DCNV4_DEVICE uint32_t row_turn(uint32_t index) {
  return index * UNITS / 8 % UNITS;
}

template <class T, int UNITS, int TAPS, bool WHOLE, bool RUNS>
__global__ void __launch_bounds__(kMostSortThreads, 2)
    gather_matrix(const __grid_constant__ dcnv4_problem p, const __grid_constant__ Window w,
                  const __grid_constant__ Groups groups, const __grid_constant__ BulkMap mask_map,
                  const __grid_constant__ BulkMap gradient_map, const T* __restrict__ offset_mask,
                  const T* __restrict__ grad_output, T* __restrict__ grad_value, float* __restrict__ sums, int64_t sums_stride,
                  LateWait earlier) {
  constexpr int N = 8, cell_bytes = UNITS * 16, pixels = kSlots / TAPS;
  constexpr int most_tiles = kFiner<T> != 1.0f && DCNV4_MORE_REGISTERS ? 2 : 4;  // of eight columns of B; as registers allow
  constexpr int tiles = UNITS < most_tiles ? UNITS : most_tiles, passes = UNITS / tiles;
  const WindowOrigin o = window_origin(p, w);
  const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp), warps = int(blockDim.x / kWarp);
  const int channel = o.g * int(p.D) + o.slice * UNITS * N;
  const char* gradients = reinterpret_cast<const char*>(image_of(grad_output, o, w.output_image) + channel);
  const int64_t first_cell = int64_t(o.n) * p.H * p.W;
  float* sums_map = sums + first_cell * sums_stride + channel;
  T* value_map = grad_value + first_cell * p.grad_value_stride + channel;

  const int keys = groups.pairs * groups.pitch, most = w.pixels * TAPS * 2 + kStep;
  // Where entries come to lie when the taps are known, the runs lie until then.
  PairColumn* columns = reinterpret_cast<PairColumn*>(dynamic_shared());  // (most, 2)
  char* rows = dynamic_shared() + round_up_to(uint32_t(kEntryColumns * most) * uint32_t(sizeof(PairColumn)),
                                              uint32_t(kBulkAlignment));    // (pixels, UNITS pieces)
  uint2* far_of = reinterpret_cast<uint2*>(rows + w.pixels * cell_bytes);   // (batches): a bit a tap beyond the window
  char* barriers = reinterpret_cast<char*>(far_of + kMostBatches * warps);  // the runs have come, the rows have come
  int* starts = reinterpret_cast<int*>(barriers + 2 * kBarrierBytes) + 1;   // (keys + 1), and a zero before
  int* counts = starts + keys + 1;                                          // (warps)
  int* next_group = counts + warps;                                         // the next to be taken
  int* hostile = next_group + 1;                                            // whether grad_output has inf or NaN here
  uint16_t* entry_rows = reinterpret_cast<uint16_t*>(hostile + 1);          // (most)

  earlier.wait(false);
  const TileTaps<T, TAPS, RUNS> tile(w, o, offset_mask);
  // Rows of grad_output, of which a thread has a piece of 16 bytes: UNITS threads a row.
  constexpr int rows_a_warp = kWarp / UNITS;
  const int unit = lane % UNITS, first_row = warp * rows_a_warp + lane / UNITS, rows_at_once = warps * rows_a_warp;
  if (!RUNS) {
    for (int i = first_row; i < w.pixels; i += rows_at_once)  // where there is no pixel, another's
      copy_async(rows + i * cell_bytes + unit * 16, gradients + unit * 16 + tile_pixel(p, w, o, i).number * w.output_bytes);
  } else if (threadIdx.x == 0) {
    expect_bulk(barriers, uint32_t(w.pixels) * kRunBytes<T, TAPS>);
    start_bulk(mask_map, dynamic_shared(), barriers, tile.first_word(), o.tile_x, o.tile_y, int(o.n));
    expect_bulk(barriers + kBarrierBytes, uint32_t(w.pixels) * cell_bytes);
    start_bulk(gradient_map, rows, barriers + kBarrierBytes, channel * int(sizeof(T)) / 4, o.tile_x, o.tile_y, int(o.n));
  }
#pragma unroll 1
  for (int i = int(threadIdx.x); i < 1 + keys + 1 + warps + 2; i += int(blockDim.x)) starts[i - 1] = 0;
  TapSlot slots[kSlotRounds];
  find_slots<TAPS, true>(w, slots);
  __syncthreads();
  if (RUNS) wait_for_bulk(barriers);

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

  // Of each 32 bytes of a row the even words go to one piece of 16 bytes and the odd ones to the next, so that the columns a
  // lane gets of two products are neighbours. Pieces change places from row to row, to be read eight rows at a time.
  if (RUNS)
    wait_for_bulk(barriers + kBarrierBytes);
  else
    copy_async_wait();  // for those that this thread has copied
  uint32_t marks = 0;
#pragma unroll 2
  for (int first = warp * rows_a_warp; first < w.pixels; first += rows_at_once) {
    const uint32_t index = uint32_t(first + lane / UNITS);
    const bool live = index < uint32_t(w.pixels);
    char* row = rows + index * cell_bytes;
    uint4 words{};
    if (live) words = *reinterpret_cast<const uint4*>(row + unit * 16);
    mark_not_finite<T>(words.x, marks);
    mark_not_finite<T>(words.y, marks);
    mark_not_finite<T>(words.z, marks);
    mark_not_finite<T>(words.w, marks);
    __syncwarp();
    const uint32_t place = ((uint32_t(unit) & ~1u) ^ row_turn<UNITS>(index)) * 16 + uint32_t(unit) % 2 * 8;
    if (live) {
      *reinterpret_cast<uint2*>(row + place) = make_uint2(words.x, words.z);
      *reinterpret_cast<uint2*>(row + (place ^ 16)) = make_uint2(words.y, words.w);
    }
  }
  if (is_marked(marks)) *hostile = 1;
  __syncthreads();

  find_starts(starts, keys, groups.run_length, counts, [](int, int) {});
  __syncthreads();

#pragma unroll
  for (int b = 0; b < kMostBatches; ++b) {
#pragma unroll
    for (int r = 0; r < kSlotRounds; ++r) {
      if (number[b][r] == 0) continue;
      const uint32_t index = uint32_t((warp + b * warps) * pixels + slots[r].of);
      const uint32_t row = index * cell_bytes + row_turn<UNITS>(index) * 16;
      const Corners<float> weights = corner_weights(lx[b][r], ly[b][r], weight[b][r], 1.0f);
      if (!(fabsf(weight[b][r]) < bits_to_float(0x7f800000u))) *hostile = 1;
      const PairColumn left = split_weights<T>(weights.w00, weights.w10), right = split_weights<T>(weights.w01, weights.w11);
      const auto enter = [&](int key, uint32_t number, const PairColumn& own, const PairColumn& next, uint32_t rows_of) {
        const int start = starts[key], next_start = starts[key + 1], at = start + int(number) - 1;
        columns[start + at] = own;
        columns[next_start + at] = next;
        entry_rows[at] = uint16_t(row | rows_of);
      };
      // Of a tap in an odd row the lower two corners are the next pair's.
      const uint32_t below = number[b][r] >> 16, shift = below != 0 ? 16 : 0;
      enter(key_of[b][r], number[b][r] & 0xffffu, {left.high << shift, left.low << shift},
            {right.high << shift, right.low << shift}, below != 0 ? kLower : kUpper | kLower);
      if (below != 0)
        enter(key_of[b][r] + groups.pitch, below, {left.high >> 16, left.low >> 16}, {right.high >> 16, right.low >> 16},
              kUpper);
    }
  }
  if (threadIdx.x < kStep) entry_rows[starts[keys] + int(threadIdx.x)] = 0;  // read behind the last entry, to no effect
  earlier.wait(true);                                                        // for the sums to be cleared
  __syncthreads();

  // Four sums of a cell of the map, of the group's channels from `first` on, and then `further`.
  const uint32_t sums_bytes = uint32_t(sums_stride) * uint32_t(sizeof(float));
  const auto write = [&](bool used, uint32_t cell, int first, int further, const float (&values)[4]) {
    if (WHOLE) {
      if (used) store<T, 4>(at_pixel(value_map + first, cell, p.grad_value_stride) + further, values);
    } else {
      char* sums_of_cell = reinterpret_cast<char*>(sums_map + first) + uint64_t(cell) * sums_bytes;
      add_if(used, reinterpret_cast<float*>(sums_of_cell) + further, values);
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
      // From the middle on, to both sides in turn: there are most entries.
      const int turn = groups.by_columns.quotient(group),
                column = (group - turn * int(groups.by_columns.divisor)) * kGroupColumns;
      const int pair = groups.pairs / 2 + (turn >> 1 ^ -(turn & 1));
      const int* first = starts + pair * groups.pitch + column;
      const int begin = first[-1], end = first[kGroupColumns];
      if (!WHOLE && begin == end) continue;
      // The list to the left of the thread's column, and behind it the column's own.
      const int left = first[g - 1], start = first[g];
      const uint32_t both = uint32_t(first[g + 1] - left);
      int number = begin + q * 2 - left;  // of the thread's first entry, from the left list's first on
      const PairColumn* next = columns + (start + begin + q * 2);
      const uint16_t* next_row = entry_rows + begin + lane % kStep;
      constexpr bool finer = kFiner<T> != 1.0f;
      float totals[tiles][4] = {}, low_totals[finer ? tiles : 1][4] = {};
#pragma unroll 1
      for (int e = begin; e < end; e += kStep, number += kStep, next += kStep, next_row += kStep) {
        uint32_t high[4], low[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint2 one = load_shared_if(uint32_t(number + i * 8) < both, next + i * 8),
                      two = load_shared_if(uint32_t(number + i * 8 + 1) < both, next + i * 8 + 1);
          high[2 * i] = low_halves(one.x, two.x);
          high[2 * i + 1] = high_halves(one.x, two.x);
          low[2 * i] = low_halves(one.y, two.y);
          low[2 * i + 1] = high_halves(one.y, two.y);
        }
        const uint32_t row = (*next_row & ~15u) ^ uint32_t((pass * tiles + half) * 16);
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
      const int x = o.x + column + g, y = o.y + 2 * pair;
      const bool used = uint32_t(x) < uint32_t(p.W) && (WHOLE || both != 0);
      const uint32_t cell = uint32_t(y) * uint32_t(p.W) + uint32_t(x);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const bool inside = used && uint32_t(y + row) < uint32_t(p.H);
#pragma unroll
        for (int t = 0; t < tiles; t += 2) {
          float values[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            values[i] = totals[t + i / 2][2 * row + i % 2];
            if (finer) values[i] += low_totals[finer ? t + i / 2 : 0][2 * row + i % 2] * (1 / kFiner<T>);
          }
          write(inside, cell + uint32_t(row) * uint32_t(p.W), pass * tiles * N + q * 4, t * N, values);
        }
      }
    }
  } else {
    // Zero times infinity must be added where it is due and nowhere else: by threads, each one cell and four channels.
    constexpr int vectors = UNITS * 2;
    for (int i = int(threadIdx.x); i < keys * 2 * vectors; i += int(blockDim.x)) {
      const int vector = i % vectors, cell = i / vectors, row = cell / groups.pitch, column = cell % groups.pitch;
      const int x = o.x + column, y = o.y + row, key = row / 2 * groups.pitch + column;
      float values[4] = {};
      bool used = WHOLE;
      for (int e = starts[key - 1]; e < starts[key + 1]; ++e) {
        const uint32_t entry_row = entry_rows[e];
        if ((entry_row >> (row % 2) & 1) == 0) continue;
        const float weight = join_weight<T>(columns[starts[key] + e], row % 2);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float pair[2];
          load_shared<T, 2>(rows + ((entry_row & ~15u) ^ uint32_t((vector / 4 * 2 + h) * 16)) + vector % 4 * 4, pair);
#pragma unroll
          for (int j = 0; j < 2; ++j) values[2 * h + j] += weight * pair[j];
        }
        used = true;
      }
      write(used && uint32_t(x) < uint32_t(p.W) && uint32_t(y) < uint32_t(p.H), uint32_t(y) * uint32_t(p.W) + uint32_t(x),
            vector * 4, 0, values);
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
                        2 * kBarrierBytes + kBulkAlignment + (2 + kMostSortThreads / kWarp + 2) * int64_t(sizeof(int));
  WindowBytes bytes{int64_t(sizeof(int)), slicing.bytes + taps * 2 * kPairEntryBytes, 0, fixed, 0};
  bytes.cost = WindowCost{3.6, 0.014, 0.0037, 2, 0.4};
  plan.w = plan_blocks(p, taps, slicing, bytes);
  if (plan.w.blocks == 0) return plan;
  const int64_t columns = divide_up(plan.w.width, kGroupColumns);
  plan.groups.pitch = int32_t(columns * kGroupColumns);
  plan.groups.pairs = int32_t(divide_up(plan.w.height, 2));
  plan.groups.count = int32_t(columns * plan.groups.pairs);
  plan.groups.by_columns = divisor_of(columns);
  plan.groups.run_length = int32_t(divide_up(plan.groups.pitch * plan.groups.pairs + 1, plan.w.threads));
  // Whole groups may be more than the window's cells.
  plan.w.shared = fixed + plan.w.pixels * bytes.pixel + plan.groups.pitch * plan.groups.pairs * int64_t(sizeof(int));
  if (plan.w.shared > shared_limit(p.device)) plan.w.blocks = 0;
  return plan;
}

template <class T, int UNITS, int TAPS>
int32_t run(const BackwardCall& call, const MatrixPlan& plan, float* sums, int64_t sums_stride, Ahead ahead) {
  const dcnv4_problem& p = call.p;
  const T* offset_mask = static_cast<const T*>(call.offset_mask);
  const Window& w = plan.w;
  BulkMap mask_map{}, gradient_map{};
  const bool runs = can_have_runs(p, offset_mask) && runs_map<T, TAPS>(p, w, offset_mask, mask_map) &&
                    output_map(p, w, call.grad_output, UNITS * 16, gradient_map);
  const auto start = [&](auto kernel) {
    return launch(earliest_start(p), kernel, w.blocks, w.threads, w.shared, call.stream, p, w, plan.groups, mask_map,
                  gradient_map, offset_mask, static_cast<const T*>(call.grad_output), static_cast<T*>(call.grad_value), sums,
                  sums_stride, LateWait{ahead == Ahead::ours});
  };
  if (runs) return sums ? start(gather_matrix<T, UNITS, TAPS, false, true>) : start(gather_matrix<T, UNITS, TAPS, true, true>);
  return sums ? start(gather_matrix<T, UNITS, TAPS, false, false>) : start(gather_matrix<T, UNITS, TAPS, true, false>);
}

template <class T, int TAPS>
int32_t run_units(const BackwardCall& call, float* sums, int64_t sums_stride, Ahead ahead) {
  const MatrixPlan plan = plan_of(call.p);
  const int64_t bytes = slicing_of(call.p).bytes;
  if (bytes == 128) return run<T, 8, TAPS>(call, plan, sums, sums_stride, ahead);
  if (bytes == 64) return run<T, 4, TAPS>(call, plan, sums, sums_stride, ahead);
  return run<T, 2, TAPS>(call, plan, sums, sums_stride, ahead);
}

template <class T>
int32_t run_type(const BackwardCall& call, float* sums, int64_t sums_stride, Ahead ahead) {
  return taps_of(call.p) == 9 ? run_units<T, 9>(call, sums, sums_stride, ahead)
                              : run_units<T, 8>(call, sums, sums_stride, ahead);
}

}  // namespace

Window plan_matrices(const dcnv4_problem& p) { return plan_of(p).w; }

int32_t gather_by_matrices(const BackwardCall& call, float* sums, int64_t sums_stride, Ahead ahead) {
  return call.p.dtype == DCNV4_BFLOAT16 ? run_type<bf16>(call, sums, sums_stride, ahead)
                                        : run_type<f16>(call, sums, sums_stride, ahead);
}

}  // namespace dcnv4
