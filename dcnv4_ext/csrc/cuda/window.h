// Cells that many taps look at, kept in shared memory.
//
// A block takes a tile of output pixels, one group and a slice of its channels, and holds the cells around the tile, the
// window: each is fetched once for some thirty-six reads. A cell is `units` pieces of 16 bytes; those of one cell are
// neighbours, those of the next follow. Cells outside the map are zero, one row and column of them is all that taps can reach.
// Taps that leave the window should be rare (kMargin); they go to global memory by themselves.
//
// Positions and weights are worked out by warps for themselves, one tap a thread, a batch of pixels at a time.
#pragma once
#include <cmath>

#include "launch.h"

namespace dcnv4 {

constexpr int kCorners = 4;                                 // of a tap
constexpr int kBatch = 8;                                   // pixels whose taps a warp works out at once, at most
constexpr int kMostWindowThreads = 512, kWindowBlocks = 2;  // of a block; blocks of so many that have the registers they need
constexpr int kSlots = 64;                                  // taps that backward's warps work out at once: of 7 or 8 pixels
constexpr int kAround = 1;                                  // cells of zeros on each side of the map
constexpr int kMargin = 6;  // cells beyond the reach of zero offsets, on each side; more where offsets are scaled up

struct Window {
  int32_t tile_w, tile_h, pixels;  // of the output
  int32_t width, height, pitch;    // cells; of a row in memory an even number
  int32_t slices;                  // of a group's channels
  int32_t threads;
  int64_t reach_x, reach_y;  // first cell relative to the base of the tile's first pixel
  int64_t blocks, shared;    // of the launch; shared memory in bytes
  int32_t base_x, base_y;    // of output pixel 0
  float scale, limit_x, limit_y;
  uint32_t run_bytes, value_bytes, output_bytes;  // of a pixel of offset_mask, of value, of the output
  Divisor by_tile_w, by_width, by_kernel_h, tiles_x, tiles_y, by_slices, groups;
};

// The window of a tile of `pixels` along one axis: from `reach` on, `cells` long.
struct Span {
  int64_t reach, cells;
};

inline Span span_of(int64_t pixels, int64_t stride, int64_t dilation, int64_t kernel, double scale, int64_t size) {
  const double low = double(-(dilation * (kernel - 1) / 2)) * scale;
  const double high = double(dilation * (kernel - 1) - dilation * (kernel - 1) / 2) * scale;
  const int64_t margin = int64_t(std::ceil(kMargin * std::max(1.0, std::fabs(scale))));
  const int64_t first = int64_t(std::floor(std::min(low, high))) - margin;
  const int64_t last = (pixels - 1) * stride + int64_t(std::ceil(std::max(low, high))) + 1 + margin;
  return {first, std::min(last - first + 1, size + 2 * kAround)};
}

// What a kernel keeps in shared memory: bytes a cell, a pixel, a warp, and once; rows of cells behind the window.
struct WindowBytes {
  int64_t cell, pixel, warp, fixed, rows;
  int64_t most_pixels_a_warp = INT32_MAX;
  bool whole = false;                                                 // one tile must do for the map
  int64_t most_threads = kMostWindowThreads, blocks = kWindowBlocks;  // of a block; blocks of so many that have the registers
};

// The tile and the block that cost least; blocks = 0 where no window is worth while.
inline Window plan_window(const dcnv4_problem& p, int64_t slices, const WindowBytes& bytes) {
  Window best{};
  const double scale = p.offset_scale;
  if (!(std::fabs(scale) <= 16)) return best;
  // Within an image these kernels count bytes in 32 bits.
  const int64_t element = element_bytes(p.dtype), farthest = UINT32_MAX / element;
  if (p.value_stride > farthest / (p.H * p.W) || p.offset_mask_stride > farthest / (p.Ho * p.Wo) ||
      p.output_stride > farthest / (p.Ho * p.Wo))
    return best;
  const int64_t processors = std::max(1, multiprocessors(p.device)), most = shared_limit(p.device),
                all = shared_total(p.device);
  double least = 0;
  for (const int64_t edge : {64, 32, 16, 8, 4}) {
    const int64_t tile_w = even_edge(p.Wo, edge), tile_h = even_edge(p.Ho, edge), pixels = tile_w * tile_h;
    const Span x = span_of(tile_w, p.stride_w, p.dilation_w, p.kernel_w, scale, p.W);
    const Span y = span_of(tile_h, p.stride_h, p.dilation_h, p.kernel_h, scale, p.H);
    const int64_t tiles_x = divide_up(p.Wo, tile_w), tiles_y = divide_up(p.Ho, tile_h);
    const int64_t batches = divide_up(pixels, kBatch), blocks = tiles_x * tiles_y * p.N * p.G * slices;
    if (bytes.whole) {
      if (tiles_x * tiles_y > 1 || x.cells < p.W + 2 * kAround || y.cells < p.H + 2 * kAround) continue;
      // A few blocks with much to do each: the kernels without a window spread it further.
      if (blocks < processors && pixels > 256 && !forced(p, kForceWindow)) continue;
    }
    if (x.cells >= most / bytes.cell / y.cells || blocks > INT32_MAX) continue;
    const int64_t pitch = round_up(x.cells, 2), cells = pitch * y.cells;
    // Worth it where fetching a cell is shared by several of the reads it saves.
    if (cells > 4 * pixels * taps_of(p) && !forced(p, kForceWindow)) continue;
    for (const int64_t warps : {16, 14, 12, 8, 6, 4, 2}) {
      if ((warps > batches && warps > 2) || warps * kWarp > bytes.most_threads) continue;
      const int64_t shared =
          (cells + bytes.rows * pitch) * bytes.cell + pixels * bytes.pixel + warps * bytes.warp + bytes.fixed;
      if (shared > most || pixels > warps * bytes.most_pixels_a_warp) continue;
      const int64_t fit = std::min<int64_t>(all / (shared + 1024), bytes.blocks * bytes.most_threads / (warps * kWarp)),
                    load = divide_up(blocks, processors);
      if (fit < 1) continue;
      // In units of a batch's work, constants fitted to an H200: rounds of batches, the warps' starts, cells to fetch, the
      // block's start; slower the fewer warps there are to hide latencies.
      const double work = double(divide_up(batches, warps) * warps) + 0.8 * double(warps) + 0.012 * double(cells) + 4;
      const double busy = std::min(1.0, double(std::min(fit, load) * warps) / 32);
      const double cost = double(load) * work / busy;
      if (best.blocks != 0 && cost >= least) continue;
      least = cost;
      best.tile_w = int32_t(tile_w);
      best.tile_h = int32_t(tile_h);
      best.pixels = int32_t(pixels);
      best.width = int32_t(x.cells);
      best.height = int32_t(y.cells);
      best.pitch = int32_t(pitch);
      best.threads = int32_t(warps * kWarp);
      best.reach_x = x.reach;
      best.reach_y = y.reach;
      best.blocks = blocks;
      best.shared = shared;
      best.tiles_x = divisor_of(tiles_x);
      best.tiles_y = divisor_of(tiles_y);
    }
  }
  if (best.blocks == 0) return best;
  best.slices = int32_t(slices);
  best.scale = float(scale);
  best.limit_x = float(int(p.W));
  best.limit_y = float(int(p.H));
  best.run_bytes = uint32_t(p.offset_mask_stride * element);
  best.value_bytes = uint32_t(p.value_stride * element);
  best.output_bytes = uint32_t(p.output_stride * element);
  best.base_x = int32_t(base_x(p, 0));
  best.base_y = int32_t(base_y(p, 0));
  best.by_tile_w = divisor_of(best.tile_w);
  best.by_width = divisor_of(best.width);
  best.by_kernel_h = divisor_of(p.kernel_h);
  best.by_slices = divisor_of(slices);
  best.groups = divisor_of(p.G);
  return best;
}

// Which tile, group, slice and image a block has, and where its window lies: inside the map and kAround cells beyond.
struct WindowOrigin {
  int64_t n;
  int g, slice;
  int tile_x, tile_y;  // first output pixel
  int x, y;            // first cell
};

DCNV4_DEVICE WindowOrigin window_origin(const dcnv4_problem& p, const Window& w) {
  const uint32_t above_x = w.tiles_x.quotient(blockIdx.x), above_y = w.tiles_y.quotient(above_x);
  const uint32_t above_slice = w.by_slices.quotient(above_y);
  WindowOrigin o;
  o.n = w.groups.quotient(above_slice);
  o.g = int(above_slice - uint32_t(o.n) * w.groups.divisor);
  o.slice = int(above_y - above_slice * w.by_slices.divisor);
  o.tile_x = int(blockIdx.x - above_x * w.tiles_x.divisor) * w.tile_w;
  o.tile_y = int(above_x - above_y * w.tiles_y.divisor) * w.tile_h;
  o.x = int(max(int64_t(-kAround), min(base_x(p, o.tile_x) + w.reach_x, p.W + kAround - w.width)));
  o.y = int(max(int64_t(-kAround), min(base_y(p, o.tile_y) + w.reach_y, p.H + kAround - w.height)));
  return o;
}

// Starts fetching the window: UNITS pieces of 16 bytes a cell from `map` on.
template <int UNITS>
DCNV4_DEVICE void fetch_window(const dcnv4_problem& p, const Window& w, const WindowOrigin& o, const void* map, char* window) {
  const int lane = int(threadIdx.x) % kWarp, warps = int(blockDim.x) / kWarp;
  for (int row = int(threadIdx.x) / kWarp; row < w.height; row += warps) {
    const int y = o.y + row;
    const bool row_inside = y >= 0 && y < int(p.H);
    char* to = window + (row * w.pitch * UNITS + lane) * 16;
    const char* from = static_cast<const char*>(map) + (uint32_t(row_inside ? y : 0) * uint32_t(p.W) * w.value_bytes);
#pragma unroll 1  // a remainder of a longer step would cost as much as the row
    for (int i = lane; i < w.width * UNITS; i += kWarp, to += kWarp * 16) {
      const int x = o.x + i / UNITS;
      if (row_inside && uint32_t(x) < uint32_t(p.W))
        copy_async(to, from + (uint32_t(x) * w.value_bytes + uint32_t(i % UNITS) * 16));
      else
        *reinterpret_cast<uint4*>(to) = make_uint4(0, 0, 0, 0);
    }
  }
}

// Zeros in the first two cells of the two rows behind the window, for taps that look nowhere.
template <int CELL>
DCNV4_DEVICE void clear_nowhere(char* nowhere, uint32_t pitch_bytes) {
  constexpr uint32_t pieces = 2 * CELL / 16;
  if (threadIdx.x < 2 * pieces)
    *reinterpret_cast<uint4*>(nowhere + threadIdx.x / pieces * pitch_bytes + threadIdx.x % pieces * 16) =
        make_uint4(0, 0, 0, 0);
}

// Pixel `index` of the tile; where there is none, the tile's first instead.
struct TilePixel {
  int wo, ho;
  uint32_t number;  // in the output map
  bool live;
};
DCNV4_DEVICE TilePixel tile_pixel(const dcnv4_problem& p, const Window& w, const WindowOrigin& o, int index) {
  const int row = w.by_tile_w.quotient(index);
  TilePixel pixel{o.tile_x + index - row * w.tile_w, o.tile_y + row, 0, false};
  pixel.live = index < w.pixels && pixel.wo < int(p.Wo) && pixel.ho < int(p.Ho);
  if (!pixel.live) pixel.wo = o.tile_x, pixel.ho = o.tile_y;
  pixel.number = output_pixel(p, pixel.ho, pixel.wo);
  return pixel;
}

// What a thread that works out taps needs to know of its own, whatever the batch: which pixel of it, which tap, where that one
// lies in the grid, where its numbers lie in the pixel's (in bytes).
struct TapSlot {
  int of, k;
  float grid_x, grid_y;
  uint32_t offsets, weight;
};
template <class T, int TAPS>
DCNV4_DEVICE TapSlot tap_slot(const dcnv4_problem& p, const Window& w, int slot) {
  TapSlot found;
  found.of = slot / TAPS;
  found.k = slot - found.of * TAPS;
  const int index = tap_index(p, found.k), column = w.by_kernel_h.quotient(index);
  found.grid_x = float(column_grid(p, column));
  found.grid_y = float(row_grid(p, index - column * p.kernel_h));
  found.offsets = uint32_t(2 * found.k * int(sizeof(T)));
  found.weight = uint32_t((2 * TAPS + found.k) * int(sizeof(T)));
  return found;
}

// A tap of a batch, as the thread that works it out sees it.
struct WindowTap {
  float lx, ly, weight;
  int x, y;         // cell in the window
  bool used, near;  // near: its four corners lie in the window
};

// Which of a tap's corners lie in the map.
struct Inside {
  bool left, right, top, bottom;
  DCNV4_DEVICE Inside(const dcnv4_problem& p, const WindowOrigin& o, const WindowTap& tap) {
    const int x = tap.x + o.x, y = tap.y + o.y;
    left = x >= 0;
    right = x + 1 < int(p.W);
    top = y >= 0;
    bottom = y + 1 < int(p.H);
  }
};

// The tap of a pixel; `runs` is where the numbers of the image's first pixel and this group start. The same arithmetic as
// read_tap's.
template <class T, int TAPS>
DCNV4_DEVICE WindowTap window_tap(const dcnv4_problem& p, const Window& w, const WindowOrigin& o, const TilePixel& pixel,
                                  const T* runs, const TapSlot& slot) {
  const char* bytes = reinterpret_cast<const char*>(runs);
  const uint32_t run = pixel.number * w.run_bytes;
  const T* offsets = reinterpret_cast<const T*>(bytes + (run + slot.offsets));
  const float x = float(pixel.wo * p.stride_w + w.base_x) + (slot.grid_x + load_one(offsets)) * w.scale;
  const float y = float(pixel.ho * p.stride_h + w.base_y) + (slot.grid_y + load_one(offsets + 1)) * w.scale;
  WindowTap tap;
  tap.weight = load_one(reinterpret_cast<const T*>(bytes + (run + slot.weight)));
  if (p.softmax) {
    const SoftmaxNorm<float> norm = softmax_norm(reinterpret_cast<const T*>(bytes + run), TAPS);
    tap.weight = exp(tap.weight - norm.peak) * norm.scale;
  }
  tap.used = pixel.live && x > -1.0f && y > -1.0f && x < w.limit_x && y < w.limit_y;
  const float x_floor = floorf(x), y_floor = floorf(y);
  tap.lx = x - x_floor;
  tap.ly = y - y_floor;
#if defined(__CUDA_ARCH__)
  tap.x = __float2int_rd(x) - o.x;  // of anything: what is out of range is not used
  tap.y = __float2int_rd(y) - o.y;
#else
  tap.x = tap.used ? int(x_floor) - o.x : 0;
  tap.y = tap.used ? int(y_floor) - o.y : 0;
#endif
  tap.near = tap.used && uint32_t(tap.x) < uint32_t(w.width - 1) && uint32_t(tap.y) < uint32_t(w.height - 1);
  return tap;
}

// The taps of a batch of PIXELS pixels, 32 at a time, by the threads of a warp: visit(round, slot, tap), where an unused tap
// has a weight of zero. What has left the window gets a bit in `far`, in the order of the taps.
template <class T, int TAPS, int PIXELS, int ROUNDS, class Visit>
DCNV4_DEVICE void work_out_taps(const dcnv4_problem& p, const Window& w, const WindowOrigin& o, const T* runs, int batch,
                                const TapSlot (&slots)[ROUNDS], uint32_t (&far)[ROUNDS], Visit visit) {
  static_assert(ROUNDS == (PIXELS * TAPS + kWarp - 1) / kWarp, "every tap has a thread");
  const int lane = int(threadIdx.x) % kWarp;
#pragma unroll
  for (int r = 0; r < ROUNDS; ++r) {
    const bool whole = (r + 1) * kWarp <= PIXELS * TAPS, has_slot = whole || r * kWarp + lane < PIXELS * TAPS;
    const TilePixel pixel = tile_pixel(p, w, o, batch * PIXELS + slots[r].of);
    WindowTap tap = window_tap<T, TAPS>(p, w, o, pixel, runs, slots[r]);
    far[r] = __ballot_sync(0xffffffffu, has_slot && tap.used && !tap.near);
    if (!tap.used) tap.lx = tap.ly = tap.weight = 0;
    if (has_slot) visit(r, slots[r], tap);
  }
}

// The far taps of pixel `of`, from bit 0 on.
template <int TAPS, int ROUNDS>
DCNV4_DEVICE uint32_t far_taps(const uint32_t (&far)[ROUNDS], int of) {
  const int first = of * TAPS;
  uint64_t bits = uint64_t(far[1]) << 32 | far[0];
  if (ROUNDS > 2 && first >= kWarp) bits = uint64_t(far[ROUNDS - 1]) << 32 | far[1];
  return uint32_t(bits >> (ROUNDS > 2 && first >= kWarp ? first - kWarp : first)) & ((1u << TAPS) - 1);
}

// How kernels whose threads hold 16 bytes each cut a group's channels: slices of `bytes`, of 128, 64 or 32; 0 where D does not
// fit.
struct Slicing {
  int64_t bytes, slices;
};
inline Slicing slicing_of(const dcnv4_problem& p) {
  const int64_t group = p.D * element_bytes(p.dtype);
  for (const int64_t bytes : {128, 64, 32})
    if (group % bytes == 0) return {bytes, group / bytes};
  return {0, 0};
}

}  // namespace dcnv4
