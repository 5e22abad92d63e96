// Wide accesses and the few device instructions the kernels need by name. Each stands behind one small function with a plain
// C++ twin, which the tests compile when they run the kernels on the CPU (tests/emulation).
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "../dtypes.h"

#define DCNV4_DEVICE __device__ __forceinline__

// From sm_120 on ptxas needs more registers than before for the same.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
#define DCNV4_MORE_REGISTERS 1
#else
#define DCNV4_MORE_REGISTERS 0
#endif

namespace dcnv4 {

constexpr int kMoreRegisters = 120;

// Four numbers that travel together: the four corners of a tap.
template <class Real>
struct alignas(16) Four {
  Real v[4];
};

// The block's dynamic shared memory, the only kind used: its size is exact, so that overruns are found.
DCNV4_DEVICE char* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(1024) uint4 dcnv4_shared[];
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

#if defined(__CUDACC__)
// A number that the compiler does not know: what is multiplied by it is not shifted.
static __constant__ uint32_t kTwoTo16 = 0x10000u;
#else
constexpr uint32_t kTwoTo16 = 0x10000u;
#endif

// Two bf16 are the upper halves of two floats. By a shift and a mask all of it would fall to the integer units, which do half
// as much a cycle as those for multiply-adds; the multiplication is one of the latter.
DCNV4_DEVICE void unpack(bf16, uint32_t pair, float& low, float& high) {
  low = bits_to_float(pair * kTwoTo16);
  high = bits_to_float(pair & 0xffff0000u);
}
DCNV4_DEVICE void unpack(f16, uint32_t pair, float& low, float& high) {
  low = to_compute(f16{uint16_t(pair & 0xffffu)});
  high = to_compute(f16{uint16_t(pair >> 16)});
}

// The word that a pair of CUDA's own types is.
template <class Pair>
DCNV4_DEVICE uint32_t bits_of(const Pair& pair) {
  uint32_t bits;
  static_assert(sizeof pair == sizeof bits, "two 16-bit numbers");
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// Round to nearest even. sm_80 and above have one instruction for two.
DCNV4_DEVICE uint32_t pack(bf16, float low, float high) {
#if defined(__CUDA_ARCH__)
  return bits_of(__floats2bfloat162_rn(low, high));
#else
  return from_compute<bf16>(low).bits | uint32_t(from_compute<bf16>(high).bits) << 16;
#endif
}
DCNV4_DEVICE uint32_t pack(f16, float low, float high) {
#if defined(__CUDA_ARCH__)
  return bits_of(__floats2half2_rn(low, high));
#else
  return from_compute<f16>(low).bits | uint32_t(from_compute<f16>(high).bits) << 16;
#endif
}

// Words as they were read to N numbers.
template <class T, class Words, int N, class Real>
DCNV4_DEVICE void spread(const Words& words, Real (&values)[N]) {
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

// Reads through the path for data that no kernel writes; `address` is aligned to Access::word bytes.
template <class T, int N, class Real>
DCNV4_DEVICE void load(const void* address, Real (&values)[N]) {
  using A = Access<T, N>;
  typename A::type words[A::words];
#pragma unroll
  for (int i = 0; i < A::words; ++i) words[i] = __ldg(static_cast<const typename A::type*>(address) + i);
  spread<T>(words, values);
}

// The same where `use` holds; else zeros.
template <class T, int N, class Real>
DCNV4_DEVICE void load_if(bool use, const void* address, Real (&values)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = 0;
  if (use) load<T, N>(address, values);
}

// The same from shared memory.
template <class T, int N, class Real>
DCNV4_DEVICE void load_shared(const void* address, Real (&values)[N]) {
  using A = Access<T, N>;
  typename A::type words[A::words];
#pragma unroll
  for (int i = 0; i < A::words; ++i) words[i] = static_cast<const typename A::type*>(address)[i];
  spread<T>(words, values);
}

// The same from what a kernel has written that may still have run when this one was launched.
template <class T, int N, class Real>
DCNV4_DEVICE void load_written(const void* address, Real (&values)[N]) {
  load_shared<T, N>(address, values);
}

// 8 bytes of shared memory where `use` holds, else zeros: a predicated instruction, where the compiler would branch.
DCNV4_DEVICE uint2 load_shared_if(bool use, const void* address) {
  uint2 words = make_uint2(0, 0);
#if defined(__CUDA_ARCH__)
  asm volatile("{\n .reg .pred use;\n setp.ne.s32 use, %2, 0;\n @use ld.shared.v2.u32 {%0, %1}, [%3];\n}"
               : "+r"(words.x), "+r"(words.y)
               : "r"(int(use)), "r"(uint32_t(__cvta_generic_to_shared(address))));
#else
  if (use) words = *static_cast<const uint2*>(address);
#endif
  return words;
}

// One instruction, which the compiler does not always make of a plain assignment.
template <class Word>
DCNV4_DEVICE void store_word(Word* address, const Word& word) {
  *address = word;
}
#if defined(__CUDA_ARCH__)
template <>
DCNV4_DEVICE void store_word<uint4>(uint4* address, const uint4& word) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w)
               : "memory");
}
template <>
DCNV4_DEVICE void store_word<unsigned short>(unsigned short* address, const unsigned short& word) {
  asm volatile("st.global.b16 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "h"(word) : "memory");
}
template <>
DCNV4_DEVICE void store_word<uint2>(uint2* address, const uint2& word) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(address)), "r"(word.x), "r"(word.y)
               : "memory");
}
#endif

