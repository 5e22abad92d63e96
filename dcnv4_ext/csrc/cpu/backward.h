// Backward.

namespace {

// Sum `slabs` packed gradient maps in their order and store rows [first, last) of the group in the final type.
template <class C, class T, class V = typename C::Vector>
void unpack(const dcnv4_problem& p, const Plan<ScalarOf<V>>& plan, const ScalarOf<V>* grad_maps, int64_t map_size,
            int64_t slabs, int64_t first, int64_t last, T* grad_value, bool past_caches) {
  for (int64_t h = first; h < last; ++h)
    for (int64_t w = 0; w < p.W; ++w) {
      const ScalarOf<V>* cell = grad_maps + ((h + 1) * plan.pitch + w + 1) * plan.packed_width;
      T* target = grad_value + (h * p.W + w) * p.grad_value_stride;
      for (int64_t c = 0; c < p.D; c += C::width, cell += C::width) {
        V parts[C::registers];
        for (int r = 0; r < C::registers; ++r) {
          parts[r] = V::load(cell + r * V::width);
          for (int64_t s = 1; s < slabs; ++s) parts[r] = parts[r] + V::load(cell + s * map_size + r * V::width);
        }
        const C sum = C::of(parts);
        if constexpr (V::looks_up) {
          if (past_caches) {
            sum.stream(target + c);
            continue;
          }
        }
        if (c + C::width <= p.D) {
          sum.store(target + c);
        } else {
          sum.store_some(target + c, int(p.D - c));
        }
      }
    }
}

// How far a task has come with its packed maps. Where both are larger than a cache (`rolls`), rows of them are packed and
// cleared when taps first look there, and unpacked when the last ones are thought to have: what is being worked on then stays
// in the caches. A row that taps return to is unpacked again, from sums that are still there. Rows count as packed: row 0 is
// the zero row above the map.
template <class C, class T, class V = typename C::Vector>
class Front {
 public:
  using S = ScalarOf<V>;
  using Cell = typename C::Cell;

  // `target`: the group's channels of grad_value's image, or null where sums of several tasks are unpacked later.
  Front(const dcnv4_problem& p, const Plan<S>& plan, const T* image, Cell* map, S* grad_map, T* target, bool past_caches,
        bool rolls)
      : p_(p),
        plan_(plan),
        image_(image),
        map_(map),
        grad_map_(grad_map),
        target_(target),
        past_caches_(past_caches),
        rolls_(rolls),
        row_size_(plan.pitch * plan.packed_width) {
    const int64_t size = map_elements(plan, p.H + 2), rows = (p.H + 2) * row_size_;
    clear_blank(plan, map + rows);
    memset(grad_map + rows, 0, (size - rows) * sizeof(S));
    if (!rolls) cover(0, p.H + 2);
  }

  // Taps are about to look at rows [first, last).
  void cover(int64_t first, int64_t last) {
    if (last > packed_) {
      pack<C>(p_, plan_, image_, Window{packed_ - 1, last - 1}, map_ + packed_ * row_size_);
      clear_to(last);
    }
    if (first - 1 < unpacked_) {
      if constexpr (V::looks_up)
        if (past_caches_) V::fence();  // what comes again stays behind what is on its way
      halo_ += unpacked_ - std::max<int64_t>(0, first - 1);
      unpacked_ = std::max<int64_t>(0, first - 1);
    }
  }

  // The taps to come are those of the output rows [first, last) and further on.
  void expect(int64_t first, int64_t last) {
    if (rolls_ && target_ && first < last) unpack_to(std::min(packed_ - 1, expected(first, last).first));
  }
  // Value rows that taps of those output rows are thought to reach.
  Window expected(int64_t first, int64_t last) const { return window_of(p_, plan_, first, last, halo_); }

  // No taps are to come: rows that none has looked at have a gradient of zero.
  void finish() {
    clear_to(p_.H + 2);
    if (target_) unpack_to(p_.H);
  }

  bool rolls() const { return rolls_; }
  const T* image() const { return image_; }

 private:
  void clear_to(int64_t row) {
    memset(grad_map_ + packed_ * row_size_, 0, (row - packed_) * row_size_ * sizeof(S));
    packed_ = row;
  }

