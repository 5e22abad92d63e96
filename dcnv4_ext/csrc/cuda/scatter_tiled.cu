// The gradient of `value`, merged in shared memory before it goes out.
//
// A block takes a tile of output pixels, one group and a slice of its channels, and keeps the sums of a window of cells around
// the tile: where taps of neighbouring pixels meet in a cell, one reduction to global memory remains of many. Corners outside
// the window go out by themselves.
#include <cmath>

#include "scatter.h"

namespace dcnv4 {
namespace {

constexpr int N = 4;            // channels a thread
constexpr int kSliceLanes = 8;  // threads of one class at most, so that a block is one warp and many windows fit
constexpr int kThreads = kClasses * kSliceLanes;
constexpr int kChunk = 144;  // taps staged at a time, whole pixels of them
// Shares are read this many at once: sums in shared memory written between two reads keep the compiler from moving the second
// up. A pixel's taps are staged in multiples of it.
constexpr int kAhead = 3;
constexpr int kTileEdge = 8;
constexpr int kMargin = 2;  // cells beyond the reach of zero offsets, on each side, where memory allows
constexpr int64_t kWindowBytes = 40 * 1024;

// In Share::place, for a corner outside the window: | pixel of its cell in the map.
constexpr uint32_t kFar = 0x80000000u;

struct Windows {
  int32_t tile_w, tile_h;      // output pixels
  int32_t window_w, window_h;  // cells
  int64_t reach_x, reach_y;    // first cell of the window relative to the base of the tile's first pixel
  int32_t lanes, slices;       // threads of a class; slices of `lanes` * N channels
  int32_t row, chunk_pixels;   // taps staged a pixel, some of them none; pixels staged at a time
  Divisor by_width, by_lanes, by_row, by_kernel_h, by_window_w;
  Divisor tiles_x, tiles_y, groups, by_slices;
};

// The window of a tile of `pixels` along one axis: from `reach` on, `cells` long.
struct Span {
  int64_t reach, cells;
};

Span span_of(int64_t pixels, int64_t stride, int64_t dilation, int64_t kernel, double scale, int64_t size, int margin) {
  const double low = double(-(dilation * (kernel - 1) / 2)) * scale;
  const double high = double(dilation * (kernel - 1) - dilation * (kernel - 1) / 2) * scale;
  const int64_t first = int64_t(std::floor(std::min(low, high))) - margin;
  const int64_t last = (pixels - 1) * stride + int64_t(std::ceil(std::max(low, high))) + 1 + margin;
  return {first, std::min(last - first + 1, size)};
}

// Windows for the problem; lanes = 0 where none are worth while.
Windows plan_windows(const dcnv4_problem& p) {
  Windows w{};
  const double scale = p.offset_scale;
  const int64_t units = p.D / N;
  w.row = int32_t(round_up(taps_of(p), kAhead));
  if (p.D % N != 0 || w.row > kChunk || !(std::fabs(scale) <= 16)) return w;
  w.chunk_pixels = kChunk / w.row;
  w.slices = int32_t(divide_up(units, kSliceLanes));
  w.lanes = int32_t(divide_up(units, w.slices));
  const int64_t cell_bytes = int64_t(w.lanes) * N * int64_t(sizeof(float));
  w.tile_w = int32_t(even_edge(p.Wo, kTileEdge));
  w.tile_h = int32_t(even_edge(p.Ho, kTileEdge));
  for (int margin = kMargin; margin >= 0; --margin) {
    const Span x = span_of(w.tile_w, p.stride_w, p.dilation_w, p.kernel_w, scale, p.W, margin);
    const Span y = span_of(w.tile_h, p.stride_h, p.dilation_h, p.kernel_h, scale, p.H, margin);
    if (x.cells > kWindowBytes / cell_bytes / y.cells) continue;
    // Worth it where the window's cells are few beside the corners that fall into it.
    if (x.cells * y.cells > int64_t(w.tile_w) * w.tile_h * taps_of(p) && !forced(p, kForceTiled)) break;
    w.window_w = int32_t(x.cells);
    w.window_h = int32_t(y.cells);
    w.reach_x = x.reach;
    w.reach_y = y.reach;
    w.by_width = divisor_of(w.tile_w);
    w.by_lanes = divisor_of(w.lanes);
    w.by_row = divisor_of(w.row);
    w.by_kernel_h = divisor_of(p.kernel_h);
    w.by_window_w = divisor_of(w.window_w);
    w.tiles_x = divisor_of(divide_up(p.Wo, w.tile_w));
    w.tiles_y = divisor_of(divide_up(p.Ho, w.tile_h));
    w.groups = divisor_of(p.G);
    w.by_slices = divisor_of(w.slices);
    return w;
  }
  w.lanes = 0;
  return w;
}

int64_t shared_bytes(const Windows& w) {
  return (int64_t(w.window_w) * w.window_h + kClasses) * w.lanes * N * int64_t(sizeof(float)) +
         kChunk * kClasses * int64_t(sizeof(Share<float>));
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    merge_tiles(const __grid_constant__ dcnv4_problem p, const __grid_constant__ Windows w, const T* __restrict__ offset_mask,
                const T* __restrict__ grad_output, float* __restrict__ sums, int64_t sums_stride) {
  const int taps = taps_of(p);
  // Which tile, group, slice and image.
  const uint32_t above_x = w.tiles_x.quotient(blockIdx.x), above_y = w.tiles_y.quotient(above_x);
  const uint32_t above_slice = w.by_slices.quotient(above_y);
  const int64_t n = w.groups.quotient(above_slice);
  const int g = int(above_slice - uint32_t(n) * w.groups.divisor), slice = int(above_y - above_slice * w.by_slices.divisor);
  const int tile_x = int(blockIdx.x - above_x * w.tiles_x.divisor) * w.tile_w;
  const int tile_y = int(above_x - above_y * w.tiles_y.divisor) * w.tile_h;
  // The window stays inside the map.
  const int window_x = int(max(int64_t(0), min(base_x(p, tile_x) + w.reach_x, p.W - w.window_w)));
  const int window_y = int(max(int64_t(0), min(base_y(p, tile_y) + w.reach_y, p.H - w.window_h)));

  const int cells = w.window_w * w.window_h, cell_length = w.lanes * N;
  float* window = reinterpret_cast<float*>(dynamic_shared());  // (cells + kClasses, lanes, N)
  Share<float>* shares = reinterpret_cast<Share<float>*>(window + (cells + kClasses) * cell_length);  // (kChunk, classes)
  const int parity = w.by_lanes.quotient(threadIdx.x), lane = threadIdx.x - parity * w.lanes;
  const int unit = slice * w.lanes + lane, channel = g * int(p.D) + unit * N;
  const bool active = parity < kClasses && unit < int(p.D) / N;
  const int64_t first_output = n * p.Ho * p.Wo;
  const T* runs = offset_mask + first_output * p.offset_mask_stride + g * 3 * taps;
  const T* gradients = grad_output + first_output * p.output_stride + channel;
  float* sums_map = sums + n * p.H * p.W * sums_stride + channel;

  for (int i = threadIdx.x; i < (cells + kClasses) * cell_length; i += blockDim.x) window[i] = 0;

  // The output gradients of the tile's pixels one after the other, each loaded while the one before is at work.
  float next_gradient[N] = {};
  const auto load_next = [&](int pixel) {
    const int row = w.by_width.quotient(pixel), wo = tile_x + pixel - row * w.tile_w, ho = tile_y + row;
    if (active && row < w.tile_h && wo < int(p.Wo) && ho < int(p.Ho))
      load<T, N>(at_pixel(gradients, output_pixel(p, ho, wo), p.output_stride), next_gradient);
  };
  load_next(0);

  const int pixels = w.tile_w * w.tile_h;
  float* own_sums = window + lane * N;                                // of the first cell
  const uint32_t nowhere = uint32_t((cells + parity) * cell_length);  // of this thread's class
  for (int first = 0; first < pixels; first += w.chunk_pixels) {
    const int count = min(w.chunk_pixels, pixels - first);
    for (int i = threadIdx.x; i < count * w.row; i += blockDim.x) {
      const int at = w.by_row.quotient(i), pixel = first + at, k = i - at * w.row, row = w.by_width.quotient(pixel);
      const int wo = tile_x + pixel - row * w.tile_w, ho = tile_y + row;
      Share<float>* mine = shares + i * kClasses;
#pragma unroll
      for (int c = 0; c < kClasses; ++c) mine[c] = {0, uint32_t((cells + c) * cell_length)};
      if (k >= taps || wo >= int(p.Wo) || ho >= int(p.Ho)) continue;
      const T* run = at_pixel(runs, output_pixel(p, ho, wo), p.offset_mask_stride);
      const SoftmaxNorm<float> norm = p.softmax ? softmax_norm(run, taps) : SoftmaxNorm<float>{};
      const Tap<float> tap = read_tap(p, w.by_kernel_h, run, k, taps, ho, wo, norm);
      if (!tap.used) continue;
      visit_corners(tap, [&](int c, int x, int y, float weight) {
        if (x < 0 || y < 0 || x >= int(p.W) || y >= int(p.H)) return;
        const int in_x = x - window_x, in_y = y - window_y;
        const bool near = in_x >= 0 && in_y >= 0 && in_x < w.window_w && in_y < w.window_h;
        mine[c] = {weight, near ? uint32_t((in_y * w.window_w + in_x) * cell_length)
                                : kFar | (uint32_t(y) * uint32_t(p.W) + uint32_t(x))};
      });
    }
    __syncthreads();
    if (active) {
      const Share<float>* share = shares + parity;
      for (int pixel = first; pixel < first + count; ++pixel) {
        float gradient[N];
#pragma unroll
        for (int c = 0; c < N; ++c) gradient[c] = next_gradient[c];
        load_next(pixel + 1);
        for (int k = 0; k < w.row; k += kAhead, share += kAhead * kClasses) {
          Share<float> ahead[kAhead];
          uint32_t farthest = 0;
#pragma unroll
          for (int j = 0; j < kAhead; ++j) {
            ahead[j] = share[j * kClasses];
            farthest = max(farthest, ahead[j].place);
          }
#pragma unroll
          for (int j = 0; j < kAhead; ++j) add_share(own_sums + min(ahead[j].place, nowhere), ahead[j].weight, gradient);
          if (farthest < kFar) continue;
          for (int j = 0; j < kAhead; ++j) {
            const Share<float> far = share[j * kClasses];
            if (far.place < kFar) continue;
            float part[N];
#pragma unroll
            for (int c = 0; c < N; ++c) part[c] = far.weight * gradient[c];
            add_if(true, sums_map + uint64_t(far.place & ~kFar) * uint64_t(sums_stride), part);
          }
        }
      }
    }
    __syncthreads();
  }

  if (!active) return;
  for (int cell = parity; cell < cells; cell += kClasses) {
    float sum[N];
#pragma unroll
    for (int c = 0; c < N; ++c) sum[c] = window[cell * cell_length + lane * N + c];
    const bool touched = sum[0] != 0 || sum[1] != 0 || sum[2] != 0 || sum[3] != 0;  // NaN is
    const int row = w.by_window_w.quotient(cell), column = cell - row * w.window_w;
    const uint32_t at = uint32_t(window_y + row) * uint32_t(p.W) + uint32_t(window_x + column);
    add_if(touched, sums_map + uint64_t(at) * uint64_t(sums_stride), sum);
  }
}

template <class T>
int32_t run(const BackwardCall& call, const Windows& w, float* sums, int64_t sums_stride) {
  const dcnv4_problem& p = call.p;
  const int64_t blocks = p.N * p.G * w.slices * w.tiles_x.divisor * w.tiles_y.divisor;
  return launch(merge_tiles<T>, blocks, int(round_up(kClasses * w.lanes, kWarp)), shared_bytes(w), call.stream, p, w,
                static_cast<const T*>(call.offset_mask), static_cast<const T*>(call.grad_output), sums, sums_stride);
}

}  // namespace

bool can_scatter_tiled(const dcnv4_problem& p) { return p.dtype != DCNV4_FLOAT64 && plan_windows(p).lanes > 0; }

int32_t scatter_tiled(const BackwardCall& call, float* sums, int64_t sums_stride) {
  const Windows w = plan_windows(call.p);
  switch (call.p.dtype) {
    case DCNV4_FLOAT32:
      return run<float>(call, w, sums, sums_stride);
    case DCNV4_BFLOAT16:
      return run<bf16>(call, w, sums, sums_stride);
    case DCNV4_FLOAT16:
      return run<f16>(call, w, sums, sums_stride);
    default:
      return DCNV4_NO_KERNEL;
  }
}

}  // namespace dcnv4
