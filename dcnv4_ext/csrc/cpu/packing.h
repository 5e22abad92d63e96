// The packed map: rows of one group as C holds channels, with zero cells all round.

namespace {

// One cell of `width` elements. Where it is one round of channels no memset is called: that takes longer than the few stores.
template <class C, int kVectors>
DCNV4_INLINE void clear_cell(typename C::Cell* cell, int64_t width) {
  if (DCNV4_LIKELY(width == kVectors * C::width)) {
    for (int v = 0; v < kVectors; ++v) C::clear(cell + v * C::width);
  } else {
    memset(cell, 0, width * sizeof *cell);
  }
}

// The group's channels of `pixels` pixels, `step` apart, cell by cell.
template <class C, class T, int kVectors>
DCNV4_INLINE void pack_pixels(const Plan<ScalarOf<typename C::Vector>>& plan, const T* first, int64_t step, int64_t pixels,
                              typename C::Cell* to) {
  using Cell = typename C::Cell;
  const int64_t width = plan.packed_width;
  constexpr int64_t kChunk = kVectors * C::width;
  for (int64_t c = 0; c < width; c += kChunk) {
    const T* source = first + c;
    Cell* cell = to + c;
    if (c + kChunk <= plan.D) {
      for (int64_t i = 0; i < pixels; ++i, source += step, cell += width) {
        for (int64_t line = 0; line < kChunk; line += 64 / int64_t(sizeof(T))) C::Vector::prefetch(source + 16 * step + line);
        for (int v = 0; v < kVectors; ++v) C::pack(source + v * C::width, cell + v * C::width);
      }
      continue;
    }
    for (int64_t i = 0; i < pixels; ++i, source += step, cell += width)
      for (int v = 0; v < kVectors; ++v) {
        const int64_t left = std::max<int64_t>(0, std::min<int64_t>(C::width, plan.D - c - v * C::width));
        C::pack_some(source + (left ? v * C::width : 0), int(left), cell + v * C::width);
      }
  }
}

// Pack rows of one group: row r of the map holds value row window.first + r. `value` points at pixel (0, 0) of the group.
template <class C, class T, int kVectors>
void pack_rows(const dcnv4_problem& p, const Plan<ScalarOf<typename C::Vector>>& plan, const T* value, Window window,
               typename C::Cell* map) {
  using Cell = typename C::Cell;
  const int64_t width = plan.packed_width, row_size = plan.pitch * width, step = p.value_stride;
  for (int64_t h = window.first; h < window.last; ++h, map += row_size) {
    if (h < 0 || h >= p.H) {
      memset(map, 0, row_size * sizeof(Cell));
      continue;
    }
    clear_cell<C, kVectors>(map, width);
    clear_cell<C, kVectors>(map + row_size - width, width);
    pack_pixels<C, T, kVectors>(plan, value + h * p.W * step, step, p.W, map + width);
  }
}

template <class C, class T>
void pack(const dcnv4_problem& p, const Plan<ScalarOf<typename C::Vector>>& plan, const T* value, Window window,
          typename C::Cell* map) {
  static_assert(C::at_once <= 4, "a case for each");
  const auto rows = plan.at_once == 1   ? pack_rows<C, T, 1>
                    : plan.at_once == 2 ? pack_rows<C, T, 2>
                    : plan.at_once == 3 ? pack_rows<C, T, 3>
                                        : pack_rows<C, T, 4>;
  rows(p, plan, value, window, map);
}

template <class S, class Cell>
DCNV4_INLINE void clear_blank(const Plan<S>& plan, Cell* blank) {
  const int64_t width = plan.packed_width;
  memset(blank, 0, 2 * width * sizeof(Cell));
  memset(blank + plan.pitch * width, 0, 2 * width * sizeof(Cell));
}

// Elements of a packed map of `rows` rows with the blank cells behind it; whole cache lines of them.
template <class S>
inline int64_t map_elements(const Plan<S>& plan, int64_t rows) {
  const int64_t elements = (rows * plan.pitch + plan.pitch + 2) * plan.packed_width;
  return (elements + 31) / 32 * 32;
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

}  // namespace