  // Value rows below `row`.
  void unpack_to(int64_t row) {
    if (row <= unpacked_) return;
    unpack<C, T>(p_, plan_, grad_map_, 0, 1, unpacked_, row, target_, past_caches_);
    unpacked_ = row;
  }

  const dcnv4_problem& p_;
  const Plan<S>& plan_;
  const T* const image_;
  Cell* const map_;
  S* const grad_map_;
  T* const target_;
  const bool past_caches_, rolls_;
  const int64_t row_size_;
  int64_t packed_ = 0, unpacked_ = 0;  // rows of the maps; of the value
  int64_t halo_ = 6;                   // rows of offset that taps are thought to reach
};

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
                   int64_t first_row, int64_t last_row, ScalarOf<V>* tap_scratch, Front<Widened<V>, T>&, int64_t padding,
                   Ahead<V> ahead, const Operands<T>*) {
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
      if (!grad_offset_mask) continue;
      T* const target = grad_offset_mask + pixel * p.grad_offset_mask_stride;
      finish_taps<V, T>(plan, K, sums, state, softened, weight_gradients, target);
      if (padding > 0) memset(target + 3 * K, 0, padding * sizeof(T));
    }
  }
}

// For `count` pixels: grad_output times the weights of the corners of their taps, added to the cells of `grad_map`; with kDots
// also its dot products with the values of the corners, four a tap, to `sums`, or added to what these hold. Over kVectors
// vectors of channels, of which `channels` are there; cells are `width` elements apart. Both in one loop: adding waits for
// stores, dot products for arithmetic.
template <class C, class T, int kVectors, int kTaps, bool kDots, bool kSingle, class V = typename C::Vector>
DCNV4_NOINLINE void visit_lookups(const typename C::Cell* map, ScalarOf<V>* grad_map, int64_t width, int64_t row_size,
                                  const Lookups<V, kTaps>& from, int count, const T* gradient, int64_t step, int64_t channels,
                                  ScalarOf<V>* sums, bool add, AheadOfVisits<V>& ahead) {
  using S = ScalarOf<V>;
  using Cell = typename C::Cell;
  constexpr int kParts = kVectors * C::registers, kLine = 64 / int(sizeof(T));
  if (kSingle) width = kVectors * C::width;
  for (int i = 0; i < count; ++i, gradient += step, sums += 4 * kTaps) {
    if (kSingle || !add) ahead.fetch();
    for (int c = 0; c < kVectors * C::width; c += kLine) V::prefetch(gradient + 8 * step + c);
    typename C::Operand operand[kVectors];
    V grad[kParts];
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = channels - v * C::width;
      const T* const source = gradient + v * C::width;
      if (kDots) operand[v] = DCNV4_LIKELY(left >= C::width) ? C::operand(source) : C::operand_some(source, int(left));
      const C c = DCNV4_LIKELY(left >= C::width) ? C::load(source) : C::load_some(source, int(left));
      for (int r = 0; r < C::registers; ++r) grad[v * C::registers + r] = c.part(r);
    }
    const int at = i * kTaps;
    uint64_t two = 0;
    DCNV4_UNROLL
    for (int k = 0; k < kTaps; ++k, two >>= 32) {
      if (k % 2 == 0) memcpy(&two, from.element + at + k, sizeof two);
      const Cell* const top = map + uint32_t(two);
      S* const grad_top = grad_map + uint32_t(two);
      V dot[4];
      if (kDots) {
        const Cell* const corner[4] = {top, top + width, top + row_size, top + row_size + width};
        for (int q = 0; q < 4; ++q) {
          dot[q] = C::dot(operand[0], C::operand(corner[q]));
          for (int v = 1; v < kVectors; ++v) dot[q] = C::dot(operand[v], C::operand(corner[q] + v * C::width), dot[q]);
        }
      }
      const auto add_to = [&](S* cell, S weight) DCNV4_LAMBDA_INLINE {
        const V w = V::set1(weight);
        for (int v = 0; v < kParts; ++v) V::fma(w, grad[v], V::load(cell + v * V::width)).store(cell + v * V::width);
      };
      add_to(grad_top, from.w00[at + k]);
      add_to(grad_top + width, from.w01[at + k]);
      add_to(grad_top + row_size, from.w10[at + k]);
      add_to(grad_top + row_size + width, from.w11[at + k]);
      if (kDots) V::sum4(dot[0], dot[1], dot[2], dot[3], sums + 4 * k, !kSingle && add);
    }
  }
}

