// output[n, ho, wo, g, :] = sum over taps of weight * bilinear(value[n, :, :, g, :], y, x).
//
// A thread holds N channels of one item and adds up the four corners of every tap. All it reads per tap from
// shared memory are four weights and four cells, so the loop is loads of 16 bytes, one wide multiply-add an address, and
// fused multiply-adds; with TAPS known it is unrolled whole and every load of an item can be in flight.
#include "forward.h"

namespace dcnv4 {
namespace {

constexpr int kThreads = 128;
constexpr int kChunk = 8;  // taps staged at a time where their number is not known to the compiler

// The two cells a position lies between along one axis, and their weights. A cell outside the map counts as zero; instead of
// it the cell inside is read twice at half its weight, which adds the same and lets nothing else in (zero times a cell
// that holds inf would be NaN).
template <class Real>
struct Axis {
  int low, high;
  Real low_weight, high_weight;
};

template <class Real>
DCNV4_DEVICE Axis<Real> axis_inside(int cell, Real fraction, int size) {
  Axis<Real> axis{cell, cell + 1, 1 - fraction, fraction};
  if (cell < 0) {
    axis.low = 0;
    axis.low_weight = axis.high_weight = fraction / 2;
  } else if (cell + 1 >= size) {
    axis.high = cell;
    axis.low_weight = axis.high_weight = (1 - fraction) / 2;
  }
  return axis;
}

template <class Real>
struct Shared {
  Four<Real>* weights;       // (items, odd(chunk)): of the four corners; no_weight in an unused tap
  uint4* cells;              // (items, odd(chunk)): the corners' pixels in the map
  SoftmaxNorm<Real>* norms;  // (items)
};

template <class Real>
int64_t shared_bytes(int64_t items, int chunk) {
  return items * (odd(chunk) * int64_t(sizeof(Four<Real>) + sizeof(uint4)) + int64_t(sizeof(SoftmaxNorm<Real>)));
}

template <class Real>
DCNV4_DEVICE Shared<Real> carve_shared(int items, int chunk) {
  Shared<Real> shared;
  shared.weights = reinterpret_cast<Four<Real>*>(dynamic_shared());
  shared.cells = reinterpret_cast<uint4*>(shared.weights + items * odd(chunk));
  shared.norms = reinterpret_cast<SoftmaxNorm<Real>*>(shared.cells + items * odd(chunk));
  return shared;
}

template <class T, class Real>
DCNV4_DEVICE void stage_norms(const dcnv4_problem& p, const Tiling& tiling, const Origin& origin, const T* runs, int taps,
                              const Shared<Real>& shared) {
  for (int index = threadIdx.x; index < tiling.items; index += blockDim.x) {
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
    Four<Real> weights{{no_weight<Real>(), 0, 0, 0}};
    uint4 cells = make_uint4(0, 0, 0, 0);
    if (item.live) {
      const T* run = run_of(p, runs, item, taps);
      const SoftmaxNorm<Real> norm = p.softmax ? shared.norms[index] : SoftmaxNorm<Real>{};
      const Tap<Real> tap = read_tap(p, tiling.by_kernel_h, run, first + k, taps, item.ho, item.wo, norm);
      if (tap.used) {
        const Axis<Real> x = axis_inside(tap.x0, tap.lx, int(p.W)), y = axis_inside(tap.y0, tap.ly, int(p.H));
        const Real low = tap.weight * y.low_weight, high = tap.weight * y.high_weight;
        weights = {{low * x.low_weight, low * x.high_weight, high * x.low_weight, high * x.high_weight}};
        const uint32_t low_row = uint32_t(y.low) * uint32_t(p.W), high_row = uint32_t(y.high) * uint32_t(p.W);
        cells = make_uint4(low_row + x.low, low_row + x.high, high_row + x.low, high_row + x.high);
      }
    }
    shared.weights[index * row_length + k] = weights;
    shared.cells[index * row_length + k] = cells;
  }
}

// TAPS: 8 or 9, or 0 for any number. N: elements of one access. row_bytes: of one pixel
// of the value map, 32 bits wide for the sake of the multiply-add.
template <class T, int N, int TAPS>
__global__ void __launch_bounds__(kThreads)
    sample(const __grid_constant__ dcnv4_problem p, const __grid_constant__ Tiling tiling, uint32_t row_bytes,
           const T* __restrict__ value, const T* __restrict__ offset_mask, T* __restrict__ output) {
  using Real = typename compute_of<T>::type;
  constexpr int chunk = TAPS ? TAPS : kChunk, row_length = odd(chunk);
  const int taps = TAPS ? TAPS : taps_of(p);
  const Shared<Real> shared = carve_shared<Real>(tiling.items, chunk);
  const Origin origin = block_origin(tiling);
  const T* runs = offset_mask + origin.n * p.Ho * p.Wo * p.offset_mask_stride;
  const T* map = value + origin.n * p.H * p.W * p.value_stride;
  T* result = output + origin.n * p.Ho * p.Wo * p.output_stride;

  const int index = tiling.by_lanes.quotient(threadIdx.x), lane = threadIdx.x - index * tiling.lanes;
  const Item item = item_at(p, tiling, origin, index);
  wait_for_earlier();
  if (p.softmax) {
    stage_norms(p, tiling, origin, runs, taps, shared);
    __syncthreads();
  }

  for (int pass = 0; pass < tiling.units; pass += tiling.lanes) {
    const int unit = pass + lane;
    const bool active = item.live && unit < tiling.units;
    const char* channels = reinterpret_cast<const char*>(map + item.g * int(p.D) + unit * N);
    Real sums[N] = {};

    for (int first = 0; first < taps; first += chunk) {
      const int count = TAPS ? TAPS : min(chunk, taps - first);
      if (pass == 0 || taps > chunk) {
        stage_taps(p, tiling, origin, runs, taps, first, count, row_length, shared);
        __syncthreads();
      }
      if (active) {
        const Four<Real>* tap_weights = shared.weights + index * row_length;
        const uint4* tap_cells = shared.cells + index * row_length;
#pragma unroll(TAPS ? TAPS : 1)
        for (int k = 0; k < count; ++k) {
          const Four<Real> weights = tap_weights[k];
          const uint4 staged = tap_cells[k];
          const uint32_t cells[4] = {staged.x, staged.y, staged.z, staged.w};
          const bool used = is_weight(weights.v[0]);
#pragma unroll
          for (int corner = 0; corner < 4; ++corner) {
            Real vector[N];
            load<T, N>(channels + uint64_t(cells[corner]) * row_bytes, vector);
#pragma unroll
            for (int i = 0; i < N; ++i) sums[i] = fma_if(used, weights.v[corner], vector[i], sums[i]);
          }
        }
      }
      if (taps > chunk) __syncthreads();  // before the next taps take the place of these
    }

    if (active) {
      T* pixel = at_pixel(result, output_pixel(p, item.ho, item.wo), p.output_stride) + item.g * int(p.D) + unit * N;
      store<T, N>(pixel, sums);
    }
  }
}

template <class T, int N, int TAPS>
int32_t run(const ForwardCall& call) {
  using Real = typename compute_of<T>::type;
  const dcnv4_problem& p = call.p;
  const int64_t units = p.D / N;
  const int lanes = lanes_for(units), chunk = TAPS ? TAPS : kChunk;
  const int64_t fit = kSharedBytes / shared_bytes<Real>(1, chunk);
  // Smaller blocks where large ones would leave multiprocessors idle.
  const int64_t enough = 2 * int64_t(multiprocessors(p.device));
  Tiling tiling{};
  for (int threads = kThreads; threads >= kWarp; threads /= 2) {
    tiling = plan_tiling(p, units, lanes, std::min<int64_t>(threads / lanes, fit));
    if (blocks_of(p, tiling) >= enough) break;
  }
  return launch(earliest_start(p), sample<T, N, TAPS>, blocks_of(p, tiling), threads_of(tiling),
                shared_bytes<Real>(tiling.items, chunk), call.stream, p, tiling, uint32_t(p.value_stride * sizeof(T)),
                static_cast<const T*>(call.value), static_cast<const T*>(call.offset_mask), static_cast<T*>(call.output));
}

template <class T, int N>
int32_t run_taps(const ForwardCall& call) {
  const int taps = forced(call.p, kForceGeneral) ? 0 : taps_of(call.p);
  if (taps == 9) return run<T, N, 9>(call);
  if (taps == 8) return run<T, N, 8>(call);
  return run<T, N, 0>(call);
}

// fp64 is for checking, not for speed: one kernel with vectors and one without.
template <class T>
int32_t run_type(const ForwardCall& call) {
  const dcnv4_problem& p = call.p;
  constexpr int N = 16 / sizeof(T);
  const bool vectors = p.D % N == 0 && aligned(call.value, p.value_stride, sizeof(T), 16) &&
                       aligned(call.output, p.output_stride, sizeof(T), 16) && !forced(p, kForceScalar);
  if (!vectors) return run<T, 1, 0>(call);
  if constexpr (sizeof(T) == 8) {
    return run<T, N, 0>(call);
  } else {
    return run_taps<T, N>(call);
  }
}

}  // namespace
}  // namespace dcnv4

int32_t dcnv4_cuda_forward(const dcnv4_problem* problem, const void* value, const void* offset_mask, void* output,
                           void* stream) {
  using namespace dcnv4;
  if (!problem) return DCNV4_BAD_PROBLEM;
  const int32_t status = check_problem(*problem);
  if (status != DCNV4_OK || problem->N == 0) return status;
  if (!value || !offset_mask || !output) return DCNV4_BAD_PROBLEM;
  const DeviceGuard guard(problem->device);
  if (guard.error() != cudaSuccess) return status_of(guard.error());
  const ForwardCall call{*problem, value, offset_mask, output, static_cast<cudaStream_t>(stream)};
  if (!forced(*problem, kForceNoWindow) && !forced(*problem, kForceScalar) && !forced(*problem, kForceGeneral)) {
    const int32_t found = forward_window(call);
    if (found != DCNV4_NO_KERNEL) return found;
  }
  switch (problem->dtype) {
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
