// Backward by cells, for 3x3 kernels: the taps of many pixels are sorted by the cell they look at. The values of a cell and its
// three neighbours, and the sums of their gradients, then stay in registers for all taps that look there. A pass over pixels
// reads, and writes, all eight vectors again for every tap; which of the two is faster depends on the processor (api.cpp).

namespace {

// A tap of a block in one number: its pixel, and below that half of the place where its four numbers begin. What is read for
// every tap should be little and soon taken apart.
struct SortedTap {
  static constexpr int kPlaceBits = 18;
  static constexpr uint32_t kNext = 2, kNextPixel = 1u << kPlaceBits;
  uint32_t bits;
  DCNV4_INLINE int64_t pixel() const { return bits >> kPlaceBits; }
  DCNV4_INLINE int64_t place() const { return 2 * int64_t(bits & (kNextPixel - 1)); }
};

// The taps of a block of pixels, tap by tap and pixel by pixel.
template <class V, int kTaps>
struct SortedTaps {
  using S = ScalarOf<V>;
  static constexpr int64_t kMostPixels = 8192;  // of a block
  static_assert(SortedTap::kNext * kTaps * kMostPixels <= SortedTap::kNextPixel &&
                    kMostPixels <= (int64_t(1) << (32 - SortedTap::kPlaceBits)),
                "an entry holds them");

  S* corners;  // four a tap: weights of the corners
  S* sums;     // four a tap: dot products with the values of the corners; in place of the weights where one visit makes them
  S *lx, *ly, *weight;
  typename V::Mask* used;  // a vector of taps each
  // Twice the cell, one more for every second tap. A counter that is counted up again at once has to be waited for: two a cell
  // are so half as often. Taps that do not count have V::width counters together, behind all others. Once taps are sorted, the
  // block's gradients take their place: what a block needs should stay in the L2 cache.
  uint32_t* counter;
  SortedTap* order;  // in the order of the counters, and of the taps of a counter
  uint32_t* end;     // where in `order` the taps of a counter end
  Reach<V> cells;    // that the taps look at
  Reach<V> columns;  // of the value

  // Places for `pixels` and for maps of `cells` cells before the blank one, in `memory`; returns the bytes. A last batch may
  // write as if it were whole.
  int64_t lay_out(char* memory, int64_t pixels, int64_t cells, bool one_visit) {
    char* at = memory;
    const int64_t taps = (pixels + V::width) * kTaps;
    const auto take = [&](auto*& array, int64_t count) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(at);
      at += (count * int64_t(sizeof *array) + 63) / 64 * 64;
    };
    take(corners, 4 * taps);
    sums = corners;
    if (!one_visit) take(sums, 4 * taps);
    take(lx, taps);
    take(ly, taps);
    take(weight, taps + V::width);
    take(used, taps / V::width);
    take(order, taps);
    take(end, 2 * cells + V::width);
    take(counter, taps);
    return at - memory;
  }
};

// The taps of a batch whose first is number `at`.
template <class V, class T, int kTaps>
DCNV4_NOINLINE void locate_sorted(const dcnv4_problem& p, const LookupFrame<V>& on, const LaneTables<V, kTaps>& lanes,
                                  const Batch<T>& batch, SortedTaps<V, kTaps>& to, int64_t at) {
  using S = ScalarOf<V>;
  S *const corners = to.corners + 4 * at, *const weights = to.weight + at, *const to_lx = to.lx + at, *const to_ly = to.ly + at;
  uint32_t* const counters = to.counter + at;
  typename V::Mask* const masks = to.used + at / V::width;
  const V one = on.frame.one;
  const V unused = V::set1(S(2 * on.blank)) + V::load(lanes.count), every_second = V::load(lanes.every_second),
          two = V::set1(S(2));
  Reach<V> cells = to.cells, columns = to.columns;
  locate_batch<V, kTaps>(p, on, lanes, batch, weights, nullptr,
                         [&](int v, typename V::Mask used, V place, V x0, V lx, V ly) DCNV4_LAMBDA_INLINE {
                           const int i = v * V::width;
                           V::store_whole(counters + i, used, V::fma(place, two, every_second), unused);
                           cells.add(used, place);
                           columns.add(used, x0);
                           lx.store(to_lx + i);
                           ly.store(to_ly + i);
                           masks[v] = used;
                           const Corners<V> w = corner_weights(lx, ly, V::select(used, V::load(weights + i)), one);
                           V::store_quads(corners + 4 * i, w.w00, w.w01, w.w10, w.w11);
                         });
  to.cells = cells;
  to.columns = columns;
}

// Sorts `pixels` pixels' taps that look at the cells [first, last], by counting. `blank` is behind all cells of the map.
template <class V, int kTaps>
DCNV4_NOINLINE void sort_taps(const SortedTaps<V, kTaps>& taps, int64_t pixels, int64_t first, int64_t last, int64_t blank) {
  const uint32_t* counter = taps.counter;
  uint32_t* const end = taps.end;
  if (first <= last) memset(end + 2 * first, 0, 2 * (last - first + 1) * sizeof *end);
  memset(end + 2 * blank, 0, V::width * sizeof *end);
  for (int64_t i = 0; i < pixels; ++i) {
    DCNV4_UNROLL
    for (int k = 0; k < kTaps; ++k) ++end[counter[i * kTaps + k]];
  }
  uint32_t before = 0;
  const auto begin_of = [&](int64_t from, int64_t to) {  // two by two: of a cell
    for (int64_t c = from; c < to; c += 2) {
      const uint32_t first = end[c], both = first + end[c + 1];
      end[c] = before;
      end[c + 1] = before + first;
      before += both;
    }
  };
  begin_of(2 * first, 2 * last + 2);
  begin_of(2 * blank, 2 * blank + V::width);
  SortedTap* const order = taps.order;
  SortedTap tap{0};
  for (int64_t i = 0; i < pixels; ++i, counter += kTaps, tap.bits += SortedTap::kNextPixel) {
    DCNV4_UNROLL
    for (int k = 0; k < kTaps; ++k, tap.bits += SortedTap::kNext) order[end[counter[k]]++] = tap;
  }
}

