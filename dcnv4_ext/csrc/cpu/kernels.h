// The CPU algorithm, once for every instruction set. A file of an instruction set defines its vectors in a namespace of its own
// and then includes this one inside that namespace.
//
// A task owns a group of an image (or some rows of it). It packs the rows of the value map that its taps reach into a map of
// the compute type with zero cells all round, so that no tap needs a bounds test and neighbouring cells lie in neighbouring
// cache lines. Positions, corner weights and cell indices of all taps of a pixel are computed one tap a lane; then each tap is
// four weighted loads a vector of channels. Backward adds into a second packed map that the task alone owns: no atomics, the
// same sums in the same order every time.
//
// A vector type V has: width, Scalar, Mask; set1, zero, load, load_some, store, store_some, pairs, store_pairs, quads, fma,
// floor, first_lanes, greater (among the lanes of a mask), any, select, store_cells, sum4, prefetch, operators + - *; where
// `spreads` is true also spread (one lane over all), stream (a store past the caches) and fence. kUnrollTaps asks for kernels
// with the nine taps of a 3x3 kernel unrolled, which pays where the taps' weights can stay in registers.

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

// Pack rows of one group: row r of the map holds value row window.first + r. `value` points at pixel (0, 0) of the group.
template <class V, class T, int kVectors>
void pack_rows(const dcnv4_problem& p, const Plan<ScalarOf<V>>& plan, const T* value, Window window, ScalarOf<V>* map) {
  using S = ScalarOf<V>;
  const int64_t width = plan.packed_width, row_size = plan.pitch * width, step = p.value_stride;
  constexpr int64_t kChunk = kVectors * V::width;
  for (int64_t h = window.first; h < window.last; ++h, map += row_size) {
    if (h < 0 || h >= p.H) {
      memset(map, 0, row_size * sizeof(S));
      continue;
    }
    memset(map, 0, width * sizeof(S));
    memset(map + row_size - width, 0, width * sizeof(S));
    for (int64_t c = 0; c < width; c += kChunk) {
      const T* source = value + h * p.W * step + c;
      S* cell = map + width + c;
      if (c + kChunk <= p.D) {
        for (int64_t w = 0; w < p.W; ++w, source += step, cell += width) {
          for (int64_t line = 0; line < kChunk; line += 64 / int64_t(sizeof(T))) V::prefetch(source + 8 * step + line);
          for (int v = 0; v < kVectors; ++v) V::load(source + v * V::width).store(cell + v * V::width);
        }
        continue;
      }
      for (int64_t w = 0; w < p.W; ++w, source += step, cell += width)
        for (int v = 0; v < kVectors; ++v) {
          const int64_t left = std::max<int64_t>(0, std::min<int64_t>(V::width, p.D - c - v * V::width));
          V::load_some(source + (left ? v * V::width : 0), int(left)).store(cell + v * V::width);
        }
    }
  }
}

template <class V, class T>
void pack(const dcnv4_problem& p, const Plan<ScalarOf<V>>& plan, const T* value, Window window, ScalarOf<V>* map) {
  const auto rows = plan.at_once == 1   ? pack_rows<V, T, 1>
                    : plan.at_once == 2 ? pack_rows<V, T, 2>
                    : plan.at_once == 3 ? pack_rows<V, T, 3>
                                        : pack_rows<V, T, 4>;
  rows(p, plan, value, window, map);
}

template <class V>
DCNV4_INLINE void clear_blank(const Plan<ScalarOf<V>>& plan, ScalarOf<V>* blank) {
  const int64_t width = plan.packed_width;
  memset(blank, 0, 2 * width * sizeof(ScalarOf<V>));
  memset(blank + plan.pitch * width, 0, 2 * width * sizeof(ScalarOf<V>));
}

// Elements of a packed map of `rows` rows with the blank cells behind it.
template <class S>
inline int64_t map_elements(const Plan<S>& plan, int64_t rows) {
  const int64_t elements = (rows * plan.pitch + plan.pitch + 2) * plan.packed_width;
  return (elements + 15) / 16 * 16;
}

// ---------------------------------------------------------------------------------------------------------------- forward

// One pixel straight from the value tensor, for taps that leave the packed window.
template <class V, class T>
DCNV4_NOINLINE void forward_direct(const dcnv4_problem& p, const Plan<ScalarOf<V>>& plan, const T* value, const T* row,
                                   const ScalarOf<V>* weights, ScalarOf<V> x_base, ScalarOf<V> y_base, T* output) {
  using S = ScalarOf<V>;
  for (int64_t c = 0; c < p.D; c += V::width) {
    const int lanes = int(std::min<int64_t>(V::width, p.D - c));
    V sum = V::zero();
    for (int64_t k = 0; k < plan.K; ++k) {
      const S x = std::fma(plan.grid_x[k] + S(to_compute(row[2 * k])), plan.scale, x_base);
      const S y = std::fma(plan.grid_y[k] + S(to_compute(row[2 * k + 1])), plan.scale, y_base);
      if (!(x > -1 && y > -1 && x < plan.width && y < plan.height)) continue;
      const S weight = weights ? weights[k] : S(to_compute(row[2 * plan.K + k]));
      const S x_floor = std::floor(x), y_floor = std::floor(y);
      const Corners<S> corners = corner_weights(x - x_floor, y - y_floor, weight, S(1));
      const int64_t x0 = int64_t(x_floor), y0 = int64_t(y_floor);
      const S corner[4] = {corners.w00, corners.w01, corners.w10, corners.w11};
      for (int q = 0; q < 4; ++q) {
        const int64_t cell_x = x0 + (q & 1), cell_y = y0 + (q >> 1);
        if (cell_x < 0 || cell_y < 0 || cell_x >= p.W || cell_y >= p.H) continue;
        const T* source = value + (cell_y * p.W + cell_x) * p.value_stride + c;
        sum = V::fma(V::set1(corner[q]), V::load_some(source, lanes), sum);
      }
    }
    sum.store_some(output + c, lanes);
  }
}

// Four weighted loads a tap for `kVectors` vectors of channels. kTaps = 0: K at run time.
template <class V, int kVectors, int kTaps>
DCNV4_INLINE void gather(const ScalarOf<V>* map, int64_t width, int64_t row_size, int64_t K, const Taps<V>& taps, V* sum) {
  V even[kVectors], odd[kVectors];
  for (int v = 0; v < kVectors; ++v) even[v] = odd[v] = V::zero();
  const auto tap = [&](int64_t k) DCNV4_LAMBDA_INLINE {
    const ScalarOf<V>* top = map + int64_t(taps.cell[k]) * width;
    const ScalarOf<V>* bottom = top + row_size;
    const V w00 = V::set1(taps.w00[k]), w01 = V::set1(taps.w01[k]), w10 = V::set1(taps.w10[k]), w11 = V::set1(taps.w11[k]);
    for (int v = 0; v < kVectors; ++v) even[v] = V::fma(w00, V::load(top + v * V::width), even[v]);
    for (int v = 0; v < kVectors; ++v) odd[v] = V::fma(w01, V::load(top + width + v * V::width), odd[v]);
    for (int v = 0; v < kVectors; ++v) even[v] = V::fma(w10, V::load(bottom + v * V::width), even[v]);
    for (int v = 0; v < kVectors; ++v) odd[v] = V::fma(w11, V::load(bottom + width + v * V::width), odd[v]);
  };
  if (kTaps > 0) {
    DCNV4_UNROLL
    for (int k = 0; k < kTaps; ++k) tap(k);
  } else {
    for (int64_t k = 0; k < K; ++k) tap(k);
  }
  for (int v = 0; v < kVectors; ++v) sum[v] = even[v] + odd[v];
}