// Gradients of the offsets and weights of `count` pixels from the dot products, to rows `step` apart, and zeros to the
// `padding` columns behind them. `fetch`: those rows may be far away; those of the next pixels are asked for.
template <class V, class T, int kTaps>
DCNV4_NOINLINE void finish_lookups(const LaneTables<V, kTaps>& lanes, V scale, const ScalarOf<V>* sums,
                                   const LookupStates<V>& states, bool softmax, int count, T* target, int64_t step,
                                   int64_t padding, bool fetch) {
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
  if (softmax) {
    alignas(64) S means[V::width] = {0};
    for (int i = 0; i < count; ++i)
      for (int k = i * kTaps; k < (i + 1) * kTaps; ++k) means[i] += states.weight[k] * softmax_gradients[k];
    const V mean = V::load(means);
    for (int i = 0; i < vectors * V::width; i += V::width)
      (V::load(states.weight + i) * (V::load(softmax_gradients + i) - V::permute(mean, lanes.pixel + i))).store(weights + i);
  }
  for (int i = 0; i < count; ++i, target += step) {
    if (fetch) {
      V::prefetch(target + V::width * step);
      V::prefetch(target + V::width * step + 3 * kTaps - 1);
    }
    const int at = i * kTaps;
    memcpy(target, pairs + 2 * at, 2 * kTaps * sizeof(T));
    memcpy(target + 2 * kTaps, weights + at, kTaps * sizeof(T));
    for (int64_t i = 0; i < padding; i += V::width)
      V::zero().store_some(target + 3 * kTaps + i, int(std::min<int64_t>(V::width, padding - i)));
  }
}

// Pixels of the output that go together: rows [top, bottom), columns [left, right). Where it is not as wide as the output it is
// some vectors wide.
struct Block {
  int64_t top, bottom, left, right;
  int64_t columns() const { return right - left; }
  int64_t pixels() const { return (bottom - top) * columns(); }
};

// Calls `work(row, column, count, below)` as for_batches does, row after row.
template <class V, class Work>
DCNV4_INLINE void for_batches_of(const dcnv4_problem& p, const Block& block, Work work) {
  if (block.columns() == p.Wo) {
    for_batches<V>(p, block.top, block.bottom, false, work);
    return;
  }
  for (int64_t row = block.top; row < block.bottom; ++row)
    for (int64_t column = block.left; column < block.right; column += V::width) work(row, column, V::width, V::width);
}

// How large blocks may be. Taps are sorted in large ones, where cells have many of them: the nearer to a square, the fewer
// cells they look at. With AVX-512 and pixel by pixel, a block is what is fetched ahead, and what rows of the maps are packed
// for: few whole rows, so that both are still in the caches when they are needed. With AVX2 it is the latter alone.
template <class V>
struct BlockSize {
  int64_t pixels, columns;
  explicit BlockSize(bool by_cells)
      : pixels(V::sorts && !by_cells ? 256 : 2048),
        columns(V::sorts && !by_cells ? std::numeric_limits<int64_t>::max() : 100) {}
};

// How wide blocks are. Narrower than the output where some vectors of columns divide it.
template <class V>
int64_t columns_of_block(const dcnv4_problem& p, bool by_cells) {
  const int64_t most = BlockSize<V>(by_cells).columns;
  for (int64_t strips = 1; p.Wo / strips >= V::width; ++strips)
    if (p.Wo / strips <= most && (strips == 1 || p.Wo % (strips * V::width) == 0)) return p.Wo / strips;
  return p.Wo;
}