// One number, by the processor's own instruction where it has one.
template <class T>
DCNV4_DEVICE T round_one(typename compute_of<T>::type value) {
  if constexpr (sizeof(T) == 2)
    return T{uint16_t(pack(T{}, value, 0.0f))};
  else
    return from_compute<T>(value);
}

// To global memory.
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
    for (int i = 0; i < N; ++i) elements[i] = round_one<T>(values[i]);
    memcpy(words, elements, sizeof elements);
  }
#pragma unroll
  for (int i = 0; i < A::words; ++i) store_word(static_cast<typename A::type*>(address) + i, words[i]);
}

template <class T>
DCNV4_DEVICE typename compute_of<T>::type load_one(const T* address) {
  typename compute_of<T>::type value[1];
  load<T, 1>(address, value);
  return value[0];
}
template <class T>
DCNV4_DEVICE typename compute_of<T>::type load_one_shared(const T* address) {
  typename compute_of<T>::type value[1];
  load_shared<T, 1>(address, value);
  return value[0];
}

// ---- From global to shared memory, 16 bytes at a time, past the registers: started by one function, waited for by the other
// (by each thread for its own, a barrier then tells the others). Where `use` does not hold zeros are written, and `from` is
// not read.
DCNV4_DEVICE void copy_async_or_zero(bool use, char* to, const void* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(to));
  const uint64_t global = __cvta_generic_to_global(from);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(use ? 16 : 0) : "memory");
#else
  *reinterpret_cast<uint4*>(to) = use ? __ldg(static_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
#endif
}
DCNV4_DEVICE void copy_async(char* to, const void* from) { copy_async_or_zero(true, to, from); }
DCNV4_DEVICE void copy_async_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// ---- Kernels of a stream, one after the other.

// Lets the next kernel start where this one leaves room.
DCNV4_DEVICE void let_next_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until all kernels before this one have ended and can be seen, then lets the next one start: where that is of the same
// call, it knows from its own start that what was there before the call can be read (Ahead).
DCNV4_DEVICE void wait_for_earlier() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n griddepcontrol.launch_dependents;" ::: "memory");
#elif !defined(__CUDACC__)
  host_cuda::wait_for_earlier();
#endif
}

// For blocks that have something to do before they need what kernels ahead of theirs write: wait(false) at the start,
// wait(true) before that is touched, and every thread before it ends, so that the kernel does not end before those.
struct LateWait {
  bool late;
  DCNV4_DEVICE void wait(bool second) const {
    if (second == late)
      wait_for_earlier();
    else if (late)
      let_next_start();
  }
};

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

