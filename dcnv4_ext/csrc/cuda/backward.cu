// Gradients of the forward kernel. With s_c the dot product of grad_output and the value at corner c, over the channels of a
// group (0 for a corner outside the map), `tap_gradient` of sampling.h gives the three numbers of a tap; the gradient of
// `value` comes from one of five kernels: here corner by corner, in scatter_sorted.cu and scatter_matrix.cu gathered out of
// sorted taps, in scatter_tiled.cu merged a tile at a time, in scatter_ordered.cu in a fixed order.
#include "backward.h"

namespace dcnv4 {
namespace {

constexpr int kThreads = 128;
constexpr int kChunk = 8;  // taps staged at a time where their number is not known to the compiler

template <class Real>
struct Shared {
  Four<Real>* partial;       // (chunk, threads + 1): a thread's share of the four dot products of a tap
  Four<Real>* weights;       // (items, odd(chunk)): of the corners, no_weight for one outside
  uint4* cells;              // (items, odd(chunk)): the corners' pixels, moved into the map
  Four<Real>* places;        // (items, odd(chunk)): lx, ly, weight of the tap
  Real* gradients;           // (items, 3 * chunk): pairs (x, y), then weights
  SoftmaxNorm<Real>* norms;  // (items)
  Real* totals;              // (items): sum of weight * its gradient, for the gradient of softmax
};

template <class Real>
int64_t shared_bytes(int64_t items, int64_t threads, int chunk) {
  const int64_t rows = items * odd(chunk);
  return chunk * (threads + 1) * int64_t(sizeof(Four<Real>)) + rows * int64_t(2 * sizeof(Four<Real>) + sizeof(uint4)) +
         items * (3 * chunk + 3) * int64_t(sizeof(Real));
}

template <class Real>
DCNV4_DEVICE Shared<Real> carve_shared(int items, int threads, int chunk) {
  const int rows = items * odd(chunk);
  Shared<Real> shared;
  shared.partial = reinterpret_cast<Four<Real>*>(dynamic_shared());
  shared.weights = shared.partial + chunk * (threads + 1);
  shared.places = shared.weights + rows;
  shared.cells = reinterpret_cast<uint4*>(shared.places + rows);
  shared.norms = reinterpret_cast<SoftmaxNorm<Real>*>(shared.cells + rows);
  shared.gradients = reinterpret_cast<Real*>(shared.norms + items);
  shared.totals = shared.gradients + items * 3 * chunk;
  return shared;
}

template <class T, class Real>
DCNV4_DEVICE void start_softmax(const dcnv4_problem& p, const Tiling& tiling, const Origin& origin, const T* runs, int taps,
                                const Shared<Real>& shared) {
  for (int index = threadIdx.x; index < tiling.items; index += blockDim.x) {
    shared.totals[index] = 0;
    const Item item = item_at(p, tiling, origin, index);
    if (!item.live) continue;
    shared.norms[index] = softmax_norm(run_of(p, runs, item, taps), taps);
  }
}

// Taps [first, first + count) of all items of the tile.
template <class T, class Real>
DCNV4_DEVICE void stage_taps(const dcnv4_problem& p, const Tiling& tiling, const Origin& origin, const T* runs, int taps,
                             int first, int count, int row_length, const Shared<Real>& shared) {
  for (int i = threadIdx.x; i < tiling.items * count; i += blockDim.x) {
    const int index = i / count, k = i - index * count;
    const Item item = item_at(p, tiling, origin, index);
    Four<Real> weights{{no_weight<Real>(), no_weight<Real>(), no_weight<Real>(), no_weight<Real>()}};
    Four<Real> place{};
    uint4 cells = make_uint4(0, 0, 0, 0);
    if (item.live) {
      const T* run = run_of(p, runs, item, taps);
      const SoftmaxNorm<Real> norm = p.softmax ? shared.norms[index] : SoftmaxNorm<Real>{};
      const Tap<Real> tap = read_tap(p, tiling.by_kernel_h, run, first + k, taps, item.ho, item.wo, norm);
      if (tap.used) {
        const int W = int(p.W), H = int(p.H);
        const Corners<Real> inside = corner_weights(tap.lx, tap.ly, tap.weight, Real(1));
        const bool left = tap.x0 >= 0, right = tap.x0 + 1 < W, top = tap.y0 >= 0, bottom = tap.y0 + 1 < H;
        if (top && left) weights.v[0] = inside.w00;
        if (top && right) weights.v[1] = inside.w01;
        if (bottom && left) weights.v[2] = inside.w10;
        if (bottom && right) weights.v[3] = inside.w11;
        const uint32_t x_low = max(tap.x0, 0), x_high = min(tap.x0 + 1, W - 1);
        const uint32_t row_low = uint32_t(max(tap.y0, 0)) * uint32_t(W),
                       row_high = uint32_t(min(tap.y0 + 1, H - 1)) * uint32_t(W);
        cells = make_uint4(row_low + x_low, row_low + x_high, row_high + x_low, row_high + x_high);
      }
      // An unused tap has no gradient, however large or undefined its weight is; behind softmax that weight still counts.
      place = {{tap.lx, tap.ly, tap.used || p.softmax ? tap.weight : Real(0), 0}};
    }
    shared.weights[index * row_length + k] = weights;
    shared.places[index * row_length + k] = place;
    shared.cells[index * row_length + k] = cells;
  }
}

// Sums what the lanes of an item found and turns it into gradients.
template <class Real>
DCNV4_DEVICE void finish_taps(const dcnv4_problem& p, const Tiling& tiling, int count, int row_length,
                              const Shared<Real>& shared) {
  for (int i = threadIdx.x; i < tiling.items * count; i += blockDim.x) {
    const int index = i / count, k = i - index * count;
    Corners<Real> dots{};
    const Four<Real>* partial = shared.partial + k * (int(blockDim.x) + 1) + index * tiling.lanes;
    for (int lane = 0; lane < tiling.lanes; ++lane) {
      const Four<Real> part = partial[lane];
      dots.w00 += part.v[0];
      dots.w01 += part.v[1];
      dots.w10 += part.v[2];
      dots.w11 += part.v[3];
    }
    const Four<Real> place = shared.places[index * row_length + k];
    const TapGradient<Real> gradient = tap_gradient(dots, place.v[0], place.v[1], place.v[2], Real(p.offset_scale));
    Real* row = shared.gradients + index * 3 * count;
    row[2 * k] = gradient.x;
    row[2 * k + 1] = gradient.y;
    row[2 * count + k] = gradient.weight;
  }
}

// totals[item] += weight * gradient of the weight, over the staged taps.
template <class Real>
DCNV4_DEVICE void add_totals(const Tiling& tiling, int count, int row_length, const Shared<Real>& shared) {
  for (int index = threadIdx.x; index < tiling.items; index += blockDim.x) {
    Real total = shared.totals[index];
    for (int k = 0; k < count; ++k)
      total += shared.places[index * row_length + k].v[2] * shared.gradients[index * 3 * count + 2 * count + k];
    shared.totals[index] = total;
  }
}

// The gradients of taps [first, first + count), neighbouring threads to neighbouring columns.
template <class T, class Real>
DCNV4_DEVICE void write_taps(const dcnv4_problem& p, const Tiling& tiling, const Origin& origin, T* rows, int taps, int first,
                             int count, int row_length, const Shared<Real>& shared) {
  for (int i = threadIdx.x; i < tiling.items * 3 * count; i += blockDim.x) {
    const int index = i / (3 * count), e = i - index * 3 * count;
    const Item item = item_at(p, tiling, origin, index);
    if (!item.live) continue;
    Real gradient = shared.gradients[i];
    int column = 2 * first + e;
    if (e >= 2 * count) {
      const int k = e - 2 * count;
      column = 2 * taps + first + k;
      if (p.softmax) gradient = shared.places[index * row_length + k].v[2] * (gradient - shared.totals[index]);
    }
    at_pixel(rows, output_pixel(p, item.ho, item.wo), p.grad_offset_mask_stride)[item.g * 3 * taps + column] =
        from_compute<T>(gradient);
  }
}

// Channels behind the last group's are padding: their gradient is zero.
template <class T, class Real>
DCNV4_DEVICE void write_padding(const dcnv4_problem& p, const Tiling& tiling, const Origin& origin, T* rows, int taps) {
  const int used = int(p.G) * 3 * taps, padding = int(p.P) - used;
  if (padding == 0 || origin.g + tiling.groups < int(p.G)) return;
  for (int i = threadIdx.x; i < tiling.width * tiling.height * padding; i += blockDim.x) {
    const int pixel = i / padding;
    const Item item = item_at(p, tiling, {origin.n, origin.wo, origin.ho, 0}, pixel * tiling.groups);
    if (!item.live) continue;
    at_pixel(rows, output_pixel(p, item.ho, item.wo), p.grad_offset_mask_stride)[used + i - pixel * padding] =
        from_compute<T>(Real(0));
  }
}

// TAPS and N as in forward.cu; with TAPS known an item's channels fit its threads in one pass. With SCATTER the gradient
// of value is added to `sums`, rows of sums_stride elements or sums_bytes bytes. `grad_offset_mask` may be null.
template <class T, int N, int TAPS, bool SCATTER>
__global__ void DCNV4_BLOCK(T, kThreads)
    differentiate(const __grid_constant__ dcnv4_problem p, const __grid_constant__ Tiling tiling, uint32_t value_bytes,
                  const T* __restrict__ value, const T* __restrict__ offset_mask, const T* __restrict__ grad_output,
                  T* __restrict__ grad_offset_mask, uint32_t sums_bytes, int64_t sums_stride,
                  typename compute_of<T>::type* __restrict__ sums) {
  using Real = typename compute_of<T>::type;
  constexpr int chunk = TAPS ? TAPS : kChunk, row_length = odd(chunk);
  const int taps = TAPS ? TAPS : taps_of(p);
  const Shared<Real> shared = carve_shared<Real>(tiling.items, blockDim.x, chunk);
  const Origin origin = block_origin(tiling);
  const int64_t first_output = origin.n * p.Ho * p.Wo, first_cell = origin.n * p.H * p.W;
  const T* runs = offset_mask + first_output * p.offset_mask_stride;
  const T* map = value + first_cell * p.value_stride;
  Real* sums_map = sums + first_cell * sums_stride;

  const int index = tiling.by_lanes.quotient(threadIdx.x), lane = threadIdx.x - index * tiling.lanes;
  const Item item = item_at(p, tiling, origin, index);
  const T* gradient_row = grad_output + first_output * p.output_stride;
  if (item.live) gradient_row = at_pixel(gradient_row, output_pixel(p, item.ho, item.wo), p.output_stride);

  if (p.softmax) {
    start_softmax(p, tiling, origin, runs, taps, shared);
    __syncthreads();
  }

  Real gradient[N] = {};  // of the output, this thread's channels
  const auto load_gradient = [&](int channel) { load<T, N>(gradient_row + channel, gradient); };
  if (TAPS && item.live) load_gradient(item.g * int(p.D) + lane * N);

  // The gradient of softmax needs a sum over all taps before the first can be written: where they do not fit in one chunk, a
  // first sweep only takes that sum.
  const bool sum_first = !TAPS && p.softmax && taps > chunk;
  for (int sweep = sum_first ? 0 : 1; sweep < 2; ++sweep) {
    for (int first = 0; first < taps; first += chunk) {
      const int count = TAPS ? TAPS : min(chunk, taps - first);
      stage_taps(p, tiling, origin, runs, taps, first, count, row_length, shared);
      __syncthreads();
      if (item.live) {
#pragma unroll(TAPS ? TAPS : 1)
        for (int k = 0; k < count; ++k) {
          const Four<Real> weights = shared.weights[index * row_length + k];
          const uint4 staged = shared.cells[index * row_length + k];
          const uint32_t cells[4] = {staged.x, staged.y, staged.z, staged.w};
          Four<Real> dots{};
          for (int unit = lane; unit < tiling.units; unit += tiling.lanes) {
            const int channel = item.g * int(p.D) + unit * N;
            if (!TAPS) load_gradient(channel);
            const char* channels = reinterpret_cast<const char*>(map + channel);
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
              Real vector[N];
              load<T, N>(channels + uint64_t(cells[corner]) * value_bytes, vector);
#pragma unroll
              for (int i = 0; i < N; ++i) dots.v[corner] += gradient[i] * vector[i];
            }
            if (SCATTER && sweep == 1) {
              char* sums_of = reinterpret_cast<char*>(sums_map + channel);
#pragma unroll
              for (int corner = 0; corner < 4; ++corner) {
                Real share[N];
#pragma unroll
                for (int i = 0; i < N; ++i) share[i] = weights.v[corner] * gradient[i];
                add_if(is_weight(weights.v[corner]), reinterpret_cast<Real*>(sums_of + uint64_t(cells[corner]) * sums_bytes),
                       share);
              }
            }
            if (TAPS) break;
          }
#pragma unroll
          for (int corner = 0; corner < 4; ++corner)
            if (!is_weight(weights.v[corner])) dots.v[corner] = 0;
          shared.partial[k * (int(blockDim.x) + 1) + int(threadIdx.x)] = dots;
        }
      }
      __syncthreads();
      if (grad_offset_mask) {
        finish_taps(p, tiling, count, row_length, shared);
        __syncthreads();
        if (p.softmax && (sweep == 0 || !sum_first)) {
          add_totals(tiling, count, row_length, shared);
          __syncthreads();
        }
        T* rows = grad_offset_mask + first_output * p.grad_offset_mask_stride;
        if (sweep == 1) write_taps(p, tiling, origin, rows, taps, first, count, row_length, shared);
      }
      if (taps > chunk) __syncthreads();  // before the next taps take the place of these
    }
  }
  if (grad_offset_mask)
    write_padding<T, Real>(p, tiling, origin, grad_offset_mask + first_output * p.grad_offset_mask_stride, taps);
}

// Rounds `vectors` runs of N sums to the storage type, one a thread; a row of C channels has by_row.divisor of them.
template <class T, int N>
__global__ void DCNV4_BLOCK(T, kThreads)
    round_sums(int64_t vectors, Divisor by_row, const float* __restrict__ sums, int64_t sums_stride, T* __restrict__ grad_value,
               int64_t grad_value_stride) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  wait_for_earlier();
  if (i >= vectors) return;
  const int64_t row = vectors <= INT32_MAX ? by_row.quotient(uint32_t(i)) : i / by_row.divisor;
  const int64_t channel = (i - row * by_row.divisor) * N;
  float values[N];
  load_written<float, N>(sums + row * sums_stride + channel, values);
  store<T, N>(grad_value + row * grad_value_stride + channel, values);
}

