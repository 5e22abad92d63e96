// Kernels, most of them wrong on purpose: the emulation must notice.
#include "host_cuda.h"

namespace {

// Half of the threads never reach the barrier.
void divergent(int* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = 1;
}

// Threads read what another wrote, without a barrier between.
void racing(int* out) {
  int* shared = static_cast<int*>(host_cuda::dynamic_shared());
  shared[threadIdx.x] = int(threadIdx.x);
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

// The same as it should be, and a vote and a shuffle.
void meeting(int* out) {
  int* shared = static_cast<int*>(host_cuda::dynamic_shared());
  shared[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  const unsigned votes = __ballot_sync(~0u, threadIdx.x % 2 == 0);
  const int neighbour = __shfl_xor_sync(~0u, int(threadIdx.x), 1);
  out[threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x] + (votes == 0x55555555u ? 1000 : 0) + 10000 * neighbour;
}

// Half of the threads wait for what the others have written, who do not wait for them; so many of those do not arrive.
template <unsigned LOST>
void waiting(int* out) {
  int* shared = static_cast<int*>(host_cuda::dynamic_shared());
  if (threadIdx.x == 0) host_cuda::expect_arrivals(shared + 32, 16);
  __syncthreads();
  if (threadIdx.x < 16) {
    host_cuda::wait_for_arrivals(shared + 32, __LINE__);
    out[threadIdx.x] = shared[threadIdx.x + 16];
  } else {
    out[threadIdx.x] = shared[threadIdx.x] = int(threadIdx.x);
    if (threadIdx.x >= 16 + LOST) host_cuda::arrive(shared + 32);
  }
}

// Starts early, and one thread does not wait for what is before it.
void hasty(int* out) {
  if (threadIdx.x != 5) host_cuda::wait_for_earlier();
  out[threadIdx.x] = 1;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) int32_t emulation_try(int32_t kernel, int32_t* out) {
  cudaLaunchConfig_t config;
  cudaLaunchAttribute early{};
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = 32 * sizeof(int) + sizeof(uint64_t);
  void (*const kernels[])(int*) = {divergent, racing, meeting, hasty, waiting<0>, waiting<1>};
  config.attrs = &early;
  config.numAttrs = kernels[kernel] == hasty ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernels[kernel], out);
}
