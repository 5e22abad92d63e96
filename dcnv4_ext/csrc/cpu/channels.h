// How a packed map holds channels. A type C of channels has: Vector, the vectors that weights and sums are made of; Cell, the
// type of an element of the map; width, in channels; at_once, how many may be taken together so that sums, weights and
// addresses stay in registers; registers, how many vectors of the compute type one becomes; permuted, how many of the four
// corners' weights come out of registers rather than from memory; clear, pack and pack_some, of a map; load, load_some, times,
// add and + for weighted sums; store, store_some, stream and store_two of sums; part, each of the vectors of the compute type,
// and of, what they are together; Operand, operand, operand_some and dot for dot products; turns: whether the dot products of
// one vector with four are had in one sum, a quarter of its lanes each (V::sum_blocks): then turn, which makes of four operands
// those that hold a quarter of every one of them, and spread_block, a quarter of an operand four times.

namespace {

// In the compute type: for every vector V and every type T of tensors.
template <class V>
struct Widened {
  using Vector = V;
  using Cell = typename V::Scalar;
  using Operand = V;
  static constexpr int width = V::width, at_once = 4, registers = 1;
  static constexpr int permuted = V::permuted;
  static constexpr bool turns = false;
  V v;

  static DCNV4_INLINE void clear(Cell* to) { V::zero().store(to); }
  template <class T>
  static DCNV4_INLINE void pack(const T* from, Cell* to) {
    V::load(from).store(to);
  }
  template <class T>
  static DCNV4_INLINE void pack_some(const T* from, int n, Cell* to) {
    V::load_some(from, n).store(to);
  }
  template <class T>
  static DCNV4_INLINE Widened load(const T* p) {
    return {V::load(p)};
  }
  template <class T>
  static DCNV4_INLINE Widened load_some(const T* p, int n) {
    return {n > 0 ? V::load_some(p, n) : V::zero()};
  }
  static DCNV4_INLINE Widened of(const V* parts) { return {parts[0]}; }
  DCNV4_INLINE V part(int) const { return v; }
  static DCNV4_INLINE Widened times(V weight, Widened x) { return {weight * x.v}; }
  static DCNV4_INLINE Widened add(V weight, Widened x, Widened sum) { return {V::fma(weight, x.v, sum.v)}; }
  friend DCNV4_INLINE Widened operator+(Widened a, Widened b) { return {a.v + b.v}; }

  template <class T>
  static DCNV4_INLINE Operand operand(const T* p) {
    return V::load(p);
  }
  template <class T>
  static DCNV4_INLINE Operand operand_some(const T* p, int n) {
    return n > 0 ? V::load_some(p, n) : V::zero();
  }
  static DCNV4_INLINE V dot(Operand x, Operand y) { return x * y; }
  static DCNV4_INLINE V dot(Operand x, Operand y, V sum) { return V::fma(x, y, sum); }

  template <class T>
  DCNV4_INLINE void store(T* p) const {
    v.store(p);
  }
  template <class T>
  DCNV4_INLINE void store_some(T* p, int n) const {
    v.store_some(p, n);
  }
  template <class T>
  DCNV4_INLINE void stream(T* p) const {
    v.stream(p);
  }
  template <class T>
  static DCNV4_INLINE void store_two(T* p, Widened a, Widened b, bool past_caches) {
    V::store_two(p, a.v, b.v, past_caches);
  }
};

// Channels are taken some vectors at a time: as many, in as few rounds, as C allows.
template <class C>
inline int vectors_at_once(int64_t vectors) {
  const int64_t rounds = (vectors + C::at_once - 1) / C::at_once;
  return int((vectors + rounds - 1) / rounds);
}

// Elements of a cell that holds D channels, rounded up to whole rounds.
template <class C>
inline int64_t cell_elements(int64_t D) {
  const int64_t vectors = (D + C::width - 1) / C::width, at_once = vectors_at_once<C>(vectors);
  return (vectors + at_once - 1) / at_once * at_once * C::width;
}

}  // namespace
