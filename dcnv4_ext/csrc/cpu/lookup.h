// Taps of many pixels located at once, for 3x3 kernels: whole vectors of them, however few a pixel has.

namespace {

// Taps of the kernel that is worth tables of its own: 3x3.
constexpr int kLookupTaps = 9;

// What the taps of V::width pixels look up, pixel by pixel without gaps, so that kTaps whole vectors locate them all.
template <class V, int kTaps>
struct Lookups {
  static constexpr int kPixels = V::width, kAll = kPixels * kTaps;
  // One vector of the last pixel's taps is read past the end.
  alignas(64) ScalarOf<V> w00[kAll + V::width], w01[kAll + V::width], w10[kAll + V::width], w11[kAll + V::width];
  alignas(64) uint32_t element[kAll + V::width];  // where the upper left corner begins in the packed map
};

// What backward needs of the taps of a batch besides: a mask a vector of taps.
template <class V>
struct LookupStates {
  const ScalarOf<V>*lx, *ly, *weight;
  const typename V::Mask* used;
};

template <class V, int kTaps>
struct OwnStates {
  static constexpr int kAll = V::width * kTaps;
  alignas(64) ScalarOf<V> lx[kAll], ly[kAll], weight[kAll + V::width];
  typename V::Mask used[kTaps];
  LookupStates<V> view() const { return {lx, ly, weight, used}; }
};

// Constants of a lane, the same for every batch: [0, kAll) of its tap, then its pixel in the batch; 0, 1, 2, ... and 0, 1, 0,
// 1, ...; and which lanes hold a pixel's weights where they are the last of a vector.
template <class V, int kTaps>
struct LaneTables {
  using S = ScalarOf<V>;
  static constexpr int kAll = Lookups<V, kTaps>::kAll;
  alignas(64) S grid_x[kAll], grid_y[kAll], count[V::width], every_second[V::width];
  alignas(64) int32_t pixel[kAll], last_taps[V::width];

  explicit LaneTables(const Plan<S>& plan) {
    for (int i = 0; i < kAll; ++i) {
      grid_x[i] = plan.grid_x[i % kTaps];
      grid_y[i] = plan.grid_y[i % kTaps];
      pixel[i] = i / kTaps;
    }
    for (int i = 0; i < V::width; ++i) {
      count[i] = S(i);
      every_second[i] = S(i % 2);
      last_taps[i] = (i + V::width - kTaps % V::width) % V::width;
    }
  }
};

// What locating needs of the problem and the window; places in the map are counted in cells, or in elements of `unit` a cell,
// in rows of `pitch` cells from column `left` on.
template <class V>
struct LookupFrame {
  using S = ScalarOf<V>;
  const Frame<V> frame;
  const V cell_size, row_size, origin, columns, per_column, step_x, step_y;
  const int32_t blank;