// And how high, all alike if they can be; 0 where a single row is too much.
template <class V>
int64_t rows_of_block(const dcnv4_problem& p, bool by_cells) {
  const int64_t columns = columns_of_block<V>(p, by_cells);
  if ((by_cells || !V::sorts) && columns > SortedTaps<V, kLookupTaps>::kMostPixels) return 0;
  const int64_t most = std::max<int64_t>(1, BlockSize<V>(by_cells).pixels / columns), blocks = (p.Ho + most - 1) / most;
  return (p.Ho + blocks - 1) / blocks;
}

// Bytes of scratch that backward_block_sorted needs.
template <class C>
int64_t sorted_bytes(const dcnv4_problem& p, const Plan<ScalarOf<typename C::Vector>>& plan) {
  using V = typename C::Vector;
  SortedTaps<V, kLookupTaps> taps;
  const int64_t pixels = rows_of_block<V>(p, true) * columns_of_block<V>(p, true);
  return taps.lay_out(nullptr, pixels, (p.H + 2) * plan.pitch, false) +
         (pixels * plan.packed_width + 32) * int64_t(sizeof(typename C::Cell));
}

// The cells that a block's taps look at if they stay within some columns.
template <class V>
CellGrid grid_of(const dcnv4_problem& p, int64_t pitch, const Block& block, bool narrow) {
  if (!narrow || block.columns() == p.Wo) return {0, pitch};
  constexpr int64_t kHalo = 12;
  const int64_t reach = int64_t(std::ceil(std::min(std::abs(p.offset_scale) * double(p.dilation_w * p.kernel_w), 1e6))) + kHalo;
  const int64_t left = std::max<int64_t>(0, std::min(pitch, base_x(p, block.left) - reach + 1));
  const int64_t right = std::max(left + 2, std::min(pitch, base_x(p, block.right - 1) + reach + 3));
  return {left, right - left};
}

enum class Sorting { done, does_not_pay, leaves };

// A block whose taps are sorted by cells. Where that does not pay, or taps leave the columns of `grid`, nothing has been done
// but that the maps may be covered.
template <class C, class T, int kVectors, int kTaps, class V = typename C::Vector>
Sorting backward_block_sorted(const dcnv4_problem& p, const Plan<ScalarOf<V>>& plan, const T* offset_mask, const T* grad_output,
                              T* grad_offset_mask, const typename C::Cell* map, ScalarOf<V>* grad_map, Window window,
                              int32_t blank, const Block& block, const CellGrid& grid, char* scratch, Front<C, T>& front,
                              int64_t padding, BlocksAhead<V>& ahead) {
  using Cell = typename C::Cell;
  const LaneTables<V, kTaps>& lanes = *static_cast<const LaneTables<V, kTaps>*>(plan.lanes);
  const int64_t width = plan.packed_width, row_size = plan.pitch * width, pixels = block.pixels();
  const LookupFrame<V> frame(p, plan, window, blank, 1, grid.pitch, grid.left);
  SortedTaps<V, kTaps> taps;
  taps.cells = taps.columns = Reach<V>(ScalarOf<V>(blank));
  constexpr int64_t kMost = 2 / C::registers;  // vectors of channels a visit: values and sums of four cells in registers
  taps.lay_out(scratch, pixels, blank, width <= kMost * C::width);
  int64_t done = 0;
  for_batches_of<V>(p, block, [&](int64_t row, int64_t column, int count, int64_t below) DCNV4_LAMBDA_INLINE {
    const int64_t pixel = row * p.Wo + column;
    const Batch<T> batch = {offset_mask + pixel * p.offset_mask_stride, p.offset_mask_stride, below, row, column, count};
    locate_sorted<V, T, kTaps>(p, frame, lanes, batch, taps, done * kTaps);
    done += count;
  });
  const int64_t first_cell = taps.cells.first(), last_cell = taps.cells.last();
  if (first_cell <= last_cell) {
    if (taps.columns.first() + 1 < grid.left || taps.columns.last() + 1 >= grid.left + grid.pitch - 1) return Sorting::leaves;
    front.cover(first_cell / grid.pitch, last_cell / grid.pitch + 2);
  }
  // Many more cells than pixels: looking for those with taps would take longer than visiting them.
  if (last_cell - first_cell > 256 + 4 * pixels) return Sorting::does_not_pay;
  sort_taps(taps, pixels, first_cell, last_cell, blank);
  Cell* const gradients = reinterpret_cast<Cell*>(taps.counter);
  const int64_t runs = block.columns() == p.Wo ? 1 : block.bottom - block.top, run = pixels / runs;
  for (int64_t i = 0; i < runs; ++i)
    pack_pixels<C, T, kVectors>(plan, grad_output + ((block.top + i) * p.Wo + block.left) * p.output_stride, p.output_stride,
                                run, gradients + i * run * width);
  for (int64_t c = 0; c < width;) {
    const bool most = width - c >= kMost * C::width;
    const bool single = width == kMost * C::width;
    const auto visit = !grad_offset_mask
                           ? (most ? visit_cells<C, kMost, kTaps, false, false> : visit_cells<C, 1, kTaps, false, false>)
                       : single ? visit_cells<C, kMost, kTaps, true, true>
                       : most   ? visit_cells<C, kMost, kTaps, true, false>
                                : visit_cells<C, 1, kTaps, true, false>;
    visit(map + c, grad_map + c, width, row_size, grid, taps, first_cell, last_cell, gradients + c, c > 0, ahead);
    c += (most ? kMost : 1) * C::width;
  }
  if (!grad_offset_mask) return Sorting::done;
  done = 0;
  for_batches_of<V>(p, block, [&](int64_t row, int64_t column, int count, int64_t) DCNV4_LAMBDA_INLINE {
    const int64_t at = done * kTaps;
    const LookupStates<V> states = {taps.lx + at, taps.ly + at, taps.weight + at, taps.used + at / V::width};
    finish_lookups<V, T, kTaps>(lanes, frame.frame.scale, taps.sums + 4 * at, states, p.softmax, count,
                                grad_offset_mask + (row * p.Wo + column) * p.grad_offset_mask_stride, p.grad_offset_mask_stride,
                                padding, false);
    done += count;
  });
  return Sorting::done;
}