// fp32 sums of the gradient of a 16-bit value, rows padded for reductions of four.
int64_t sums_stride_of(const dcnv4_problem& p) { return round_up(p.G * p.D, 4); }

// Where the sums of the gradient of value are taken: rows of `channels` numbers of `bytes`.
struct SumsInMemory {
  void* sums;
  int64_t rows, channels, stride, bytes;
};

int32_t clear(const SumsInMemory& m, cudaStream_t stream) {
  const size_t row_bytes = size_t(m.channels * m.bytes), stride_bytes = size_t(m.stride * m.bytes);
  if (row_bytes == stride_bytes) return status_of(cudaMemsetAsync(m.sums, 0, size_t(m.rows) * row_bytes, stream));
  return status_of(cudaMemset2DAsync(m.sums, stride_bytes, 0, row_bytes, size_t(m.rows), stream));
}

template <class T, int N, int TAPS, bool SCATTER>
int32_t run(const BackwardCall& call, void* sums, int64_t sums_stride) {
  using Real = typename compute_of<T>::type;
  const dcnv4_problem& p = call.p;
  const int64_t units = p.D / N;
  // With TAPS known in one pass, by more than a warp where need be.
  const int lanes = TAPS ? int(units) : lanes_for(units), chunk = TAPS ? TAPS : kChunk;
  const int64_t enough = 2 * int64_t(multiprocessors(p.device));
  Tiling tiling{};
  for (int threads = sizeof(Real) == 8 ? kThreads / 2 : kThreads; threads >= std::max(kWarp, lanes); threads /= 2) {
    const int64_t fit = (kSharedBytes - shared_bytes<Real>(0, threads, chunk)) /
                        (shared_bytes<Real>(1, 0, chunk) - shared_bytes<Real>(0, 0, chunk));
    tiling = plan_tiling(p, units, lanes, std::min<int64_t>(threads / lanes, fit));
    if (blocks_of(p, tiling) >= enough) break;
  }
  const int threads = threads_of(tiling);
  return launch(differentiate<T, N, TAPS, SCATTER>, blocks_of(p, tiling), threads,
                shared_bytes<Real>(tiling.items, threads, chunk), call.stream, p, tiling, uint32_t(p.value_stride * sizeof(T)),
                static_cast<const T*>(call.value), static_cast<const T*>(call.offset_mask),
                static_cast<const T*>(call.grad_output), static_cast<T*>(call.grad_offset_mask),
                uint32_t(sums_stride * sizeof(Real)), sums_stride, static_cast<Real*>(sums));
}

