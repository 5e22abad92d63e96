// Sizes that no kernel may be given, whoever calls. Python checks the arguments before and says which is wrong; this is the
// last line. What only one device cannot do stands with that device.
#pragma once
#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "sampling.h"

namespace dcnv4 {

constexpr int64_t kMostPoints = 1 << 20;  // of a kernel: 1024 x 1024

// Whether the bytes of n x h x w pixels, and of the scratch that goes with them, are counted by 64 bits.
inline bool countable(int64_t n, int64_t h, int64_t w, int64_t stride) {
  int64_t most = INT64_MAX / 64;
  for (int64_t size : {n, h, w, stride}) most /= size > 0 ? size : 1;
  return most > 0;
}

inline int32_t check_sizes(const dcnv4_problem& p) {
  constexpr int64_t limit = INT32_MAX;
  if (p.abi_version != DCNV4_ABI_VERSION || p.dtype < DCNV4_FLOAT32 || p.dtype > DCNV4_FLOAT16) return DCNV4_BAD_PROBLEM;
  for (int64_t size : {p.H, p.W, p.G, p.D, p.Ho, p.Wo, p.P})
    if (size < 1 || size > limit) return DCNV4_BAD_PROBLEM;
  for (int64_t size : {p.kernel_h, p.kernel_w, p.stride_h, p.stride_w, p.dilation_h, p.dilation_w})
    if (size < 1) return DCNV4_BAD_PROBLEM;
  const int64_t channels = p.G * p.D, points = int64_t(p.kernel_h) * p.kernel_w, taps = points - (p.remove_center ? 1 : 0);
  if (p.N < 0 || p.N > limit || p.pad_h < 0 || p.pad_w < 0 || taps < 1 || points > kMostPoints) return DCNV4_BAD_PROBLEM;
  if (p.G > p.P / (3 * taps) || p.value_stride < channels || p.output_stride < channels || p.offset_mask_stride < p.P)
    return DCNV4_BAD_PROBLEM;
  if (!countable(p.N, p.H, p.W, p.value_stride) || !countable(p.N, p.Ho, p.Wo, p.offset_mask_stride) ||
      !countable(p.N, p.Ho, p.Wo, p.output_stride))
    return DCNV4_BAD_PROBLEM;
  const int64_t reach_w = int64_t(p.dilation_w) * (p.kernel_w - 1), reach_h = int64_t(p.dilation_h) * (p.kernel_h - 1);
  if (reach_w > limit || reach_h > limit || !std::isfinite(p.offset_scale)) return DCNV4_BAD_PROBLEM;
  return DCNV4_OK;
}

// The same for backward's gradients, of which one or both may be left out.
inline int32_t check_gradients(const dcnv4_problem& p, const void* grad_value, const void* grad_offset_mask) {
  if ((grad_value && p.grad_value_stride < p.G * p.D) || (grad_offset_mask && p.grad_offset_mask_stride < p.P))
    return DCNV4_BAD_PROBLEM;
  if (!countable(p.N, p.H, p.W, grad_value ? p.grad_value_stride : 1) ||
      !countable(p.N, p.Ho, p.Wo, grad_offset_mask ? p.grad_offset_mask_stride : 1))
    return DCNV4_BAD_PROBLEM;
  return DCNV4_OK;
}

}  // namespace dcnv4
