// Runs CUDA kernels on the CPU, one fiber a thread, one block after another: for tests, not for speed. The kernels' own sources
// are compiled by a plain C++ compiler with this header in place of the CUDA toolkit's; nothing else is needed.
// The machine itself is host_cuda.cpp.
//
// What is real: indices, barriers, votes and shuffles, the limits on grids, blocks and shared memory, the current device. What
// is stricter than on a GPU: shared memory is filled with NaN before each block, and all threads of a block must meet at the
// same barrier, by source line; a warp runs as far ahead of the others as barriers and arrivals let it. What is missing: time,
// memory ordering between barriers, inline PTX (it stands behind functions with a C++ twin, see csrc/cuda/vector.h). Blocks and
// the threads of a block run in an order drawn from a seed, so that a result that depends on the order changes with the seed.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <type_traits>

// ---- The words of the language.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

// Of the thread that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// ---- The host's interface.
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
struct cudaFuncAttributes {
  int ptxVersion;
};

// ---- What a thread meets others by.
namespace host_cuda {

enum class Wait : int { none, warp, block, arrivals, ended };

void* dynamic_shared();
unsigned current_thread();
void wait_for_earlier();
// Waits, or ends; `line` is that of the barrier in the source.
void wait_at(Wait wait, int line);
// A barrier in shared memory at which some threads arrive, and go on, and others wait until its first phase has ended, as an
// mbarrier: so many arrivals end a phase.
void expect_arrivals(void* barrier, int count);
void arrive(void* barrier);
void wait_for_arrivals(const void* barrier, int line);

// What the threads of a warp hold.
struct Held {
  const uint64_t* first;  // that of lane 0
  unsigned lanes, me;
  uint64_t of(unsigned lane) const { return first[(lane & 31u) < lanes ? lane & 31u : me]; }
};
// All threads of the warp meet, each with some bits.
Held exchange(uint64_t bits, int line);

inline unsigned ballot(bool flag, int line) {
  const Held held = exchange(flag, line);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) votes |= unsigned(held.of(lane)) << lane;
  return votes;
}
template <class T>
T shuffle(T value, unsigned lane, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable<T>::value, "moves 8 bytes at most");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(bits, line).of(lane);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace host_cuda

#define __syncthreads() host_cuda::wait_at(host_cuda::Wait::block, __LINE__)
#define __syncwarp(...) host_cuda::wait_at(host_cuda::Wait::warp, __LINE__)
#define __ballot_sync(mask, flag) host_cuda::ballot(flag, __LINE__)
#define __shfl_sync(mask, value, lane) host_cuda::shuffle(value, lane, __LINE__)
#define __shfl_xor_sync(mask, value, distance) host_cuda::shuffle(value, host_cuda::current_thread() ^ (distance), __LINE__)

// ---- Device functions.
using std::max;
using std::min;
template <class T>
T __ldg(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    // A GPU faults; so does the test.
    std::fprintf(stderr, "host_cuda: a read of %zu bytes at %p is misaligned\n", sizeof(T), static_cast<const void*>(address));
    std::abort();
  }
  return *address;
}
// Threads change only at barriers: plain arithmetic is atomic.
template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}
inline int atomicMin(int* address, int value) {
  const int before = *address;
  *address = min(before, value);
  return before;
}
inline int atomicMax(int* address, int value) {
  const int before = *address;
  *address = max(before, value);
  return before;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

// ---- Host functions.
namespace host_cuda {
// Runs `call` with `arguments` for each thread of a grid.
cudaError_t run_grid(const cudaLaunchConfig_t& config, void* kernel, void (*call)(const void*), const void* arguments);
cudaError_t allow_shared(void* kernel, int bytes);
}  // namespace host_cuda

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaMemset2DAsync(void* pointer, size_t pitch, int value, size_t width, size_t height, cudaStream_t stream);
cudaError_t cudaGetLastError();
const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  return host_cuda::allow_shared(reinterpret_cast<void*>(kernel), bytes);
}
template <class... Parameters>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Parameters...)) {
  int device = 0;
  cudaGetDevice(&device);
  attributes->ptxVersion = device == 0 ? 90 : 80;  // device 1 has but PTX of sm_80
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const auto body = [&] { kernel(arguments...); };
  return host_cuda::run_grid(
      *config, reinterpret_cast<void*>(kernel), [](const void* one) { (*static_cast<decltype(&body)>(one))(); }, &body);
}
