// A box of a map to shared memory by one thread's instruction: the tensor memory accelerator of sm_90 and later, which takes no
// threads' time and fills with zeros what lies outside the map.
#pragma once
#include "launch.h"

#if defined(__CUDACC__)
#include <cuda.h>
#if CUDART_VERSION >= 12050
#define DCNV4_BULK 1
#else
#define DCNV4_BULK 0
#endif
#endif

namespace dcnv4 {

// Of a channels-last tensor, in words of 4 bytes: a pixel's, then columns, rows and images.
struct BulkSizes {
  uint64_t words, width, height, images;
  uint64_t pixel_bytes, row_bytes, image_bytes;
  uint32_t box_words, box_width, box_height;
  bool swizzled;  // of boxes of 128 bytes a pixel, see swizzle()
};
// So that neighbouring pixels lie in different banks: bits 7 to 9 of a byte's place in a box change which 16 bytes it is in.
DCNV4_DEVICE uint32_t swizzle(uint32_t at) { return at ^ (at >> 3 & 0x70u); }
constexpr int64_t kMostBox = 256;        // along each direction
constexpr int64_t kBulkAlignment = 128;  // of the box in shared memory; of a swizzled one 1024
constexpr int kBarrierBytes = 8;

#if !defined(__CUDACC__)
struct BulkMap {
  const char* first;
  BulkSizes sizes;
};
inline bool make_bulk_map(const void* first, const BulkSizes& sizes, BulkMap& map) {
  map = {static_cast<const char*>(first), sizes};
  return true;
}
#elif DCNV4_BULK
using BulkMap = CUtensorMap;
// False where the driver has no such thing or does not take the sizes.
inline bool make_bulk_map(const void* first, const BulkSizes& sizes, BulkMap& map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(found) : nullptr;
  }();
  if (!encode) return false;
  const cuuint64_t size[4] = {sizes.words, sizes.width, sizes.height, sizes.images};
  const cuuint64_t strides[3] = {sizes.pixel_bytes, sizes.row_bytes, sizes.image_bytes};
  const cuuint32_t box[4] = {sizes.box_words, sizes.box_width, sizes.box_height, 1}, steps[4] = {1, 1, 1, 1};
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT32, 4, const_cast<void*>(first), size, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, sizes.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}
#else
struct BulkMap {};
inline bool make_bulk_map(const void*, const BulkSizes&, BulkMap&) { return false; }
#endif

// By one thread, once a barrier: that `bytes` in all will come to it. The others need another one before they wait for them.
DCNV4_DEVICE void expect_bulk(char* barrier, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && DCNV4_BULK
  const uint32_t at = uint32_t(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(at) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
#endif
}

// A box whose first pixel may lie outside the map; `word` is a multiple of four.
DCNV4_DEVICE void start_bulk(const BulkMap& map, char* to, char* barrier, int word, int x, int y, int image) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && DCNV4_BULK
  const uint32_t at = uint32_t(__cvta_generic_to_shared(barrier)), shared = uint32_t(__cvta_generic_to_shared(to));
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
          shared),
      "l"(&map), "r"(word), "r"(x), "r"(y), "r"(image), "r"(at)
      : "memory");
#elif !defined(__CUDACC__)
  (void)barrier;
  const BulkSizes& s = map.sizes;
  uint32_t at = 0;
  for (uint32_t row = 0; row < s.box_height; ++row) {
    for (uint32_t column = 0; column < s.box_width; ++column) {
      const int64_t from_x = x + int64_t(column), from_y = y + int64_t(row);
      const bool inside = from_x >= 0 && from_y >= 0 && from_x < int64_t(s.width) && from_y < int64_t(s.height);
      const char* pixel =
          map.first + uint64_t(image) * s.image_bytes + uint64_t(from_y) * s.row_bytes + uint64_t(from_x) * s.pixel_bytes;
      for (uint32_t i = 0; i < s.box_words; ++i, at += 4) {
        char* word_to = to + (s.swizzled ? swizzle(at) : at);
        if (inside && word + i < s.words)
          memcpy(word_to, pixel + uint64_t(word + i) * 4, 4);
        else
          memset(word_to, 0, 4);
      }
    }
  }
#endif
}

DCNV4_DEVICE void wait_for_bulk(const char* barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && DCNV4_BULK
  const uint32_t at = uint32_t(__cvta_generic_to_shared(barrier));
  uint32_t done = 0;
  while (done == 0)
    asm volatile("{\n .reg .pred done;\n mbarrier.try_wait.parity.shared::cta.b64 done, [%1], 0;\n selp.u32 %0, 1, 0, done;\n}"
                 : "=r"(done)
                 : "r"(at)
                 : "memory");
#else
  (void)barrier;
#endif
}

// ---- Arrivals: some threads have written something and go on, others wait for it, later. Once a barrier.

// By one thread: that `count` threads will arrive. All need another barrier before they arrive or wait.
DCNV4_DEVICE void expect_arrivals(char* barrier, int count) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && DCNV4_BULK
  const uint32_t at = uint32_t(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
#elif !defined(__CUDACC__)
  host_cuda::expect_arrivals(barrier, count);
#endif
}
// What this thread has written is there for those who have waited.
DCNV4_DEVICE void arrive(char* barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && DCNV4_BULK
  const uint32_t at = uint32_t(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
#elif !defined(__CUDACC__)
  host_cuda::arrive(barrier);
#endif
}
DCNV4_DEVICE void wait_for_arrivals(const char* barrier) {
#if defined(__CUDACC__)
  wait_for_bulk(barrier);
#else
  host_cuda::wait_for_arrivals(barrier, __LINE__);
#endif
}

}  // namespace dcnv4
