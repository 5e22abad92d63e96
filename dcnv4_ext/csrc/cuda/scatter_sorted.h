// The gradient of `value` for groups of a multiple of 32 bytes and 8 or 9 taps, gathered by cells out of sorted taps.
//
// A block takes a tile of output pixels, one group and a slice of its channels. It sorts what the tile's taps give to the cells
// of its window (window.h), counting, and writes the sum of each cell once: to grad_value itself where the block has all of the
// map, else as one reduction a cell and tile to `sums`. Taps beyond the window are reduced one by one.
#pragma once
#include "backward.h"
#include "window.h"

namespace dcnv4 {

constexpr int kMostBatches = 3;        // of a warp; what is known of their taps stays in registers while they are sorted
constexpr int kMostSortThreads = 448;  // of a block; two have the registers they need

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
// totals follow; all runs have one more than the lists. visit(list, length), also of what comes behind the last.
template <class Visit>
DCNV4_DEVICE void find_starts(int* starts, int lists, int run_length, int* totals, Visit visit) {
  const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp), first = int(threadIdx.x) * run_length;
  int own = 0;
#pragma unroll 1
  for (int i = first; i < min(first + run_length, lists); ++i) own += starts[i];
  int before = sum_of_lanes(own);
  if (lane == kWarp - 1) totals[warp] = before;
  before -= own;
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < warp; ++i) before += totals[i];
#pragma unroll 1
  for (int i = first; i < min(first + run_length, lists + 1); ++i) {
    const int length = starts[i];
    starts[i] = before;
    before += length;
    visit(i, length);
  }
}

// The tile and the block; blocks = 0 where there is none.
inline Window plan_blocks(const dcnv4_problem& p, int taps, const Slicing& slicing, WindowBytes bytes) {
  bytes.most_threads = kMostSortThreads;
  bytes.blocks = 2;
  bytes.most_pixels_a_warp = kSlots / taps * kMostBatches;
  bytes.batch = kSlots / taps;
  // A whole map's sums are written at once; others are cleared before and rounded after.
  WindowBytes whole = bytes;
  whole.whole = INT32_MAX;
  whole.most_of_few = 196;
  const Window w = plan_window(p, slicing.slices, whole);
  return w.blocks != 0 ? w : plan_window(p, slicing.slices, bytes);
}

// By matrices (scatter_matrix.cu): blocks = 0 where type or device have none.
Window plan_matrices(const dcnv4_problem& p);
int32_t gather_by_matrices(const BackwardCall& call, float* sums, int64_t sums_stride, Ahead ahead);

}  // namespace dcnv4
