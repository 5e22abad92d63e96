// What one call of a CPU kernel computes once: strides, tap grid, tiling.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <optional>
#include <type_traits>

#if defined(_WIN32)
#include <malloc.h>
#endif

#if defined(_OPENMP)
#include <omp.h>
#endif

#include "../sampling.h"

#if defined(_MSC_VER)
#define DCNV4_INLINE __forceinline
#define DCNV4_NOINLINE __declspec(noinline)
#define DCNV4_RESTRICT __restrict
#define DCNV4_UNROLL
#define DCNV4_LIKELY(x) (x)
#define DCNV4_LAMBDA_INLINE
#else
#define DCNV4_INLINE inline __attribute__((always_inline))
#define DCNV4_NOINLINE __attribute__((noinline))
#define DCNV4_RESTRICT __restrict__
#define DCNV4_UNROLL _Pragma("GCC unroll 16")
#define DCNV4_LIKELY(x) __builtin_expect(!!(x), 1)
#define DCNV4_LAMBDA_INLINE __attribute__((always_inline))
#endif

namespace dcnv4 {

// The kernels of one instruction set. Pointers are typed by problem->dtype.
struct CpuKernels {
  const char* name;
  int32_t (*forward)(const dcnv4_problem&, const void* value, const void* offset_mask, void* output);
  int32_t (*backward)(const dcnv4_problem&, const void* value, const void* offset_mask, const void* grad_output,
                      void* grad_value, void* grad_offset_mask);
};

// Internal linkage: files of different instruction sets must never share a function, or the linker could keep the one that
// the processor cannot run.
namespace {

// This thread among those that work together.
struct Thread {
  int number = 0, team = 1;
};
inline Thread this_thread() {
#if defined(_OPENMP)
  return {omp_get_thread_num(), omp_get_num_threads()};
#else
  return {};
#endif
}

// Two neighbouring vectors one by one; past the caches p is aligned to both.
template <class V, class T>
DCNV4_INLINE void store_each(T* p, V a, V b, bool past_caches) {
  if (past_caches) {
    a.stream(p);
    b.stream(p + V::width);
  } else {
    a.store(p);
    b.store(p + V::width);
  }
}

// Scratch that a thread keeps between calls, so that a call in a training loop touches no fresh pages.
class Scratch {
 public:
  ~Scratch() { release(); }
  // At least `bytes`, aligned to a cache line, or nullptr. What it held before is lost.
  void* get(size_t bytes) {
    if (bytes <= size_) return data_;
    release();
    bytes = (bytes + 4095) / 4096 * 4096;
#if defined(_WIN32)  // whatever the compiler: it is the C library that has no aligned_alloc
    data_ = _aligned_malloc(bytes, 64);
#else
    data_ = std::aligned_alloc(64, bytes);
#endif
    size_ = data_ ? bytes : 0;
    return data_;
  }
  // Give back what only an unusually large problem needs.
  void trim(size_t keep) {
    if (size_ > keep) release();
  }

 private:
  void release() {
#if defined(_WIN32)
    _aligned_free(data_);
#else
    std::free(data_);
#endif
    data_ = nullptr;
    size_ = 0;
  }
  void* data_ = nullptr;
  size_t size_ = 0;
};

constexpr size_t kKeptScratch = size_t(64) << 20;  // bytes a thread may keep

// Rows [first, last) of a value map, packed with a zero column on either side. first >= -1 and last <= H + 1: row -1 and row H
// are zero rows.
struct Window {
  int64_t first, last;
};

template <class S>
struct Plan {
  int64_t K, padded_taps;   // taps, and taps rounded up to whole vectors
  int64_t D, packed_width;  // channels a group, and rounded up to whole vectors
  int at_once;              // vectors of channels taken together
  int64_t pitch;            // cells of a packed row: W + 2
  int64_t rows;             // of the value map: H
  int64_t center_y;         // of the kernel, in rows
  S width, height, scale;
  const S *grid_x, *grid_y;     // padded_taps each
  const void* lanes = nullptr;  // LaneTables, where the kernel wants them
  bool by_cells = false;        // whether backward sorts taps by cells (cells.h), where its vectors can
};

}  // namespace
}  // namespace dcnv4
