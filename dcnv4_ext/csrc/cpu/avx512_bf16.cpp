// AVX-512 with AVX512_BF16: bf16 problems; the others are those of AVX-512.
#include <immintrin.h>

#include <cmath>

#include "plan.h"

#define DCNV4_BF16_INSTRUCTIONS

namespace dcnv4 {
extern const CpuKernels kAvx512Kernels, kAvx512CellsKernels;

namespace avx512_bf16 {

#include "avx512.h"

namespace {

// Packed maps of bf16 as it lies in tensors (a type of channels, channels.h): 32 a vector, half the loads and half the memory.
// For weighted sums the even channels and the odd ones are taken apart, by two simple instructions. Dot products need none:
// products of two bf16 numbers are exact in fp32 (numbers below 2^-126 count as zero).
struct Bf16 {
  using Vector = F32;
  using Cell = bf16;
  using Operand = __m512i;
  static constexpr int width = 32, at_once = 3, registers = 2, permuted = 1;
  static constexpr bool turns = true;
  F32 even, odd;

  static DCNV4_INLINE __m512i some(const bf16* p, int n) { return _mm512_maskz_loadu_epi16(first(n), p); }
  static DCNV4_INLINE void clear(bf16* to) { _mm512_storeu_si512(to, _mm512_setzero_si512()); }
  static DCNV4_INLINE void pack(const bf16* from, bf16* to) { _mm512_storeu_si512(to, _mm512_loadu_si512(from)); }
  static DCNV4_INLINE void pack_some(const bf16* from, int n, bf16* to) { _mm512_storeu_si512(to, some(from, n)); }
  static DCNV4_INLINE Bf16 load(const bf16* p) { return widened(operand(p)); }
  static DCNV4_INLINE Bf16 load_some(const bf16* p, int n) { return widened(operand_some(p, n)); }
  static DCNV4_INLINE Bf16 of(const F32* parts) { return {parts[0], parts[1]}; }
  DCNV4_INLINE F32 part(int i) const { return i == 0 ? even : odd; }
  static DCNV4_INLINE Bf16 times(F32 weight, Bf16 x) { return {weight * x.even, weight * x.odd}; }
  static DCNV4_INLINE Bf16 add(F32 weight, Bf16 x, Bf16 sum) {
    return {F32::fma(weight, x.even, sum.even), F32::fma(weight, x.odd, sum.odd)};
  }
  friend DCNV4_INLINE Bf16 operator+(Bf16 a, Bf16 b) { return {a.even + b.even, a.odd + b.odd}; }

  static DCNV4_INLINE __m512i operand(const bf16* p) { return _mm512_loadu_si512(p); }
  static DCNV4_INLINE __m512i operand_some(const bf16* p, int n) { return n > 0 ? some(p, n) : _mm512_setzero_si512(); }
  static DCNV4_INLINE void turn(__m512i& a, __m512i& b, __m512i& c, __m512i& d) {
    const __m512i ab_low = _mm512_shuffle_i32x4(a, b, 0x44), ab_high = _mm512_shuffle_i32x4(a, b, 0xee);
    const __m512i cd_low = _mm512_shuffle_i32x4(c, d, 0x44), cd_high = _mm512_shuffle_i32x4(c, d, 0xee);
    a = _mm512_shuffle_i32x4(ab_low, cd_low, 0x88);
    b = _mm512_shuffle_i32x4(ab_low, cd_low, 0xdd);
    c = _mm512_shuffle_i32x4(ab_high, cd_high, 0x88);
    d = _mm512_shuffle_i32x4(ab_high, cd_high, 0xdd);
  }
  static DCNV4_INLINE __m512i spread_block(const bf16* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p)); }
  static DCNV4_INLINE F32 dot(__m512i x, __m512i y) { return dot(x, y, F32::zero()); }
  static DCNV4_INLINE F32 dot(__m512i x, __m512i y, F32 sum) { return {_mm512_dpbf16_ps(sum.v, (__m512bh)x, (__m512bh)y)}; }

  DCNV4_INLINE void store(bf16* p) const { _mm512_storeu_si512(p, bits()); }
  DCNV4_INLINE void store_some(bf16* p, int n) const { _mm512_mask_storeu_epi16(p, first(n), bits()); }
  DCNV4_INLINE void stream(bf16* p) const { _mm512_stream_si512((__m512i*)p, bits()); }
  static DCNV4_INLINE void store_two(bf16* p, Bf16 a, Bf16 b, bool past_caches) { store_each(p, a, b, past_caches); }

 private:
  static DCNV4_INLINE Bf16 widened(__m512i both) {
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))))}};
  }
  static DCNV4_INLINE __mmask32 first(int n) { return __mmask32(n < 32 ? (1u << n) - 1u : ~0u); }
  DCNV4_INLINE __m512i bits() const {
    const __m512i in_turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                             20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(in_turn, bf16_bits(even.v, odd.v));
  }
};

}  // namespace

#include "kernels.h"

namespace {

// Whether cells of bf16 hold `D` channels with no more waste than cells of the compute type.
bool fits(int64_t D) { return cell_elements<Bf16>(D) <= cell_elements<Widened<F32>>(D); }

template <bool kWide>
int32_t forward_of(const dcnv4_problem& p, const void* value, const void* offset_mask, void* output) {
  if (p.dtype != DCNV4_BFLOAT16) return kAvx512Kernels.forward(p, value, offset_mask, output);
  if (kWide && fits(p.D)) return forward<F32, bf16, Bf16>(p, value, offset_mask, output);
  return forward<F32, bf16>(p, value, offset_mask, output);
}

template <bool kByCells>
int32_t backward_of(const dcnv4_problem& p, const void* value, const void* offset_mask, const void* grad_output,
                    void* grad_value, void* grad_offset_mask) {
  if (p.dtype != DCNV4_BFLOAT16)
    return (kByCells ? kAvx512CellsKernels : kAvx512Kernels)
        .backward(p, value, offset_mask, grad_output, grad_value, grad_offset_mask);
  if (kByCells && fits(p.D))
    return backward<F32, bf16, Bf16>(p, value, offset_mask, grad_output, grad_value, grad_offset_mask, kByCells);
  return backward<F32, bf16>(p, value, offset_mask, grad_output, grad_value, grad_offset_mask, kByCells);
}

}  // namespace
}  // namespace avx512_bf16

extern const CpuKernels kAvx512Bf16Kernels, kAvx512Bf16CellsKernels, kAvx512WideKernels;
const CpuKernels kAvx512Bf16Kernels = {"avx512_bf16", avx512_bf16::forward_of<false>, avx512_bf16::backward_of<false>};
// The same with backward by cells, whose dot products are made by the instruction: four times as slow as a multiply-add on an
// Intel Xeon (Emerald Rapids).
const CpuKernels kAvx512Bf16CellsKernels = {"avx512_bf16", avx512_bf16::forward_of<false>, avx512_bf16::backward_of<true>};
// Where taking channels apart costs less than loading them twice: four pipes of 512 bits beside two loads.
const CpuKernels kAvx512WideKernels = {"avx512_wide", avx512_bf16::forward_of<true>, avx512_bf16::backward_of<true>};
}  // namespace dcnv4