// What is to be fetched while the taps of `block` are visited: what is written for it, and what is read for the one behind it,
// be it the first one of the next task. `next` is null if that is not known.
template <class C, class T, class V = typename C::Vector>
BlocksAhead<V> ahead_of(const dcnv4_problem& p, int64_t taps, const Block& block, const Operands<T>& own,
                        const Operands<T>* next, const T* grad_offset_mask, const Front<C, T>& front) {
  const bool whole_rows = block.columns() == p.Wo;  // all pixels in one row, then
  BlocksAhead<V> ahead(whole_rows ? 1 : block.bottom - block.top, whole_rows ? block.pixels() : block.columns());
  const auto add_nothing = [&]() { ahead.add(own.gradient, 0, 0, 1); };
  const auto add = [&](const T* all, int64_t first, int64_t stride, int64_t elements) {
    ahead.add(all + first * stride, stride, p.Wo * stride, elements);
  };
  if (grad_offset_mask) {
    add(grad_offset_mask, block.top * p.Wo + block.left, p.grad_offset_mask_stride, 3 * taps);
  } else {
    add_nothing();
  }
  const bool ends_rows = block.right >= p.Wo, last_rows = block.bottom >= own.last_row;
  const Operands<T>* const pixels_of = ends_rows && last_rows ? next : &own;
  if (!pixels_of) return ahead;
  const int64_t below = last_rows ? pixels_of->first_row : block.bottom;
  const int64_t first = ends_rows ? below * p.Wo : block.top * p.Wo + block.right;
  add(pixels_of->offsets, first, p.offset_mask_stride, 3 * taps);
  add(pixels_of->gradient, first, p.output_stride, p.D);
  // Values are packed by whole rows, those of some blocks or of the whole map: blocks beside each other share them.
  const Operands<T>* const values_of = !front.rolls() || last_rows ? next : &own;
  if (!values_of) {
    add_nothing();
    return ahead;
  }
  int64_t row = 0;
  if (!front.rolls()) {
    row = (block.top - own.first_row) * p.H / (own.last_row - own.first_row);
  } else if (!last_rows) {
    row = std::min(p.H - 1, front.expected(block.top, block.bottom).last);
  }
  const int64_t value = row * p.W + block.left * (block.bottom - block.top), stride = p.value_stride;
  ahead.add(values_of->image + value * stride, stride, (whole_rows ? p.Wo : block.columns()) * stride, p.D);
  return ahead;
}

