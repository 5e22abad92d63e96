// Wide accesses and the few device instructions the kernels need by name. Each stands behind one small function with a plain
// C++ twin, which the tests compile when they run the kernels on the CPU (tests/emulation).
#pragma once
#include <cuda_runtime.h>

#include "../dtypes.h"

#define DCNV4_DEVICE __device__ __forceinline__

namespace dcnv4 {

// Four numbers that travel together: the four corners of a tap.
template <class Real>
struct alignas(16) Four {
  Real v[4];
};

// The block's dynamic shared memory, the only kind used: its size is exact, so that overruns are found.
DCNV4_DEVICE char* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ uint4 dcnv4_shared[];
  return reinterpret_cast<char*>(dcnv4_shared);
#else
  return static_cast<char*>(host_cuda::dynamic_shared());
#endif
}

// ---- Moving N elements of storage type T at once, computing in Real.

template <int BYTES>
struct Word;
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<2> {
  using type = unsigned short;
};

template <class T, int N>
struct Access {
  static constexpr int bytes = int(sizeof(T)) * N;
  static constexpr int word = bytes < 16 ? bytes : 16;  // of one instruction
  static constexpr int words = bytes / word;
  using type = typename Word<word>::type;
};

// Two bf16 are the upper halves of two floats.
DCNV4_DEVICE void unpack(bf16, uint32_t pair, float& low, float& high) {
  low = bits_to_float(pair << 16);
  high = bits_to_float(pair & 0xffff0000u);
}
DCNV4_DEVICE void unpack(f16, uint32_t pair, float& low, float& high) {
  low = to_compute(f16{uint16_t(pair & 0xffffu)});
  high = to_compute(f16{uint16_t(pair >> 16)});
}

// Round to nearest even. sm_80 and above have one instruction for two bf16.
DCNV4_DEVICE uint32_t pack(bf16, float low, float high) {
#if defined(__CUDA_ARCH__)
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
#else
  return from_compute<bf16>(low).bits | uint32_t(from_compute<bf16>(high).bits) << 16;
#endif
}
DCNV4_DEVICE uint32_t pack(f16, float low, float high) {
  return from_compute<f16>(low).bits | uint32_t(from_compute<f16>(high).bits) << 16;
}

// Reads through the path for data that no kernel writes; `address` is aligned to Access::word bytes.
template <class T, int N, class Real>
DCNV4_DEVICE void load(const void* address, Real (&values)[N]) {
  using A = Access<T, N>;
  typename A::type words[A::words];
#pragma unroll
  for (int i = 0; i < A::words; ++i) words[i] = __ldg(static_cast<const typename A::type*>(address) + i);
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    uint32_t pairs[N / 2];
    memcpy(pairs, words, sizeof pairs);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) unpack(T{}, pairs[i], values[2 * i], values[2 * i + 1]);
  } else {
    T elements[N];
    memcpy(elements, words, sizeof elements);
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = to_compute(elements[i]);
  }
}

template <class T, int N, class Real>
DCNV4_DEVICE void store(void* address, const Real (&values)[N]) {
  using A = Access<T, N>;
  typename A::type words[A::words];
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    uint32_t pairs[N / 2];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) pairs[i] = pack(T{}, values[2 * i], values[2 * i + 1]);
    memcpy(words, pairs, sizeof pairs);
  } else {
    T elements[N];
#pragma unroll
    for (int i = 0; i < N; ++i) elements[i] = from_compute<T>(values[i]);
    memcpy(words, elements, sizeof elements);
  }
#pragma unroll
  for (int i = 0; i < A::words; ++i) static_cast<typename A::type*>(address)[i] = words[i];
}

template <class T>
DCNV4_DEVICE typename compute_of<T>::type load_one(const T* address) {
  typename compute_of<T>::type value[1];
  load<T, 1>(address, value);
  return value[0];
}

// ---- Arithmetic.

// sum + a * b where `use` holds, else sum, whatever a * b is: a predicated instruction. Left to itself the compiler branches
// around the load of `b` as well, which then waits for the loads before it.
DCNV4_DEVICE float fma_if(bool use, float a, float b, float sum) {
#if defined(__CUDA_ARCH__)
  asm("{\n .reg .pred use;\n setp.ne.s32 use, %1, 0;\n @use fma.rn.f32 %0, %2, %3, %0;\n}"
      : "+f"(sum)
      : "r"(int(use)), "f"(a), "f"(b));
  return sum;
#else
  return use ? fmaf(a, b, sum) : sum;
#endif
}
DCNV4_DEVICE double fma_if(bool use, double a, double b, double sum) {
#if defined(__CUDA_ARCH__)
  asm("{\n .reg .pred use;\n setp.ne.s32 use, %1, 0;\n @use fma.rn.f64 %0, %2, %3, %0;\n}"
      : "+d"(sum)
      : "r"(int(use)), "d"(a), "d"(b));
  return sum;
#else
  return use ? fma(a, b, sum) : sum;
#endif
}

// ---- Sums in global memory, in no fixed order.

// Adds N numbers where `use` holds, as predicated instructions: a branch around each would keep the loads behind it waiting.
// Four floats go as one reduction from sm_90 on; `address` is then aligned to 16 bytes.
template <int N>
DCNV4_DEVICE void add_if(bool use, float* address, const float (&values)[N]) {
#if defined(__CUDA_ARCH__)
  constexpr int step = __CUDA_ARCH__ >= 900 && N % 4 == 0 ? 4 : 1;
#pragma unroll
  for (int i = 0; i < N; i += step) {
    const size_t global = __cvta_generic_to_global(address + i);
    if constexpr (step == 4)
      asm volatile(
          "{\n .reg .pred use;\n setp.ne.s32 use, %0, 0;\n @use red.relaxed.gpu.global.add.v4.f32 [%1], {%2, %3, %4, %5};\n}" ::
              "r"(int(use)),
          "l"(global), "f"(values[i]), "f"(values[i + 1]), "f"(values[i + 2]), "f"(values[i + 3])
          : "memory");
    else
      asm volatile(
          "{\n .reg .pred use;\n setp.ne.s32 use, %0, 0;\n @use red.relaxed.gpu.global.add.f32 [%1], %2;\n}" ::"r"(int(use)),
          "l"(global), "f"(values[i])
          : "memory");
  }
#else
  for (int i = 0; i < N; ++i)
    if (use) atomicAdd(address + i, values[i]);
#endif
}
template <int N>
DCNV4_DEVICE void add_if(bool use, double* address, const double (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (use) atomicAdd(address + i, values[i]);
}

}  // namespace dcnv4