template <class T, int N, bool SCATTER>
int32_t run_taps(const BackwardCall& call, void* sums, int64_t sums_stride) {
  const int taps = forced(call.p, kForceGeneral) || call.p.D > N * kThreads ? 0 : taps_of(call.p);
  if (taps == 9) return run<T, N, 9, SCATTER>(call, sums, sums_stride);
  if (taps == 8) return run<T, N, 8, SCATTER>(call, sums, sums_stride);
  return run<T, N, 0, SCATTER>(call, sums, sums_stride);
}

template <class T, bool SCATTER>
int32_t run_vectors(const BackwardCall& call, void* sums, int64_t sums_stride) {
  const dcnv4_problem& p = call.p;
  constexpr int N = 16 / sizeof(T);
  const bool vectors = p.D % N == 0 && aligned(call.value, p.value_stride, sizeof(T), 16) &&
                       aligned(call.grad_output, p.output_stride, sizeof(T), 16) &&
                       (!SCATTER || aligned(sums, sums_stride, sizeof(typename compute_of<T>::type), 16)) &&
                       !forced(p, kForceScalar);
  if (!vectors) return run<T, 1, 0, SCATTER>(call, sums, sums_stride);
  if constexpr (sizeof(T) == 8) {
    return run<T, N, 0, SCATTER>(call, sums, sums_stride);
  } else {
    return run_taps<T, N, SCATTER>(call, sums, sums_stride);
  }
}

