// The mathematics of one tap: where it looks, what its four corners weigh, what its gradients are. Compiled for the host (for
// scalars and for vectors, one tap a lane) and for the device, so that every kernel samples alike.
//
// With base = out * stride - pad + centre, centre = dilation * (kernel - 1) / 2 and grid = index * dilation - centre:
//     position = base + (grid + offset) * offset_scale
// A tap counts where -1 < x < W and -1 < y < H; NaN and inf fail the comparison. A corner outside the map counts as zero.
#pragma once
#include "dcnv4.h"
#include "dtypes.h"

namespace dcnv4 {

DCNV4_HD int taps_of(const dcnv4_problem& p) { return p.kernel_h * p.kernel_w - (p.remove_center ? 1 : 0); }

// Number of tap k in the whole kernel_w x kernel_h grid: with remove_center the taps behind the left-out one move up.
DCNV4_HD int tap_index(const dcnv4_problem& p, int k) {
  const int center = (p.kernel_w / 2) * p.kernel_h + p.kernel_h / 2;
  return p.remove_center && k >= center ? k + 1 : k;
}

// Position of the grid point in column i, row j relative to the centre, in value pixels.
DCNV4_HD int column_grid(const dcnv4_problem& p, int i) { return i * p.dilation_w - (p.dilation_w * (p.kernel_w - 1)) / 2; }
DCNV4_HD int row_grid(const dcnv4_problem& p, int j) { return j * p.dilation_h - (p.dilation_h * (p.kernel_h - 1)) / 2; }

// The same of tap k. Columns are outer: k = i * kernel_h + j.
DCNV4_HD void tap_grid(const dcnv4_problem& p, int k, int& grid_x, int& grid_y) {
  const int index = tap_index(p, k);
  grid_x = column_grid(p, index / p.kernel_h);
  grid_y = row_grid(p, index % p.kernel_h);
}

DCNV4_HD int64_t base_x(const dcnv4_problem& p, int64_t wo) {
  return wo * p.stride_w - p.pad_w + (p.dilation_w * (p.kernel_w - 1)) / 2;
}
DCNV4_HD int64_t base_y(const dcnv4_problem& p, int64_t ho) {
  return ho * p.stride_h - p.pad_h + (p.dilation_h * (p.kernel_h - 1)) / 2;
}

// Weights of the corners (y0, x0), (y0, x0 + 1), (y0 + 1, x0), (y0 + 1, x0 + 1), the tap's weight folded in.
template <class Real>
struct Corners {
  Real w00, w01, w10, w11;
};

template <class Real>
DCNV4_HD Corners<Real> corner_weights(Real lx, Real ly, Real weight, Real one) {
  const Real top = weight * (one - ly), bottom = weight * ly, left = one - lx;
  return {top * left, top * lx, bottom * left, bottom * lx};
}

// Gradients of one tap from the dot products s = sum over channels of grad_output * corner value (zero for a corner outside).
// The derivative at an integer position is the one of the cell that floor chose.
template <class Real>
struct TapGradient {
  Real x, y, weight;
};

template <class Real>
DCNV4_HD TapGradient<Real> tap_gradient(Corners<Real> s, Real lx, Real ly, Real weight, Real scale) {
  const Real dx_top = s.w01 - s.w00, dx_bottom = s.w11 - s.w10;
  const Real top = s.w00 + lx * dx_top, bottom = s.w10 + lx * dx_bottom;
  const Real scaled = weight * scale;
  return {scaled * (dx_top + ly * (dx_bottom - dx_top)), scaled * (bottom - top), top + ly * (bottom - top)};
}

}  // namespace dcnv4
