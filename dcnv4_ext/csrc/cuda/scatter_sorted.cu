// Corners sorted by cell (scatter_sorted.h). A few threads own a cell and go through what falls on it, multiply-adding rows of
// grad_output from shared memory. Cells are taken in the order of how much falls on them, so that those of one warp are done
// together.
#include "scatter_sorted.h"

namespace dcnv4 {
namespace {

constexpr int kLengths = 64;  // cells are told apart by how much falls on them, up to this

// What a corner of a tap gives to its cell: `weight` times the row of grad_output that lies `row` bytes on.
struct alignas(8) Entry {
  float weight;
  uint32_t row;
};

// Shared memory: entries by cell, rows of grad_output (pixels, UNITS pieces), barriers, where each cell's entries start, one
// number a warp, cells of each length, which taps of a batch are far, and the cells in order. This much of it is not counted by
// cell or pixel.
constexpr int64_t kCellBytes = sizeof(int) + sizeof(uint16_t);
constexpr int64_t kFixedBytes = (kMostSortThreads / kWarp + kLengths + 3) * int64_t(sizeof(int)) +
                                kMostSortThreads / kWarp * kMostBatches * int64_t(sizeof(uint2)) + 2 * kBarrierBytes +
                                kBulkAlignment;

// Which cells a block has to write: all of the map's where it has the whole of it, else those that anything falls on.
template <bool WHOLE>
DCNV4_DEVICE bool has_to_write(const dcnv4_problem& p, const Window& w, const WindowOrigin& o, int cell, int length) {
  if (!WHOLE) return length != 0;
  const int row = w.by_width.quotient(cell), x = o.x + cell - row * w.width, y = o.y + row;
  return uint32_t(x) < uint32_t(p.W) && uint32_t(y) < uint32_t(p.H);
}

// RUNS: the numbers of offset_mask and the rows of grad_output come as boxes.
template <class T, int UNITS, int TAPS, bool WHOLE, bool RUNS>
__global__ void __launch_bounds__(kMostSortThreads, 2)
    gather_sorted(const __grid_constant__ dcnv4_problem p, const __grid_constant__ Window w, int run_length,
                  const __grid_constant__ BulkMap mask_map, const __grid_constant__ BulkMap gradient_map,
                  const T* __restrict__ offset_mask, const T* __restrict__ grad_output, T* __restrict__ grad_value,
                  float* __restrict__ sums, int64_t sums_stride, LateWait earlier) {
  constexpr int N = 16 / int(sizeof(T)), cell_bytes = UNITS * 16, pixels = kSlots / TAPS;
  const WindowOrigin o = window_origin(p, w);
  const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp), warps = int(blockDim.x / kWarp);
  const int channel = o.g * int(p.D) + o.slice * UNITS * N;
  const char* gradients = reinterpret_cast<const char*>(image_of(grad_output, o, w.output_image) + channel);
  const int64_t first_cell = int64_t(o.n) * p.H * p.W;
  float* sums_map = sums + first_cell * sums_stride + channel;

  const int cells = w.width * w.height;
  // Where entries come to lie when the taps are known, the runs lie until then.
  Entry* entries = reinterpret_cast<Entry*>(dynamic_shared());  // (pixels * TAPS * corners)
  static_assert(kRunBytes<T, TAPS> <= TAPS * kCorners * int(sizeof(Entry)), "room for the runs");
  char* rows = dynamic_shared() + round_up_to(uint32_t(w.pixels) * uint32_t(TAPS * kCorners * sizeof(Entry)), kBulkAlignment);
  char* barriers = rows + w.pixels * cell_bytes;                       // the runs have come, the rows have come
  int* starts = reinterpret_cast<int*>(barriers + 2 * kBarrierBytes);  // (cells + 1)
  int* counts = starts + cells + 1;                                    // (warps)
  int* lengths = counts + warps;                                       // (kLengths + 1): cells of each, then where
  uint2* far_of =
      reinterpret_cast<uint2*>(lengths + kLengths + 1 + (cells + warps) % 2);    // (batches): a bit a tap beyond the window
  uint16_t* order = reinterpret_cast<uint16_t*>(far_of + kMostBatches * warps);  // (cells)