int32_t try_window(const BackwardCall& call, Part part, const Errand& errand, Ahead ahead) {
  for (const Force other : {kForceNoWindow, kForceScalar, kForceGeneral})
    if (forced(call.p, other)) return DCNV4_NO_KERNEL;
  return differentiate_window(call, part, errand, ahead);
}

// The gradient of offset_mask, and with `sums` that of value, corner by corner.
template <class T>
int32_t differentiate_type(const BackwardCall& call, void* sums, int64_t sums_stride, Ahead ahead = Ahead::anything) {
  if (!sums) {
    const int32_t found = try_window(call, Part::all, Errand{}, ahead);
    if (found != DCNV4_NO_KERNEL) return found;
  }
  return sums ? run_vectors<T, true>(call, sums, sums_stride) : run_vectors<T, false>(call, nullptr, 0);
}

template <class T>
int32_t round_type(const BackwardCall& call, const float* sums, int64_t sums_stride) {
  const dcnv4_problem& p = call.p;
  const int64_t C = p.G * p.D, rows = p.N * p.H * p.W;
  const auto start = [&](auto kernel, int64_t n) {
    const int64_t vectors = rows * (C / n);
    return launch(earliest_start(p), kernel, divide_up(vectors, kThreads), kThreads, 0, call.stream, vectors, divisor_of(C / n),
                  sums, sums_stride, static_cast<T*>(call.grad_value), p.grad_value_stride);
  };
  const bool vectors = C % 8 == 0 && aligned(call.grad_value, p.grad_value_stride, sizeof(T), 16);
  return vectors ? start(round_sums<T, 8>, 8) : start(round_sums<T, 1>, 1);
}

