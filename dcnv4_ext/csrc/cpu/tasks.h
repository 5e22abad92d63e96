// Who computes what, and which memory is asked for ahead.

namespace {

// Asks for a pixel's channels: `whole_lines` lines 64 bytes apart, and the line of the byte `last`. Where it was measured, into
// the L2 cache alone: they are for the next task or block, and the L1 cache belongs to the map that this one looks at.
template <class V>
DCNV4_INLINE void fetch_pixel(const char* at, int64_t whole_lines, int64_t last) {
  V::prefetch_l2(at + last);
  if (whole_lines == 0) return;
  V::prefetch_l2(at);
  for (int64_t line = 1; line < whole_lines; ++line) V::prefetch_l2(at + 64 * line);
}

// Some channels of consecutive pixels, to be fetched into the caches.
struct Stream {
  const char* at = nullptr;
  int64_t step = 0;         // bytes from pixel to pixel
  int64_t pixels = 0;       // left
  int64_t whole_lines = 0;  // 64 bytes apart from a pixel's first byte on
  int64_t last = 0;         // the byte whose line is fetched besides

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
    fetch_pixel<V>(at, whole_lines, last);
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

// What a task reads: a group's channels of an image and of the gradient, the offsets, and of which rows of the output.
template <class T>
struct Operands {
  const T *image, *offsets, *gradient;
  int64_t first_row, last_row;
};

// The same for blocks that are equally many rows and columns of up to four tensors: one of them, or four, that are fetched side
// by side.
template <class V>
class BlocksAhead {
 public:
  BlocksAhead() = default;
  BlocksAhead(int64_t rows, int64_t columns) : columns_(columns), rows_(rows) {}

  // A block whose pixels are `stride` apart, and `row_stride` from row to row: the first `elements` of each.
  template <class T>
  void add(const T* first, int64_t stride, int64_t row_stride, int64_t elements) {
    constexpr int64_t kSize = int64_t(sizeof(T));
    const Stream pixel(first, stride, 1, elements);
    blocks_[count_++] = {pixel.at, pixel.whole_lines, pixel.last, stride * kSize, (row_stride - columns_ * stride) * kSize};
  }

  DCNV4_INLINE void fetch() {
    if (--column_ < 0 && (rows_ <= 0 || !begin_row())) return;
    fetch(blocks_[0]);
    if (count_ == 1) return;
    fetch(blocks_[1]);
    fetch(blocks_[2]);
    fetch(blocks_[3]);
  }

 private:
  struct Block {
    const char* at = nullptr;
    int64_t whole_lines = 0, last = 0;  // as in Stream
    int64_t step = 0, jump = 0;         // bytes
  };

  DCNV4_INLINE void fetch(Block& block) {
    fetch_pixel<V>(block.at, block.whole_lines, block.last);
    block.at += block.step;
  }
  DCNV4_NOINLINE bool begin_row() {
    column_ = 0;
    if (rows_ <= 0) return false;
    if (begun_)
      for (Block& block : blocks_) block.at += block.jump;
    begun_ = true;
    --rows_;
    column_ = columns_ - 1;
    return true;
  }

  int64_t columns_ = 0, rows_ = 0;  // of a block; not yet begun
  int64_t column_ = 0;              // how many of the row are left
  int count_ = 0;
  bool begun_ = false;
  Block blocks_[4];
};

// What goes on while taps are visited.
template <class V>
using AheadOfVisits = std::conditional_t<V::sorts, BlocksAhead<V>, Ahead<V>>;

// What tasks threads take: each at first a share of its own, tasks that follow one another, then whoever is free one that is
// left. Threads keep away from each other: neighbouring groups share cache lines, and a line that one thread writes while
// another one works at it goes back and forth between their caches, for as long as that takes on this machine. Not all are for
// whoever is free: to take one waits until memory has what was stored past the caches; a single thread takes none so. A thread
// knows its next task while it does this one where there are many, and can ask for that one's data meanwhile.
class Tasks {
 public:
  explicit Tasks(int64_t count) : count_(count) {}

  // For every thread of a team: `work(task, next)`, where `next` is -1 if it is not known. The team may be smaller than was
  // asked for: what OpenMP gives is what counts.
  template <class Work>
  void run(Thread thread, Work work) {
    const int64_t team = thread.team, share = count_ / team;
    const int64_t own = team == 1 ? share : share * 3 / 4, left = share - own;
    const bool early = count_ >= 4 * team;
    int64_t begun = 0;  // of its own
    const auto another = [&]() {
      if (begun < own) return thread.number * share + begun++;
      const int64_t i = taken_++;  // of every share one, and again
      return i < team * left ? i % team * share + own + i / team : team * own + i;
    };
    int64_t task = another();
    while (task < count_) {
      const bool known = begun < own || early;
      const int64_t next = known ? another() : -1;
      work(task, next < count_ ? next : -1);
      task = known ? next : another();
    }
  }

 private:
  const int64_t count_;
  std::atomic<int64_t> taken_{0};  // of what shares leave
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

}  // namespace