  LookupFrame(const dcnv4_problem& p, const Plan<S>& plan, Window window, int32_t blank, int64_t unit, int64_t pitch,
              int64_t left)
      : frame(plan, window, blank),
        cell_size(V::set1(S(unit))),
        row_size(V::set1(S(pitch * unit))),
        origin(V::set1(S((1 - left - window.first * pitch) * unit))),
        columns(V::set1(S(p.Wo))),
        per_column(V::set1(S(1) / S(p.Wo))),
        step_x(V::set1(S(p.stride_w))),
        step_y(V::set1(S(p.stride_h))),
        blank(int32_t(blank * unit)) {}
};

// Calls `work(row, column, count, below)` for up to V::width neighbouring pixels at a time: those from (row, column) on, which
// are followed by those `below` pixels further on. `strips`: wide maps go in strips, down all rows one after the other. The
// part of a packed map that a strip looks at stays in the L1 cache, where rows of the whole width would not.
template <class V, class Work>
DCNV4_INLINE void for_batches(const dcnv4_problem& p, int64_t first_row, int64_t last_row, bool strips, Work work) {
  strips = strips && p.Wo >= 2 * V::width;
  const int64_t strip = strips ? V::width : p.Wo, below = strips ? p.Wo : V::width;
  for (int64_t left = 0; left < p.Wo; left += strip)
    for (int64_t row = first_row; row < last_row; row += strips ? 1 : last_row - first_row) {
      const int64_t pixels = strips ? std::min(strip, p.Wo - left) : (last_row - first_row) * p.Wo;
      for (int64_t first = 0; first < pixels; first += V::width) {
        const int64_t column = left + first;
        work(row + column / p.Wo, column % p.Wo, int(std::min<int64_t>(V::width, pixels - first)), below);
      }
    }
}

// The pixels (row, column) and `count` - 1 behind it, whose offset rows begin at `offsets`, `step` apart; pixels `below` behind
// them are next.
template <class T>
struct Batch {
  const T* offsets;
  int64_t step, below, row, column;
  int count;
};

// e^x for x <= 0, where e^-87 is next to nothing: 2^n e^r, |r| <= ln(2) / 2, with the polynomial of Cephes' expf.
template <class V>
DCNV4_INLINE V exp_of(V x) {
  using S = ScalarOf<V>;
  const V at_least = V::greatest(V::first_lanes(V::width), V::set1(S(-87)), x);  // NaN stays
  const V n = V::floor(V::fma(at_least, V::set1(S(1.44269504088896341)), V::set1(S(0.5))));
  const V r = V::fma(n, V::set1(S(2.12194440e-4)), V::fma(n, V::set1(S(-0.693359375)), at_least));  // ln(2) in two parts
  constexpr S kTerms[] = {S(1.3981999507e-3), S(8.3334519073e-3), S(4.1665795894e-2), S(1.6666665459e-1), S(0.5), S(1), S(1)};
  V sum = V::set1(S(1.9875691500e-4));
  DCNV4_UNROLL
  for (int i = 0; i < 7; ++i) sum = V::fma(sum, r, V::set1(kTerms[i]));
  return sum * V::power_of_two(n);
}

// Softmax of the weights of `count` pixels, kTaps each.
template <class V, int kTaps>
DCNV4_NOINLINE void softmax_batch(const LaneTables<V, kTaps>& lanes, ScalarOf<V>* weights, int count) {
  using S = ScalarOf<V>;
  alignas(64) S largest[V::width] = {0}, inverse[V::width] = {0};
  const int vectors = (count * kTaps + V::width - 1) / V::width;
  for (int i = 0; i < count; ++i) {
    const S* const own = weights + i * kTaps;
    largest[i] = own[0];
    for (int k = 1; k < kTaps; ++k) largest[i] = std::max(largest[i], own[k]);
  }
  const V from = V::load(largest);
  for (int i = 0; i < vectors * V::width; i += V::width)
    exp_of(V::load(weights + i) - V::permute(from, lanes.pixel + i)).store(weights + i);
  for (int i = 0; i < count; ++i) {
    S sum = 0;
    for (int k = 0; k < kTaps; ++k) sum += weights[i * kTaps + k];
    inverse[i] = S(1) / sum;
  }
  const V scale = V::load(inverse);
  for (int i = 0; i < vectors * V::width; i += V::width)
    (V::load(weights + i) * V::permute(scale, lanes.pixel + i)).store(weights + i);
}

// Locates the taps of a batch. `weights` becomes what they count, softmax done. Calls `take(v, used, place, x0, lx, ly)` for
// every vector v of them: which count, where in the map the upper left corner is, its column, and the fractions of the
// position, zero where a tap does not count. Returns whether a tap needs a row outside the window; then `outside` has a bit a
// tap.
template <class V, int kTaps, class T, class Take>
DCNV4_INLINE bool locate_batch(const dcnv4_problem& p, const LookupFrame<V>& on, const LaneTables<V, kTaps>& lanes,
                               const Batch<T>& batch, ScalarOf<V>* weights, typename V::Mask* outside, Take take) {
  using S = ScalarOf<V>;
  constexpr int kPixels = V::width;
  // The taps' offsets and weights side by side. A store writes whole vectors, and the next one overwrites what is too much.
  alignas(64) T pairs[kPixels * 2 * kTaps + 2 * V::width];
  const T* offsets = batch.offsets;
  for (int i = 0; i < batch.count; ++i, offsets += batch.step) {
    V::prefetch(offsets + batch.below * batch.step);
    V::prefetch(offsets + batch.below * batch.step + 3 * kTaps - 1);  // most pixels' numbers lie in two lines
    memcpy(pairs + i * 2 * kTaps, offsets, 2 * kTaps * sizeof(T));
    // Whole vectors that end where the weights do: a masked one would wait for the line behind them.
    const T* const end = offsets + 3 * kTaps;
    if constexpr (V::width > kTaps) {
      V::permute(V::load(end - V::width), lanes.last_taps).store(weights + i * kTaps);
    } else {
      for (int k = 0; k < kTaps; k += V::width) {
        const int from = std::min(k, kTaps - V::width);
        V::load(end - kTaps + from).store(weights + i * kTaps + from);
      }
    }
  }
  if (p.softmax) softmax_batch<V, kTaps>(lanes, weights, batch.count);
  // Taps that the last vector has too many count nowhere, as any NaN.
  if (batch.count < kPixels)
    std::fill_n(pairs + batch.count * 2 * kTaps, 2 * V::width, from_compute<T>(std::numeric_limits<S>::quiet_NaN()));
  const Frame<V> frame = on.frame;
  // Columns count on over the end of a row; `wrapped` is how many rows down that is. Half a column keeps it off the edge.
  const V ahead = V::set1(S(batch.column)) + V::load(lanes.count);
  const V wrapped = V::floor((ahead + V::set1(S(0.5))) * on.per_column);
  const V pixel_x = V::fma(ahead - wrapped * on.columns, on.step_x, V::set1(S(base_x(p, 0))));
  const V pixel_y = V::fma(wrapped, on.step_y, V::set1(S(base_y(p, batch.row))));
  const int vectors = (batch.count * kTaps + V::width - 1) / V::width;
  bool leaves = false;
  for (int v = 0, i = 0; v < vectors; ++v, i += V::width) {
    V dx, dy;
    V::all_pairs(pairs + 2 * i, dx, dy);
    const V x = V::fma(V::load(lanes.grid_x + i) + dx, frame.scale, V::permute(pixel_x, lanes.pixel + i));
    const V y = V::fma(V::load(lanes.grid_y + i) + dy, frame.scale, V::permute(pixel_y, lanes.pixel + i));
    typename V::Mask used = V::greater(V::first_lanes(V::width), x, frame.minus_one);
    used = V::greater(used, y, frame.minus_one);
    used = V::greater(used, frame.width, x);
    used = V::greater(used, frame.height, y);
    const V x0 = V::floor(x), y0 = V::floor(y);
    if (!frame.whole) {
      outside[v] = V::either(V::greater(used, frame.first, y0), V::greater(used, y0, frame.last));
      leaves |= V::any(outside[v]);
    }
    take(v, used, V::fma(y0, on.row_size, V::fma(x0, on.cell_size, on.origin)), x0, V::select(used, x - x0),
         V::select(used, y - y0));
  }
  return leaves;
}

// Where in a packed map taps look: the first and the last place.
template <class V>
struct Reach {
  V low, high;  // a lane's share

