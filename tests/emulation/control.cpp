// What the tests set and read of the emulation, beside the functions of dcnv4.h.
#include "host_cuda.h"

extern "C" {
// Blocks and threads run in an order drawn from the seed; 0 is the natural one.
__attribute__((visibility("default"))) void emulation_order(uint64_t seed) { host_cuda::settings.seed = seed; }
__attribute__((visibility("default"))) void emulation_multiprocessors(int32_t count) {
  host_cuda::settings.multiprocessors = count;
}
__attribute__((visibility("default"))) int32_t emulation_device() { return host_cuda::settings.device; }
__attribute__((visibility("default"))) int64_t emulation_launches() { return host_cuda::settings.launches; }
// Addresses of the kernels launched since the last call, at most `room` of them; returns how many there are.
__attribute__((visibility("default"))) int32_t emulation_kernels(void** addresses, int32_t room) {
  int32_t count = 0;
  for (void* kernel : host_cuda::settings.kernels)
    if (count++ < room) addresses[count - 1] = kernel;
  host_cuda::settings.kernels.clear();
  return count;
}
}

// ---- Kernels, most of them wrong on purpose: the emulation must notice.
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
  config.dynamicSmemBytes = 32 * sizeof(int) + sizeof(host_cuda::Arrivals);
  void (*const kernels[])(int*) = {divergent, racing, meeting, hasty, waiting<0>, waiting<1>};
  config.attrs = &early;
  config.numAttrs = kernels[kernel] == hasty ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernels[kernel], out);
}
