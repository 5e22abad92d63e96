// The packed map: rows of one group in the compute type, with zero cells all round.

namespace {

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