// Both gradients, that of value merged before it is added to the sums. Where the other one comes out of a window, clearing and
// rounding the sums are errands of its kernel. In 16 bits of its two halves, one before and one after, where the sums outgrow
// the cache; clearing smaller ones takes less than a second launch. Those that the cache holds well are soon rounded too; of
// few the launch that is saved counts.
template <class T>
int32_t merge(const BackwardCall& call, const SumsInMemory& memory, bool sorted) {
  const dcnv4_problem& p = call.p;
  constexpr bool rounds = sizeof(T) == 2;
  float* sums = static_cast<float*>(memory.sums);
  const auto errand = [&](void* rounded) {
    return make_errand(memory.rows, memory.channels, sums, memory.stride, rounded, p.grad_value_stride, sizeof(T));
  };
  const Errand clearing = errand(nullptr), rounding = errand(call.grad_value);
  const int64_t bytes = memory.rows * memory.stride * memory.bytes, cache = cache_bytes(p.device);
  const bool halves = bytes > cache || forced(p, kForceWindow);
  const bool worth_it = !rounds || halves || bytes > cache / 3 * 2 || bytes <= cache / 4;
  const bool beside = call.grad_offset_mask && clearing.vectors != 0 && (!rounds || rounding.vectors != 0) && worth_it &&
                      !forced(p, kForceApart);
  const bool before_it = beside && (!rounds || halves);
  const int32_t before =
      before_it ? try_window(call, rounds ? Part::first : Part::all, clearing, Ahead::anything) : DCNV4_NO_KERNEL;
  int32_t status = before == DCNV4_NO_KERNEL ? clear(memory, call.stream) : before;
  if (status == DCNV4_OK)
    status = sorted ? scatter_sorted(call, sums, memory.stride, before == DCNV4_OK ? Ahead::ours : Ahead::anything)
                    : scatter_tiled(call, sums, memory.stride);
  if (status != DCNV4_OK) return status;
  if constexpr (rounds) {
    if (beside) {
      status = try_window(call, before == DCNV4_OK ? Part::second : Part::all, rounding, Ahead::ours);
      if (status != DCNV4_NO_KERNEL) return status;
    }
  } else if (before == DCNV4_OK) {
    return status;
  }
  if (call.grad_offset_mask) status = differentiate_type<T>(call, nullptr, 0, Ahead::ours);
  if constexpr (rounds)
    if (status == DCNV4_OK) status = round_type<T>(call, sums, memory.stride);
  return status;
}