// Some channels of consecutive pixels, to be fetched into the caches.
struct Stream {
  const char* at = nullptr;
  int64_t step = 0;         // bytes from pixel to pixel
  int64_t pixels = 0;       // left
  int64_t whole_lines = 0;  // 64 bytes apart from a pixel's first byte on
  int64_t last = 0;         // the byte whose line is fetched after these

  Stream() = default;
  template <class T>
  Stream(const T* first, int64_t stride, int64_t pixels, int64_t elements)
      : at(reinterpret_cast<const char*>(first)), step(stride * int64_t(sizeof(T))), pixels(pixels) {
    const int64_t bytes = elements * int64_t(sizeof(T)), begin = int64_t(reinterpret_cast<uintptr_t>(first) % 64);
    // Where every pixel begins at the same byte of a line, as many lines as it touches; else one more than it may fill.
    const int64_t lines = step % 64 == 0 ? (begin + bytes + 63) / 64 : (bytes + 62) / 64 + 1;
    whole_lines = lines - 1;
    last = bytes - 1;
  }

  template <class V>
  DCNV4_INLINE void fetch() {
    for (int64_t line = 0; line < whole_lines; ++line) V::prefetch(at + 64 * line);
    V::prefetch(at + last);
    at += --pixels > 0 ? step : 0;  // stays on the last pixel: a branch would be foreseen wrongly
  }
};

// What the next group of a task reads and, through the caches, writes, fetched a pixel at a time while this one is computed:
// the channels of a group lie so far apart in memory that the processor foresees none of them.
template <class V>
struct Ahead {
  Stream streams[4];
  int count = 0;

  Ahead() = default;
  explicit Ahead(std::initializer_list<Stream> all) {
    for (const Stream& stream : all)
      if (stream.pixels > 0) streams[count++] = stream;
  }
  // Without a loop, whose branches would be foreseen wrongly. Values and offsets are always there, if anything is.
  DCNV4_INLINE void fetch() {
    if (count == 0) return;
    streams[0].template fetch<V>();
    streams[1].template fetch<V>();
    if (count <= 2) return;
    streams[2].template fetch<V>();
    if (count <= 3) return;
    streams[3].template fetch<V>();
  }
};

// Output rows [first_row, last_row) of one group. Pointers are at the group's channels of the image; `map` holds `window`.
template <class V, class T, int kVectors, int kTaps>
void forward_rows(const dcnv4_problem& p, const Plan<ScalarOf<V>>& plan, const T* value, const T* offset_mask, T* output,
                  const ScalarOf<V>* map, Window window, int32_t blank, int64_t first_row, int64_t last_row,
                  ScalarOf<V>* tap_scratch, Ahead<V> ahead, bool past_caches) {
  using S = ScalarOf<V>;
  constexpr int kBatch = 4;  // pixels located before any is gathered: the stores of the weights have settled by then
  const int64_t K = kTaps > 0 ? kTaps : plan.K, padded = plan.padded_taps;
  const int64_t width = plan.packed_width, row_size = plan.pitch * width;
  const Frame<V> frame(plan, window, blank);
  Taps<V> taps[kBatch];
  S* softened[kBatch];
  bool leaves[kBatch];
  for (int b = 0; b < kBatch; ++b) {
    S* at = tap_scratch + b * 6 * padded;
    taps[b] = {at, at + padded, at + 2 * padded, at + 3 * padded, reinterpret_cast<int32_t*>(at + 4 * padded)};
    softened[b] = p.softmax ? at + 5 * padded : nullptr;
  }
  for (int64_t ho = first_row; ho < last_row; ++ho) {
    const S y_base = S(base_y(p, ho));
    for (int64_t first = 0; first < p.Wo; first += kBatch) {
      const int count = int(std::min<int64_t>(kBatch, p.Wo - first));
      for (int b = 0; b < count; ++b) {
        const T* row = offset_mask + (ho * p.Wo + first + b) * p.offset_mask_stride;
        V::prefetch(row + 2 * kBatch * p.offset_mask_stride);
        V::prefetch(reinterpret_cast<const char*>(row + 2 * kBatch * p.offset_mask_stride) + 64);
        if (softened[b]) softmax_row(row + 2 * K, K, softened[b]);
        leaves[b] = locate<V, T, false>(frame, plan.grid_x, plan.grid_y, K, row, softened[b], S(base_x(p, first + b)), y_base,
                                        taps[b], {});
      }
      for (int b = 0; b < count; ++b) {
        T* target = output + (ho * p.Wo + first + b) * p.output_stride;
        ahead.fetch();
        if (!DCNV4_LIKELY(!leaves[b])) {
          const T* row = offset_mask + (ho * p.Wo + first + b) * p.offset_mask_stride;
          forward_direct<V, T>(p, plan, value, row, softened[b], S(base_x(p, first + b)), y_base, target);
          continue;
        }
        for (int64_t c = 0; c < width; c += kVectors * V::width) {
          V sum[kVectors];
          gather<V, kVectors, kTaps>(map + c, width, row_size, K, taps[b], sum);
          for (int v = 0; v < kVectors; ++v) {
            const int64_t left = p.D - c - v * V::width;
            if (DCNV4_LIKELY(left >= V::width)) {
              sum[v].store(target + c + v * V::width);
            } else if (left > 0) {
              sum[v].store_some(target + c + v * V::width, int(left));
            }
          }
        }
      }
    }
  }
}

// What the taps of V::width pixels look up, pixel by pixel without gaps, so that kTaps whole vectors locate them all.
template <class V, int kTaps>
struct Lookups {
  static constexpr int kPixels = V::width, kAll = kPixels * kTaps;
  // One vector of the last pixel's taps is read past the end.
  alignas(64) ScalarOf<V> w00[kAll + V::width], w01[kAll + V::width], w10[kAll + V::width], w11[kAll + V::width];
  alignas(64) uint32_t element[kAll + V::width];  // where the upper left corner begins in the packed map
};

// What backward needs of them besides.
template <class V, int kTaps>
struct LookupStates {
  static constexpr int kAll = V::width * kTaps;
  alignas(64) ScalarOf<V> lx[kAll], ly[kAll], weight[kAll + V::width];
  typename V::Mask used[kTaps];
};

// Constants of a lane, the same for every batch: [0, kAll) of its tap, then its pixel in the batch, then 0, 1, 2, ...
template <class V, int kTaps>
struct LaneTables {
  using S = ScalarOf<V>;
  static constexpr int kAll = Lookups<V, kTaps>::kAll;
  alignas(64) S grid_x[kAll], grid_y[kAll], count[V::width];
  alignas(64) int32_t pixel[kAll];

  explicit LaneTables(const Plan<S>& plan) {
    for (int i = 0; i < kAll; ++i) {
      grid_x[i] = plan.grid_x[i % kTaps];
      grid_y[i] = plan.grid_y[i % kTaps];
      pixel[i] = i / kTaps;
    }
    for (int i = 0; i < V::width; ++i) count[i] = S(i);
  }
};

// What locating needs of the problem and the window.
template <class V>
struct LookupFrame {
  using S = ScalarOf<V>;
  const Frame<V> frame;
  const V cell_size, row_size, origin, columns, per_column, step_x, step_y;
  const int32_t blank;

