// The gradient of `value` in a fixed order: the same bits at every run, without atomics and without zeroing first.
//
// First every tap's cell is written down, with a bounding box for each tile of output pixels. Then each block owns a tile of
// cells, a group and a slice of channels; it goes through the boxes in order, through the taps of the boxes that reach its
// cells in order, and adds what falls on its cells, in that order, as scatter.h describes. Offsets may lead anywhere: far ones
// cost time, not memory.
#include "scatter.h"

namespace dcnv4 {
namespace {

constexpr int kLanes = 32;  // threads of one class at most
constexpr int kThreads = kClasses * kLanes;
constexpr int kEdge = 8;   // of a tile of output pixels, and of one of cells
constexpr int kTests = 4;  // taps a thread looks at in one step
// Shares and output gradients are read this many at once: sums in shared memory written between two reads keep the compiler
// from moving the second up. It divides the threads of a warp, which stage that many.
constexpr int kAhead = 4;
constexpr int kFindThreads = 128;
constexpr int64_t kSumBytes = 32 * 1024;  // of shared memory for the sums of a block

// The cell (x0, y0) of a tap as two numbers of 16 bits, x0 + 1 and y0 + 1, shifted right where the map is larger than that.
constexpr uint32_t kUnused = 0xffffffffu;
struct Cell16 {
  int shift;
  DCNV4_DEVICE int coordinate(int cell) const { return (cell + 1) >> shift; }
  DCNV4_DEVICE uint32_t pack(int x, int y) const { return uint32_t(coordinate(x)) | uint32_t(coordinate(y)) << 16; }
};

// Of packed coordinates, both ends included; empty where low > high.
struct alignas(16) Box {
  int low_x, low_y, high_x, high_y;
  DCNV4_DEVICE bool contains(int x, int y) const { return x >= low_x && x <= high_x && y >= low_y && y <= high_y; }
  DCNV4_DEVICE bool meets(const Box& other) const {
    return low_x <= other.high_x && high_x >= other.low_x && low_y <= other.high_y && high_y >= other.low_y;
  }
};

struct Plan {
  int32_t tile_w, tile_h;           // output pixels
  int32_t tile_taps;                // of one tile and group, rounded up to kTests
  int32_t tiles;                    // of one map
  int32_t owner_w, owner_h;         // cells
  int32_t lanes, slices, channels;  // threads of a class; slices of lanes * channels
  Cell16 cells;
  Divisor by_tiles, tiles_x, groups, by_taps, by_tile_w, by_tile_taps, by_kernel_h, by_lanes, owners_x, owners_y, by_slices,
      by_owner_w;
};

// `channels`: of one thread, with sums of `real_bytes` each.
Plan plan_ordered(const dcnv4_problem& p, int channels, int64_t real_bytes) {
  Plan plan{};
  plan.tile_w = int32_t(even_edge(p.Wo, kEdge));
  plan.tile_h = int32_t(even_edge(p.Ho, kEdge));
  plan.tile_taps = int32_t(round_up(int64_t(plan.tile_w) * plan.tile_h * taps_of(p), kTests));
  plan.tiles_x = divisor_of(divide_up(p.Wo, plan.tile_w));
  plan.tiles = int32_t(divide_up(p.Wo, plan.tile_w) * divide_up(p.Ho, plan.tile_h));
  plan.by_tiles = divisor_of(plan.tiles);
  plan.owner_w = int32_t(even_edge(p.W, kEdge));
  plan.owner_h = int32_t(even_edge(p.H, kEdge));
  plan.channels = channels;
  const int64_t units = p.D / channels,
                most_lanes = std::min<int64_t>(kLanes, kSumBytes / (kEdge * kEdge * channels * real_bytes));
  plan.slices = int32_t(divide_up(units, most_lanes));
  plan.lanes = int32_t(divide_up(units, plan.slices));
  while ((std::max(p.W, p.H) + 1) >> plan.cells.shift >= 0xffff) ++plan.cells.shift;
  plan.groups = divisor_of(p.G);
  plan.by_taps = divisor_of(taps_of(p));
  plan.by_tile_w = divisor_of(plan.tile_w);
  plan.by_tile_taps = divisor_of(plan.tile_taps);
  plan.by_kernel_h = divisor_of(p.kernel_h);
  plan.by_lanes = divisor_of(plan.lanes);
  plan.owners_x = divisor_of(divide_up(p.W, plan.owner_w));
  plan.owners_y = divisor_of(divide_up(p.H, plan.owner_h));
  plan.by_slices = divisor_of(plan.slices);
  plan.by_owner_w = divisor_of(plan.owner_w);
  return plan;
}

// The workspace: packed cells (N, G, tiles, tile_taps), then boxes (N, G, tiles).
int64_t packed_bytes(const dcnv4_problem& p, const Plan& plan) {
  return round_up(p.N * p.G * plan.tiles * plan.tile_taps * int64_t(sizeof(uint32_t)), sizeof(Box));
}

// Tap `id` of one image and group: tiles in order, in each its pixels, in each its taps.
struct TapAt {
  int wo, ho, k;
  bool live;
};
DCNV4_DEVICE TapAt tap_at(const dcnv4_problem& p, const Plan& plan, int taps, uint32_t id) {
  const uint32_t tile = plan.by_tile_taps.quotient(id), local = id - tile * uint32_t(plan.tile_taps);
  const uint32_t pixel = plan.by_taps.quotient(local), row = plan.by_tile_w.quotient(pixel),
                 tile_row = plan.tiles_x.quotient(tile);
  TapAt at;
  at.wo = int((tile - tile_row * plan.tiles_x.divisor) * plan.tile_w + pixel - row * plan.tile_w);
  at.ho = int(tile_row * plan.tile_h + row);
  at.k = int(local - pixel * uint32_t(taps));
  at.live = row < uint32_t(plan.tile_h) && at.wo < int(p.Wo) && at.ho < int(p.Ho);
  return at;
}

// One block a tile, group and image.
template <class T>
__global__ void __launch_bounds__(kFindThreads)
    find_taps(const __grid_constant__ dcnv4_problem p, const __grid_constant__ Plan plan, const T* __restrict__ offset_mask,
              uint32_t* __restrict__ packed, Box* __restrict__ boxes) {
  using Real = typename compute_of<T>::type;
  const int taps = taps_of(p);
  const uint32_t map = plan.by_tiles.quotient(blockIdx.x), tile = blockIdx.x - map * uint32_t(plan.tiles);  // map: of (n, g)
  const int64_t n = plan.groups.quotient(map);
  const int g = int(map - uint32_t(n) * plan.groups.divisor);
  const T* runs = offset_mask + n * p.Ho * p.Wo * p.offset_mask_stride + g * 3 * taps;
  int* box = reinterpret_cast<int*>(dynamic_shared());  // low x, low y, high x, high y
  if (threadIdx.x < 4) box[threadIdx.x] = threadIdx.x < 2 ? 0x7fffffff : -1;
  __syncthreads();
  packed += int64_t(blockIdx.x) * plan.tile_taps;
  Box mine{0x7fffffff, 0x7fffffff, -1, -1};
  for (int i = threadIdx.x; i < plan.tile_taps; i += blockDim.x) {
    uint32_t cell = kUnused;
    const TapAt at = tap_at(p, plan, taps, tile * uint32_t(plan.tile_taps) + i);
    if (at.live) {
      // The weight decides nothing here, so its softmax is not taken.
      const T* run = at_pixel(runs, output_pixel(p, at.ho, at.wo), p.offset_mask_stride);
      const Tap<Real> tap = read_tap(p, plan.by_kernel_h, run, at.k, taps, at.ho, at.wo, SoftmaxNorm<Real>{});
      if (tap.used) {
        cell = plan.cells.pack(tap.x0, tap.y0);
        const int x = plan.cells.coordinate(tap.x0), y = plan.cells.coordinate(tap.y0);
        mine = {min(mine.low_x, x), min(mine.low_y, y), max(mine.high_x, x), max(mine.high_y, y)};
      }
    }
    packed[i] = cell;
  }
  // Integers: the order of these does not show.
  atomicMin(box, mine.low_x);
  atomicMin(box + 1, mine.low_y);
  atomicMax(box + 2, mine.high_x);
  atomicMax(box + 3, mine.high_y);
  __syncthreads();
  if (threadIdx.x == 0) boxes[blockIdx.x] = Box{box[0], box[1], box[2], box[3]};
}

// Gives every true flag of a block its number, by thread and within a thread in order; returns the first number of this
// thread's, and in `total` how many there are. `counts` is one number a warp.
template <int FLAGS>
DCNV4_DEVICE int number_flags(const bool (&flags)[FLAGS], int* counts, int& total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int before = 0, in_warp = 0;
#pragma unroll
  for (int i = 0; i < FLAGS; ++i) {
    const uint32_t votes = __ballot_sync(0xffffffffu, flags[i]);
    before += __popc(votes & ((1u << lane) - 1));
    in_warp += __popc(votes);
  }
  if (lane == 0) counts[warp] = in_warp;
  __syncthreads();
  total = 0;
  for (int w = 0; w < int(blockDim.x) / 32; ++w) {
    if (w == warp) before += total;
    total += counts[w];
  }
  __syncthreads();  // before the next call writes its counts
  return before;
}

template <class Real, int N>
struct Shared {
  Share<Real>* shares;  // (threads, classes)
  Real* sums;           // (owned cells + kClasses, lanes, N)
  uint32_t* pixels;     // (threads): whose output gradient a staged tap takes
  uint32_t* list;       // (2 * threads * kTests): taps found
  int* tiles;           // (threads): tiles found
  int* counts;          // (warps)
};

template <class Real, int N>
int64_t shared_bytes(const Plan& plan, int64_t threads) {
  return (int64_t(plan.owner_w) * plan.owner_h + kClasses) * plan.lanes * N * int64_t(sizeof(Real)) +
         threads * int64_t(kClasses * sizeof(Share<Real>) + sizeof(uint32_t) + 2 * kTests * sizeof(uint32_t) + sizeof(int)) +
         threads / kWarp * int64_t(sizeof(int));
}

template <class Real, int N>
DCNV4_DEVICE Shared<Real, N> carve_shared(const Plan& plan) {
  const int threads = int(blockDim.x);
  Shared<Real, N> shared;
  shared.shares = reinterpret_cast<Share<Real>*>(dynamic_shared());
  shared.sums = reinterpret_cast<Real*>(shared.shares + threads * kClasses);
  shared.pixels = reinterpret_cast<uint32_t*>(shared.sums + (plan.owner_w * plan.owner_h + kClasses) * plan.lanes * N);
  shared.list = shared.pixels + threads;
  shared.tiles = reinterpret_cast<int*>(shared.list + 2 * threads * kTests);
  shared.counts = shared.tiles + threads;
  return shared;
}

// One block a tile of cells, slice of channels, group and image. N: channels a thread. gradient_bytes: of one pixel of
// grad_output.
template <class T, int N>
__global__ void DCNV4_BLOCK(T, kThreads)
    gather_taps(const __grid_constant__ dcnv4_problem p, const __grid_constant__ Plan plan, const T* __restrict__ offset_mask,
                const T* __restrict__ grad_output, uint32_t gradient_bytes, const uint32_t* __restrict__ packed,
                const Box* __restrict__ boxes, T* __restrict__ grad_value) {
  using Real = typename compute_of<T>::type;
  const int taps = taps_of(p), threads = int(blockDim.x), thread = int(threadIdx.x);
  const Shared<Real, N> shared = carve_shared<Real, N>(plan);

  const uint32_t above_x = plan.owners_x.quotient(blockIdx.x), above_y = plan.owners_y.quotient(above_x);
  const uint32_t map = plan.by_slices.quotient(above_y), slice = above_y - map * plan.by_slices.divisor;  // map: of (n, g)
  const int64_t n = plan.groups.quotient(map);
  const int g = int(map - uint32_t(n) * plan.groups.divisor);
  const int owned_x = int(blockIdx.x - above_x * plan.owners_x.divisor) * plan.owner_w;
  const int owned_y = int(above_x - above_y * plan.owners_y.divisor) * plan.owner_h;
  // A tap touches the cells owned where its own is one of them or one to the left or above.
  const Box reach{plan.cells.coordinate(owned_x - 1), plan.cells.coordinate(owned_y - 1),
                  plan.cells.coordinate(owned_x + plan.owner_w - 1), plan.cells.coordinate(owned_y + plan.owner_h - 1)};

  const int parity = plan.by_lanes.quotient(thread), lane = thread - parity * plan.lanes;
  const int unit = int(slice) * plan.lanes + lane, channel = g * int(p.D) + unit * N;
  const bool active = parity < kClasses && unit < int(p.D) / N;
  Real* own_sums = shared.sums + lane * N;  // of the first cell
  const int64_t first_output = n * p.Ho * p.Wo;
  const T* runs = offset_mask + first_output * p.offset_mask_stride + g * 3 * taps;
  const char* gradients = reinterpret_cast<const char*>(grad_output + first_output * p.output_stride + channel);
  packed += int64_t(map) * plan.tiles * plan.tile_taps;
  boxes += int64_t(map) * plan.tiles;

  const int owned = plan.owner_w * plan.owner_h, cell_length = plan.lanes * N;
  for (int i = thread; i < (owned + kClasses) * cell_length; i += threads) shared.sums[i] = 0;

  int next_tile = 0;     // the first whose box was not looked at yet
  int found = 0, t = 0;  // tiles in shared.tiles, the one at work
  int first = 0;         // its taps before this one are done
  for (bool more = true; more;) {
    // Find taps, until the next step might find more than there is room for.
    int length = 0;
    while (length <= threads * kTests) {
      while (t == found && next_tile < plan.tiles) {
        const int tile = next_tile + thread;
        const bool meets[1] = {tile < plan.tiles && boxes[tile].meets(reach)};
        const int slot = number_flags(meets, shared.counts, found);
        if (meets[0]) shared.tiles[slot] = tile;
        __syncthreads();
        t = 0;
        next_tile += threads;
      }
      if (t == found) {
        more = false;
        break;
      }
      const uint32_t base = uint32_t(shared.tiles[t]) * uint32_t(plan.tile_taps) + uint32_t(first + thread * kTests);
      uint4 four = make_uint4(kUnused, kUnused, kUnused, kUnused);
      if (first + thread * kTests < plan.tile_taps) four = __ldg(reinterpret_cast<const uint4*>(packed + base));
      const uint32_t cells[kTests] = {four.x, four.y, four.z, four.w};
      bool hits[kTests];
#pragma unroll
      for (int j = 0; j < kTests; ++j)
        hits[j] = cells[j] != kUnused && reach.contains(int(cells[j] & 0xffffu), int(cells[j] >> 16));
      int hit_count;
      int slot = length + number_flags(hits, shared.counts, hit_count);
#pragma unroll
      for (int j = 0; j < kTests; ++j)
        if (hits[j]) shared.list[slot++] = base + j;
      length += hit_count;
      first += threads * kTests;
      if (first >= plan.tile_taps) {
        first = 0;
        ++t;
      }
    }
    __syncthreads();

    // Add them, a block's worth at a time.
    for (int begin = 0; begin < length; begin += threads) {
      const int count = (min(threads, length - begin) + kAhead - 1) / kAhead * kAhead;
      if (thread < count) {
        Share<Real>* mine = shared.shares + thread * kClasses;
#pragma unroll
        for (int c = 0; c < kClasses; ++c) mine[c] = {0, uint32_t((owned + c) * cell_length)};
        shared.pixels[thread] = 0;
        if (begin + thread < length) {
          const TapAt at = tap_at(p, plan, taps, shared.list[begin + thread]);
          const T* run = at_pixel(runs, output_pixel(p, at.ho, at.wo), p.offset_mask_stride);
          const SoftmaxNorm<Real> norm = p.softmax ? softmax_norm(run, taps) : SoftmaxNorm<Real>{};
          const Tap<Real> tap = read_tap(p, plan.by_kernel_h, run, at.k, taps, at.ho, at.wo, norm);
          shared.pixels[thread] = output_pixel(p, at.ho, at.wo);
          visit_corners(tap, [&](int c, int x, int y, Real weight) {
            const int in_x = x - owned_x, in_y = y - owned_y;
            if (in_x >= 0 && in_y >= 0 && in_x < plan.owner_w && in_y < plan.owner_h && x < int(p.W) && y < int(p.H))
              mine[c] = {weight, uint32_t((in_y * plan.owner_w + in_x) * cell_length)};
          });
        }
      }
      __syncthreads();
      if (active) {
        for (int i = 0; i < count; i += kAhead) {
          Share<Real> ahead[kAhead];
          Real gradient[kAhead][N];
#pragma unroll
          for (int j = 0; j < kAhead; ++j) {
            ahead[j] = shared.shares[(i + j) * kClasses + parity];
            load<T, N>(gradients + uint64_t(shared.pixels[i + j]) * gradient_bytes, gradient[j]);
          }
#pragma unroll
          for (int j = 0; j < kAhead; ++j) add_share(own_sums + ahead[j].place, ahead[j].weight, gradient[j]);
        }
      }
      __syncthreads();
    }
  }

  if (!active) return;
  T* rows = grad_value + n * p.H * p.W * p.grad_value_stride + channel;
  for (int cell = parity; cell < owned; cell += kClasses) {
    const int row = plan.by_owner_w.quotient(cell), x = owned_x + cell - row * plan.owner_w, y = owned_y + row;
    if (x >= int(p.W) || y >= int(p.H)) continue;
    Real sum[N];
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] = shared.sums[cell * cell_length + lane * N + i];
    store<T, N>(at_pixel(rows, uint32_t(y) * uint32_t(p.W) + uint32_t(x), p.grad_value_stride), sum);
  }
}

template <class T, int N>
int32_t run(const BackwardCall& call) {
  using Real = typename compute_of<T>::type;
  const dcnv4_problem& p = call.p;
  const Plan plan = plan_ordered(p, N, sizeof(Real));
  const int64_t maps = p.N * p.G;
  // Taps of one image and group are numbered in 31 bits.
  if (int64_t(plan.tiles) * plan.tile_taps > INT32_MAX) return DCNV4_BAD_PROBLEM;
  uint32_t* packed = static_cast<uint32_t*>(call.workspace);
  Box* boxes = reinterpret_cast<Box*>(static_cast<char*>(call.workspace) + packed_bytes(p, plan));
  const T* offset_mask = static_cast<const T*>(call.offset_mask);
  const int32_t status =
      launch(find_taps<T>, maps * plan.tiles, kFindThreads, sizeof(Box), call.stream, p, plan, offset_mask, packed, boxes);
  if (status != DCNV4_OK) return status;
  const int threads = int(round_up(kClasses * plan.lanes, kWarp));
  return launch(gather_taps<T, N>, maps * plan.slices * plan.owners_x.divisor * plan.owners_y.divisor, threads,
                shared_bytes<Real, N>(plan, threads), call.stream, p, plan, offset_mask,
                static_cast<const T*>(call.grad_output), uint32_t(p.output_stride * sizeof(T)), packed, boxes,
                static_cast<T*>(call.grad_value));
}

template <class T>
int32_t run_type(const BackwardCall& call) {
  const dcnv4_problem& p = call.p;
  constexpr int64_t bytes = 4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16;
  const bool fours = p.D % 4 == 0 && aligned(call.grad_output, p.output_stride, sizeof(T), bytes) &&
                     aligned(call.grad_value, p.grad_value_stride, sizeof(T), bytes) && !forced(p, kForceScalar);
  return fours ? run<T, 4>(call) : run<T, 1>(call);
}

}  // namespace

int64_t ordered_workspace(const dcnv4_problem& p) {
  const Plan plan = plan_ordered(p, 1, sizeof(double));
  return packed_bytes(p, plan) + p.N * p.G * plan.tiles * int64_t(sizeof(Box));
}

int32_t scatter_ordered(const BackwardCall& call) {
  switch (call.p.dtype) {
    case DCNV4_FLOAT32:
      return run_type<float>(call);
    case DCNV4_FLOAT64:
      return run_type<double>(call);
    case DCNV4_BFLOAT16:
      return run_type<bf16>(call);
    default:
      return run_type<f16>(call);
  }
}

}  // namespace dcnv4