// The same as backward_rows where positions and elements of the map are whole numbers that the compute type holds: by cells, or
// in three passes over some pixels, which each keep what they need in registers: locating taps, visiting corners, finishing.
template <class C, class T, int kVectors, int kTaps, class V = typename C::Vector>
void backward_rows_lookup(const dcnv4_problem& p, const Plan<ScalarOf<V>>& plan, const T* offset_mask, const T* grad_output,
                          T* grad_offset_mask, const typename C::Cell* map, ScalarOf<V>* grad_map, Window window, int32_t blank,
                          int64_t first_row, int64_t last_row, ScalarOf<V>* scratch, Front<C, T>& front, int64_t padding,
                          Ahead<V> ahead, const Operands<T>* next) {
  using S = ScalarOf<V>;
  constexpr int64_t kChunk = kVectors * C::width;
  const LaneTables<V, kTaps>& lanes = *static_cast<const LaneTables<V, kTaps>*>(plan.lanes);
  const int64_t width = plan.packed_width, row_size = plan.pitch * width;
  const LookupFrame<V> frame(p, plan, window, blank, width, plan.pitch, 0);
  Lookups<V, kTaps> lookups;
  OwnStates<V, kTaps> states;
  alignas(64) S sums[4 * V::width * kTaps];
  memset(sums, 0, sizeof sums);  // lanes of a last batch that nothing is computed for
  const auto batch_by_batch = [&](const Block& block, AheadOfVisits<V>& ahead) {
    // No strips: what is added to would come back to the L1 cache as often as there are strips (measured: a quarter slower).
    for_batches_of<V>(p, block, [&](int64_t row, int64_t column, int count, int64_t below) DCNV4_LAMBDA_INLINE {
      const int64_t pixel = row * p.Wo + column;
      const T* gradient = grad_output + pixel * p.output_stride;
      const Batch<T> batch = {offset_mask + pixel * p.offset_mask_stride, p.offset_mask_stride, below, row, column, count};
      Reach<V> reach(S(frame.blank));
      locate_lookups<V, T, kTaps>(p, frame, lanes, batch, lookups, nullptr, &states, front.rolls() ? &reach : nullptr);
      if (front.rolls() && reach.first() <= reach.last()) front.cover(reach.first() / row_size, reach.last() / row_size + 2);
      for (int64_t c = 0; c < width; c += kChunk) {
        const bool single = width == kChunk;
        const auto visit = grad_offset_mask ? (single ? visit_lookups<C, T, kVectors, kTaps, true, true>
                                                      : visit_lookups<C, T, kVectors, kTaps, true, false>)
                                            : (single ? visit_lookups<C, T, kVectors, kTaps, false, true>
                                                      : visit_lookups<C, T, kVectors, kTaps, false, false>);
        visit(map + c, grad_map + c, width, row_size, lookups, count, gradient + c, p.output_stride, p.D - c, sums, c > 0,
              ahead);
      }
      if (grad_offset_mask)
        finish_lookups<V, T, kTaps>(lanes, frame.frame.scale, sums, states.view(), p.softmax, count,
                                    grad_offset_mask + pixel * p.grad_offset_mask_stride, p.grad_offset_mask_stride, padding,
                                    front.rolls());
    });
  };
  const int64_t rows = rows_of_block<V>(p, plan.by_cells), columns = columns_of_block<V>(p, plan.by_cells);
  if (rows == 0 || !(V::sorts || front.rolls())) {
    AheadOfVisits<V> whole{};
    if constexpr (!V::sorts) whole = ahead;
    batch_by_batch({first_row, last_row, 0, p.Wo}, whole);
    return;
  }
  bool narrow = true;  // until taps leave the columns around a block
  for (int64_t top = first_row; top < last_row; top += rows) {
    const int64_t bottom = std::min(last_row, top + rows);
    for (int64_t left = 0; left < p.Wo; left += columns) {
      const Block block{top, bottom, left, left + columns};
      if constexpr (V::sorts) {
        const Operands<T> own = {front.image(), offset_mask, grad_output, first_row, last_row};
        BlocksAhead<V> ahead = ahead_of<C, T>(p, kTaps, block, own, next, grad_offset_mask, front);
        const auto sorted = [&]() {
          if (!plan.by_cells) return Sorting::does_not_pay;
          return backward_block_sorted<C, T, kVectors, kTaps>(
              p, plan, offset_mask, grad_output, grad_offset_mask, map, grad_map, window, blank, block,
              grid_of<V>(p, plan.pitch, block, narrow), reinterpret_cast<char*>(scratch), front, padding, ahead);
        };
        Sorting found = sorted();
        if (found == Sorting::leaves) {
          narrow = false;
          found = sorted();
        }
        if (found != Sorting::done) batch_by_batch(block, ahead);
      } else {
        batch_by_batch(block, ahead);
      }
    }
    front.expect(bottom, std::min(last_row, bottom + rows));
  }
}

