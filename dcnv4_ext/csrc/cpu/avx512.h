// AVX-512 (F, BW, VL, DQ) vectors: 16 lanes of fp32, 8 of fp64. Included inside the namespace of an instruction set;
// DCNV4_BF16_INSTRUCTIONS: it has AVX512_BF16 too.

namespace {

#if defined(DCNV4_BF16_INSTRUCTIONS)
// The instructions round to nearest even and keep NaN; numbers below 2^-126 become zero.
DCNV4_INLINE __m256i bf16_bits(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
// Two vectors in one.
DCNV4_INLINE __m512i bf16_bits(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
#else
DCNV4_INLINE __m512i round_to_bf16(__m512 v) {
  const __m512i bits = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
}
// NaN keeps its upper bits and becomes quiet: rounding could carry it into an infinity.
DCNV4_INLINE __m512i keep_nan(__m512i rounded, __m512 v) {
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, _mm512_castps_si512(v), _mm512_set1_epi32(0x400000));
}
DCNV4_INLINE __m256i bf16_bits(__m512 v) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(keep_nan(round_to_bf16(v), v), 16)); }
// Two vectors in one.
DCNV4_INLINE __m512i bf16_bits(__m512 low, __m512 high) {
  __m512i a = round_to_bf16(low), b = round_to_bf16(high);
  if (!DCNV4_LIKELY(!_mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q))) {
    a = keep_nan(a, low);
    b = keep_nan(b, high);
  }
  const __m512i odd = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27, 25, 23, 21,
                                       19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(a, odd, b);
}
#endif
DCNV4_INLINE __m512 from_bf16(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

struct F32 {
  using Scalar = float;
  using Mask = __mmask16;
  static constexpr int width = 16;
  __m512 v;

  static DCNV4_INLINE F32 zero() { return {_mm512_setzero_ps()}; }
  static DCNV4_INLINE F32 set1(float x) { return {_mm512_set1_ps(x)}; }
  static DCNV4_INLINE Mask first_lanes(int n) { return Mask((1u << n) - 1u); }

  static DCNV4_INLINE F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static DCNV4_INLINE F32 load(const bf16* p) { return {from_bf16(_mm256_loadu_si256((const __m256i*)p))}; }
  static DCNV4_INLINE F32 load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
  static DCNV4_INLINE F32 load_some(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
  static DCNV4_INLINE F32 load_some(const bf16* p, int n) { return {from_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p))}; }
  static DCNV4_INLINE F32 load_some(const f16* p, int n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))};
  }
  DCNV4_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  DCNV4_INLINE void store(bf16* p) const { _mm256_storeu_si256((__m256i*)p, bf16_bits(v)); }
  DCNV4_INLINE void store(f16* p) const { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, kNearest)); }
  // Past the caches; p is aligned.
  DCNV4_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }
  DCNV4_INLINE void stream(bf16* p) const { _mm256_stream_si256((__m256i*)p, bf16_bits(v)); }
  DCNV4_INLINE void stream(f16* p) const { _mm256_stream_si256((__m256i*)p, _mm512_cvtps_ph(v, kNearest)); }
  static DCNV4_INLINE void fence() { _mm_sfence(); }
  DCNV4_INLINE void store_some(float* p, int n) const { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
  DCNV4_INLINE void store_some(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, first_lanes(n), bf16_bits(v)); }
  DCNV4_INLINE void store_some(f16* p, int n) const {
    _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph(v, kNearest));
  }

  // Elements 0, 2, 4, ... and 1, 3, 5, ... of the 2 n values at p.
  template <class T>
  static DCNV4_INLINE void pairs(const T* p, int n, F32& even, F32& odd) {
    const __m512i even_index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd_index = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    const F32 low = n >= 8 ? load(p) : load_some(p, 2 * n), high = n > 8 ? load_some(p + 16, 2 * n - 16) : zero();
    even.v = _mm512_permutex2var_ps(low.v, even_index, high.v);
    odd.v = _mm512_permutex2var_ps(low.v, odd_index, high.v);
  }
  template <class T>
  static DCNV4_INLINE void store_pairs(T* p, int n, F32 even, F32 odd) {
    const __m512i low_index = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high_index = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    const F32 low = {_mm512_permutex2var_ps(even.v, low_index, odd.v)},
              high = {_mm512_permutex2var_ps(even.v, high_index, odd.v)};
    if (n >= 8) {
      low.store(p);
      if (n > 8) high.store_some(p + 16, 2 * n - 16);
    } else {
      low.store_some(p, 2 * n);
    }
  }
  // The same for a whole vector of pairs.
  template <class T>
  static DCNV4_INLINE void all_pairs(const T* p, F32& even, F32& odd) {
    pairs(p, width, even, odd);
  }
  static DCNV4_INLINE void all_pairs(const bf16* p, F32& even, F32& odd) {
    const __m512i both = _mm512_loadu_si512(p);
    even.v = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    odd.v = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000u))));
  }
  // Two neighbouring vectors; past the caches p is aligned to both.
  template <class T>
  static DCNV4_INLINE void store_two(T* p, F32 a, F32 b, bool past_caches) {
    store_each(p, a, b, past_caches);
  }
  static DCNV4_INLINE void store_two(bf16* p, F32 a, F32 b, bool past_caches) {
    const __m512i two = bf16_bits(a.v, b.v);
    if (past_caches) {
      _mm512_stream_si512((__m512i*)p, two);
    } else {
      _mm512_storeu_si512(p, two);
    }
  }
  // Element q of each of 16 groups of four.
  static DCNV4_INLINE void quads(const float* p, F32& a, F32& b, F32& c, F32& d) {
    const __m512 r0 = _mm512_loadu_ps(p), r1 = _mm512_loadu_ps(p + 16), r2 = _mm512_loadu_ps(p + 32),
                 r3 = _mm512_loadu_ps(p + 48);
    const __m512i ab = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 1, 5, 9, 13, 17, 21, 25, 29);
    const __m512i cd = _mm512_setr_epi32(2, 6, 10, 14, 18, 22, 26, 30, 3, 7, 11, 15, 19, 23, 27, 31);
    const __m512 ab_low = _mm512_permutex2var_ps(r0, ab, r1), ab_high = _mm512_permutex2var_ps(r2, ab, r3);
    const __m512 cd_low = _mm512_permutex2var_ps(r0, cd, r1), cd_high = _mm512_permutex2var_ps(r2, cd, r3);
    a.v = _mm512_shuffle_f32x4(ab_low, ab_high, 0x44);
    b.v = _mm512_shuffle_f32x4(ab_low, ab_high, 0xee);
    c.v = _mm512_shuffle_f32x4(cd_low, cd_high, 0x44);
    d.v = _mm512_shuffle_f32x4(cd_low, cd_high, 0xee);
  }
  static DCNV4_INLINE void store_quads(float* p, F32 a, F32 b, F32 c, F32 d) {
    const __m512i low_index = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high_index = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    const __m512i low_pairs = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11),
                  high_pairs = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    const auto pairs_of = [](F32 x, __m512i index, F32 y) { return _mm512_castps_pd(_mm512_permutex2var_ps(x.v, index, y.v)); };
    const __m512d ab_low = pairs_of(a, low_index, b), ab_high = pairs_of(a, high_index, b);
    const __m512d cd_low = pairs_of(c, low_index, d), cd_high = pairs_of(c, high_index, d);
    _mm512_storeu_pd((double*)p, _mm512_permutex2var_pd(ab_low, low_pairs, cd_low));
    _mm512_storeu_pd((double*)(p + 16), _mm512_permutex2var_pd(ab_low, high_pairs, cd_low));
    _mm512_storeu_pd((double*)(p + 32), _mm512_permutex2var_pd(ab_high, low_pairs, cd_high));
    _mm512_storeu_pd((double*)(p + 48), _mm512_permutex2var_pd(ab_high, high_pairs, cd_high));
  }
  // The sums over the lanes of a, b, c, d to out[0..3], or added to them.
  static DCNV4_INLINE void sum4(F32 a, F32 b, F32 c, F32 d, float* out, bool add) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    __m128 sums = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
    if (add) sums = _mm_add_ps(sums, _mm_loadu_ps(out));
    _mm_storeu_ps(out, sums);
  }
  // The sums over the lanes of each quarter of a to out[0..3], or added to them.
  static DCNV4_INLINE void sum_blocks(F32 a, float* out, bool add) {
    const __m512 pairs = _mm512_add_ps(a.v, _mm512_permute_ps(a.v, 0xb1));
    const __m512 all = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0x4e));
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
    __m128 sums = _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, all));
    if (add) sums = _mm_add_ps(sums, _mm_loadu_ps(out));
    _mm_storeu_ps(out, sums);
  }

  static constexpr bool looks_up = true, sorts = true;
  static constexpr int permuted = 2;
  using Weights = F32;
  static DCNV4_INLINE Weights weights(const float* p) { return load(p); }
  static DCNV4_INLINE F32 spread(Weights weights, int tap) {
    return {_mm512_permutexvar_ps(_mm512_set1_epi32(tap), weights.v)};
  }
  static DCNV4_INLINE F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static DCNV4_INLINE F32 floor(F32 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
  // 2^n for a whole n that is the exponent of a normal number.
  static DCNV4_INLINE F32 power_of_two(F32 n) {
    const __m512i exponent = _mm512_add_epi32(_mm512_cvttps_epi32(n.v), _mm512_set1_epi32(127));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
  }
  static DCNV4_INLINE Mask greater(Mask among, F32 a, F32 b) { return _mm512_mask_cmp_ps_mask(among, a.v, b.v, _CMP_GT_OQ); }
  // a, or b where used and smaller or greater.
  static DCNV4_INLINE F32 least(Mask used, F32 a, F32 b) { return {_mm512_mask_min_ps(a.v, used, a.v, b.v)}; }
  static DCNV4_INLINE F32 greatest(Mask used, F32 a, F32 b) { return {_mm512_mask_max_ps(a.v, used, a.v, b.v)}; }
  DCNV4_INLINE float lane(int i) const {
    alignas(64) float lanes[width];
    _mm512_store_ps(lanes, v);
    return lanes[i];
  }
  static DCNV4_INLINE bool any(Mask m) { return m != 0; }
  static DCNV4_INLINE Mask either(Mask a, Mask b) { return Mask(a | b); }
  static DCNV4_INLINE bool lane(Mask m, int i) { return m >> i & 1; }
  static DCNV4_INLINE F32 permute(F32 a, const int32_t* lanes) {
    return {_mm512_permutexvar_ps(_mm512_loadu_si512(lanes), a.v)};
  }
  static DCNV4_INLINE F32 select(Mask m, F32 a) { return {_mm512_maskz_mov_ps(m, a.v)}; }
  static DCNV4_INLINE void store_cells(int32_t* out, Mask used, F32 y, F32 x, int32_t first_row, int32_t pitch, int32_t blank) {
    const __m512i row = _mm512_sub_epi32(_mm512_maskz_cvttps_epi32(used, y.v), _mm512_set1_epi32(first_row));
    const __m512i column = _mm512_add_epi32(_mm512_maskz_cvttps_epi32(used, x.v), _mm512_set1_epi32(1));
    const __m512i cell = _mm512_add_epi32(_mm512_mullo_epi32(row, _mm512_set1_epi32(pitch)), column);
    _mm512_storeu_si512(out, _mm512_mask_mov_epi32(_mm512_set1_epi32(blank), used, cell));
  }
  // `cell`, a whole number below 2^24, where used.
  static DCNV4_INLINE void store_whole(uint32_t* out, Mask used, F32 cell, int32_t blank) {
    _mm512_storeu_si512(out, _mm512_mask_cvttps_epi32(_mm512_set1_epi32(blank), used, cell.v));
  }
  static DCNV4_INLINE void store_whole(uint32_t* out, Mask used, F32 cell, F32 otherwise) {
    _mm512_storeu_si512(out, _mm512_cvttps_epi32(_mm512_mask_mov_ps(otherwise.v, used, cell.v)));
  }
  static DCNV4_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
  static DCNV4_INLINE void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
};
DCNV4_INLINE F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
DCNV4_INLINE F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
DCNV4_INLINE F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }

