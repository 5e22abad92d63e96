// Forward.

namespace {

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

// Output rows [first_row, last_row) of one group. Pointers are at the group's channels of the image; `map` holds `window`.
template <class V, class T, int kVectors, int kTaps>
void forward_rows(const dcnv4_problem& p, const Plan<ScalarOf<V>>& plan, const T* value, const T* offset_mask, T* output,
                  const ScalarOf<V>* map, Window window, int32_t blank, int64_t first_row, int64_t last_row,
                  ScalarOf<V>* tap_scratch, Ahead<V>& ahead, bool past_caches) {
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

// kVectors neighbouring vectors of channels; past the caches they are aligned to whole lines.
template <class C, int kVectors, class T>
DCNV4_INLINE void store_all(T* p, const C* c, bool past_caches) {
  for (int i = 0; i + 1 < kVectors; i += 2) C::store_two(p + i * C::width, c[i], c[i + 1], past_caches);
  if (kVectors % 2) {
    constexpr int kLast = kVectors - 1;
    if (past_caches) {
      c[kLast].stream(p + kLast * C::width);
    } else {
      c[kLast].store(p + kLast * C::width);
    }
  }
}

// Four weighted loads a tap for `kVectors` vectors of channels, `width` elements from one cell to the next. Where a permutation
// can spread a weight over a vector, some of the four come so and the others from memory: neither the load ports, which the map
// keeps busy, nor the multiply-adds' neighbours are then the narrow place. Sums of one or two vectors are kept a corner: a
// chain of additions must not be longer than the multiply-adds take that run beside it.
template <class C, int kVectors, int kTaps, class V = typename C::Vector>
DCNV4_INLINE void gather_lookup(const typename C::Cell* map, int64_t width, int64_t row_size, const Lookups<V, kTaps>& from,
                                int pixel, C* sum) {
  using Cell = typename C::Cell;
  constexpr int kChains = kVectors * C::registers <= 2 ? 4 : 2;
  const int at = pixel * kTaps;
  C chain[kChains][kVectors];
  const Spreads<V, (C::permuted > 0)> w00(from.w00 + at);
  const Spreads<V, (C::permuted > 1)> w10(from.w10 + at);
  const Spreads<V, (C::permuted > 2)> w01(from.w01 + at), w11(from.w11 + at);
  uint64_t two = 0;  // elements of two taps: half as many loads, and none that extends a sign
  DCNV4_UNROLL
  for (int k = 0; k < kTaps; ++k, two >>= 32) {
    if (k % 2 == 0) memcpy(&two, from.element + at + k, sizeof two);
    const Cell* top = map + uint32_t(two);
    const Cell* bottom = top + row_size;
    const auto add = [&](int q, V weight, const Cell* corner) DCNV4_LAMBDA_INLINE {
      C* const sums = chain[q % kChains];
      for (int v = 0; v < kVectors; ++v) {
        const C there = C::load(corner + v * C::width);
        sums[v] = k == 0 && q < kChains ? C::times(weight, there) : C::add(weight, there, sums[v]);
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
template <class C, class T, int kVectors, int kTaps, class V = typename C::Vector>
DCNV4_NOINLINE void gather_lookups(const typename C::Cell* map, int64_t row_size, const Lookups<V, kTaps>& from, int count,
                                   T* target, int64_t step, Ahead<V>& ahead, bool past_caches) {
  for (int i = 0; i < count; ++i, target += step) {
    ahead.fetch();
    C sum[kVectors];
    gather_lookup<C, kVectors, kTaps>(map, kVectors * C::width, row_size, from, i, sum);
    store_all<C, kVectors>(target, sum, past_caches);
  }
}

// Output rows where positions and elements of the map are whole numbers that the compute type holds. `past_caches`: the output
// is aligned to whole cache lines and goes straight to memory.
template <class C, class T, int kVectors, int kTaps, class V = typename C::Vector>
void forward_rows_lookup(const dcnv4_problem& p, const Plan<ScalarOf<V>>& plan, const T* value, const T* offset_mask, T* output,
                         const typename C::Cell* map, Window window, int32_t blank, int64_t first_row, int64_t last_row,
                         ScalarOf<V>* tap_scratch, Ahead<V>& ahead, bool past_caches) {
  using S = ScalarOf<V>;
  constexpr int64_t kChunk = kVectors * C::width;
  const LaneTables<V, kTaps>& lanes = *static_cast<const LaneTables<V, kTaps>*>(plan.lanes);
  const int64_t width = plan.packed_width, row_size = plan.pitch * width, D = p.D;
  const int64_t offset_step = p.offset_mask_stride, output_step = p.output_stride;
  const LookupFrame<V> frame(p, plan, window, blank, width, plan.pitch, 0);
  Lookups<V, kTaps> lookups;
  typename V::Mask outside[kTaps];
  for_batches<V>(p, first_row, last_row, true, [&](int64_t row, int64_t column, int count, int64_t below) DCNV4_LAMBDA_INLINE {
    const T* const offsets = offset_mask + (row * p.Wo + column) * offset_step;
    T* const target = output + (row * p.Wo + column) * output_step;
    const Batch<T> batch = {offsets, offset_step, below, row, column, count};
    const bool leaves = locate_lookups<V, T, kTaps>(p, frame, lanes, batch, lookups, outside, nullptr, nullptr);
    if (DCNV4_LIKELY(!leaves && D == kChunk)) {
      gather_lookups<C, T, kVectors, kTaps>(map, row_size, lookups, count, target, output_step, ahead, past_caches);
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
        C sum[kVectors];
        gather_lookup<C, kVectors, kTaps>(map + c, width, row_size, lookups, i, sum);
        if (c + kChunk <= D) {
          store_all<C, kVectors>(out + c, sum, past_caches);
        } else {
          for (int v = 0; v < kVectors; ++v) {
            const int64_t left = D - c - v * C::width;
            if (left > 0) sum[v].store_some(out + c + v * C::width, int(std::min<int64_t>(left, C::width)));
          }
        }
      }
    }
  });
}

template <class C, class T, class V = typename C::Vector>
using ForwardRows = void (*)(const dcnv4_problem&, const Plan<ScalarOf<V>>&, const T*, const T*, T*, const typename C::Cell*,
                             Window, int32_t, int64_t, int64_t, ScalarOf<V>*, Ahead<V>&, bool);

template <class C, class T, int kVectors>
ForwardRows<C, T> forward_rows_for_taps(int64_t K, bool exact) {
  using V = typename C::Vector;
  if constexpr (V::looks_up) {
    if (K == kLookupTaps && exact) return forward_rows_lookup<C, T, kVectors, kLookupTaps>;
  } else if constexpr (kUnrollTaps) {
    if (K == 9) return forward_rows<V, T, kVectors, 9>;
  }
  if constexpr (std::is_same_v<C, Widened<V>>) return forward_rows<V, T, kVectors, 0>;
  return nullptr;
}

template <class C, class T>
ForwardRows<C, T> choose_forward_rows(int at_once, int64_t K, bool exact) {
  switch (at_once) {
    case 1:
      return forward_rows_for_taps<C, T, 1>(K, exact);
    case 2:
      return forward_rows_for_taps<C, T, 2>(K, exact);
    case 3:
      return forward_rows_for_taps<C, T, 3>(K, exact);
    default:
      return forward_rows_for_taps<C, T, std::min(4, C::at_once)>(K, exact);
  }
}

// With packed maps of channels as C holds them, or in the compute type where C has no kernel for the problem.
template <class V, class T, class C = Widened<V>>
int32_t forward(const dcnv4_problem& p, const void* value_, const void* offset_mask_, void* output_) {
  using S = ScalarOf<V>;
  using Cell = typename C::Cell;
  const T *value = static_cast<const T*>(value_), *offset_mask = static_cast<const T*>(offset_mask_);
  T* output = static_cast<T*>(output_);
  static thread_local Scratch grid_scratch;
  S* grid = static_cast<S*>(grid_scratch.get(TapGrid<V>::elements(p) * sizeof(S)));
  if (!grid) return DCNV4_OUT_OF_MEMORY;
  Plan<S> plan = TapGrid<V>::template plan<C>(p, grid);
  const int64_t row_size = plan.pitch * plan.packed_width;
  std::optional<LaneTables<V, kLookupTaps>> lanes;
  if (V::looks_up && plan.K == kLookupTaps) plan.lanes = &lanes.emplace(plan);

  // Output rows a task: all where the map they need stays within half of the L2 cache, else as many as leave most of the window
  // no halo; fewer where threads would have nothing to do.
  constexpr int64_t kBudget = int64_t(512) << 10;  // bytes of a packed map
  constexpr int64_t kHalo = 4;                     // rows of offset that stay inside a window
  const int64_t rows_in_budget = std::max<int64_t>(1, kBudget / (row_size * int64_t(sizeof(Cell))));
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
  const auto rows_kernel = choose_forward_rows<C, T>(plan.at_once, plan.K, is_exact(p, plan, most_rows));
  if constexpr (!std::is_same_v<C, Widened<V>>)
    if (!rows_kernel) return forward<V, T>(p, value_, offset_mask_, output_);
  const int64_t map_bytes = map_elements(plan, most_rows) * int64_t(sizeof(Cell));
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
  Tasks tasks(count);
#pragma omp parallel num_threads(p.threads) if (parallel)
  {
    static thread_local Scratch scratch;
    bool begun = false;
    tasks.run(this_thread(), [&](int64_t task, int64_t next) {
      char* const memory = static_cast<char*>(scratch.get(map_bytes + tap_size * sizeof(S)));
      Cell* const map = reinterpret_cast<Cell*>(memory);
      const Part part = part_of(task);
      if (!map) status = DCNV4_OUT_OF_MEMORY;
      if (!map || part.first >= part.last) return;
      if (!begun) fetch_beginning(data_of(task));
      begun = true;
      const T* image = image_of(part);
      const int32_t blank = int32_t((part.window.last - part.window.first) * plan.pitch);
      pack<C>(p, plan, image, part.window, map);
      clear_blank(plan, map + int64_t(blank) * plan.packed_width);
      Ahead<V> ahead = data_of(next);
      rows_kernel(p, plan, image, offsets_of(part), output_of(part), map, part.window, blank, part.first, part.last,
                  reinterpret_cast<S*>(memory + map_bytes), ahead, past_caches);
    });
    if constexpr (V::looks_up)
      if (past_caches) V::fence();
    scratch.trim(kKeptScratch);
  }
  return status;
}

}  // namespace
