// How a block finds its work and a thread one tap of it: the part all kernels share.
//
// An item is one (pixel of the output map, group). A block owns a tile of items, groups fastest. All threads first stage the
// taps of the items in shared memory, one tap a thread, so that positions, weights and bounds are worked out once; then the
// `lanes` threads of an item walk its taps, each with its own channels.
#pragma once
#include <cmath>

#include "../sampling.h"
#include "vector.h"

namespace dcnv4 {

// Threads of a block, at most. Left to itself ptxas settles, for sm_100 and above, on fewer registers than it needs, and
// spills; asked for 8 blocks a multiprocessor (64 registers a thread) it does not. fp64 takes what it wants.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define DCNV4_BLOCK(T, threads) __launch_bounds__(threads, sizeof(T) == 8 ? 1 : 8)
#else
#define DCNV4_BLOCK(T, threads) __launch_bounds__(threads)
#endif

// A divisor known on the host: n / divisor for n < 2^31 by one multiplication. With s = ceil(log2(divisor)) and
// multiplier = ceil(2^(31 + s) / divisor) the error of the quotient stays below 1 / divisor.
struct Divisor {
  uint32_t divisor, multiplier, shift;
  DCNV4_DEVICE uint32_t quotient(uint32_t n) const { return __umulhi(n << 1, multiplier) >> shift; }
};

struct Tiling {
  int32_t width, height, groups;  // of the tile
  int32_t items;                  // width * height * groups
  int32_t lanes;                  // threads an item
  int32_t units;                  // pieces an item's channels are cut into; lanes <= units
  Divisor by_width, by_groups, by_lanes, by_kernel_h;
  Divisor blocks_x, blocks_y, blocks_g;  // tiles along each direction; then images
};

// The first item of this block.
struct Origin {
  int64_t n;
  int wo, ho, g;
};

DCNV4_DEVICE Origin block_origin(const Tiling& t) {
  const uint32_t x = t.blocks_x.quotient(blockIdx.x);
  const uint32_t y = t.blocks_y.quotient(x);
  const uint32_t n = t.blocks_g.quotient(y);
  return {n, int(blockIdx.x - x * t.blocks_x.divisor) * t.width, int(x - y * t.blocks_y.divisor) * t.height,
          int(y - n * t.blocks_g.divisor) * t.groups};
}

struct Item {
  int wo, ho, g;
  bool live;  // tiles reach over the edges of the map
};

DCNV4_DEVICE Item item_at(const dcnv4_problem& p, const Tiling& t, const Origin& origin, int index) {
  const int pixel = t.by_groups.quotient(index), row = t.by_width.quotient(pixel);
  Item item{origin.wo + pixel - row * t.width, origin.ho + row, origin.g + index - pixel * t.groups, false};
  item.live = index < t.items && item.wo < int(p.Wo) && item.ho < int(p.Ho) && item.g < int(p.G);
  return item;
}

// Pixels of one map are numbered in 32 bits, everything behind them is 64 bits wide: one wide multiply-add a pointer.
DCNV4_DEVICE uint32_t output_pixel(const dcnv4_problem& p, int ho, int wo) { return uint32_t(ho) * uint32_t(p.Wo) + wo; }
template <class Pointer>
DCNV4_DEVICE Pointer at_pixel(Pointer image, uint32_t pixel, int64_t stride) {
  return image + uint64_t(pixel) * uint32_t(stride);
}

// The numbers of an item in an image's offset_mask: K pairs (x, y), then K weights.
template <class Pointer>
DCNV4_DEVICE Pointer run_of(const dcnv4_problem& p, Pointer runs, const Item& item, int taps) {
  return at_pixel(runs, output_pixel(p, item.ho, item.wo), p.offset_mask_stride) + item.g * 3 * taps;
}

// What softmax divides by: exp(weight - peak) * scale is the normalised weight.
template <class Real>
struct SoftmaxNorm {
  Real peak, scale;
};

// `weight(k)` reads the weight of a tap.
template <class Real, class Weight>
DCNV4_DEVICE SoftmaxNorm<Real> softmax_norm(int taps, Weight weight) {
  Real peak = weight(0), sum = 0;
  for (int k = 1; k < taps; ++k) peak = fmax(peak, weight(k));
  for (int k = 0; k < taps; ++k) sum += exp(weight(k) - peak);
  return {peak, Real(1) / sum};
}
template <class T>
DCNV4_DEVICE SoftmaxNorm<typename compute_of<T>::type> softmax_norm(const T* run, int taps) {
  return softmax_norm<typename compute_of<T>::type>(taps, [&](int k) { return load_one(run + 2 * taps + k); });
}

template <class Real>
struct Tap {
  int x0, y0;           // cell; its corners are x0, x0 + 1 and y0, y0 + 1
  Real lx, ly, weight;  // place inside the cell, weight of the tap
  bool used;            // false where the position is outside the map, NaN or infinite: then x0 = y0 = lx = ly = 0
};

// Tap k of the item whose 3 * taps numbers start at `run`; `norm` is read with softmax only.
template <class T, class Real>
DCNV4_DEVICE Tap<Real> read_tap(const dcnv4_problem& p, const Divisor& by_kernel_h, const T* run, int k, int taps, int ho,
                                int wo, const SoftmaxNorm<Real>& norm) {
  const int index = tap_index(p, k), column = by_kernel_h.quotient(index), row = index - column * p.kernel_h;
  const Real scale = Real(p.offset_scale);
  const Real x = Real(int(base_x(p, wo))) + (Real(column_grid(p, column)) + load_one(run + 2 * k)) * scale;
  const Real y = Real(int(base_y(p, ho))) + (Real(row_grid(p, row)) + load_one(run + 2 * k + 1)) * scale;
  Tap<Real> tap{};
  tap.weight = load_one(run + 2 * taps + k);
  if (p.softmax) tap.weight = exp(tap.weight - norm.peak) * norm.scale;
  tap.used = x > Real(-1) && y > Real(-1) && x < Real(int(p.W)) && y < Real(int(p.H));
  if (tap.used) {
    const Real x_floor = floor(x), y_floor = floor(y);
    tap.x0 = int(x_floor);
    tap.y0 = int(y_floor);
    tap.lx = x - x_floor;
    tap.ly = y - y_floor;
  }
  return tap;
}

// A NaN that arithmetic never makes, in place of a weight that must not be multiplied with anything: 0 times a cell that
// holds inf would be NaN, where nothing may be added.
template <class Real>
DCNV4_DEVICE Real no_weight();
template <>
DCNV4_DEVICE float no_weight<float>() {
  return bits_to_float(0x7fdcdcdcu);
}
template <>
DCNV4_DEVICE double no_weight<double>() {
  const uint64_t bits = 0x7ffbdcdcdcdcdcdcull;
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
DCNV4_DEVICE bool is_weight(float value) { return float_to_bits(value) != 0x7fdcdcdcu; }
DCNV4_DEVICE bool is_weight(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits != 0x7ffbdcdcdcdcdcdcull;
}

constexpr DCNV4_HD uint32_t round_up_to(uint32_t number, uint32_t step) { return (number + step - 1) / step * step; }

// Rows of staged taps have odd length: with an even one of 16-byte entries, items would meet in the same banks.
constexpr DCNV4_HD int odd(int length) { return length | 1; }

}  // namespace dcnv4