template <class T>
int32_t run_type(const BackwardCall& call) {
  const dcnv4_problem& p = call.p;
  constexpr bool direct_sums = sizeof(T) >= 4;  // grad_value itself is where the sums are taken
  const int64_t C = p.G * p.D, rows = p.N * p.H * p.W;
  if (!call.grad_value) return differentiate_type<T>(call, nullptr, 0);
  if (p.deterministic) {
    const int32_t status = scatter_ordered(call);
    return status != DCNV4_OK || !call.grad_offset_mask ? status : differentiate_type<T>(call, nullptr, 0);
  }

  void* sums = direct_sums ? call.grad_value : call.workspace;
  const int64_t stride = direct_sums ? p.grad_value_stride : sums_stride_of(p), size = direct_sums ? sizeof(T) : sizeof(float);
  const bool may_sort = sizeof(T) <= 4 && !forced(p, kForceDirect) && !forced(p, kForceScalar) && !forced(p, kForceTiled) &&
                        !forced(p, kForceNoWindow) && aligned(sums, stride, size, 16) &&
                        aligned(call.grad_output, p.output_stride, sizeof(T), 16) &&
                        aligned(call.grad_value, p.grad_value_stride, sizeof(T), 16);
  const Sorted sorted = may_sort ? can_scatter_sorted(p) : Sorted::no;
  if (sorted == Sorted::whole) {
    const int32_t status = scatter_sorted(call, nullptr, 0, Ahead::anything);
    return status != DCNV4_OK || !call.grad_offset_mask ? status : differentiate_type<T>(call, nullptr, 0, Ahead::ours);
  }
  bool tiled = sizeof(T) <= 4 && can_scatter_tiled(p) && !forced(p, kForceDirect) && !forced(p, kForceScalar);
  tiled = tiled && aligned(sums, stride, size, 16) && aligned(call.grad_output, p.output_stride, sizeof(T), 4 * sizeof(T));
  const SumsInMemory memory{sums, rows, C, stride, size};
  if (sorted == Sorted::tiles || tiled) return merge<T>(call, memory, sorted == Sorted::tiles);
  int32_t status = clear(memory, call.stream);
  if (status == DCNV4_OK) status = differentiate_type<T>(call, sums, stride);
  if constexpr (!direct_sums)
    if (status == DCNV4_OK) status = round_type<T>(call, static_cast<const float*>(sums), stride);
  return status;
}

}  // namespace
}  // namespace dcnv4

