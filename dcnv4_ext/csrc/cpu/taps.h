// Where the taps of one pixel look: positions, corner weights and cells, one tap a lane.

namespace {

template <class V>
using ScalarOf = typename V::Scalar;

// Corner weights and cells of the taps of one pixel, arrays of plan.padded_taps.
template <class V>
struct Taps {
  using S = ScalarOf<V>;
  S *w00, *w01, *w10, *w11;
  int32_t* cell;
};

// What backward needs besides.
template <class V>
struct TapState {
  using S = ScalarOf<V>;
  S *lx, *ly, *weight, *inside;
};

// A weight row after softmax, in compute type.
template <class S, class T>
inline void softmax_row(const T* row, int64_t K, S* out) {
  S largest = to_compute(row[0]), sum = 0;
  for (int64_t k = 1; k < K; ++k) largest = std::max(largest, S(to_compute(row[k])));
  for (int64_t k = 0; k < K; ++k) sum += out[k] = std::exp(S(to_compute(row[k])) - largest);
  for (int64_t k = 0; k < K; ++k) out[k] /= sum;
}

// The smallest number of the type that is not below `row`: fp32 has not every row past 2^24, and a bound that rounds the wrong
// way would let a tap read outside its window.
template <class S>
inline S at_least(int64_t row) {
  const S rounded = S(row);
  return int64_t(rounded) < row ? std::nextafter(rounded, std::numeric_limits<S>::infinity()) : rounded;
}

// What locating a tap needs besides its offset, in vectors that stay in registers over a row.
template <class V>
struct Frame {
  using S = ScalarOf<V>;
  V minus_one, one, width, height, scale, first, last;
  int32_t first_row, pitch, blank;
  bool whole;  // the window holds the whole map: no tap can leave it

  // `blank` is a cell that is zero with its right, lower and diagonal neighbour; unused taps look there.
  Frame(const Plan<S>& plan, Window window, int32_t blank)
      : minus_one(V::set1(S(-1))),
        one(V::set1(S(1))),
        width(V::set1(plan.width)),
        height(V::set1(plan.height)),
        scale(V::set1(plan.scale)),
        first(V::set1(at_least<S>(window.first))),
        last(V::set1(-at_least<S>(2 - window.last))),  // rows y0 and y0 + 1 are read
        first_row(int32_t(window.first)),
        pitch(int32_t(plan.pitch)),
        blank(blank),
        whole(window.first == -1 && window.last == plan.rows + 1) {}
};

// What becomes of one vector of taps: fractions of the position and weights, zero where a tap does not count, and the weights
// of the corners.
template <class V>
struct Located {
  typename V::Mask used;
  V lx, ly, weight;
  Corners<V> corners;
};

// Positions of the taps k, k + 1, ... that fill a vector, of the pixel whose offset row is `row`; their cells go to cell[k] and
// on. `weights` replaces the row's weights where softmax is on. `leaves` is set where a tap needs a row outside the window.
template <class V, class T>
DCNV4_INLINE Located<V> locate_vector(const Frame<V>& frame, V grid_x, V grid_y, int64_t K, int64_t k, const T* row,
                                      const ScalarOf<V>* weights, V x_start, V y_start, int32_t* cell, bool& leaves) {
  const int lanes = int(std::min<int64_t>(V::width, K - k));
  V dx, dy;
  V::pairs(row + 2 * k, lanes, dx, dy);
  const V weight = weights ? V::load_some(weights + k, lanes) : V::load_some(row + 2 * K + k, lanes);
  const V x = V::fma(grid_x + dx, frame.scale, x_start);
  const V y = V::fma(grid_y + dy, frame.scale, y_start);
  typename V::Mask used = V::greater(V::first_lanes(lanes), x, frame.minus_one);
  used = V::greater(used, y, frame.minus_one);
  used = V::greater(used, frame.width, x);
  used = V::greater(used, frame.height, y);
  const V x0 = V::floor(x), y0 = V::floor(y);
  const V lx = V::select(used, x - x0), ly = V::select(used, y - y0), m = V::select(used, weight);
  if (!frame.whole) leaves |= V::any(V::greater(used, frame.first, y0)) || V::any(V::greater(used, y0, frame.last));
  V::store_cells(cell + k, used, y0, x0, frame.first_row, frame.pitch, frame.blank);
  return {used, lx, ly, m, corner_weights(lx, ly, m, frame.one)};
}

// All taps of a pixel. Returns whether a tap needs a row outside the window.
template <class V, class T, bool kState>
DCNV4_INLINE bool locate(const Frame<V>& frame, const ScalarOf<V>* grid_x, const ScalarOf<V>* grid_y, int64_t K, const T* row,
                         const ScalarOf<V>* weights, ScalarOf<V> x_base, ScalarOf<V> y_base, const Taps<V>& taps,
                         const TapState<V>& state) {
  bool leaves = false;
  const V x_start = V::set1(x_base), y_start = V::set1(y_base);
  for (int64_t k = 0; k < K; k += V::width) {
    const Located<V> at = locate_vector<V, T>(frame, V::load(grid_x + k), V::load(grid_y + k), K, k, row, weights, x_start,
                                              y_start, taps.cell, leaves);
    at.corners.w00.store(taps.w00 + k);
    at.corners.w01.store(taps.w01 + k);
    at.corners.w10.store(taps.w10 + k);
    at.corners.w11.store(taps.w11 + k);
    if (kState) {
      at.lx.store(state.lx + k);
      at.ly.store(state.ly + k);
      at.weight.store(state.weight + k);
      V::select(at.used, frame.one).store(state.inside + k);
    }
  }
  return leaves;
}

template <class V>
struct TapGrid {
  using S = ScalarOf<V>;
  // Two arrays of `padded` values in `storage`. C: how the packed map holds channels.
  template <class C>
  static Plan<S> plan(const dcnv4_problem& p, S* storage) {
    const int64_t K = taps_of(p), padded = (K + V::width - 1) / V::width * V::width;
    Plan<S> plan;
    plan.K = K;
    plan.padded_taps = padded;
    plan.D = p.D;
    plan.at_once = vectors_at_once<C>((p.D + C::width - 1) / C::width);
    plan.packed_width = cell_elements<C>(p.D);
    plan.pitch = p.W + 2;
    plan.rows = p.H;
    plan.center_y = (p.dilation_h * (p.kernel_h - 1)) / 2;
    plan.width = S(p.W);
    plan.height = S(p.H);
    plan.scale = S(p.offset_scale);
    for (int64_t k = 0; k < padded; ++k) {
      int grid_x = 0, grid_y = 0;
      if (k < K) tap_grid(p, int(k), grid_x, grid_y);
      storage[k] = S(grid_x);
      storage[padded + k] = S(grid_y);
    }
    plan.grid_x = storage;
    plan.grid_y = storage + padded;
    return plan;
  }
  static int64_t elements(const dcnv4_problem& p) { return 2 * ((taps_of(p) + V::width - 1) / V::width * V::width); }
};

}  // namespace