// Cells that taps are sorted by: rows of `pitch`, from the packed map's column `left` on. In the last column of them no tap has
// its upper left corner.
struct CellGrid {
  int64_t left, pitch;
};

// For kVectors vectors of channels: dot products of the gradients with the corners of every tap, four a tap, to `taps.sums`, or
// added to them; and the gradients times the corners' weights, added to the cells of `grad_map`, for the taps that look at the
// cells [first, last]. Cells of both maps, and `gradients` of pixels, are `width` elements apart; kSingle: those are all
// channels.
template <class C, int kVectors, int kTaps, bool kDots, bool kSingle, class V = typename C::Vector>
DCNV4_NOINLINE void visit_cells(const typename C::Cell* map, ScalarOf<V>* grad_map, int64_t width, int64_t row_size,
                                const CellGrid& grid, const SortedTaps<V, kTaps>& taps, int64_t first, int64_t last,
                                const typename C::Cell* gradients, bool add, BlocksAhead<V>& ahead) {
  using S = ScalarOf<V>;
  using Cell = typename C::Cell;
  constexpr int kParts = kVectors * C::registers;
  if (kSingle) width = kVectors * C::width;
  const S* const corners = taps.corners;
  S* const sums = taps.sums;
  // What the cell before added to its right and lower right neighbour: this cell's own and lower one.
  V right[kParts], lower_right[kParts];
  const auto clear = [&]() DCNV4_LAMBDA_INLINE {
    for (int v = 0; v < kParts; ++v) right[v] = lower_right[v] = V::zero();
  };
  const auto add_to = [](S* cell, const V* what) DCNV4_LAMBDA_INLINE {
    for (int v = 0; v < kParts; ++v) (V::load(cell + v * V::width) + what[v]).store(cell + v * V::width);
  };
  clear();
  bool pending = false;  // never at the end of a row
  const SortedTap* tap = taps.order;
  for (int64_t row = first / grid.pitch, c = first; c <= last; ++row) {
    const int64_t column = c - row * grid.pitch, end_of_row = std::min(last + 1, c - column + grid.pitch);
    const int64_t place = row * row_size + (grid.left + column) * width;
    const Cell* source = map + place;
    S* target = grad_map + place;
    for (; c < end_of_row; ++c, source += width, target += width) {
      const SortedTap* const end = taps.order + taps.end[2 * c + 1];
      if (tap == end) {
        if (pending) {
          add_to(target, right);
          add_to(target + row_size, lower_right);
          clear();
          pending = false;
        }
        continue;
      }
      typename C::Operand value[4][kVectors];
      if (kDots) {
        for (int v = 0; v < kVectors; ++v) {
          value[0][v] = C::operand(source + v * C::width);
          value[1][v] = C::operand(source + width + v * C::width);
          value[2][v] = C::operand(source + row_size + v * C::width);
          value[3][v] = C::operand(source + row_size + width + v * C::width);
          if constexpr (C::turns) C::turn(value[0][v], value[1][v], value[2][v], value[3][v]);
        }
      }
      V sum[4][kParts];
      for (int v = 0; v < kParts; ++v) {
        sum[0][v] = right[v];
        sum[2][v] = lower_right[v];
        sum[1][v] = sum[3][v] = V::zero();
      }
      const auto take = [&](const SortedTap* tap) DCNV4_LAMBDA_INLINE {
        const Cell* const gradient = gradients + tap->pixel() * width;
        const S* const weights = corners + tap->place();
        for (int v = 0; v < kVectors; ++v) {
          const C g = C::load(gradient + v * C::width);
          for (int q = 0; q < 4; ++q)
            for (int r = 0; r < C::registers; ++r) {
              V& total = sum[q][v * C::registers + r];
              total = V::fma(V::set1(weights[q]), g.part(r), total);
            }
        }
        if constexpr (kDots && C::turns) {
          V dots;
          for (int v = 0; v < kVectors; ++v)
            for (int i = 0; i < 4; ++i) {
              const typename C::Operand g = C::spread_block(gradient + v * C::width + i * C::width / 4);
              dots = v + i == 0 ? C::dot(g, value[i][v]) : C::dot(g, value[i][v], dots);
            }
          V::sum_blocks(dots, sums + tap->place(), !kSingle && add);
        } else if constexpr (kDots) {
          V dot[4];
          for (int v = 0; v < kVectors; ++v) {
            const typename C::Operand g = C::operand(gradient + v * C::width);
            for (int q = 0; q < 4; ++q) dot[q] = v == 0 ? C::dot(g, value[q][v]) : C::dot(g, value[q][v], dot[q]);
          }
          V::sum4(dot[0], dot[1], dot[2], dot[3], sums + tap->place(), !kSingle && add);
        }
      };
      // Where a cell's taps end is foreseen wrongly: what has to be computed comes first when the next cell is begun.
      take(tap);
      if (kSingle || !add) ahead.fetch();
      while (++tap < end) take(tap);
      add_to(target, sum[0]);
      add_to(target + row_size, sum[2]);
      for (int v = 0; v < kParts; ++v) {
        right[v] = sum[1][v];
        lower_right[v] = sum[3][v];
      }
      pending = true;
    }
    if (pending && c > last) {
      add_to(target, right);
      add_to(target + row_size, lower_right);
    }
  }
}

}  // namespace