struct F64 {
  using Scalar = double;
  using Mask = __mmask8;
  static constexpr int width = 8;
  __m512d v;

  static DCNV4_INLINE F64 zero() { return {_mm512_setzero_pd()}; }
  static DCNV4_INLINE F64 set1(double x) { return {_mm512_set1_pd(x)}; }
  static DCNV4_INLINE Mask first_lanes(int n) { return Mask((1u << n) - 1u); }
  static DCNV4_INLINE F64 load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static DCNV4_INLINE F64 load_some(const double* p, int n) { return {_mm512_maskz_loadu_pd(first_lanes(n), p)}; }
  DCNV4_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  DCNV4_INLINE void store_some(double* p, int n) const { _mm512_mask_storeu_pd(p, first_lanes(n), v); }
  static DCNV4_INLINE void pairs(const double* p, int n, F64& even, F64& odd) {
    const __m512i even_index = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14),
                  odd_index = _mm512_setr_epi64(1, 3, 5, 7, 9, 11, 13, 15);
    const F64 low = n >= 4 ? load(p) : load_some(p, 2 * n), high = n > 4 ? load_some(p + 8, 2 * n - 8) : zero();
    even.v = _mm512_permutex2var_pd(low.v, even_index, high.v);
    odd.v = _mm512_permutex2var_pd(low.v, odd_index, high.v);
  }
  static DCNV4_INLINE void store_pairs(double* p, int n, F64 even, F64 odd) {
    const __m512i low_index = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11),
                  high_index = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
    const F64 low = {_mm512_permutex2var_pd(even.v, low_index, odd.v)},
              high = {_mm512_permutex2var_pd(even.v, high_index, odd.v)};
    low.store_some(p, n >= 4 ? 8 : 2 * n);
    if (n > 4) high.store_some(p + 8, 2 * n - 8);
  }
  static DCNV4_INLINE void quads(const double* p, F64& a, F64& b, F64& c, F64& d) {
    const __m512i index = _mm512_setr_epi64(0, 4, 8, 12, 16, 20, 24, 28);
    a.v = _mm512_i64gather_pd(index, p, 8);
    b.v = _mm512_i64gather_pd(index, p + 1, 8);
    c.v = _mm512_i64gather_pd(index, p + 2, 8);
    d.v = _mm512_i64gather_pd(index, p + 3, 8);
  }
  static DCNV4_INLINE void sum4(F64 a, F64 b, F64 c, F64 d, double* out, bool add) {
    const double sums[4] = {_mm512_reduce_add_pd(a.v), _mm512_reduce_add_pd(b.v), _mm512_reduce_add_pd(c.v),
                            _mm512_reduce_add_pd(d.v)};
    for (int q = 0; q < 4; ++q) out[q] = add ? out[q] + sums[q] : sums[q];
  }
  static constexpr bool looks_up = false;
  static DCNV4_INLINE F64 fma(F64 a, F64 b, F64 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
  static DCNV4_INLINE F64 floor(F64 a) { return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
  static DCNV4_INLINE Mask greater(Mask among, F64 a, F64 b) { return _mm512_mask_cmp_pd_mask(among, a.v, b.v, _CMP_GT_OQ); }
  static DCNV4_INLINE bool any(Mask m) { return m != 0; }
  static DCNV4_INLINE F64 select(Mask m, F64 a) { return {_mm512_maskz_mov_pd(m, a.v)}; }
  static DCNV4_INLINE void store_cells(int32_t* out, Mask used, F64 y, F64 x, int32_t first_row, int32_t pitch, int32_t blank) {
    const __m256i row = _mm256_sub_epi32(_mm512_maskz_cvttpd_epi32(used, y.v), _mm256_set1_epi32(first_row));
    const __m256i column = _mm256_add_epi32(_mm512_maskz_cvttpd_epi32(used, x.v), _mm256_set1_epi32(1));
    const __m256i cell = _mm256_add_epi32(_mm256_mullo_epi32(row, _mm256_set1_epi32(pitch)), column);
    _mm256_storeu_si256((__m256i*)out, _mm256_mask_mov_epi32(_mm256_set1_epi32(blank), used, cell));
  }
  static DCNV4_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
  static DCNV4_INLINE void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
};
DCNV4_INLINE F64 operator+(F64 a, F64 b) { return {_mm512_add_pd(a.v, b.v)}; }
DCNV4_INLINE F64 operator-(F64 a, F64 b) { return {_mm512_sub_pd(a.v, b.v)}; }
DCNV4_INLINE F64 operator*(F64 a, F64 b) { return {_mm512_mul_pd(a.v, b.v)}; }

constexpr bool kUnrollTaps = true;

}  // namespace