// ---- Products of small matrices, a warp at a time. With q = lane % 4 and g = lane / 4 a lane holds
//     of A (16 x 16, or 16 x 8)   rows g and g + 8, columns 2q and 2q + 1 (a[0], a[1]), the same 8 columns on (a[2], a[3])
//     of B (16 x 8, or 8 x 8)     rows 2q and 2q + 1 (b[0]), the same 8 rows on (b[1]), column g
//     of C (16 x 8, fp32)         row g, columns 2q and 2q + 1 (c[0], c[1]), row g + 8 (c[2], c[3])
// two 16-bit numbers a word. The twins serve the emulation and processors before sm_80.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define DCNV4_MATRIX_UNITS 1
#else
#define DCNV4_MATRIX_UNITS 0
#endif

// Matrices of 8 rows of 16 bytes: lane 8i + r holds the address of row r of matrix i. Lane 4g + q gets of each the numbers 2q
// and 2q + 1 of row g, or with TRANSPOSED of column g.
template <int MATRICES, bool TRANSPOSED>
DCNV4_DEVICE void load_matrices(const char* row, uint32_t (&words)[MATRICES]) {
  static_assert(MATRICES == 2 || MATRICES == 4, "what the instruction has");
#if DCNV4_MATRIX_UNITS
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(row));
  if constexpr (MATRICES == 4 && TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared));
  else if constexpr (MATRICES == 4)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared));
  else if constexpr (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(words[0]), "=r"(words[1])
                 : "r"(shared));
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(shared));
#else
  const int lane = int(threadIdx.x) % 32, q = lane % 4, g = lane / 4;
#pragma unroll
  for (int i = 0; i < MATRICES; ++i) {
    uint16_t pair[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int from = i * 8 + (TRANSPOSED ? 2 * q + e : g), number = TRANSPOSED ? g : 2 * q + e;
      const uint64_t address = __shfl_sync(0xffffffffu, uint64_t(reinterpret_cast<uintptr_t>(row)), from);
      pair[e] = reinterpret_cast<const uint16_t*>(uintptr_t(address))[number];
    }
    words[i] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
  }
#endif
}

// c += A B, with EIGHTS eights of columns of A: 2, or 1 (then a[2], a[3] and b[1] are not looked at).
template <class T, int EIGHTS>
DCNV4_DEVICE void multiply_matrices(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if DCNV4_MATRIX_UNITS
#define DCNV4_MULTIPLY(shape, type, left, right, ...)                                                               \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 {%0, %1, %2, %3}, {" left "}, {" right \
               "}, {%0, %1, %2, %3};"                                                                               \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                     \
               : __VA_ARGS__)
  constexpr bool is_bf16 = std::is_same<T, bf16>::value;
  if constexpr (EIGHTS == 2 && is_bf16)
    DCNV4_MULTIPLY("m16n8k16", "bf16", "%4, %5, %6, %7", "%8, %9", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0),
                   "r"(b1));
  else if constexpr (EIGHTS == 2)
    DCNV4_MULTIPLY("m16n8k16", "f16", "%4, %5, %6, %7", "%8, %9", "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else if constexpr (is_bf16)
    DCNV4_MULTIPLY("m16n8k8", "bf16", "%4, %5", "%6", "r"(a[0]), "r"(a[1]), "r"(b0));
  else
    DCNV4_MULTIPLY("m16n8k8", "f16", "%4, %5", "%6", "r"(a[0]), "r"(a[1]), "r"(b0));
#undef DCNV4_MULTIPLY
#else
  const int lane = int(threadIdx.x) % 32, q = lane % 4, g = lane / 4;
  const auto both = [](uint32_t low, uint32_t high) { return uint64_t(low) | uint64_t(high) << 32; };
#pragma unroll 1  // never in a hurry, and a compiler would be busy for a minute
  for (int j = 0; j < 4; ++j) {
    uint64_t left[EIGHTS], right[2];
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e) left[e] = __shfl_sync(0xffffffffu, both(a[2 * e], a[2 * e + 1]), 4 * g + j);
#pragma unroll
    for (int n = 0; n < 2; ++n) right[n] = __shfl_sync(0xffffffffu, both(b0, b1), 4 * (2 * q + n) + j);
#pragma unroll
    for (int e = 0; e < EIGHTS; ++e) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          float x0, x1, y0, y1;
          unpack(T{}, uint32_t(left[e] >> (32 * row)), x0, x1);
          unpack(T{}, uint32_t(right[n] >> (32 * e)), y0, y1);
          c[2 * row + n] += x0 * y0 + x1 * y1;
        }
      }
    }
  }
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
