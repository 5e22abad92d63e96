// Plain C++ vectors for every other processor (arm64 among them): loops of a fixed length that compilers turn into whatever
// vector instructions the target has.
#include <cmath>

#include "plan.h"

namespace dcnv4 {
namespace portable {
namespace {

template <class S, int kWidth>
struct Lanes {
  using Scalar = S;
  struct Mask {
    bool lane[kWidth];
  };
  static constexpr int width = kWidth;
  static constexpr bool looks_up = false;
  S v[kWidth];

  template <class F>
  static DCNV4_INLINE Lanes make(F lane) {
    Lanes r;
    for (int i = 0; i < kWidth; ++i) r.v[i] = lane(i);
    return r;
  }
  template <class F>
  static DCNV4_INLINE Mask make_mask(F lane) {
    Mask r;
    for (int i = 0; i < kWidth; ++i) r.lane[i] = lane(i);
    return r;
  }
  static DCNV4_INLINE Lanes zero() {
    return make([](int) { return S(0); });
  }
  static DCNV4_INLINE Lanes set1(S x) {
    return make([=](int) { return x; });
  }
  static DCNV4_INLINE Mask first_lanes(int n) {
    return make_mask([=](int i) { return i < n; });
  }
  template <class T>
  static DCNV4_INLINE Lanes load(const T* p) {
    return make([=](int i) { return S(to_compute(p[i])); });
  }
  template <class T>
  static DCNV4_INLINE Lanes load_some(const T* p, int n) {
    Lanes r = zero();
    for (int i = 0; i < n; ++i) r.v[i] = S(to_compute(p[i]));
    return r;
  }
  template <class T>
  DCNV4_INLINE void store(T* p) const {
    for (int i = 0; i < kWidth; ++i) p[i] = from_compute<T>(v[i]);
  }
  template <class T>
  DCNV4_INLINE void store_some(T* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = from_compute<T>(v[i]);
  }
  template <class T>
  static DCNV4_INLINE void pairs(const T* p, int n, Lanes& even, Lanes& odd) {
    even = odd = zero();
    for (int i = 0; i < n; ++i) even.v[i] = S(to_compute(p[2 * i])), odd.v[i] = S(to_compute(p[2 * i + 1]));
  }
  template <class T>
  static DCNV4_INLINE void store_pairs(T* p, int n, const Lanes& even, const Lanes& odd) {
    for (int i = 0; i < n; ++i) p[2 * i] = from_compute<T>(even.v[i]), p[2 * i + 1] = from_compute<T>(odd.v[i]);
  }
  static DCNV4_INLINE void quads(const S* p, Lanes& a, Lanes& b, Lanes& c, Lanes& d) {
    for (int i = 0; i < kWidth; ++i) a.v[i] = p[4 * i], b.v[i] = p[4 * i + 1], c.v[i] = p[4 * i + 2], d.v[i] = p[4 * i + 3];
  }
  DCNV4_INLINE S sum() const {
    S total = 0;
    for (int i = 0; i < kWidth; ++i) total += v[i];
    return total;
  }
  static DCNV4_INLINE void sum4(const Lanes& a, const Lanes& b, const Lanes& c, const Lanes& d, S* out, bool add) {
    const S sums[4] = {a.sum(), b.sum(), c.sum(), d.sum()};
    for (int q = 0; q < 4; ++q) out[q] = add ? out[q] + sums[q] : sums[q];
  }
  // A product and a sum: a call of std::fma without the instruction would cost more than all the rest.
  static DCNV4_INLINE Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
    return make([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
  }
  static DCNV4_INLINE Lanes floor(const Lanes& a) {
    return make([&](int i) { return std::floor(a.v[i]); });
  }
  static DCNV4_INLINE Mask greater(const Mask& among, const Lanes& a, const Lanes& b) {
    return make_mask([&](int i) { return among.lane[i] && a.v[i] > b.v[i]; });
  }
  static DCNV4_INLINE bool any(const Mask& m) {
    bool found = false;
    for (int i = 0; i < kWidth; ++i) found |= m.lane[i];
    return found;
  }
  static DCNV4_INLINE Lanes select(const Mask& m, const Lanes& a) {
    return make([&](int i) { return m.lane[i] ? a.v[i] : S(0); });
  }
  static DCNV4_INLINE void store_cells(int32_t* out, const Mask& used, const Lanes& y, const Lanes& x, int32_t first_row,
                                       int32_t pitch, int32_t blank) {
    for (int i = 0; i < kWidth; ++i)
      out[i] = used.lane[i] ? (int32_t(y.v[i]) - first_row) * pitch + int32_t(x.v[i]) + 1 : blank;
  }
  static DCNV4_INLINE void prefetch(const void*) {}
  static DCNV4_INLINE void prefetch_l2(const void*) {}
};
template <class S, int n>
DCNV4_INLINE Lanes<S, n> operator+(const Lanes<S, n>& a, const Lanes<S, n>& b) {
  return Lanes<S, n>::make([&](int i) { return a.v[i] + b.v[i]; });
}
template <class S, int n>
DCNV4_INLINE Lanes<S, n> operator-(const Lanes<S, n>& a, const Lanes<S, n>& b) {
  return Lanes<S, n>::make([&](int i) { return a.v[i] - b.v[i]; });
}
template <class S, int n>
DCNV4_INLINE Lanes<S, n> operator*(const Lanes<S, n>& a, const Lanes<S, n>& b) {
  return Lanes<S, n>::make([&](int i) { return a.v[i] * b.v[i]; });
}

using F32 = Lanes<float, 4>;
using F64 = Lanes<double, 2>;

constexpr bool kUnrollTaps = false;

}  // namespace

#include "kernels.h"

}  // namespace portable

extern const CpuKernels kPortableKernels;
const CpuKernels kPortableKernels = {"portable", portable::forward_any<portable::F32, portable::F64>,
                                     portable::backward_any<portable::F32, portable::F64>};
}  // namespace dcnv4