  LookupFrame(const dcnv4_problem& p, const Plan<S>& plan, Window window, int32_t blank)
      : frame(plan, window, blank),
        cell_size(V::set1(S(plan.packed_width))),
        row_size(V::set1(S(plan.pitch * plan.packed_width))),
        origin(V::set1(S((1 - window.first * plan.pitch) * plan.packed_width))),
        columns(V::set1(S(p.Wo))),
        per_column(V::set1(S(1) / S(p.Wo))),
        step_x(V::set1(S(p.stride_w))),
        step_y(V::set1(S(p.stride_h))),
        blank(int32_t(blank * plan.packed_width)) {}
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

// The lookups of the pixels (row, column) and `count` - 1 behind it, whose offset rows begin at `offsets`, `step` apart.
// Pixels `below` behind them are next. Returns whether a tap needs a row outside the window; then `outside` has a bit a tap.
template <class V, class T, int kTaps>
DCNV4_NOINLINE bool locate_lookups(const dcnv4_problem& p, const LookupFrame<V>& on, const LaneTables<V, kTaps>& lanes,
                                   const T* offsets, int64_t step, int64_t below, int count, int64_t row, int64_t column,
                                   Lookups<V, kTaps>& to, typename V::Mask* outside, LookupStates<V, kTaps>* states) {
  using S = ScalarOf<V>;
  constexpr int kPixels = V::width;
  // The taps' offsets and weights side by side. A store writes whole vectors, and the next one overwrites what is too much.
  alignas(64) T pairs[kPixels * 2 * kTaps + 2 * V::width];
  alignas(64) S own_weights[kPixels * kTaps + V::width];
  S* const weights = states ? states->weight : own_weights;
  const bool softmax = p.softmax;
  for (int i = 0; i < count; ++i, offsets += step) {
    V::prefetch(offsets + below * step);
    memcpy(pairs + i * 2 * kTaps, offsets, 2 * kTaps * sizeof(T));
    if (softmax) {
      softmax_row(offsets + 2 * kTaps, kTaps, weights + i * kTaps);
    } else {
      for (int k = 0; k < kTaps; k += V::width)
        V::load_some(offsets + 2 * kTaps + k, std::min(V::width + 0, kTaps - k)).store(weights + i * kTaps + k);
    }
  }
  const Frame<V> frame = on.frame;
  // Columns count on over the end of a row; `wrapped` is how many rows down that is. Half a column keeps it off the edge.
  const V ahead = V::set1(S(column)) + V::load(lanes.count);
  const V wrapped = V::floor((ahead + V::set1(S(0.5))) * on.per_column);
  const V pixel_x = V::fma(ahead - wrapped * on.columns, on.step_x, V::set1(S(base_x(p, 0))));
  const V pixel_y = V::fma(wrapped, on.step_y, V::set1(S(base_y(p, row))));
  const int vectors = (count * kTaps + V::width - 1) / V::width;
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
    V::store_whole(to.element + i, used, V::fma(y0, on.row_size, V::fma(x0, on.cell_size, on.origin)), on.blank);
    const V lx = V::select(used, x - x0), ly = V::select(used, y - y0);
    if (states) {
      lx.store(states->lx + i);
      ly.store(states->ly + i);
      states->used[v] = used;
    }
    const Corners<V> w = corner_weights(lx, ly, V::select(used, V::load(weights + i)), frame.one);
    w.w00.store(to.w00 + i);
    w.w01.store(to.w01 + i);
    w.w10.store(to.w10 + i);
    w.w11.store(to.w11 + i);
  }
  return leaves;
}

// One corner's weights of the taps of a pixel, spread over a vector one by one.
template <class V, bool kPermute>
struct Spreads {
  V all;
  explicit DCNV4_INLINE Spreads(const ScalarOf<V>* weights) : all(V::load(weights)) {}
  DCNV4_INLINE V operator()(int tap) const { return V::spread(all, tap); }
};
template <class V>
struct Spreads<V, false> {
  const ScalarOf<V>* weights;
  explicit DCNV4_INLINE Spreads(const ScalarOf<V>* weights) : weights(weights) {}
  DCNV4_INLINE V operator()(int tap) const { return V::set1(weights[tap]); }
};

// Four weighted loads a tap for `kVectors` vectors of channels, `width` elements from one cell to the next. Where a permutation
// can spread a weight over a vector, two of four come so and two from memory: neither the load ports, which the map keeps busy,
// nor the multiply-adds' neighbours are then the narrow place. Sums of one or two vectors are kept a corner: a chain of
// additions must not be longer than the multiply-adds take that run beside it.
template <class V, int kVectors, int kTaps>
DCNV4_INLINE void gather_lookup(const ScalarOf<V>* map, int64_t width, int64_t row_size, const Lookups<V, kTaps>& from,
                                int pixel, V* sum) {
  constexpr int kChains = kVectors <= 2 ? 4 : 2;
  const int at = pixel * kTaps;
  V chain[kChains][kVectors];
  const Spreads<V, V::spreads> w00(from.w00 + at), w10(from.w10 + at);
  const Spreads<V, false> w01(from.w01 + at), w11(from.w11 + at);
  uint64_t two = 0;  // elements of two taps: half as many loads, and none that extends a sign
  DCNV4_UNROLL
  for (int k = 0; k < kTaps; ++k, two >>= 32) {
    if (k % 2 == 0) memcpy(&two, from.element + at + k, sizeof two);
    const ScalarOf<V>* top = map + uint32_t(two);
    const ScalarOf<V>* bottom = top + row_size;
    const auto add = [&](int q, V weight, const ScalarOf<V>* corner) DCNV4_LAMBDA_INLINE {
      V* const sums = chain[q % kChains];
      for (int v = 0; v < kVectors; ++v) {
        const V there = V::load(corner + v * V::width);
        sums[v] = k == 0 && q < kChains ? weight * there : V::fma(weight, there, sums[v]);
      }
    };
    add(0, w00(k), top);
    add(1, w01(k), top + width);
    add(2, w10(k), bottom);
    add(3, w11(k), bottom + width);
  }
  for (int v = 0; v < kVectors; ++v) {
    sum[v] = chain[0][v] + chain[1][v];
    if (kChains == 4) sum[v] = sum[v] + (chain[2][v] + chain[3][v]);
  }
}

// The outputs of `count` pixels, `step` apart. Apart from what locates them: both need their constants in registers.
template <class V, class T, int kVectors, int kTaps>
DCNV4_NOINLINE void gather_lookups(const ScalarOf<V>* map, int64_t row_size, const Lookups<V, kTaps>& from, int count,
                                   T* target, int64_t step, Ahead<V>& ahead, bool past_caches) {
  for (int i = 0; i < count; ++i, target += step) {
    ahead.fetch();
    V sum[kVectors];
    gather_lookup<V, kVectors, kTaps>(map, kVectors * V::width, row_size, from, i, sum);
    V::template store_all<kVectors>(target, sum, past_caches);
  }
}

