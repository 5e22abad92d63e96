// The host side of a launch: the device, the one helper every kernel goes through, how problems are cut into blocks.
#pragma once
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <initializer_list>

#include "../check.h"
#include "taps.h"

namespace dcnv4 {

inline int32_t status_of(cudaError_t error) {
  if (error == cudaSuccess) return DCNV4_OK;
  cudaGetLastError();  // it is reported here and must not be found again by the next who asks
  return int32_t(DCNV4_CUDA_ERROR) + int32_t(error);
}

// Makes `device` current for the life of the guard.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    error_ = cudaGetDevice(&before_);
    if (error_ == cudaSuccess && before_ != device) {
      error_ = cudaSetDevice(device);
      moved_ = error_ == cudaSuccess;
    }
  }
  ~DeviceGuard() {
    if (moved_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t error() const { return error_; }

 private:
  cudaError_t error_;
  int before_ = 0;
  bool moved_ = false;
};

constexpr int kWarp = 32;
// What a block gets without asking for more.
constexpr int64_t kSharedBytes = 48 * 1024;

inline int attribute(cudaDeviceAttr name, int device, int otherwise) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, name, device) == cudaSuccess ? value : otherwise;
}
inline int multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device, 1); }
// Shared memory that one block may ask for, and that the blocks of a multiprocessor share.
inline int64_t shared_limit(int device) {
  return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device, int(kSharedBytes));
}
inline int64_t shared_total(int device) {
  return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device, int(kSharedBytes));
}

inline int64_t cache_bytes(int device) { return attribute(cudaDevAttrL2CacheSize, device, 0); }

template <class>
__global__ void compiled_code() {}
// What a device's code was compiled for, 80 for sm_80: the architecture whose instructions it has, which may be older than the
// device where the driver compiled it from PTX.
inline int architecture(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  const bool keep = device >= 0 && device < kDevices;
  int found = keep ? known[device].load(std::memory_order_relaxed) : 0;
  if (found != 0) return found;
  const DeviceGuard guard(device);
  cudaFuncAttributes attributes{};
  if (guard.error() != cudaSuccess || cudaFuncGetAttributes(&attributes, compiled_code<void>) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  found = attributes.ptxVersion;
  if (keep) known[device].store(found, std::memory_order_relaxed);
  return found;
}

// Bits of dcnv4_problem.reserved that force a kernel which the shape would not choose: for tests and benchmarks.
enum Force : int32_t {
  kForceScalar = 1,     // one element an access, as for misaligned tensors
  kForceGeneral = 2,    // the loop over any number of taps, also for 8 and 9
  kForceDirect = 4,     // backward: every corner's gradient straight to global memory
  kForceTiled = 8,      // backward: merged in shared memory first, where it can be
  kForceNoWindow = 16,  // no window in shared memory, no sorting
  kForceWindow = 32,    // a window wherever one fits
  kForceThreads = 64,   // windows fetched by threads, as before sm_90
  kForceInTurn = 128,   // no kernel starts before those ahead of it have ended
  kForceApart = 256     // backward: no kernel clears or rounds the sums of another
};
inline bool forced(const dcnv4_problem& p, Force bit) { return (p.reserved & bit) != 0; }

// When a kernel's blocks may start: when what is before it in its stream has ended, or where it has no room for all of them any
// more. Of an early one all threads must call wait_for_earlier() before they read or write global memory.
enum class Start { in_turn, early };

// What is ahead of a kernel in its stream: ours, the call's own, whose blocks waited before they let this one start. So what
// was there before the call is there, and only what the call itself writes must be waited for.
enum class Ahead { anything, ours };

// Early where device and driver can, in graphs too.
inline Start earliest_start(const dcnv4_problem& p) {
  static const bool driver = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12040;
  }();
  return driver && architecture(p.device) >= 90 && !forced(p, kForceInTurn) ? Start::early : Start::in_turn;
}

template <class... Parameters, class... Arguments>
int32_t launch(Start start, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, cudaStream_t stream,
               Arguments... arguments) {
  if (blocks == 0) return DCNV4_OK;
  if (blocks > INT32_MAX) return DCNV4_BAD_PROBLEM;
  if (shared > kSharedBytes) {
    // Always the same number: what one thread allows its launch, another must not take back before it.
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_limit(device)));
    if (error != cudaSuccess) return status_of(error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared);
  config.stream = stream;
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early;
  config.numAttrs = start == Start::early ? 1 : 0;
  return status_of(cudaLaunchKernelEx(&config, kernel, arguments...));
}