int64_t dcnv4_cuda_backward_workspace(const dcnv4_problem* problem, int32_t need_value, int32_t) {
  using namespace dcnv4;
  if (!problem) return -int64_t(DCNV4_BAD_PROBLEM);
  const dcnv4_problem& p = *problem;
  const int32_t status = check_problem(p);
  if (status != DCNV4_OK) return -int64_t(status);
  if (!need_value || p.N == 0) return 0;
  if (p.deterministic) return ordered_workspace(p);
  return element_bytes(p.dtype) == 2 ? p.N * p.H * p.W * sums_stride_of(p) * int64_t(sizeof(float)) : 0;
}

int32_t dcnv4_cuda_backward(const dcnv4_problem* problem, const void* value, const void* offset_mask, const void* grad_output,
                            void* grad_value, void* grad_offset_mask, void* workspace, void* stream) {
  using namespace dcnv4;
  if (!problem) return DCNV4_BAD_PROBLEM;
  const dcnv4_problem& p = *problem;
  const int32_t status = check_problem(p);
  if (status != DCNV4_OK || p.N == 0 || (!grad_value && !grad_offset_mask)) return status;
  if (const int32_t wrong = check_gradients(p, grad_value, grad_offset_mask)) return wrong;
  if (!value || !offset_mask || !grad_output) return DCNV4_BAD_PROBLEM;
  const DeviceGuard guard(p.device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const BackwardCall call{
      p, value, offset_mask, grad_output, grad_value, grad_offset_mask, workspace, static_cast<cudaStream_t>(stream)};
  switch (p.dtype) {
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