  Reach() = default;
  // Of no taps yet; `behind` all places.
  explicit Reach(ScalarOf<V> behind) : low(V::set1(behind)), high(V::set1(ScalarOf<V>(-1))) {}
  DCNV4_INLINE void add(typename V::Mask used, V place) {
    low = V::least(used, low, place);
    high = V::greatest(used, high, place);
  }
  int64_t first() const {
    ScalarOf<V> least = low.lane(0);
    for (int i = 1; i < V::width; ++i) least = std::min(least, low.lane(i));
    return int64_t(least);
  }
  int64_t last() const {
    ScalarOf<V> greatest = high.lane(0);
    for (int i = 1; i < V::width; ++i) greatest = std::max(greatest, high.lane(i));
    return int64_t(greatest);
  }
};

// The lookups of a batch.
template <class V, class T, int kTaps>
DCNV4_NOINLINE bool locate_lookups(const dcnv4_problem& p, const LookupFrame<V>& on, const LaneTables<V, kTaps>& lanes,
                                   const Batch<T>& batch, Lookups<V, kTaps>& to, typename V::Mask* outside,
                                   OwnStates<V, kTaps>* states, Reach<V>* reach) {
  using S = ScalarOf<V>;
  alignas(64) S own_weights[V::width * kTaps + V::width];
  S* const weights = states ? states->weight : own_weights;
  const V one = on.frame.one;
  const int32_t blank = on.blank;
  return locate_batch<V, kTaps>(p, on, lanes, batch, weights, outside,
                                [&](int v, typename V::Mask used, V place, V, V lx, V ly) DCNV4_LAMBDA_INLINE {
                                  const int i = v * V::width;
                                  V::store_whole(to.element + i, used, place, blank);
                                  if (reach) reach->add(used, place);
                                  if (states) {
                                    lx.store(states->lx + i);
                                    ly.store(states->ly + i);
                                    states->used[v] = used;
                                  }
                                  const Corners<V> w = corner_weights(lx, ly, V::select(used, V::load(weights + i)), one);
                                  w.w00.store(to.w00 + i);
                                  w.w01.store(to.w01 + i);
                                  w.w10.store(to.w10 + i);
                                  w.w11.store(to.w11 + i);
                                });
}

// One corner's weights of the taps of a pixel, spread over a vector one by one.
template <class V, bool kPermute>
struct Spreads {
  typename V::Weights all;
  explicit DCNV4_INLINE Spreads(const ScalarOf<V>* weights) : all(V::weights(weights)) {}
  DCNV4_INLINE V operator()(int tap) const { return V::spread(all, tap); }
};
template <class V>
struct Spreads<V, false> {
  const ScalarOf<V>* weights;
  explicit DCNV4_INLINE Spreads(const ScalarOf<V>* weights) : weights(weights) {}
  DCNV4_INLINE V operator()(int tap) const { return V::set1(weights[tap]); }
};

// Whether elements of a packed map of `rows` rows, and positions on the way over the output, are whole numbers that fp32 holds.
template <class S>
bool is_exact(const dcnv4_problem& p, const Plan<S>& plan, int64_t rows) {
  constexpr int64_t kMost = int64_t(1) << 24, kMostColumns = int64_t(1) << 18;
  const auto reach = [](int64_t pixels, int64_t stride, int64_t pad, int64_t extent) {
    return (pixels + 1) * stride + pad + extent;
  };
  return p.Wo < kMostColumns && map_elements(plan, rows) < kMost &&
         reach(p.Wo, p.stride_w, p.pad_w, p.dilation_w * int64_t(p.kernel_w)) < kMost &&
         reach(p.Ho, p.stride_h, p.pad_h, p.dilation_h * int64_t(p.kernel_h)) < kMost;
}

}  // namespace
