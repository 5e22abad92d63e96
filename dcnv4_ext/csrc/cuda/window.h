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
#include <cstring>

#include "bulk.h"

namespace dcnv4 {

constexpr int kCorners = 4;                                 // of a tap
constexpr int kBatch = 8;                                   // pixels whose taps a warp works out at once
constexpr int kMostWindowThreads = 512, kWindowBlocks = 2;  // of a block; blocks of so many that have the registers they need
constexpr int kSlots = 64;                                  // taps that backward's warps work out at once: of 7 or 8 pixels
constexpr int kAround = 1;                                  // cells of zeros on each side of the map
constexpr int kMostTaps = 9;
constexpr int64_t kMostEdge = int64_t(1) << 21;  // of a map: split_position holds for twice that
constexpr int kMargin = 6;  // cells beyond the reach of zero offsets, on each side; more where offsets are scaled up

struct Window {
  int32_t tile_w, tile_h, pixels;  // of the output
  int32_t width, height, pitch;    // cells; of a row in memory an even number
  int32_t slices;                  // of a group's channels
  int32_t threads;
  int64_t blocks, shared;                          // of the launch; shared memory in bytes
  int64_t resident;                                // blocks that the device has room for at once
  int32_t base_x, base_y;                          // of output pixel 0
  int32_t first_x, first_y, last_x, last_y;        // first cell of the first tile's window, were there no edge; of any window
  uint64_t value_image, mask_image, output_image;  // bytes
  float scale, limit_x, limit_y;
  float grid_x[kMostTaps], grid_y[kMostTaps];     // of each tap
  uint32_t run_bytes, value_bytes, output_bytes;  // of a pixel of offset_mask, of value, of the output
  uint32_t row_bytes;                             // of a row of value
  Divisor by_tile_w, by_width, tiles_x, tiles_y, by_slices, groups;
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

// What a block's time is made of, fitted to an H200, in units of a batch's work where all warps are busy.
struct WindowCost {
  double round;   // how long a warp takes over a batch, waiting included
  double warp;    // how much longer for each warp that the others of its block wait for
  double cell;    // work on a cell of the window: fetching it, or sorting into it and adding its sum
  double rounds;  // phases without batches, each as long as a round
  double dead;    // work on the pixels that a batch lacks, as a share of what they would cost
};

// What a kernel keeps in shared memory: bytes a cell, a pixel, a warp, and once; rows of cells behind the window.
struct WindowBytes {
  int64_t cell, pixel, warp, fixed, rows;
  int64_t copied = 1;  // cells of a row that are fetched at once
  int64_t most_pixels_a_warp = INT32_MAX;
  int64_t whole = 0;          // where not 0: one tile must do for the map, of at most so many pixels
  int64_t most_of_few = 256;  // pixels of such a tile where there are fewer blocks than multiprocessors
  int64_t most_threads = kMostWindowThreads, blocks = kWindowBlocks;  // of a block; blocks of so many that have the registers
  int64_t batch = kBatch;                                             // pixels of a batch
  WindowCost cost{8, 0, 0.008, 0, 0};
};

// What plans depend on of a device.
struct WindowDevice {
  int64_t processors, most, all;  // shared memory that a block may ask for, and that a multiprocessor has
};

// Calls `visit(tile)` for the even edges of tiles of `size` pixels, from 64 down to 4 by eighths.
template <class Visit>
void visit_edges(int64_t size, Visit visit) {
  int64_t before = 0;
  for (int64_t edge = 64; edge >= 4; edge -= std::max<int64_t>(1, edge / 8)) {
    const int64_t tile = even_edge(size, edge);
    if (tile != before) visit(tile);
    before = tile;
  }
}

// The tile and the block that cost least; blocks = 0 where no window is worth while.
inline Window find_window(const dcnv4_problem& p, int64_t slices, const WindowBytes& bytes, const WindowDevice& device) {
  Window best{};
  const double scale = p.offset_scale;
  if (!(std::fabs(scale) <= 16) || p.H > kMostEdge || p.W > kMostEdge) return best;
  // Within an image these kernels count bytes in 32 bits.
  const int64_t element = element_bytes(p.dtype), farthest = UINT32_MAX / element;
  constexpr int64_t far_off = int64_t(1) << 30;  // positions are 32-bit numbers
  const int64_t first_x = base_x(p, 0), first_y = base_y(p, 0);
  if (std::abs(first_x) > far_off || std::abs(first_y) > far_off || p.Wo > far_off / p.stride_w || p.Ho > far_off / p.stride_h)
    return best;
  if (p.value_stride > farthest / (p.H * p.W) || p.offset_mask_stride > farthest / (p.Ho * p.Wo) ||
      p.output_stride > farthest / (p.Ho * p.Wo))
    return best;
  double least = 0;
  const auto consider = [&](int64_t tile_w, int64_t tile_h) {
    const int64_t pixels = tile_w * tile_h;
    const Span x = span_of(tile_w, p.stride_w, p.dilation_w, p.kernel_w, scale, p.W);
    const Span y = span_of(tile_h, p.stride_h, p.dilation_h, p.kernel_h, scale, p.H);
    const int64_t tiles_x = divide_up(p.Wo, tile_w), tiles_y = divide_up(p.Ho, tile_h);
    const int64_t batches = divide_up(pixels, bytes.batch), blocks = tiles_x * tiles_y * p.N * p.G * slices;
    const double alive = double(p.Wo * p.Ho) / double(tiles_x * tiles_y * bytes.batch),
                 fetched = double(round_up(x.cells, bytes.copied) * y.cells);
    if (bytes.whole) {
      if (tiles_x * tiles_y > 1 || pixels > bytes.whole || x.cells < p.W + 2 * kAround || y.cells < p.H + 2 * kAround) return;
      // A few blocks with much to do each: other kernels or tiles spread it further.
      if (blocks < device.processors && pixels > bytes.most_of_few && !forced(p, kForceWindow)) return;
    }
    if (x.cells >= device.most / bytes.cell / y.cells || blocks > INT32_MAX) return;
    const int64_t pitch = round_up(x.cells, 2), cells = pitch * y.cells;
    // Worth it where fetching a cell is shared by several of the reads it saves.
    if (cells > 4 * pixels * taps_of(p) && !forced(p, kForceWindow)) return;
    for (const int64_t warps : {16, 14, 12, 8, 6, 4, 2}) {
      if ((warps > batches && warps > 2) || warps * kWarp > bytes.most_threads) continue;
      const int64_t shared =
          (cells + bytes.rows * pitch) * bytes.cell + pixels * bytes.pixel + warps * bytes.warp + bytes.fixed;
      if (shared > device.most || pixels > warps * bytes.most_pixels_a_warp) continue;
      const int64_t fit = std::min<int64_t>(device.all / (shared + 1024), bytes.blocks * bytes.most_threads / (warps * kWarp)),
                    load = divide_up(blocks, device.processors);
      if (fit < 1) continue;
      // In units of a batch's work. What a multiprocessor has to do: its blocks' pixels and cells. And what it waits for, once
      // a wave of blocks that fit together: rounds of batches, one after the other. Blocks end at different times, so both lie
      // between an even share and whole numbers of blocks and waves: in the middle. A block's warps count in fours, one for
      // each scheduler.
      const double share = double(blocks) / double(device.processors),
                   waves = (std::max(1.0, share / double(fit)) + double(divide_up(load, fit))) / 2,
                   work = alive + bytes.cost.dead * (double(batches) - alive) + bytes.cost.cell * fetched,
                   rounds = double(divide_up(batches, warps)) * (1 + bytes.cost.warp * double(round_up(warps, 4)));
      const double cost = (share + double(load)) / 2 * work + waves * bytes.cost.round * (rounds + bytes.cost.rounds);
      if (best.blocks != 0 && cost >= least) continue;
      least = cost;
      best.tile_w = int32_t(tile_w);
      best.tile_h = int32_t(tile_h);
      best.pixels = int32_t(pixels);
      best.width = int32_t(x.cells);
      best.height = int32_t(y.cells);
      best.pitch = int32_t(pitch);
      best.threads = int32_t(warps * kWarp);
      best.first_x = int32_t(first_x + x.reach);
      best.first_y = int32_t(first_y + y.reach);
      best.blocks = blocks;
      best.shared = shared;
      best.resident = fit * device.processors;
      best.tiles_x = divisor_of(tiles_x);
      best.tiles_y = divisor_of(tiles_y);
    }
  };
  visit_edges(p.Wo, [&](int64_t tile_w) { visit_edges(p.Ho, [&](int64_t tile_h) { consider(tile_w, tile_h); }); });
  if (best.blocks == 0) return best;
  best.slices = int32_t(slices);
  best.scale = float(scale);
  best.limit_x = float(int(p.W));
  best.limit_y = float(int(p.H));
  for (int k = 0; k < std::min(taps_of(p), kMostTaps); ++k) {
    int x, y;
    tap_grid(p, k, x, y);
    best.grid_x[k] = float(x);
    best.grid_y[k] = float(y);
  }
  best.run_bytes = uint32_t(p.offset_mask_stride * element);
  best.value_bytes = uint32_t(p.value_stride * element);
  best.row_bytes = uint32_t(p.W * p.value_stride * element);
  best.output_bytes = uint32_t(p.output_stride * element);
  best.base_x = int32_t(first_x);
  best.base_y = int32_t(first_y);
  best.last_x = int32_t(p.W + kAround - best.width);
  best.last_y = int32_t(p.H + kAround - best.height);
  best.value_image = uint64_t(p.H * p.W * p.value_stride * element);
  best.mask_image = uint64_t(p.Ho * p.Wo * p.offset_mask_stride * element);
  best.output_image = uint64_t(p.Ho * p.Wo * p.output_stride * element);
  best.by_tile_w = divisor_of(best.tile_w);
  best.by_width = divisor_of(best.width);
  best.by_slices = divisor_of(slices);
  best.groups = divisor_of(p.G);
  return best;
}

// The same, of a problem that this thread has asked for before without looking anew, which takes microseconds.
inline Window plan_window(const dcnv4_problem& p, int64_t slices, const WindowBytes& bytes) {
  struct Question {
    dcnv4_problem problem;
    WindowBytes bytes;
    WindowDevice device;
    int64_t slices;
  };
  static_assert(sizeof(dcnv4_problem) == 16 * sizeof(int32_t) + 13 * sizeof(int64_t) + sizeof(double) &&
                    sizeof(Question) == sizeof(dcnv4_problem) + sizeof(WindowBytes) + sizeof(WindowDevice) + sizeof(int64_t),
                "without gaps, to be compared byte by byte");
  struct Answer {
    Question asked;
    Window window;
  };
  constexpr uint64_t kKept = 32;
  static thread_local Answer answers[kKept];
  const Question question{
      p, bytes, {std::max(1, multiprocessors(p.device)), shared_limit(p.device), shared_total(p.device)}, slices};
  uint64_t hash = 0;
  for (const int64_t number : {p.N, p.H, p.W, p.G, p.D, p.Ho, p.Wo, int64_t(p.dtype), bytes.cell, bytes.pixel, bytes.warp})
    hash = (hash ^ uint64_t(number)) * 0x9e3779b97f4a7c15u;
  Answer& kept = answers[(hash >> 32) % kKept];
  if (memcmp(&kept.asked, &question, sizeof question) != 0) kept = {question, find_window(p, slices, bytes, question.device)};
  return kept.window;
}

// This thread's warp. The compiler sees of a shuffle that it is the same for all of its threads.
DCNV4_DEVICE int warp_index() { return __shfl_sync(0xffffffffu, int(threadIdx.x / kWarp), 0); }

// A thread's number, to be held in a register: what a shuffle gave the compiler keeps, what it can work out it works out anew.
template <class Number>
DCNV4_DEVICE Number keep(Number number) {
  return __shfl_sync(0xffffffffu, number, int(threadIdx.x % kWarp));
}

// Which tile, group, slice and image block `block` has, and where its window lies: inside the map and kAround cells beyond.
struct WindowOrigin {
  uint32_t n;
  int g, slice;
  int tile_x, tile_y;  // first output pixel
  int x, y;            // first cell
};

DCNV4_DEVICE WindowOrigin window_origin(const dcnv4_problem& p, const Window& w, uint32_t block = blockIdx.x) {
  const uint32_t above_x = w.tiles_x.quotient(block), above_y = w.tiles_y.quotient(above_x);
  const uint32_t above_slice = w.by_slices.quotient(above_y);
  WindowOrigin o;
  o.n = w.groups.quotient(above_slice);
  o.g = int(above_slice - o.n * w.groups.divisor);
  o.slice = int(above_y - above_slice * w.by_slices.divisor);
  o.tile_x = int(block - above_x * w.tiles_x.divisor) * w.tile_w;
  o.tile_y = int(above_x - above_y * w.tiles_y.divisor) * w.tile_h;
  o.x = max(-kAround, min(o.tile_x * p.stride_w + w.first_x, w.last_x));
  o.y = max(-kAround, min(o.tile_y * p.stride_h + w.first_y, w.last_y));
  return o;
}

// The image of a block: `bytes` each.
template <class T>
DCNV4_DEVICE T* image_of(T* first, const WindowOrigin& o, uint64_t bytes) {
  using Bytes = typename std::conditional<std::is_const<T>::value, const char, char>::type;
  return reinterpret_cast<T*>(reinterpret_cast<Bytes*>(first) + o.n * bytes);
}

// Starts fetching the window: UNITS pieces of 16 bytes a cell from `map` on. A warp takes rows; outside the map its pointers
// are off the tensor, and not read. They are carried along, for the compiler would work them out anew in every row.
template <int UNITS>
DCNV4_DEVICE void fetch_window(const dcnv4_problem& p, const Window& w, const WindowOrigin& o, const void* map, char* window) {
  constexpr int step = kWarp / UNITS, copies = 4;  // cells a copy; copies at once
  const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp), warps = int(blockDim.x / kWarp);
  const int first = o.x + lane / UNITS, end = o.x + w.width, last_row = o.y + w.height;
  const char* from_row = static_cast<const char*>(map) + (int64_t(first) * int64_t(w.value_bytes) +
                                                          int64_t(o.y + warp) * int64_t(w.row_bytes) + lane % UNITS * 16);
  char* to_row = window + (warp * w.pitch * UNITS + lane) * 16;
#pragma unroll 1
  for (int y = o.y + warp; y < last_row; y += warps) {
    const bool inside = uint32_t(y) < uint32_t(p.H);
    const char* from = from_row;
    char* to = to_row;
#pragma unroll 1
    for (int x = first; x < end; x += copies * step, to += copies * kWarp * 16) {
#pragma unroll
      for (int i = 0; i < copies; ++i, from += step * w.value_bytes)
        if (x + i * step < end)
          copy_async_or_zero(inside & (uint32_t(x + i * step) < uint32_t(p.W)), to + i * kWarp * 16, from);
    }
    from_row += uint64_t(uint32_t(warps)) * w.row_bytes;
    to_row += warps * w.pitch * UNITS * 16;
  }
}

// What fetches windows of a tensor as boxes, of `cell` bytes a cell; false where it cannot be.
inline bool window_map(const dcnv4_problem& p, const Window& w, const void* value, int64_t cell, BulkMap& map) {
  if (w.pitch > kMostBox || w.height > kMostBox) return false;
  BulkSizes sizes{};
  sizes.words = uint64_t(p.G * p.D * element_bytes(p.dtype) / 4);
  sizes.width = uint64_t(p.W), sizes.height = uint64_t(p.H), sizes.images = uint64_t(p.N);
  sizes.pixel_bytes = w.value_bytes, sizes.row_bytes = w.row_bytes, sizes.image_bytes = w.value_image;
  sizes.box_words = uint32_t(cell / 4), sizes.box_width = uint32_t(w.pitch), sizes.box_height = uint32_t(w.height);
  return make_bulk_map(value, sizes, map);
}

// What fetches a tile's pixels of a tensor like the output as boxes, `bytes` of each.
inline bool output_map(const dcnv4_problem& p, const Window& w, const void* output, int64_t bytes, BulkMap& map) {
  BulkSizes sizes{};
  sizes.words = uint64_t(p.G * p.D * element_bytes(p.dtype) / 4);
  sizes.width = uint64_t(p.Wo), sizes.height = uint64_t(p.Ho), sizes.images = uint64_t(p.N);
  sizes.pixel_bytes = w.output_bytes, sizes.row_bytes = uint64_t(p.Wo) * w.output_bytes, sizes.image_bytes = w.output_image;
  sizes.box_words = uint32_t(bytes / 4), sizes.box_width = uint32_t(w.tile_w), sizes.box_height = uint32_t(w.tile_h);
  return make_bulk_map(output, sizes, map);
}

// Zeros in the first two cells of the two rows behind the window, for taps that look nowhere.
template <int CELL>
DCNV4_DEVICE void clear_nowhere(char* nowhere, uint32_t pitch_bytes) {
  constexpr uint32_t pieces = 2 * CELL / 16;
  if (threadIdx.x < 2 * pieces)
    *reinterpret_cast<uint4*>(nowhere + threadIdx.x / pieces * pitch_bytes + threadIdx.x % pieces * 16) =
        make_uint4(0, 0, 0, 0);
}

// Pixel `index` of the tile.
struct TilePixel {
  int wo, ho;
  uint32_t number;  // in the output map; where there is no such pixel, the tile's first
  bool live;
};
DCNV4_DEVICE TilePixel tile_pixel(const dcnv4_problem& p, const Window& w, const WindowOrigin& o, int index) {
  const int row = w.by_tile_w.quotient(index);
  TilePixel pixel{o.tile_x + index - row * w.tile_w, o.tile_y + row, 0, false};
  pixel.live = index < w.pixels && pixel.wo < int(p.Wo) && pixel.ho < int(p.Ho);
  pixel.number = pixel.live ? output_pixel(p, pixel.ho, pixel.wo) : output_pixel(p, o.tile_y, o.tile_x);
  return pixel;
}

// The cell of a position, relative to cell `first`, and the place inside of it, by additions alone: beside 1.5 * 2^23 a float
// has no fraction, and its lowest bits count. For positions from -1 to 2^22; of greater ones the cell is beyond every window,
// of the rest and of NaN anything. The place is from 0 to 1 whatever the position.
DCNV4_DEVICE void split_position(float position, int first, int& cell, float& place) {
#if defined(__CUDA_ARCH__)
  constexpr float whole = 12582912.0f;
  const float below = __fadd_rd(position, whole);
  cell = int(float_to_bits(below) - (0x4b400000u + uint32_t(first)));
  place = __saturatef(position - (below - whole));  // of NaN 0, by the subtraction itself
#else
  const float below = floorf(position);
  cell = below >= -1.0f && below < float(2 * kMostEdge) ? int(below) - first : INT32_MAX;
  place = fmaxf(0.0f, position - below);
#endif
}

// A tap, as the thread that works it out sees it. Of one that is neither near nor far the cell and the weight may be anything.
struct WindowTap {
  float lx, ly, weight;
  int x, y;        // cell in the window
  bool near, far;  // near: its four corners lie in the window; far: they do not, and some lie in the map
};

// Which corners of a near or far tap lie in the map.
struct Inside {
  bool left, right, top, bottom;
  DCNV4_DEVICE Inside(const dcnv4_problem& p, const WindowOrigin& o, const WindowTap& tap) {
    const int x = int(uint32_t(tap.x) + uint32_t(o.x)), y = int(uint32_t(tap.y) + uint32_t(o.y));
    left = x >= 0;
    right = x < int(p.W) - 1;
    top = y >= 0;
    bottom = y < int(p.H) - 1;
  }
};

// A tap at a position, the same arithmetic as read_tap's. With FINITE a tap whose weight is not is called far: zeros that stand
// for the outside of the map do not make it harmless.
template <bool FINITE>
DCNV4_DEVICE WindowTap tap_at(const Window& w, const WindowOrigin& o, bool live, float x, float y, float weight) {
  WindowTap tap;
  tap.weight = weight;
  split_position(x, o.x, tap.x, tap.lx);
  split_position(y, o.y, tap.y, tap.ly);
  // No branches: what is compared in vain costs less.
  const bool above = live & (x > -1.0f) & (y > -1.0f), used = above & (x < w.limit_x) & (y < w.limit_y);
  tap.near = above & (uint32_t(tap.x) < uint32_t(w.width - 1)) & (uint32_t(tap.y) < uint32_t(w.height - 1));
  if (FINITE) tap.near = tap.near & (fabsf(tap.weight) < bits_to_float(0x7f800000u));
  tap.far = used & !tap.near;
  return tap;
}

// Tap `slot % TAPS` of pixel `slot / TAPS` of a batch.
constexpr int kSlotRounds = kSlots / kWarp;
struct TapSlot {
  int of, k;
  float grid_x, grid_y;
};
// This thread's slots. With HELD they have registers of their own.
template <int TAPS, bool HELD>
DCNV4_DEVICE void find_slots(const Window& w, TapSlot (&slots)[kSlotRounds]) {
  const int lane = int(threadIdx.x % kWarp);
#pragma unroll
  for (int r = 0; r < kSlotRounds; ++r) {
    const int of = (r * kWarp + lane) / TAPS, k = r * kWarp + lane - of * TAPS;
    // The threads of a warp read nine constants, one after the other.
    slots[r] = {HELD ? keep(of) : of, HELD ? keep(k) : k, keep(w.grid_x[k]), keep(w.grid_y[k])};
  }
}

// The far taps of pixel `of`, from bit 0 on.
template <int TAPS>
DCNV4_DEVICE uint32_t far_slots(const uint32_t (&far)[kSlotRounds], int of) {
  return uint32_t((uint64_t(far[1]) << 32 | far[0]) >> (of * TAPS)) & ((1u << TAPS) - 1);
}

// The sum of `value` over this lane and those before it.
DCNV4_DEVICE int sum_of_lanes(int value) {
  const int lane = int(threadIdx.x % kWarp);
#pragma unroll
  for (int d = 1; d < kWarp; d *= 2) {
    const int other = __shfl_sync(0xffffffffu, value, (lane - d) & 31);
    if (lane >= d) value += other;
  }
  return value;
}

// ---- The numbers of offset_mask of a tile and a group, its runs, in shared memory.

// Of a pixel's place: a run of nine taps begins anywhere in 16 bytes.
template <class T, int TAPS>
constexpr int kRunBytes = (3 * TAPS * int(sizeof(T)) + (TAPS == 9 ? 16 - int(sizeof(T)) : 0) + 15) / 16 * 16;

// What fetches those of a tile as boxes; false where it cannot be.
template <class T, int TAPS>
bool runs_map(const dcnv4_problem& p, const Window& w, const void* offset_mask, BulkMap& map) {
  BulkSizes sizes{};
  sizes.words = uint64_t(divide_up(p.P * int64_t(sizeof(T)), 4));
  sizes.width = uint64_t(p.Wo), sizes.height = uint64_t(p.Ho), sizes.images = uint64_t(p.N);
  sizes.pixel_bytes = w.run_bytes, sizes.row_bytes = uint64_t(p.Wo) * w.run_bytes, sizes.image_bytes = w.mask_image;
  sizes.box_words = kRunBytes<T, TAPS> / 4, sizes.box_width = uint32_t(w.tile_w), sizes.box_height = uint32_t(w.tile_h);
  sizes.swizzled = kRunBytes<T, TAPS> == 128;
  return make_bulk_map(offset_mask, sizes, map);
}

// The runs of a block's tile and group.
template <class T, int TAPS>
class Runs {
 public:
  DCNV4_DEVICE Runs(const WindowOrigin& o, const char* at)
      : at_(at), first_byte_(o.g * 3 * TAPS * int(sizeof(T))), begin_(keep(first_byte_ % 16)) {}
  DCNV4_DEVICE int first_word() const { return first_byte_ / 16 * 4; }
  DCNV4_DEVICE float read(int pixel, int index) const {
    const uint32_t byte = uint32_t(pixel * kRunBytes<T, TAPS> + begin_ + index * int(sizeof(T)));
    return load_one_shared(reinterpret_cast<const T*>(at_ + (kRunBytes<T, TAPS> == 128 ? swizzle(byte) : byte)));
  }

