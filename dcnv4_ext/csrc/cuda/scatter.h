// Adding up corner shares in shared memory without atomics, in a fixed order.
//
// The four corners of a tap differ in the parity of their row or of their column. So the threads of a block form four classes,
// one a parity, and every cell belongs to one class: each tap gives every class exactly one corner, each class walks all taps
// in order, and within a class a thread owns its channels. No two threads ever touch one number.
#pragma once
#include "backward.h"

namespace dcnv4 {

constexpr int kClasses = 4;
// What one class does for one tap.
template <class Real>
struct alignas(2 * sizeof(Real)) Share {
  Real weight;
  uint32_t place;  // where the cell begins in the block's sums, counted in numbers
};
// Behind the block's cells each class has one more, for taps that give it nothing: adding there is cheaper than a branch.

DCNV4_DEVICE int class_of(int x, int y) { return (y & 1) * 2 + (x & 1); }

// The four corners of a used tap: visit(class, x, y, weight), inside the map or not.
template <class Real, class Visit>
DCNV4_DEVICE void visit_corners(const Tap<Real>& tap, Visit visit) {
  const Corners<Real> weights = corner_weights(tap.lx, tap.ly, tap.weight, Real(1));
  visit(class_of(tap.x0, tap.y0), tap.x0, tap.y0, weights.w00);
  visit(class_of(tap.x0 + 1, tap.y0), tap.x0 + 1, tap.y0, weights.w01);
  visit(class_of(tap.x0, tap.y0 + 1), tap.x0, tap.y0 + 1, weights.w10);
  visit(class_of(tap.x0 + 1, tap.y0 + 1), tap.x0 + 1, tap.y0 + 1, weights.w11);
}

// sums[0..N) += weight * gradient
template <int N, class Real>
DCNV4_DEVICE void add_share(Real* sums, Real weight, const Real (&gradient)[N]) {
  struct alignas(N * sizeof(Real) % 16 ? sizeof(Real) : 16) Run {
    Real v[N];
  };
  Run run = *reinterpret_cast<const Run*>(sums);
#pragma unroll
  for (int i = 0; i < N; ++i) run.v[i] += weight * gradient[i];
  *reinterpret_cast<Run*>(sums) = run;
}

}  // namespace dcnv4
