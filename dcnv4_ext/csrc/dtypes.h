// Storage types of 16 bits with their conversions, the same bits on host and device.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DCNV4_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER)
#define DCNV4_HD __forceinline
#else
#define DCNV4_HD inline __attribute__((always_inline))
#endif

namespace dcnv4 {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

DCNV4_HD float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
DCNV4_HD uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

DCNV4_HD float to_compute(float value) { return value; }
DCNV4_HD double to_compute(double value) { return value; }
DCNV4_HD float to_compute(bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }
DCNV4_HD float to_compute(f16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));  // inf, NaN
  if (magnitude >= 0x0400u) return bits_to_float(sign | ((magnitude << 13) + 0x38000000u));           // normal
  const float subnormal = float(magnitude) * (1.0f / 16777216.0f);                                    // units of 2^-24
  return bits_to_float(sign | float_to_bits(subnormal));
#endif
}

template <class T>
DCNV4_HD T from_compute(double value);
template <class T>
DCNV4_HD T from_compute(float value);

template <>
DCNV4_HD double from_compute<double>(double value) {
  return value;
}
template <>
DCNV4_HD float from_compute<float>(float value) {
  return value;
}
template <>
DCNV4_HD bf16 from_compute<bf16>(float value) {
  // Round to nearest even; a NaN stays a NaN (adding the rounding bias could carry it into an infinity).
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{uint16_t((bits >> 16) | 0x40u)};
  return bf16{uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
DCNV4_HD f16 from_compute<f16>(float value) {
#if defined(__CUDA_ARCH__)
  return f16{__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = float_to_bits(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return f16{uint16_t(sign | 0x7e00u)};   // NaN
  if (magnitude >= 0x477ff000u) return f16{uint16_t(sign | 0x7c00u)};  // rounds past 65504
  if (magnitude >= 0x38800000u) {                                      // normal: drop 13 bits, nearest even
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return f16{uint16_t(sign | ((rounded - 0x38000000u) >> 13))};
  }
  // Subnormal: adding 0.5 leaves the value in units of 2^-24 in the low bits, rounded by the addition itself.
  const uint32_t shifted = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  return f16{uint16_t(sign | shifted)};
#endif
}

// The type sums are kept in: fp64 for fp64, fp32 for everything else.
template <class T>
struct compute_of {
  using type = float;
};
template <>
struct compute_of<double> {
  using type = double;
};

}  // namespace dcnv4