 private:
  const char* at_;
  int first_byte_, begin_;  // where the run begins in its 16 bytes is held: each number that is read needs it
};

// Works out the taps of a tile's pixels and a group, with RUNS out of those at the start of the block's shared memory.
template <class T, int TAPS, bool RUNS>
class TileTaps {
 public:
  DCNV4_DEVICE TileTaps(const Window& w, const WindowOrigin& o, const T* offset_mask)
      : runs_(o, dynamic_shared()), image_(RUNS ? nullptr : image_of(offset_mask, o, w.mask_image) + o.g * 3 * TAPS) {}
  DCNV4_DEVICE int first_word() const { return runs_.first_word(); }

  // Tap k of pixel `index`. RUNS reads what happens to lie behind the runs where there is no such pixel.
  template <bool FINITE, bool SOFTMAX>
  DCNV4_DEVICE WindowTap tap(const dcnv4_problem& p, const Window& w, const WindowOrigin& o, int index, const TilePixel& pixel,
                             int k, float grid_x, float grid_y) const {
    const T* run = reinterpret_cast<const T*>(reinterpret_cast<const char*>(image_) + uint64_t(pixel.number) * w.run_bytes);
    const auto read = [&](int i) { return RUNS ? runs_.read(index, i) : load_one(run + i); };
    const float x = float(pixel.wo * p.stride_w + w.base_x) + (grid_x + read(2 * k)) * w.scale;
    const float y = float(pixel.ho * p.stride_h + w.base_y) + (grid_y + read(2 * k + 1)) * w.scale;
    float weight = read(2 * TAPS + k);
    if (SOFTMAX && p.softmax) {
      const SoftmaxNorm<float> norm = softmax_norm<float>(TAPS, [&](int i) { return read(2 * TAPS + i); });
      weight = exp(weight - norm.peak) * norm.scale;
    }
    return tap_at<FINITE>(w, o, pixel.live, x, y, weight);
  }

