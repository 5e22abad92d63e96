// AVX2, FMA and F16C vectors: 8 lanes of fp32, 4 of fp64.
#include <immintrin.h>

#include <cmath>

#include "plan.h"

namespace dcnv4 {
namespace avx2 {
namespace {

// In the lower half of a lane. Round to nearest even; NaN keeps its upper bits and becomes quiet.
DCNV4_INLINE __m256i round_to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
}
// Two vectors in one.
DCNV4_INLINE __m256i bf16_bits(__m256 low, __m256 high) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(round_to_bf16(low), round_to_bf16(high)), 0xd8);
}
DCNV4_INLINE __m128i bf16_bits(__m256 v) {
  const __m256i bits = round_to_bf16(v);
  return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}
DCNV4_INLINE __m256 from_bf16(__m128i bits) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }
DCNV4_INLINE __m256i lanes32(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
DCNV4_INLINE __m256i lanes64(int n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
// AVX2 has no masked 16-bit access: some values go through a buffer.
template <class T>
DCNV4_INLINE __m128i load_halves(const T* p, int n) {
  alignas(16) uint16_t buffer[8] = {0};
  memcpy(buffer, p, size_t(n) * 2);
  return _mm_load_si128((const __m128i*)buffer);
}
template <class T>
DCNV4_INLINE void store_halves(T* p, int n, __m128i bits) {
  alignas(16) uint16_t buffer[8];
  _mm_store_si128((__m128i*)buffer, bits);
  memcpy(p, buffer, size_t(n) * 2);
}

struct F32 {
  using Scalar = float;
  using Mask = __m256;
  static constexpr int width = 8;
  __m256 v;

  static DCNV4_INLINE F32 zero() { return {_mm256_setzero_ps()}; }
  static DCNV4_INLINE F32 set1(float x) { return {_mm256_set1_ps(x)}; }
  static DCNV4_INLINE Mask first_lanes(int n) { return _mm256_castsi256_ps(lanes32(n)); }

  static DCNV4_INLINE F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static DCNV4_INLINE F32 load(const bf16* p) { return {from_bf16(_mm_loadu_si128((const __m128i*)p))}; }
  static DCNV4_INLINE F32 load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p))}; }
  static DCNV4_INLINE F32 load_some(const float* p, int n) { return {_mm256_maskload_ps(p, lanes32(n))}; }
  static DCNV4_INLINE F32 load_some(const bf16* p, int n) { return {from_bf16(load_halves(p, n))}; }
  static DCNV4_INLINE F32 load_some(const f16* p, int n) { return {_mm256_cvtph_ps(load_halves(p, n))}; }
  DCNV4_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  DCNV4_INLINE void store(bf16* p) const { _mm_storeu_si128((__m128i*)p, bf16_bits(v)); }
  DCNV4_INLINE void store(f16* p) const { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  // Past the caches; p is aligned.
  DCNV4_INLINE void stream(float* p) const { _mm256_stream_ps(p, v); }
  DCNV4_INLINE void stream(bf16* p) const { _mm_stream_si128((__m128i*)p, bf16_bits(v)); }
  DCNV4_INLINE void stream(f16* p) const { _mm_stream_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }
  static DCNV4_INLINE void fence() { _mm_sfence(); }
  DCNV4_INLINE void store_some(float* p, int n) const { _mm256_maskstore_ps(p, lanes32(n), v); }
  DCNV4_INLINE void store_some(bf16* p, int n) const { store_halves(p, n, bf16_bits(v)); }
  DCNV4_INLINE void store_some(f16* p, int n) const { store_halves(p, n, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT)); }

  // Elements 0, 2, 4, ... and 1, 3, 5, ... of the 2 n values at p.
  template <class T>
  static DCNV4_INLINE void pairs(const T* p, int n, F32& even, F32& odd) {
    const F32 low = n >= 4 ? load(p) : load_some(p, 2 * n), high = n > 4 ? load_some(p + 8, 2 * n - 8) : zero();
    even.v = in_order(_mm256_shuffle_ps(low.v, high.v, 0x88));
    odd.v = in_order(_mm256_shuffle_ps(low.v, high.v, 0xdd));
  }
  // The same for a whole vector of pairs.
  template <class T>
  static DCNV4_INLINE void all_pairs(const T* p, F32& even, F32& odd) {
    pairs(p, width, even, odd);
  }
  static DCNV4_INLINE void all_pairs(const bf16* p, F32& even, F32& odd) {
    const __m256i both = _mm256_loadu_si256((const __m256i*)p);
    even.v = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    odd.v = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int(0xffff0000u))));
  }
  // Two neighbouring vectors; past the caches p is aligned to both.
  template <class T>
  static DCNV4_INLINE void store_two(T* p, F32 a, F32 b, bool past_caches) {
    store_each(p, a, b, past_caches);
  }
  static DCNV4_INLINE void store_two(bf16* p, F32 a, F32 b, bool past_caches) {
    const __m256i two = bf16_bits(a.v, b.v);
    if (past_caches) {
      _mm256_stream_si256((__m256i*)p, two);
    } else {
      _mm256_storeu_si256((__m256i*)p, two);
    }
  }
  template <class T>
  static DCNV4_INLINE void store_pairs(T* p, int n, F32 even, F32 odd) {
    const __m256 a = _mm256_unpacklo_ps(even.v, odd.v), b = _mm256_unpackhi_ps(even.v, odd.v);
    const F32 low = {_mm256_permute2f128_ps(a, b, 0x20)}, high = {_mm256_permute2f128_ps(a, b, 0x31)};
    if (n >= 4) {
      low.store(p);
      if (n > 4) high.store_some(p + 8, 2 * n - 8);
    } else {
      low.store_some(p, 2 * n);
    }
  }
  static DCNV4_INLINE void store_pairs(bf16* p, int n, F32 even, F32 odd) {
    const __m256i pairs = _mm256_or_si256(_mm256_slli_epi32(round_to_bf16(odd.v), 16), round_to_bf16(even.v));
    if (n == width) {
      _mm256_storeu_si256((__m256i*)p, pairs);
    } else {
      _mm256_maskstore_epi32((int*)p, lanes32(n), pairs);
    }
  }
  // Element q of each of 8 groups of four: four times two groups that lie four apart, transposed.
  static DCNV4_INLINE void quads(const float* p, F32& a, F32& b, F32& c, F32& d) {
    const __m256 r0 = groups(p, p + 16), r1 = groups(p + 4, p + 20), r2 = groups(p + 8, p + 24), r3 = groups(p + 12, p + 28);
    const __m256 ab_low = _mm256_unpacklo_ps(r0, r1), ab_high = _mm256_unpacklo_ps(r2, r3);
    const __m256 cd_low = _mm256_unpackhi_ps(r0, r1), cd_high = _mm256_unpackhi_ps(r2, r3);
    a.v = _mm256_shuffle_ps(ab_low, ab_high, 0x44);
    b.v = _mm256_shuffle_ps(ab_low, ab_high, 0xee);
    c.v = _mm256_shuffle_ps(cd_low, cd_high, 0x44);
    d.v = _mm256_shuffle_ps(cd_low, cd_high, 0xee);
  }
  // The sums over the lanes of a, b, c, d to out[0..3], or added to them.
  static DCNV4_INLINE void sum4(F32 a, F32 b, F32 c, F32 d, float* out, bool add) {
    const __m256 quarters = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
    __m128 sums = _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1));
    if (add) sums = _mm_add_ps(sums, _mm_loadu_ps(out));
    _mm_storeu_ps(out, sums);
  }

  static constexpr bool looks_up = true, sorts = false;
  static constexpr int permuted = 4;
  using Weights = const float*;
  static DCNV4_INLINE Weights weights(const float* p) { return p; }
  // Four weights at a time in both halves of a register; which is known where the taps are unrolled.
  static DCNV4_INLINE F32 spread(Weights weights, int tap) {
    const __m256 four = _mm256_broadcast_ps((const __m128*)(weights + tap / 4 * 4));
    switch (tap % 4) {
      case 0:
        return {_mm256_permute_ps(four, 0x00)};
      case 1:
        return {_mm256_permute_ps(four, 0x55)};
      case 2:
        return {_mm256_permute_ps(four, 0xaa)};
      default:
        return {_mm256_permute_ps(four, 0xff)};
    }
  }
  static DCNV4_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static DCNV4_INLINE F32 floor(F32 a) { return {_mm256_floor_ps(a.v)}; }
  // 2^n for a whole n that is the exponent of a normal number.
  static DCNV4_INLINE F32 power_of_two(F32 n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvttps_epi32(n.v), _mm256_set1_epi32(127));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))};
  }
  static DCNV4_INLINE Mask greater(Mask among, F32 a, F32 b) {
    return _mm256_and_ps(among, _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ));
  }
  // a, or b where used and smaller or greater.
  static DCNV4_INLINE F32 least(Mask used, F32 a, F32 b) { return {_mm256_blendv_ps(a.v, _mm256_min_ps(a.v, b.v), used)}; }
  static DCNV4_INLINE F32 greatest(Mask used, F32 a, F32 b) { return {_mm256_blendv_ps(a.v, _mm256_max_ps(a.v, b.v), used)}; }
  DCNV4_INLINE float lane(int i) const {
    alignas(32) float lanes[width];
    _mm256_store_ps(lanes, v);
    return lanes[i];
  }
  static DCNV4_INLINE bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }
  static DCNV4_INLINE Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  static DCNV4_INLINE bool lane(Mask m, int i) { return _mm256_movemask_ps(m) >> i & 1; }
  static DCNV4_INLINE F32 permute(F32 a, const int32_t* lanes) {
    return {_mm256_permutevar8x32_ps(a.v, _mm256_loadu_si256((const __m256i*)lanes))};
  }
  static DCNV4_INLINE F32 select(Mask m, F32 a) { return {_mm256_and_ps(m, a.v)}; }
  // `cell`, a whole number below 2^24, where used.
  static DCNV4_INLINE void store_whole(uint32_t* out, Mask used, F32 cell, int32_t blank) {
    const __m256i chosen = _mm256_blendv_epi8(_mm256_set1_epi32(blank), _mm256_cvttps_epi32(cell.v), _mm256_castps_si256(used));
    _mm256_storeu_si256((__m256i*)out, chosen);
  }
  static DCNV4_INLINE void store_cells(int32_t* out, Mask used, F32 y, F32 x, int32_t first_row, int32_t pitch, int32_t blank) {
    const __m256i row = _mm256_sub_epi32(_mm256_cvttps_epi32(_mm256_and_ps(used, y.v)), _mm256_set1_epi32(first_row));
    const __m256i column = _mm256_add_epi32(_mm256_cvttps_epi32(_mm256_and_ps(used, x.v)), _mm256_set1_epi32(1));
    const __m256i cell = _mm256_add_epi32(_mm256_mullo_epi32(row, _mm256_set1_epi32(pitch)), column);
    _mm256_storeu_si256((__m256i*)out, _mm256_blendv_epi8(_mm256_set1_epi32(blank), cell, _mm256_castps_si256(used)));
  }
  static DCNV4_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
  // Into the L2 cache alone: not tried where AVX2 is the best there is (docs/cpu.md).
  static DCNV4_INLINE void prefetch_l2(const void* p) { prefetch(p); }

 private:
  static DCNV4_INLINE __m256 groups(const float* low, const float* high) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
  }
  static DCNV4_INLINE __m256 in_order(__m256 shuffled) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(shuffled), 0xd8));
  }
};
DCNV4_INLINE F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
DCNV4_INLINE F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
DCNV4_INLINE F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }

struct F64 {
  using Scalar = double;
  using Mask = __m256d;
  static constexpr int width = 4;
  __m256d v;

  static DCNV4_INLINE F64 zero() { return {_mm256_setzero_pd()}; }
  static DCNV4_INLINE F64 set1(double x) { return {_mm256_set1_pd(x)}; }
  static DCNV4_INLINE Mask first_lanes(int n) { return _mm256_castsi256_pd(lanes64(n)); }
  static DCNV4_INLINE F64 load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static DCNV4_INLINE F64 load_some(const double* p, int n) { return {_mm256_maskload_pd(p, lanes64(n))}; }
  DCNV4_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  DCNV4_INLINE void store_some(double* p, int n) const { _mm256_maskstore_pd(p, lanes64(n), v); }
  static DCNV4_INLINE void pairs(const double* p, int n, F64& even, F64& odd) {
    const F64 low = n >= 2 ? load(p) : load_some(p, 2 * n), high = n > 2 ? load_some(p + 4, 2 * n - 4) : zero();
    even.v = _mm256_permute4x64_pd(_mm256_unpacklo_pd(low.v, high.v), 0xd8);
    odd.v = _mm256_permute4x64_pd(_mm256_unpackhi_pd(low.v, high.v), 0xd8);
  }
  static DCNV4_INLINE void store_pairs(double* p, int n, F64 even, F64 odd) {
    const __m256d a = _mm256_unpacklo_pd(even.v, odd.v), b = _mm256_unpackhi_pd(even.v, odd.v);
    const F64 low = {_mm256_permute2f128_pd(a, b, 0x20)}, high = {_mm256_permute2f128_pd(a, b, 0x31)};
    low.store_some(p, n >= 2 ? 4 : 2 * n);
    if (n > 2) high.store_some(p + 4, 2 * n - 4);
  }
  static DCNV4_INLINE void quads(const double* p, F64& a, F64& b, F64& c, F64& d) {
    const __m128i index = _mm_setr_epi32(0, 4, 8, 12);
    a.v = _mm256_i32gather_pd(p, index, 8);
    b.v = _mm256_i32gather_pd(p + 1, index, 8);
    c.v = _mm256_i32gather_pd(p + 2, index, 8);
    d.v = _mm256_i32gather_pd(p + 3, index, 8);
  }
  static DCNV4_INLINE void sum4(F64 a, F64 b, F64 c, F64 d, double* out, bool add) {
    const __m256d ab = _mm256_hadd_pd(a.v, b.v), cd = _mm256_hadd_pd(c.v, d.v);
    __m256d sums = _mm256_add_pd(_mm256_permute2f128_pd(ab, cd, 0x20), _mm256_permute2f128_pd(ab, cd, 0x31));
    if (add) sums = _mm256_add_pd(sums, _mm256_loadu_pd(out));
    _mm256_storeu_pd(out, sums);
  }
  static constexpr bool looks_up = false;
  static DCNV4_INLINE F64 fma(F64 a, F64 b, F64 c) { return {_mm256_fmadd_pd(a.v, b.v, c.v)}; }
  static DCNV4_INLINE F64 floor(F64 a) { return {_mm256_floor_pd(a.v)}; }
  static DCNV4_INLINE Mask greater(Mask among, F64 a, F64 b) {
    return _mm256_and_pd(among, _mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ));
  }
  static DCNV4_INLINE bool any(Mask m) { return _mm256_movemask_pd(m) != 0; }
  static DCNV4_INLINE F64 select(Mask m, F64 a) { return {_mm256_and_pd(m, a.v)}; }
  static DCNV4_INLINE void store_cells(int32_t* out, Mask used, F64 y, F64 x, int32_t first_row, int32_t pitch, int32_t blank) {
    const __m128i row = _mm_sub_epi32(_mm256_cvttpd_epi32(_mm256_and_pd(used, y.v)), _mm_set1_epi32(first_row));
    const __m128i column = _mm_add_epi32(_mm256_cvttpd_epi32(_mm256_and_pd(used, x.v)), _mm_set1_epi32(1));
    const __m128i cell = _mm_add_epi32(_mm_mullo_epi32(row, _mm_set1_epi32(pitch)), column);
    const int bits = _mm256_movemask_pd(used);
    alignas(16) int32_t cells[4];
    _mm_store_si128((__m128i*)cells, cell);
    for (int lane = 0; lane < 4; ++lane) out[lane] = bits >> lane & 1 ? cells[lane] : blank;
  }
  static DCNV4_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
  // Into the L2 cache alone: not tried where AVX2 is the best there is (docs/cpu.md).
  static DCNV4_INLINE void prefetch_l2(const void* p) { prefetch(p); }
};
DCNV4_INLINE F64 operator+(F64 a, F64 b) { return {_mm256_add_pd(a.v, b.v)}; }
DCNV4_INLINE F64 operator-(F64 a, F64 b) { return {_mm256_sub_pd(a.v, b.v)}; }
DCNV4_INLINE F64 operator*(F64 a, F64 b) { return {_mm256_mul_pd(a.v, b.v)}; }

constexpr bool kUnrollTaps = true;

}  // namespace

#include "kernels.h"

}  // namespace avx2

extern const CpuKernels kAvx2Kernels;
const CpuKernels kAvx2Kernels = {"avx2", avx2::forward_any<avx2::F32, avx2::F64>, avx2::backward_any<avx2::F32, avx2::F64>};
}  // namespace dcnv4