// Output rows where positions and elements of the map are whole numbers that the compute type holds. `past_caches`: the output
// is aligned to whole cache lines and goes straight to memory.
template <class V, class T, int kVectors, int kTaps>
void forward_rows_lookup(const dcnv4_problem& p, const Plan<ScalarOf<V>>& plan, const T* value, const T* offset_mask, T* output,
                         const ScalarOf<V>* map, Window window, int32_t blank, int64_t first_row, int64_t last_row,
                         ScalarOf<V>* tap_scratch, Ahead<V> ahead, bool past_caches) {
  using S = ScalarOf<V>;
  constexpr int64_t kChunk = kVectors * V::width;
  const LaneTables<V, kTaps>& lanes = *static_cast<const LaneTables<V, kTaps>*>(plan.lanes);
  const int64_t width = plan.packed_width, row_size = plan.pitch * width, D = p.D;
  const int64_t offset_step = p.offset_mask_stride, output_step = p.output_stride;
  const LookupFrame<V> frame(p, plan, window, blank);
  Lookups<V, kTaps> lookups;
  typename V::Mask outside[kTaps];
  for_batches<V>(p, first_row, last_row, true, [&](int64_t row, int64_t column, int count, int64_t below) DCNV4_LAMBDA_INLINE {
    const T* const offsets = offset_mask + (row * p.Wo + column) * offset_step;
    T* const target = output + (row * p.Wo + column) * output_step;
    const bool leaves = locate_lookups<V, T, kTaps>(p, frame, lanes, offsets, offset_step, below, count, row, column, lookups,
                                                    outside, nullptr);
    if (DCNV4_LIKELY(!leaves && D == kChunk)) {
      gather_lookups<V, T, kVectors, kTaps>(map, row_size, lookups, count, target, output_step, ahead, past_caches);
      return;
    }
    for (int i = 0; i < count; ++i) {
      T* out = target + i * output_step;
      ahead.fetch();
      bool direct = false;
      for (int k = i * kTaps; leaves && k < (i + 1) * kTaps; ++k) direct |= V::lane(outside[k / V::width], k % V::width);
      if (direct) {
        S* softened = p.softmax ? tap_scratch : nullptr;
        if (softened) softmax_row(offsets + i * offset_step + 2 * kTaps, kTaps, softened);
        forward_direct<V, T>(p, plan, value, offsets + i * offset_step, softened, S(base_x(p, (column + i) % p.Wo)),
                             S(base_y(p, row + (column + i) / p.Wo)), out);
        continue;
      }
      for (int64_t c = 0; c < width; c += kChunk) {
        V sum[kVectors];
        gather_lookup<V, kVectors, kTaps>(map + c, width, row_size, lookups, i, sum);
        if (c + kChunk <= D) {
          V::template store_all<kVectors>(out + c, sum, past_caches);
        } else {
          for (int v = 0; v < kVectors; ++v) {
            const int64_t left = D - c - v * V::width;
            if (left > 0) sum[v].store_some(out + c + v * V::width, int(std::min<int64_t>(left, V::width)));
          }
        }
      }
    }
  });
}

// Channels are taken kVectors vectors at a time, at most four so that sums, weights and addresses stay in registers.
inline int vectors_at_once(int64_t vectors) {
  const int64_t rounds = (vectors + 3) / 4;
  return int((vectors + rounds - 1) / rounds);
}