 private:
  Runs<T, TAPS> runs_;
  const T* image_;
};

// The taps of a batch of kSlots / TAPS pixels, one after the other, by the threads of a warp: visit(round, pixel, tap). A far
// tap gets a bit in `far`, in the order of the taps.
template <bool SOFTMAX, class T, int TAPS, bool RUNS, class Visit>
DCNV4_DEVICE void work_out_slots(const dcnv4_problem& p, const Window& w, const WindowOrigin& o, int batch,
                                 const TileTaps<T, TAPS, RUNS>& tile, const TapSlot (&slots)[kSlotRounds],
                                 uint32_t (&far)[kSlotRounds], Visit visit) {
  constexpr int pixels = kSlots / TAPS;
  const int lane = int(threadIdx.x % kWarp);
#pragma unroll
  for (int r = 0; r < kSlotRounds; ++r) {
    const bool has_slot = (r + 1) * kWarp <= pixels * TAPS || r * kWarp + lane < pixels * TAPS;
    const int index = batch * pixels + slots[r].of, k = slots[r].k;
    const TilePixel pixel = tile_pixel(p, w, o, index);
    const WindowTap tap =
        tile.template tap<false, SOFTMAX>(p, w, o, min(index, w.pixels - 1), pixel, k, slots[r].grid_x, slots[r].grid_y);
    far[r] = __ballot_sync(0xffffffffu, has_slot && tap.far);
    if (has_slot) visit(r, pixel, tap);
  }
}

// ---- A tile's window and, with RUNS, its runs.

// The start of the window. Runs lie before it.
template <class T, int TAPS, bool RUNS>
DCNV4_DEVICE uint32_t window_offset(const Window& w) {
  return RUNS ? round_up_to(uint32_t(w.pixels) * kRunBytes<T, TAPS>, uint32_t(kBulkAlignment)) : 0;
}
template <class T, int TAPS, bool RUNS>
DCNV4_DEVICE char* window_of(const Window& w) {
  return dynamic_shared() + window_offset<T, TAPS, RUNS>(w);
}
// What all of a block's threads need in every round of a loop: out of the block's number the compiler would work it out anew
// each time.
struct alignas(16) Kept {
  int x, y;                       // the window's first cell
  void* rows;                     // where to write
  const void *value, *gradients;  // the image and group of each
};
// Barriers of a window (the runs have come, the cells have come), and what is kept.
constexpr int kWindowBarriers = 2 * kBarrierBytes + int(sizeof(Kept));
DCNV4_DEVICE Kept* kept_of(char* barriers) { return reinterpret_cast<Kept*>(barriers + 2 * kBarrierBytes); }
// Of what a kernel keeps once, in bytes: cells of zeros, the barriers, a gap before the window.
template <bool RUNS>
constexpr int64_t window_fixed(int64_t cell) {
  return 2 * cell + kWindowBarriers + (RUNS ? kBulkAlignment : 0);
}

// Starts fetching cells of UNITS * 16 bytes that begin at byte `channel` of a pixel, at `map` of the image's first one. With
// RUNS both come as boxes; with the cells `others` bytes may come that the caller starts fetching.
template <int UNITS, class T, int TAPS, bool RUNS>
DCNV4_DEVICE void start_window(const dcnv4_problem& p, const Window& w, const WindowOrigin& o,
                               const TileTaps<T, TAPS, RUNS>& taps, const BulkMap& value_map, const BulkMap& mask_map,
                               const T* map, int channel, char* window, char* barriers, uint32_t others = 0) {
  if (!RUNS) {
    fetch_window<UNITS>(p, w, o, map, window);
  } else if (threadIdx.x == 0) {
    expect_bulk(barriers, uint32_t(w.pixels) * kRunBytes<T, TAPS>);
    start_bulk(mask_map, dynamic_shared(), barriers, taps.first_word(), o.tile_x, o.tile_y, int(o.n));
    expect_bulk(barriers + kBarrierBytes, uint32_t(w.pitch * w.height) * (UNITS * 16) + others);
    start_bulk(value_map, window, barriers + kBarrierBytes, channel / 4, o.x, o.y, int(o.n));
  }
}
// A barrier for all threads, behind which taps can be worked out. Their cells may still be on the way.
template <bool RUNS>
DCNV4_DEVICE void wait_for_runs(const char* barriers) {
  if (!RUNS) copy_async_wait();
  __syncthreads();
  if (RUNS) wait_for_bulk(barriers);
}
// Behind it the cells are there.
template <bool RUNS>
DCNV4_DEVICE void wait_for_cells(const char* barriers) {
  if (RUNS) wait_for_bulk(barriers + kBarrierBytes);
}

// Whether runs can come as boxes: from sm_90 on, and where rows of offset_mask lie in step with 16 bytes.
inline bool can_have_runs(const dcnv4_problem& p, const void* offset_mask) {
  return architecture(p.device) >= 90 && !forced(p, kForceThreads) &&
         aligned(offset_mask, p.offset_mask_stride, element_bytes(p.dtype), 16);
}
template <class T, int TAPS>
bool make_maps(const dcnv4_problem& p, const Window& w, const void* value, int64_t cell, const void* offset_mask,
               BulkMap& value_map, BulkMap& mask_map) {
  return window_map(p, w, value, cell, value_map) && runs_map<T, TAPS>(p, w, offset_mask, mask_map);
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