template <class C, class T, class V = typename C::Vector>
using BackwardRows = void (*)(const dcnv4_problem&, const Plan<ScalarOf<V>>&, const T*, const T*, T*, const typename C::Cell*,
                              ScalarOf<V>*, Window, int32_t, int64_t, int64_t, ScalarOf<V>*, Front<C, T>&, int64_t, Ahead<V>,
                              const Operands<T>*);

template <class C, class T, int kVectors>
BackwardRows<C, T> backward_rows_for_taps(int64_t K, bool exact) {
  using V = typename C::Vector;
  if constexpr (V::looks_up) {
    if (K == kLookupTaps && exact) return backward_rows_lookup<C, T, kVectors, kLookupTaps>;
  } else if constexpr (kUnrollTaps) {
    if (K == 9) return backward_rows<V, T, kVectors, 9>;
  }
  if constexpr (std::is_same_v<C, Widened<V>>) return backward_rows<V, T, kVectors, 0>;
  return nullptr;
}

template <class C, class T>
BackwardRows<C, T> choose_backward_rows(int at_once, int64_t K, bool exact) {
  switch (at_once) {
    case 1:
      return backward_rows_for_taps<C, T, 1>(K, exact);
    case 2:
      return backward_rows_for_taps<C, T, 2>(K, exact);
    case 3:
      return backward_rows_for_taps<C, T, 3>(K, exact);
    default:
      return backward_rows_for_taps<C, T, std::min(4, C::at_once)>(K, exact);
  }
}