template <class V>
struct TapGrid {
  using S = ScalarOf<V>;
  // Two arrays of `padded` values in `storage`.
  static Plan<S> plan(const dcnv4_problem& p, S* storage) {
    const int64_t K = taps_of(p), padded = (K + V::width - 1) / V::width * V::width;
    Plan<S> plan;
    plan.K = K;
    plan.padded_taps = padded;
    plan.D = p.D;
    const int64_t vectors = (p.D + V::width - 1) / V::width, at_once = vectors_at_once(vectors);
    plan.at_once = int(at_once);
    plan.packed_width = (vectors + at_once - 1) / at_once * at_once * V::width;
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

template <class V, class T>
using ForwardRows = void (*)(const dcnv4_problem&, const Plan<ScalarOf<V>>&, const T*, const T*, T*, const ScalarOf<V>*, Window,
                             int32_t, int64_t, int64_t, ScalarOf<V>*, Ahead<V>, bool);

// Taps of the kernel that is worth tables of its own: 3x3.
constexpr int kLookupTaps = 9;

template <class V, class T, int kVectors>
ForwardRows<V, T> forward_rows_for_taps(int64_t K, bool exact) {
  if constexpr (V::looks_up) {
    if (K == kLookupTaps && exact) return forward_rows_lookup<V, T, kVectors, kLookupTaps>;
  } else if constexpr (kUnrollTaps) {
    if (K == 9) return forward_rows<V, T, kVectors, 9>;
  }
  return forward_rows<V, T, kVectors, 0>;
}

template <class V, class T>
ForwardRows<V, T> choose_forward_rows(int64_t D, int64_t K, bool exact) {
  switch (vectors_at_once((D + V::width - 1) / V::width)) {
    case 1:
      return forward_rows_for_taps<V, T, 1>(K, exact);
    case 2:
      return forward_rows_for_taps<V, T, 2>(K, exact);
    case 3:
      return forward_rows_for_taps<V, T, 3>(K, exact);
    default:
      return forward_rows_for_taps<V, T, 4>(K, exact);
  }
}

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

// Value rows that the taps of output rows [first, last) reach with offsets of up to `halo` rows.
template <class S>
Window window_of(const dcnv4_problem& p, const Plan<S>& plan, int64_t first, int64_t last, int64_t halo) {
  const double reach = std::abs(p.offset_scale) * double(plan.center_y + p.dilation_h);
  const double top = double(base_y(p, first)) - reach - double(halo),
               bottom = double(base_y(p, last - 1)) + reach + double(halo);
  const int64_t from = int64_t(std::floor(std::max(-1.0, std::min(top, double(p.H - 1)))));
  const int64_t to = int64_t(std::min(double(p.H), std::max(bottom, 0.0)));
  return {from, std::max(to + 1, from + 2)};
}

// What tasks threads take, one after the other. Where there are many, a thread takes its next one before it does this one, so
// that it can ask for that one's data meanwhile.
class Tasks {
 public:
  Tasks(int64_t count, int threads) : count_(count), early_(count >= 4 * int64_t(threads)) {}

  // For every thread of a team: `work(task, next)`, where `next` is -1 if it is not known.
  template <class Work>
  void run(Work work) {
    int64_t task = taken_++;
    while (task < count_) {
      const int64_t next = early_ ? taken_++ : -1;
      work(task, next < count_ ? next : -1);
      task = early_ ? next : taken_++;
    }
  }

 private:
  std::atomic<int64_t> taken_{0};
  const int64_t count_;
  const bool early_;
};

// Nobody has asked for the data of a thread's first task: at least for the beginning of its rows.
template <class V>
void fetch_beginning(Ahead<V> own) {
  for (int pixel = 0; pixel < 16; ++pixel) own.fetch();
}

// Whether results go past the caches: whole cache lines, of a tensor that no L2 cache would hold until it is read. A line is
// then not read before it is written.
template <class V, class T>
bool goes_past_caches(const Plan<ScalarOf<V>>& plan, int64_t pixels, int64_t stride, const T* tensor) {
  constexpr int64_t kStays = int64_t(256) << 10;  // bytes
  const auto whole_lines = [](int64_t bytes) { return bytes % 64 == 0; };
  return V::looks_up && pixels * stride * int64_t(sizeof(T)) > kStays && plan.D == plan.packed_width &&
         whole_lines(plan.D * sizeof(T)) && whole_lines(stride * sizeof(T)) && whole_lines(reinterpret_cast<uintptr_t>(tensor));
}

template <class V, class T>
int32_t forward(const dcnv4_problem& p, const void* value_, const void* offset_mask_, void* output_) {
  using S = ScalarOf<V>;
  const T *value = static_cast<const T*>(value_), *offset_mask = static_cast<const T*>(offset_mask_);
  T* output = static_cast<T*>(output_);
  static thread_local Scratch grid_scratch;
  S* grid = static_cast<S*>(grid_scratch.get(TapGrid<V>::elements(p) * sizeof(S)));
  if (!grid) return DCNV4_OUT_OF_MEMORY;
  Plan<S> plan = TapGrid<V>::plan(p, grid);
  const int64_t row_size = plan.pitch * plan.packed_width;
  std::optional<LaneTables<V, kLookupTaps>> lanes;
  if (V::looks_up && plan.K == kLookupTaps) plan.lanes = &lanes.emplace(plan);

  // Output rows a task: all where the map they need stays within half of the L2 cache, else as many as leave most of the window
  // no halo; fewer where threads would have nothing to do.
  constexpr int64_t kBudget = int64_t(512) << 10;  // bytes of a packed map
  constexpr int64_t kHalo = 4;                     // rows of offset that stay inside a window
  const int64_t rows_in_budget = std::max<int64_t>(1, kBudget / (row_size * int64_t(sizeof(S))));
  const int64_t span = 2 * int64_t(std::ceil(std::min(std::abs(p.offset_scale) * double(plan.center_y + p.dilation_h), 1e6)));
  int64_t tile = p.Ho;
  if (p.H + 2 > rows_in_budget) tile = std::max<int64_t>(8, (rows_in_budget - 2 * kHalo - span) / p.stride_h);
  const int64_t wanted = std::max<int64_t>(1, 2 * int64_t(p.threads) / (p.N * p.G));  // tiles to keep the threads busy
  tile = std::max<int64_t>(1, std::min(tile, (p.Ho + wanted - 1) / wanted));
  const int64_t tiles = (p.Ho + tile - 1) / tile;
  tile = (p.Ho + tiles - 1) / tiles;

  const bool past_caches = plan.K == 9 && goes_past_caches<V, T>(plan, p.N * p.Ho * p.Wo, p.output_stride, output);

  const Window whole = {-1, p.H + 1};
  int64_t most_rows = 0;
  for (int64_t t = 0; t * tile < p.Ho; ++t) {
    const Window window = tiles > 1 ? window_of(p, plan, t * tile, std::min(p.Ho, (t + 1) * tile), kHalo) : whole;
    most_rows = std::max(most_rows, window.last - window.first);
  }
  const int64_t map_size = map_elements(plan, most_rows);
  const auto rows_kernel = choose_forward_rows<V, T>(p.D, plan.K, is_exact(p, plan, most_rows));
  const int64_t tap_size = 4 * 6 * plan.padded_taps;
  std::atomic<int32_t> status{DCNV4_OK};
  const int64_t count = p.N * tiles * p.G;
  const bool parallel = count > 1 && p.threads > 1 && p.N * p.Ho * p.Wo * p.G * p.D >= 1 << 13;
  // A task: group g of the output rows [first, last) of image n.
  struct Part {
    int64_t n, g, first, last;
    Window window;
  };
  const auto part_of = [&](int64_t task) {
    const int64_t t = task / p.G % tiles, first = t * tile, last = std::min(p.Ho, first + tile);
    return Part{task / (p.G * tiles), task % p.G, first, last,
                tiles > 1 && first < last ? window_of(p, plan, first, last, kHalo) : whole};
  };
  const auto image_of = [&](const Part& part) { return value + part.n * p.H * p.W * p.value_stride + part.g * p.D; };
  const auto offsets_of = [&](const Part& part) {
    return offset_mask + part.n * p.Ho * p.Wo * p.offset_mask_stride + part.g * 3 * plan.K;
  };
  const auto output_of = [&](const Part& part) { return output + part.n * p.Ho * p.Wo * p.output_stride + part.g * p.D; };
  const auto data_of = [&](int64_t task) -> Ahead<V> {
    if (task < 0) return Ahead<V>();
    const Part part = part_of(task);
    const int64_t from = std::max<int64_t>(0, part.window.first), to = std::min(p.H, part.window.last);
    const int64_t skipped = part.first * p.Wo, pixels = std::max<int64_t>(0, part.last - part.first) * p.Wo;
    return Ahead<V>{Stream(image_of(part) + from * p.W * p.value_stride, p.value_stride, (to - from) * p.W, p.D),
                    Stream(offsets_of(part) + skipped * p.offset_mask_stride, p.offset_mask_stride, pixels, 3 * plan.K),
                    Stream(output_of(part) + skipped * p.output_stride, p.output_stride, past_caches ? 0 : pixels, p.D)};
  };
  Tasks tasks(count, parallel ? p.threads : 1);
#pragma omp parallel num_threads(p.threads) if (parallel)
  {
    static thread_local Scratch scratch;
    bool begun = false;
    tasks.run([&](int64_t task, int64_t next) {
      S* map = static_cast<S*>(scratch.get((map_size + tap_size) * sizeof(S)));
      const Part part = part_of(task);
      if (!map) status = DCNV4_OUT_OF_MEMORY;
      if (!map || part.first >= part.last) return;
      if (!begun) fetch_beginning(data_of(task));
      begun = true;
      const T* image = image_of(part);
      const int32_t blank = int32_t((part.window.last - part.window.first) * plan.pitch);
      pack<V, T>(p, plan, image, part.window, map);
      clear_blank<V>(plan, map + int64_t(blank) * plan.packed_width);
      rows_kernel(p, plan, image, offsets_of(part), output_of(part), map, part.window, blank, part.first, part.last,
                  map + map_size, data_of(next), past_caches);
    });
    if constexpr (V::looks_up)
      if (past_caches) V::fence();
    scratch.trim(kKeptScratch);
  }
  return status;
}

// --------------------------------------------------------------------------------------------------------------- backward

// Dot products of grad_output with the four corners of every tap, and the scattered products, for kVectors vectors of channels.
template <class V, int kVectors, int kTaps>
DCNV4_INLINE void scatter(const ScalarOf<V>* map, ScalarOf<V>* grad_map, int64_t width, int64_t row_size, int64_t K,
                          const Taps<V>& taps, const V* grad, ScalarOf<V>* sums, bool add) {
  using S = ScalarOf<V>;
  const auto tap = [&](int64_t k) DCNV4_LAMBDA_INLINE {
    const int64_t at = int64_t(taps.cell[k]) * width;
    const S* source[4] = {map + at, map + at + width, map + at + row_size, map + at + row_size + width};
    S* target[4] = {grad_map + at, grad_map + at + width, grad_map + at + row_size, grad_map + at + row_size + width};
    const V weight[4] = {V::set1(taps.w00[k]), V::set1(taps.w01[k]), V::set1(taps.w10[k]), V::set1(taps.w11[k])};
    V dot[4];
    for (int q = 0; q < 4; ++q) {
      dot[q] = grad[0] * V::load(source[q]);
      for (int v = 1; v < kVectors; ++v) dot[q] = V::fma(grad[v], V::load(source[q] + v * V::width), dot[q]);
    }
    for (int q = 0; q < 4; ++q)
      for (int v = 0; v < kVectors; ++v) {
        S* cell = target[q] + v * V::width;
        V::fma(weight[q], grad[v], V::load(cell)).store(cell);
      }
    V::sum4(dot[0], dot[1], dot[2], dot[3], sums + 4 * k, add);
  };
  if (kTaps > 0) {
    DCNV4_UNROLL
    for (int k = 0; k < kTaps; ++k) tap(k);
  } else {
    for (int64_t k = 0; k < K; ++k) tap(k);
  }
}

// A pixel's channels, of which the first `channels` are there, in kVectors vectors.
template <class V, int kVectors, class T>
DCNV4_INLINE void load_channels(const T* from, int64_t channels, V* to) {
  for (int v = 0; v < kVectors; ++v) {
    const int64_t left = channels - v * V::width;
    to[v] = DCNV4_LIKELY(left >= V::width) ? V::load(from + v * V::width)
            : left > 0                     ? V::load_some(from + v * V::width, int(left))
                                           : V::zero();
  }
}

// Gradients of the offsets and weights of one pixel from the dot products.
template <class V, class T>
DCNV4_INLINE void finish_taps(const Plan<ScalarOf<V>>& plan, int64_t K, const ScalarOf<V>* sums, const TapState<V>& state,
                              const ScalarOf<V>* softened, ScalarOf<V>* weight_gradients, T* target) {
  using S = ScalarOf<V>;
  const V scale = V::set1(plan.scale), half = V::set1(S(0.5));
  for (int64_t k = 0; k < K; k += V::width) {
    const int lanes = int(std::min<int64_t>(V::width, K - k));
    Corners<V> s;
    V::quads(sums + 4 * k, s.w00, s.w01, s.w10, s.w11);
    const typename V::Mask used = V::greater(V::first_lanes(V::width), V::load(state.inside + k), half);
    const TapGradient<V> gradient =
        tap_gradient(s, V::load(state.lx + k), V::load(state.ly + k), V::load(state.weight + k), scale);
    V::store_pairs(target + 2 * k, lanes, V::select(used, gradient.x), V::select(used, gradient.y));
    const V weight = V::select(used, gradient.weight);
    if (softened) {
      weight.store(weight_gradients + k);
    } else {
      weight.store_some(target + 2 * K + k, lanes);
    }
  }
  if (!softened) return;
  S mean = 0;
  for (int64_t k = 0; k < K; ++k) mean += softened[k] * weight_gradients[k];
  for (int64_t k = 0; k < K; ++k) target[2 * K + k] = from_compute<T>(softened[k] * (weight_gradients[k] - mean));
}

// Output rows [first_row, last_row) of one group; `map` and `grad_map` hold the whole image.
template <class V, class T, int kVectors, int kTaps>
void backward_rows(const dcnv4_problem& p, const Plan<ScalarOf<V>>& plan, const T* offset_mask, const T* grad_output,
                   T* grad_offset_mask, const ScalarOf<V>* map, ScalarOf<V>* grad_map, Window window, int32_t blank,
                   int64_t first_row, int64_t last_row, ScalarOf<V>* tap_scratch, Ahead<V> ahead) {
  using S = ScalarOf<V>;
  const int64_t K = kTaps > 0 ? kTaps : plan.K, padded = plan.padded_taps;
  const int64_t width = plan.packed_width, row_size = plan.pitch * width;
  S* at = tap_scratch;
  const Taps<V> taps = {at, at + padded, at + 2 * padded, at + 3 * padded, reinterpret_cast<int32_t*>(at + 4 * padded)};
  const TapState<V> state = {at + 5 * padded, at + 6 * padded, at + 7 * padded, at + 8 * padded};
  S *softened = p.softmax ? at + 9 * padded : nullptr, *weight_gradients = at + 10 * padded, *sums = at + 11 * padded;
  const Frame<V> frame(plan, window, blank);
  for (int64_t ho = first_row; ho < last_row; ++ho) {
    const S y_base = S(base_y(p, ho));
    for (int64_t wo = 0; wo < p.Wo; ++wo) {
      const int64_t pixel = ho * p.Wo + wo;
      const T* row = offset_mask + pixel * p.offset_mask_stride;
      ahead.fetch();
      if (softened) softmax_row(row + 2 * K, K, softened);
      locate<V, T, true>(frame, plan.grid_x, plan.grid_y, K, row, softened, S(base_x(p, wo)), y_base, taps, state);
      const T* gradient = grad_output + pixel * p.output_stride;
      for (int64_t c = 0; c < width; c += kVectors * V::width) {
        V grad[kVectors];
        load_channels<V, kVectors>(gradient + c, p.D - c, grad);
        scatter<V, kVectors, kTaps>(map + c, grad_map + c, width, row_size, K, taps, grad, sums, c > 0);
      }
      if (grad_offset_mask)
        finish_taps<V, T>(plan, K, sums, state, softened, weight_gradients,
                          grad_offset_mask + pixel * p.grad_offset_mask_stride);
    }
  }
}

// Dot products of grad_output with the corners of the taps of `count` pixels, four a tap, over kVectors vectors of channels of
// which `channels` are there; `add`: to what `sums` holds. Cells are `width` elements apart.
template <class V, class T, int kVectors, int kTaps, bool kSingle>
DCNV4_NOINLINE void dot_lookups(const ScalarOf<V>* map, int64_t width, int64_t row_size, const Lookups<V, kTaps>& from,
                                int count, const T* gradient, int64_t step, int64_t channels, ScalarOf<V>* sums, bool add,
                                Ahead<V>& ahead) {
  using S = ScalarOf<V>;
  if (kSingle) width = kVectors * V::width;
  for (int i = 0; i < count; ++i, gradient += step, sums += 4 * kTaps) {
    if (kSingle || !add) ahead.fetch();
    V::prefetch(gradient + 4 * step);
    V grad[kVectors];
    load_channels<V, kVectors>(gradient, channels, grad);
    uint64_t two = 0;
    DCNV4_UNROLL
    for (int k = 0; k < kTaps; ++k, two >>= 32) {
      if (k % 2 == 0) memcpy(&two, from.element + i * kTaps + k, sizeof two);
      const S* top = map + uint32_t(two);
      const S* const corner[4] = {top, top + width, top + row_size, top + row_size + width};
      V dot[4];
      for (int q = 0; q < 4; ++q) {
        dot[q] = grad[0] * V::load(corner[q]);
        for (int v = 1; v < kVectors; ++v) dot[q] = V::fma(grad[v], V::load(corner[q] + v * V::width), dot[q]);
      }
      V::sum4(dot[0], dot[1], dot[2], dot[3], sums + 4 * k, !kSingle && add);
    }
  }
}

// grad_output times the weights of the corners, added to the cells of `map`.
template <class V, class T, int kVectors, int kTaps, bool kSingle>
DCNV4_NOINLINE void scatter_lookups(ScalarOf<V>* map, int64_t width, int64_t row_size, const Lookups<V, kTaps>& from, int count,
                                    const T* gradient, int64_t step, int64_t channels) {
  using S = ScalarOf<V>;
  if (kSingle) width = kVectors * V::width;
  for (int i = 0; i < count; ++i, gradient += step) {
    const int at = i * kTaps;
    const Spreads<V, V::spreads> w00(from.w00 + at), w01(from.w01 + at), w10(from.w10 + at), w11(from.w11 + at);
    V grad[kVectors];
    load_channels<V, kVectors>(gradient, channels, grad);
    uint64_t two = 0;
    DCNV4_UNROLL
    for (int k = 0; k < kTaps; ++k, two >>= 32) {
      if (k % 2 == 0) memcpy(&two, from.element + at + k, sizeof two);
      S* top = map + uint32_t(two);
      S* bottom = top + row_size;
      const auto add = [&](S* corner, V weight) DCNV4_LAMBDA_INLINE {
        for (int v = 0; v < kVectors; ++v) V::fma(weight, grad[v], V::load(corner + v * V::width)).store(corner + v * V::width);
      };
      add(top, w00(k));
      add(top + width, w01(k));
      add(bottom, w10(k));
      add(bottom + width, w11(k));
    }
  }
}

// Gradients of the offsets and weights of `count` pixels from the dot products, to rows `step` apart.
template <class V, class T, int kTaps>
DCNV4_NOINLINE void finish_lookups(V scale, const ScalarOf<V>* sums, const LookupStates<V, kTaps>& states, bool softmax,
                                   int count, T* target, int64_t step) {
  using S = ScalarOf<V>;
  alignas(64) T pairs[2 * V::width * kTaps], weights[V::width * kTaps];
  alignas(64) S softmax_gradients[V::width * kTaps];
  const int vectors = (count * kTaps + V::width - 1) / V::width;
  for (int v = 0, i = 0; v < vectors; ++v, i += V::width) {
    Corners<V> s;
    V::quads(sums + 4 * i, s.w00, s.w01, s.w10, s.w11);
    const TapGradient<V> gradient =
        tap_gradient(s, V::load(states.lx + i), V::load(states.ly + i), V::load(states.weight + i), scale);
    const typename V::Mask used = states.used[v];
    V::store_pairs(pairs + 2 * i, V::width, V::select(used, gradient.x), V::select(used, gradient.y));
    const V weight = V::select(used, gradient.weight);
    if (softmax) {
      weight.store(softmax_gradients + i);
    } else {
      weight.store(weights + i);
    }
  }
  for (int i = 0; i < count; ++i, target += step) {
    const int at = i * kTaps;
    if (softmax) {
      S mean = 0;
      for (int k = 0; k < kTaps; ++k) mean += states.weight[at + k] * softmax_gradients[at + k];
      for (int k = 0; k < kTaps; ++k)
        weights[at + k] = from_compute<T>(states.weight[at + k] * (softmax_gradients[at + k] - mean));
    }
    memcpy(target, pairs + 2 * at, 2 * kTaps * sizeof(T));
    memcpy(target + 2 * kTaps, weights + at, kTaps * sizeof(T));
  }
}

// The same as backward_rows where positions and elements of the map are whole numbers that the compute type holds: dot
// products, scattering and the rest in passes of their own over some pixels, which keep what each needs in registers.
template <class V, class T, int kVectors, int kTaps>
void backward_rows_lookup(const dcnv4_problem& p, const Plan<ScalarOf<V>>& plan, const T* offset_mask, const T* grad_output,
                          T* grad_offset_mask, const ScalarOf<V>* map, ScalarOf<V>* grad_map, Window window, int32_t blank,
                          int64_t first_row, int64_t last_row, ScalarOf<V>*, Ahead<V> ahead) {
  using S = ScalarOf<V>;
  constexpr int64_t kChunk = kVectors * V::width;
  const LaneTables<V, kTaps>& lanes = *static_cast<const LaneTables<V, kTaps>*>(plan.lanes);
  const int64_t width = plan.packed_width, row_size = plan.pitch * width;
  const LookupFrame<V> frame(p, plan, window, blank);
  Lookups<V, kTaps> lookups;
  LookupStates<V, kTaps> states;
  alignas(64) S sums[4 * V::width * kTaps];
  memset(sums, 0, sizeof sums);  // lanes of a last batch that nothing is computed for
  // No strips: what is added to would come back to the L1 cache as often as there are strips (measured: a quarter slower).
  for_batches<V>(p, first_row, last_row, false, [&](int64_t row, int64_t column, int count, int64_t below) DCNV4_LAMBDA_INLINE {
    const int64_t pixel = row * p.Wo + column;
    const T* gradient = grad_output + pixel * p.output_stride;
    locate_lookups<V, T, kTaps>(p, frame, lanes, offset_mask + pixel * p.offset_mask_stride, p.offset_mask_stride, below, count,
                                row, column, lookups, nullptr, &states);
    for (int64_t c = 0; c < width; c += kChunk) {
      const auto dot = width == kChunk ? dot_lookups<V, T, kVectors, kTaps, true> : dot_lookups<V, T, kVectors, kTaps, false>;
      const auto scatter =
          width == kChunk ? scatter_lookups<V, T, kVectors, kTaps, true> : scatter_lookups<V, T, kVectors, kTaps, false>;
      if (grad_offset_mask)
        dot(map + c, width, row_size, lookups, count, gradient + c, p.output_stride, p.D - c, sums, c > 0, ahead);
      if (grad_map) scatter(grad_map + c, width, row_size, lookups, count, gradient + c, p.output_stride, p.D - c);
    }
    if (grad_offset_mask)
      finish_lookups<V, T, kTaps>(frame.frame.scale, sums, states, p.softmax, count,
                                  grad_offset_mask + pixel * p.grad_offset_mask_stride, p.grad_offset_mask_stride);
  });
}

template <class V, class T>
using BackwardRows = void (*)(const dcnv4_problem&, const Plan<ScalarOf<V>>&, const T*, const T*, T*, const ScalarOf<V>*,
                              ScalarOf<V>*, Window, int32_t, int64_t, int64_t, ScalarOf<V>*, Ahead<V>);

template <class V, class T, int kVectors>
BackwardRows<V, T> backward_rows_for_taps(int64_t K, bool exact) {
  if constexpr (V::looks_up) {
    if (K == kLookupTaps && exact) return backward_rows_lookup<V, T, kVectors, kLookupTaps>;
  } else if constexpr (kUnrollTaps) {
    if (K == 9) return backward_rows<V, T, kVectors, 9>;
  }
  return backward_rows<V, T, kVectors, 0>;
}

template <class V, class T>
BackwardRows<V, T> choose_backward_rows(int64_t D, int64_t K, bool exact) {
  switch (vectors_at_once((D + V::width - 1) / V::width)) {
    case 1:
      return backward_rows_for_taps<V, T, 1>(K, exact);
    case 2:
      return backward_rows_for_taps<V, T, 2>(K, exact);
    case 3:
      return backward_rows_for_taps<V, T, 3>(K, exact);
    default:
      return backward_rows_for_taps<V, T, 4>(K, exact);
  }
}

// Sum `slabs` packed gradient maps in their order and store rows [first, last) of the group in the final type.
template <class V, class T>
void unpack(const dcnv4_problem& p, const Plan<ScalarOf<V>>& plan, const ScalarOf<V>* grad_maps, int64_t map_size,
            int64_t slabs, int64_t first, int64_t last, T* grad_value, bool past_caches) {
  for (int64_t h = first; h < last; ++h)
    for (int64_t w = 0; w < p.W; ++w) {
      const ScalarOf<V>* cell = grad_maps + ((h + 1) * plan.pitch + w + 1) * plan.packed_width;
      T* target = grad_value + (h * p.W + w) * p.grad_value_stride;
      for (int64_t c = 0; c < p.D; c += V::width) {
        V sum = V::load(cell + c);
        for (int64_t s = 1; s < slabs; ++s) sum = sum + V::load(cell + s * map_size + c);
        if constexpr (V::looks_up) {
          if (past_caches) {
            sum.stream(target + c);
            continue;
          }
        }
        if (c + V::width <= p.D) {
          sum.store(target + c);
        } else {
          sum.store_some(target + c, int(p.D - c));
        }
      }
    }
  if constexpr (V::looks_up)
    if (past_caches) V::fence();
}

template <class V, class T>
int32_t backward(const dcnv4_problem& p, const void* value_, const void* offset_mask_, const void* grad_output_,
                 void* grad_value_, void* grad_offset_mask_) {
  using S = ScalarOf<V>;
  const T *value = static_cast<const T*>(value_), *offset_mask = static_cast<const T*>(offset_mask_);
  const T* grad_output = static_cast<const T*>(grad_output_);
  T *grad_value = static_cast<T*>(grad_value_), *grad_offset_mask = static_cast<T*>(grad_offset_mask_);
  static thread_local Scratch grid_scratch, slab_scratch;
  S* grid = static_cast<S*>(grid_scratch.get(TapGrid<V>::elements(p) * sizeof(S)));
  if (!grid) return DCNV4_OUT_OF_MEMORY;
  Plan<S> plan = TapGrid<V>::plan(p, grid);
  std::optional<LaneTables<V, kLookupTaps>> lanes;
  if (V::looks_up && plan.K == kLookupTaps) plan.lanes = &lanes.emplace(plan);
  const auto rows_kernel = choose_backward_rows<V, T>(p.D, plan.K, is_exact(p, plan, p.H + 2));
  const Window whole = {-1, p.H + 1};
  const int32_t blank = int32_t((p.H + 2) * plan.pitch);
  const int64_t map_size = map_elements(plan, p.H + 2);
  const int64_t tap_size = (11 + 4) * plan.padded_taps;

  // Where there are fewer groups than threads, the output rows are split into slabs, each with gradient maps of its own that
  // are summed in order afterwards. Their memory stays within four times the value tensor's.
  const int64_t owners = p.N * p.G;
  int64_t slabs = 1;
  if (owners < 2 * int64_t(p.threads) && p.threads > 1)
    slabs = std::max<int64_t>(1, std::min<int64_t>({(2 * int64_t(p.threads) + owners - 1) / owners, p.Ho / 4, 4}));
  S* slab_maps = nullptr;
  if (slabs > 1) {
    slab_maps = static_cast<S*>(slab_scratch.get(owners * slabs * map_size * sizeof(S)));
    if (!slab_maps) slabs = 1;
  }
  const int64_t rows_a_slab = (p.Ho + slabs - 1) / slabs;
  const bool past_caches = grad_value && goes_past_caches<V, T>(plan, p.N * p.H * p.W, p.grad_value_stride, grad_value);
  const int64_t count = owners * slabs;
  const bool parallel = count > 1 && p.threads > 1 && p.N * p.Ho * p.Wo * p.G * p.D >= 1 << 12;
  std::atomic<int32_t> status{DCNV4_OK};
  // A task: the output rows [first, last) of group g of image n.
  struct Part {
    int64_t n, g, first, last;
  };
  const auto part_of = [&](int64_t task) {
    const int64_t first = std::min(p.Ho, task % slabs * rows_a_slab);
    return Part{task / (slabs * p.G), task / slabs % p.G, first, std::min(p.Ho, first + rows_a_slab)};
  };
  const auto image_of = [&](const Part& part) { return value + part.n * p.H * p.W * p.value_stride + part.g * p.D; };
  const auto offsets_of = [&](const Part& part) {
    return offset_mask + part.n * p.Ho * p.Wo * p.offset_mask_stride + part.g * 3 * plan.K;
  };
  const auto gradient_of = [&](const Part& part) {
    return grad_output + part.n * p.Ho * p.Wo * p.output_stride + part.g * p.D;
  };
  const auto target_of = [&](const Part& part) {
    return grad_offset_mask ? grad_offset_mask + part.n * p.Ho * p.Wo * p.grad_offset_mask_stride + part.g * 3 * plan.K
                            : nullptr;
  };
  const auto data_of = [&](int64_t task) -> Ahead<V> {
    if (task < 0) return Ahead<V>();
    const Part part = part_of(task);
    const int64_t skipped = part.first * p.Wo, pixels = (part.last - part.first) * p.Wo;
    Stream written;
    if (grad_offset_mask)
      written = {target_of(part) + skipped * p.grad_offset_mask_stride, p.grad_offset_mask_stride, pixels, 3 * plan.K};
    return Ahead<V>{Stream(image_of(part), p.value_stride, p.H * p.W, p.D),
                    Stream(offsets_of(part) + skipped * p.offset_mask_stride, p.offset_mask_stride, pixels, 3 * plan.K),
                    Stream(gradient_of(part) + skipped * p.output_stride, p.output_stride, pixels, p.D), written};
  };
  Tasks tasks(count, parallel ? p.threads : 1);
#pragma omp parallel num_threads(p.threads) if (parallel)
  {
    static thread_local Scratch scratch;
    bool begun = false;
    tasks.run([&](int64_t task, int64_t next) {
      S* map = static_cast<S*>(scratch.get((2 * map_size + tap_size) * sizeof(S)));
      if (!map) {
        status = DCNV4_OUT_OF_MEMORY;
        return;
      }
      if (!begun) fetch_beginning(data_of(task));
      begun = true;
      const Part part = part_of(task);
      S* grad_map = slabs > 1 ? slab_maps + task * map_size : map + map_size;
      S* tap_scratch = map + 2 * map_size;
      // Lanes past K are never written by sum4; they must not hold signalling rubbish.
      memset(tap_scratch, 0, tap_size * sizeof(S));
      pack<V, T>(p, plan, image_of(part), whole, map);
      clear_blank<V>(plan, map + int64_t(blank) * plan.packed_width);
      memset(grad_map, 0, map_size * sizeof(S));
      T* target = target_of(part);
      rows_kernel(p, plan, offsets_of(part), gradient_of(part), target, map, grad_map, whole, blank, part.first, part.last,
                  tap_scratch, data_of(next));
      const int64_t used = 3 * p.G * plan.K;
      if (target && part.g == p.G - 1 && p.P > used)
        for (int64_t pixel = part.first * p.Wo; pixel < part.last * p.Wo; ++pixel)
          memset(target + pixel * p.grad_offset_mask_stride + 3 * plan.K, 0, (p.P - used) * sizeof(T));
      if (grad_value && slabs == 1)
        unpack<V, T>(p, plan, grad_map, map_size, 1, 0, p.H,
                     grad_value + part.n * p.H * p.W * p.grad_value_stride + part.g * p.D, past_caches);
    });
    scratch.trim(kKeptScratch);
  }
  if (grad_value && slabs > 1 && status == DCNV4_OK) {
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel)
    for (int64_t task = 0; task < count; ++task) {
      const int64_t slab = task % slabs, owner = task / slabs, n = owner / p.G, g = owner % p.G;
      const int64_t rows = (p.H + slabs - 1) / slabs;
      unpack<V, T>(p, plan, slab_maps + owner * slabs * map_size, map_size, slabs, slab * rows,
                   std::min(p.H, (slab + 1) * rows), grad_value + n * p.H * p.W * p.grad_value_stride + g * p.D, past_caches);
    }
  }
  slab_scratch.trim(kKeptScratch);
  return status;
}

// -------------------------------------------------------------------------------------------------------------- by dtype

template <class F32, class F64>
int32_t forward_any(const dcnv4_problem& p, const void* value, const void* offset_mask, void* output) {
  switch (p.dtype) {
    case DCNV4_FLOAT32:
      return forward<F32, float>(p, value, offset_mask, output);
    case DCNV4_FLOAT64:
      return forward<F64, double>(p, value, offset_mask, output);
    case DCNV4_BFLOAT16:
      return forward<F32, bf16>(p, value, offset_mask, output);
    case DCNV4_FLOAT16:
      return forward<F32, f16>(p, value, offset_mask, output);
    default:
      return DCNV4_NO_KERNEL;
  }
}

template <class F32, class F64>
int32_t backward_any(const dcnv4_problem& p, const void* value, const void* offset_mask, const void* grad_output,
                     void* grad_value, void* grad_offset_mask) {
  switch (p.dtype) {
    case DCNV4_FLOAT32:
      return backward<F32, float>(p, value, offset_mask, grad_output, grad_value, grad_offset_mask);
    case DCNV4_FLOAT64:
      return backward<F64, double>(p, value, offset_mask, grad_output, grad_value, grad_offset_mask);
    case DCNV4_BFLOAT16:
      return backward<F32, bf16>(p, value, offset_mask, grad_output, grad_value, grad_offset_mask);
    case DCNV4_FLOAT16:
      return backward<F32, f16>(p, value, offset_mask, grad_output, grad_value, grad_offset_mask);
    default:
      return DCNV4_NO_KERNEL;
  }
}

}  // namespace