template <class... Parameters, class... Arguments>
int32_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared, cudaStream_t stream,
               Arguments... arguments) {
  return launch(Start::in_turn, kernel, blocks, threads, shared, stream, arguments...);
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

inline Divisor divisor_of(int64_t divisor) {
  uint32_t shift = 0;
  while ((int64_t(1) << shift) < divisor) ++shift;
  return {uint32_t(divisor), uint32_t(divide_up(int64_t(1) << (31 + shift), divisor)), shift};
}

inline int64_t element_bytes(int32_t dtype) { return dtype == DCNV4_FLOAT64 ? 8 : dtype == DCNV4_FLOAT32 ? 4 : 2; }

// Whether rows of `stride` elements from `pointer` on can be read and written `bytes` at a time.
inline bool aligned(const void* pointer, int64_t stride, int64_t element, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % uint64_t(bytes) == 0 && stride * element % bytes == 0;
}

// Sizes that no CUDA kernel may be given: pixels of one map and positions are 32-bit numbers, row strides 32-bit byte counts.
inline int32_t check_problem(const dcnv4_problem& p) {
  constexpr int64_t limit = INT32_MAX;
  if (const int32_t status = check_sizes(p)) return status;
  if (p.H > limit / p.W || p.Ho > limit / p.Wo) return DCNV4_BAD_PROBLEM;
  for (int64_t stride : {p.value_stride, p.offset_mask_stride, p.output_stride, p.grad_value_stride, p.grad_offset_mask_stride})
    if (stride > limit / 8) return DCNV4_BAD_PROBLEM;
  const int64_t reach_w = int64_t(p.dilation_w) * (p.kernel_w - 1), reach_h = int64_t(p.dilation_h) * (p.kernel_h - 1);
  if (p.Wo > (limit - reach_w) / p.stride_w || p.Ho > (limit - reach_h) / p.stride_h) return DCNV4_BAD_PROBLEM;
  return DCNV4_OK;
}

// Edge of the pieces, at most `most` long, that cut `size` evenly.
inline int64_t even_edge(int64_t size, int64_t most) { return divide_up(size, divide_up(size, std::min(size, most))); }

// Units of an item are shared by as few passes of at most a warp's worth of threads as will do, evenly.
inline int lanes_for(int64_t units) { return int(divide_up(units, divide_up(units, kWarp))); }

// Cuts the output map into tiles of at most `items` items: few blocks, and among those little halo (the cells around a tile
// that its taps may read too, taken as 2 on each side).
inline Tiling plan_tiling(const dcnv4_problem& p, int64_t units, int lanes, int64_t items) {
  Tiling best{};
  double best_cost = 0;
  const int64_t widths[] = {1, 2, 4, 8, 16, p.Wo, divide_up(p.Wo, 2), divide_up(p.Wo, 3)};
  for (int64_t width : widths) {
    width = std::min(width, p.Wo);
    if (width > items) continue;
    const int64_t height = even_edge(p.Ho, items / width), groups = even_edge(p.G, items / (width * height));
    const double blocks = double(divide_up(p.Wo, width)) * double(divide_up(p.Ho, height)) * double(divide_up(p.G, groups));
    const double cost = blocks * (4.0 * double(items) + double((width + 4) * (height + 4) * groups));
    if (best.items != 0 && cost >= best_cost) continue;
    best_cost = cost;
    best.width = int32_t(width);
    best.height = int32_t(height);
    best.groups = int32_t(groups);
    best.items = int32_t(width * height * groups);
  }
  best.lanes = lanes;
  best.units = int32_t(units);
  best.by_width = divisor_of(best.width);
  best.by_groups = divisor_of(best.groups);
  best.by_lanes = divisor_of(lanes);
  best.by_kernel_h = divisor_of(p.kernel_h);
  best.blocks_x = divisor_of(divide_up(p.Wo, best.width));
  best.blocks_y = divisor_of(divide_up(p.Ho, best.height));
  best.blocks_g = divisor_of(divide_up(p.G, best.groups));
  return best;
}

inline int64_t blocks_of(const dcnv4_problem& p, const Tiling& t) {
  return p.N * t.blocks_x.divisor * t.blocks_y.divisor * t.blocks_g.divisor;
}

inline int threads_of(const Tiling& t) { return int(round_up(int64_t(t.items) * t.lanes, kWarp)); }

}  // namespace dcnv4