// With packed maps of channels as C holds them, or in the compute type where C has no kernel for the problem. `by_cells`: where
// V sorts.
template <class V, class T, class C = Widened<V>>
int32_t backward(const dcnv4_problem& p, const void* value_, const void* offset_mask_, const void* grad_output_,
                 void* grad_value_, void* grad_offset_mask_, bool by_cells = false) {
  using S = ScalarOf<V>;
  using Cell = typename C::Cell;
  const T *value = static_cast<const T*>(value_), *offset_mask = static_cast<const T*>(offset_mask_);
  const T* grad_output = static_cast<const T*>(grad_output_);
  T *grad_value = static_cast<T*>(grad_value_), *grad_offset_mask = static_cast<T*>(grad_offset_mask_);
  static thread_local Scratch grid_scratch, slab_scratch;
  S* grid = static_cast<S*>(grid_scratch.get(TapGrid<V>::elements(p) * sizeof(S)));
  if (!grid) return DCNV4_OUT_OF_MEMORY;
  Plan<S> plan = TapGrid<V>::template plan<C>(p, grid);
  plan.by_cells = by_cells;
  std::optional<LaneTables<V, kLookupTaps>> lanes;
  if (V::looks_up && plan.K == kLookupTaps) plan.lanes = &lanes.emplace(plan);
  const auto rows_kernel = choose_backward_rows<C, T>(plan.at_once, plan.K, is_exact(p, plan, p.H + 2));
  if constexpr (!std::is_same_v<C, Widened<V>>)
    if (!rows_kernel) return backward<V, T>(p, value_, offset_mask_, grad_output_, grad_value_, grad_offset_mask_, by_cells);
  const Window whole = {-1, p.H + 1};
  const int32_t blank = int32_t((p.H + 2) * plan.pitch);
  const int64_t map_size = map_elements(plan, p.H + 2);
  const int64_t tap_size = (11 + 4) * plan.padded_taps;
  int64_t tap_bytes = tap_size * int64_t(sizeof(S));
  bool rolls = false, by_blocks = false;
  if constexpr (V::looks_up) {
    constexpr int64_t kStays = int64_t(V::sorts ? 2 : 4) << 20;  // bytes of maps
    by_blocks = plan.lanes && is_exact(p, plan, p.H + 2) && rows_of_block<V>(p, by_cells) > 0;
    rolls = by_blocks && map_size * int64_t(sizeof(Cell) + sizeof(S)) > kStays;
    by_blocks = by_blocks && (rolls || V::sorts);
    if constexpr (V::sorts)
      if (plan.lanes && by_cells) tap_bytes = std::max(tap_bytes, sorted_bytes<C>(p, plan));
  }

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
  const auto operands_of = [&](int64_t task) {
    const Part part = part_of(task);
    return Operands<T>{image_of(part), offsets_of(part), gradient_of(part), part.first, part.last};
  };
  Tasks tasks(count);
#pragma omp parallel num_threads(p.threads) if (parallel)
  {
    static thread_local Scratch scratch;
    bool begun = false;
    tasks.run(this_thread(), [&](int64_t task, int64_t next) {
      char* const memory = static_cast<char*>(scratch.get(map_size * (sizeof(Cell) + sizeof(S)) + tap_bytes));
      if (!memory) {
        status = DCNV4_OUT_OF_MEMORY;
        return;
      }
      if (!begun) fetch_beginning(data_of(task));
      begun = true;
      const Part part = part_of(task);
      Cell* const map = reinterpret_cast<Cell*>(memory);
      S* const own_grad_map = reinterpret_cast<S*>(memory + map_size * sizeof(Cell));
      S* const grad_map = slabs > 1 ? slab_maps + task * map_size : own_grad_map;
      S* const tap_scratch = own_grad_map + map_size;
      // Lanes past K are never written by sum4; they must not hold signalling rubbish.
      memset(tap_scratch, 0, tap_size * sizeof(S));
      T* const values =
          grad_value && slabs == 1 ? grad_value + part.n * p.H * p.W * p.grad_value_stride + part.g * p.D : nullptr;
      Front<C, T> front(p, plan, image_of(part), map, grad_map, values, past_caches, rolls);
      T* target = target_of(part);
      const int64_t padding = part.g == p.G - 1 ? p.P - 3 * p.G * plan.K : 0;
      const Operands<T> upcoming = operands_of(std::max<int64_t>(0, next));
      // Blocks fetch for the next one. Without them the next task's data of a large map would be gone again when its turn
      // comes.
      rows_kernel(p, plan, offsets_of(part), gradient_of(part), target, map, grad_map, whole, blank, part.first, part.last,
                  tap_scratch, front, padding, by_blocks ? Ahead<V>() : data_of(next), next < 0 ? nullptr : &upcoming);
      front.finish();
    });
    if constexpr (V::looks_up)
      if (past_caches) V::fence();
    scratch.trim(kKeptScratch);
  }
  if (grad_value && slabs > 1 && status == DCNV4_OK) {
#pragma omp parallel for schedule(static) num_threads(p.threads) if (parallel)
    for (int64_t task = 0; task < count; ++task) {
      const int64_t slab = task % slabs, owner = task / slabs, n = owner / p.G, g = owner % p.G;
      const int64_t rows = (p.H + slabs - 1) / slabs;
      unpack<C, T>(p, plan, slab_maps + owner * slabs * map_size, map_size, slabs, slab * rows,
                   std::min(p.H, (slab + 1) * rows), grad_value + n * p.H * p.W * p.grad_value_stride + g * p.D, past_caches);
      if constexpr (V::looks_up)
        if (past_caches) V::fence();
    }
  }
  slab_scratch.trim(kKeptScratch);
  return status;
}

}  // namespace