  earlier.wait(false);
  const TileTaps<T, TAPS, RUNS> tile(w, o, offset_mask);
  if (!RUNS) {
    const char* from = gradients + threadIdx.x % UNITS * 16;
    for (uint32_t i = threadIdx.x; i < uint32_t(w.pixels) * UNITS; i += blockDim.x)  // read by live taps alone
      copy_async(rows + i * 16, from + tile_pixel(p, w, o, int(i / UNITS)).number * w.output_bytes);
  } else if (threadIdx.x == 0) {
    expect_bulk(barriers, uint32_t(w.pixels) * kRunBytes<T, TAPS>);
    start_bulk(mask_map, dynamic_shared(), barriers, tile.first_word(), o.tile_x, o.tile_y, int(o.n));
    expect_bulk(barriers + kBarrierBytes, uint32_t(w.pixels) * cell_bytes);
    start_bulk(gradient_map, rows, barriers + kBarrierBytes, channel * int(sizeof(T)) / 4, o.tile_x, o.tile_y, int(o.n));
  }
#pragma unroll 1
  for (int i = int(threadIdx.x); i <= cells; i += int(blockDim.x)) starts[i] = 0;
  for (int i = int(threadIdx.x); i <= kLengths; i += int(blockDim.x)) lengths[i] = 0;
  TapSlot slots[kSlotRounds];
  find_slots<TAPS, false>(w, slots);
  __syncthreads();
  if (RUNS) wait_for_bulk(barriers);

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
    work_out_slots<true>(p, w, o, batch, tile, slots, far, [&](int r, const TilePixel&, const WindowTap& tap) {
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
  find_starts(starts, cells, run_length, counts, [&](int cell, int count) {
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
  if (!RUNS) copy_async_wait();
  earlier.wait(true);  // for the sums to be cleared
  __syncthreads();
  if (RUNS) wait_for_bulk(barriers + kBarrierBytes);

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

// blocks = 0 where it cannot be.
Window plan_threads(const dcnv4_problem& p) {
  const int taps = taps_of(p);
  const Slicing slicing = slicing_of(p);
  if ((taps != 8 && taps != 9) || slicing.bytes == 0 || p.dtype == DCNV4_FLOAT64) return {};
  WindowBytes bytes{kCellBytes, slicing.bytes + taps * kCorners * int64_t(sizeof(Entry)), 0, kFixedBytes, 0};
  bytes.cost = p.dtype == DCNV4_FLOAT32 ? WindowCost{2.4, 0.08, 0.0037, 1.2, 0} : WindowCost{5, 0.07, 0.010, 1, 0};
  return plan_blocks(p, taps, slicing, bytes);
}

template <class T, int UNITS, int TAPS>
int32_t run(const BackwardCall& call, const Window& w, float* sums, int64_t sums_stride, Ahead ahead) {
  const dcnv4_problem& p = call.p;
  const T* offset_mask = static_cast<const T*>(call.offset_mask);
  BulkMap mask_map{}, gradient_map{};
  const auto start = [&](auto kernel) {
    return launch(earliest_start(p), kernel, w.blocks, w.threads, w.shared, call.stream, p, w,
                  int(divide_up(int64_t(w.width) * w.height + 1, w.threads)), mask_map, gradient_map, offset_mask,
                  static_cast<const T*>(call.grad_output), static_cast<T*>(call.grad_value), sums, sums_stride,
                  LateWait{ahead == Ahead::ours});
  };
  if constexpr (sizeof(T) == 4) {  // where there are boxes, 16-bit types are gathered by matrices
    if (can_have_runs(p, offset_mask) && runs_map<T, TAPS>(p, w, offset_mask, mask_map) &&
        output_map(p, w, call.grad_output, UNITS * 16, gradient_map))
      return sums ? start(gather_sorted<T, UNITS, TAPS, false, true>) : start(gather_sorted<T, UNITS, TAPS, true, true>);
  }
  return sums ? start(gather_sorted<T, UNITS, TAPS, false, false>) : start(gather_sorted<T, UNITS, TAPS, true, false>);
}

template <class T, int TAPS>
int32_t run_units(const BackwardCall& call, float* sums, int64_t sums_stride, Ahead ahead) {
  const Window w = plan_threads(call.p);
  const int64_t bytes = slicing_of(call.p).bytes;
  if (bytes == 128) return run<T, 8, TAPS>(call, w, sums, sums_stride, ahead);
  if (bytes == 64) return run<T, 4, TAPS>(call, w, sums, sums_stride, ahead);
  return run<T, 2, TAPS>(call, w, sums, sums_stride, ahead);
}

template <class T>
int32_t run_type(const BackwardCall& call, float* sums, int64_t sums_stride, Ahead ahead) {
  return taps_of(call.p) == 9 ? run_units<T, 9>(call, sums, sums_stride, ahead)
                              : run_units<T, 8>(call, sums, sums_stride, ahead);
}

}  // namespace

Sorted can_scatter_sorted(const dcnv4_problem& p) {
  Window w = plan_matrices(p);
  if (w.blocks == 0) w = plan_threads(p);
  if (w.blocks == 0) return Sorted::no;
  const bool whole = w.tiles_x.divisor == 1 && w.tiles_y.divisor == 1 && w.width >= p.W + 2 && w.height >= p.H + 2;
  return whole ? Sorted::whole : Sorted::tiles;
}

int32_t scatter_sorted(const BackwardCall& call, float* sums, int64_t sums_stride, Ahead ahead) {
  if (plan_matrices(call.p).blocks != 0) return gather_by_matrices(call, sums, sums_stride, ahead);
  switch (call.p.dtype) {
    case DCNV4_FLOAT32:
      return run_type<float>(call, sums, sums_stride, ahead);
    case DCNV4_BFLOAT16:
      return run_type<bf16>(call, sums, sums_stride, ahead);
    case DCNV4_FLOAT16:
      return run_type<f16>(call, sums, sums_stride, ahead);
    default:
      return DCNV4_NO_KERNEL;
  }
}

}  // namespace dcnv4
