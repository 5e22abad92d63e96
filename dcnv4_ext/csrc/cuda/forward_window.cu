// The forward kernel for groups of a multiple of 32 bytes and 8 or 9 taps, out of a window in shared memory (window.h).
//
// A thread holds 16 bytes of one pixel's channels, of all four corners or of those on its side. Per tap it reads its weights
// and two places from shared memory, then the corners: a warp reads 512 bytes of cells an instruction without bank conflicts.
#include "forward.h"
#include "window.h"

namespace dcnv4 {
namespace {

constexpr int kQuad = 4;              // threads of a batch's pixel: q works out taps q and q + 4
constexpr int kRow = odd(2 * kQuad);  // of a pixel's taps in memory
// Taps of odd pixels begin elsewhere in their row: written by eight threads at once, those of two pixels then touch every bank
// once.
DCNV4_DEVICE int turn_of(int pixel) { return pixel % 2 * 3; }
constexpr int kNinths = 3;  // batches of a warp whose ninth taps are worked out at once: a fourth's room is a block's
constexpr int kEights = kBatch * kRow;  // where those begin

// What a thread reads of a tap: weights of its corners, and where the upper and the lower row of them lie in the window.
struct alignas(16) Side {
  float top, bottom;
  uint32_t at_top, at_bottom;
};

// Rows have odd length, the second plane is half the banks away: threads that read a tap of several pixels and both sides
// touch every bank once.
template <int TAPS>
constexpr DCNV4_HD int plane_length() {
  return kEights + (TAPS == 9 ? kNinths * kBatch : 0) + 4;
}

template <int SIDES, int TAPS>
constexpr DCNV4_HD int64_t staged_bytes() {
  return SIDES == 2 ? 2 * plane_length<TAPS>() * int64_t(sizeof(Side))
                    : plane_length<TAPS>() * int64_t(sizeof(Four<float>) + sizeof(uint2));
}

// RUNS: what comes from offset_mask lies in shared memory too, and all of it was fetched as boxes.
template <class T, int UNITS, int SIDES, int TAPS, bool RUNS>
__global__ void __launch_bounds__(kMostWindowThreads, kWindowBlocks)
    sample_window(const __grid_constant__ dcnv4_problem p, const __grid_constant__ Window w,
                  const __grid_constant__ BulkMap value_map, const __grid_constant__ BulkMap mask_map,
                  const T* __restrict__ value, const T* __restrict__ offset_mask, T* __restrict__ output) {
  constexpr int N = 16 / int(sizeof(T)), lanes = UNITS * SIDES, items = kWarp / lanes, cell_bytes = UNITS * 16;
  constexpr int plane = plane_length<TAPS>();
  constexpr int unrolled = UNITS == 4 ? 8 : sizeof(T) == 4 ? 2 : 4;  // as far as registers allow
  const WindowOrigin o = window_origin(p, w);
  const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp), warps = int(blockDim.x / kWarp);
  const int channel = o.g * int(p.D) + o.slice * UNITS * N;
  const T* map = image_of(value, o, w.value_image) + channel;

  // Behind the window two rows whose first two cells are zeros, for taps that add nothing; a barrier; then each warp's taps.
  char* window = window_of<T, TAPS, RUNS>(w);
  const uint32_t pitch_bytes = uint32_t(w.pitch) * cell_bytes, nowhere = pitch_bytes * uint32_t(w.height);
  char* barrier = window + nowhere + pitch_bytes + 2 * cell_bytes;
  char* staged = barrier + kBarrierBytes + warp * staged_bytes<SIDES, TAPS>();
  const TileTaps<T, TAPS, RUNS> taps(w, o, offset_mask);
  start_window<UNITS>(p, w, o, taps, value_map, mask_map, map, channel * int(sizeof(T)), window, barrier);
  clear_nowhere<cell_bytes>(window + nowhere, pitch_bytes);
  const int q = lane % kQuad;
  const float grid_x[2] = {w.grid_x[q], w.grid_x[q + kQuad]}, grid_y[2] = {w.grid_y[q], w.grid_y[q + kQuad]};
  wait_for_window<RUNS>(barrier);

  // A far tap is left to be added afterwards.
  const auto stage = [&](int place, int of, const WindowTap& tap) {
    const Corners<float> weights = corner_weights(tap.lx, tap.ly, tap.near ? tap.weight : 0.0f, 1.0f);
    const uint32_t at = tap.near ? uint32_t(tap.y * w.pitch + tap.x) * cell_bytes : nowhere;
    if constexpr (SIDES == 2) {
      Side* to = reinterpret_cast<Side*>(staged) + place;
      to[0] = {weights.w00, weights.w10, at, at + pitch_bytes};
      to[plane] = {weights.w01, weights.w11, at, at + pitch_bytes};
    } else {
      // Two pixels share the banks where a cell takes half of them: one reads cells of even number first, the other of odd.
      const bool swap = UNITS == 4 && ((at / cell_bytes + uint32_t(of)) & 1) != 0;
      const uint32_t right = swap ? cell_bytes : 0;
      Four<float>* to = reinterpret_cast<Four<float>*>(staged) + place;
      *to = {{swap ? weights.w01 : weights.w00, swap ? weights.w00 : weights.w01, swap ? weights.w11 : weights.w10,
              swap ? weights.w10 : weights.w11}};
      uint2* places = reinterpret_cast<uint2*>(reinterpret_cast<Four<float>*>(staged) + plane) + place;
      *places = make_uint2(at + right, at + cell_bytes - right);
    }
  };

  const int item = lane / lanes, unit = lane % UNITS, side = SIDES == 2 ? lane / UNITS % 2 : 0;
  const char* cells = window + side * cell_bytes + unit * 16;
  T* result = image_of(output, o, w.output_image) + channel;
  uint32_t far_ninths = 0;
#pragma unroll 1
  for (int batch = warp, turn = 0; batch * kBatch < w.pixels; batch += warps, turn = turn + 1 == kNinths ? 0 : turn + 1) {
    const int ninths = kEights + turn * kBatch;
    if (TAPS == 9 && turn == 0) {
      // Of this batch and the warp's next.
      const int of = lane % kBatch, index = (batch + lane / kBatch * warps) * kBatch + of;
      const WindowTap tap = taps.template tap<true, true>(p, w, o, min(index, w.pixels - 1), tile_pixel(p, w, o, index),
                                                          kMostTaps - 1, w.grid_x[kMostTaps - 1], w.grid_y[kMostTaps - 1]);
      far_ninths = __ballot_sync(0xffffffffu, tap.far);
      if (lane < kNinths * kBatch) stage(kEights + lane, of, tap);
    }
    const int of = lane / kQuad, index = batch * kBatch + of;
    const TilePixel own = tile_pixel(p, w, o, index);
    uint32_t far[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const WindowTap tap = taps.template tap<true, true>(p, w, o, index, own, q + r * kQuad, grid_x[r], grid_y[r]);
      far[r] = __ballot_sync(0xffffffffu, tap.far);
      stage(of * kRow + (q + r * kQuad + turn_of(of)) % (2 * kQuad), of, tap);
    }
    __syncwarp();

#pragma unroll 1
    for (int pass = 0; pass < kBatch; pass += items) {
      float sums[N] = {};
      const int of_pass = pass + item, row = of_pass * kRow, ninth = ninths + of_pass;
      const auto add = [&](float weight, const float (&corner)[N]) {
#pragma unroll
        for (int i = 0; i < N; ++i) sums[i] += weight * corner[i];
      };
      const auto add_tap = [&](int place) {
        float corner[N];
        if constexpr (SIDES == 2) {
          const Side tap = reinterpret_cast<const Side*>(staged)[side * plane + place];
          load_shared<T, N>(cells + tap.at_top, corner);
          add(tap.top, corner);
          load_shared<T, N>(cells + tap.at_bottom, corner);
          add(tap.bottom, corner);
        } else {
          const Four<float>* from = reinterpret_cast<const Four<float>*>(staged);
          const Four<float> weights = from[place];
          const uint2 at = reinterpret_cast<const uint2*>(from + plane)[place];
          load_shared<T, N>(cells + at.x, corner);
          add(weights.v[0], corner);
          load_shared<T, N>(cells + at.y, corner);
          add(weights.v[1], corner);
          load_shared<T, N>(cells + at.x + pitch_bytes, corner);
          add(weights.v[2], corner);
          load_shared<T, N>(cells + at.y + pitch_bytes, corner);
          add(weights.v[3], corner);
        }
      };
#pragma unroll(unrolled)
      for (int k = 0; k < 2 * kQuad; ++k) add_tap(row + k);
      if (TAPS == 9) add_tap(ninth);

      const TilePixel pixel = items == kBatch ? own : tile_pixel(p, w, o, batch * kBatch + of_pass);
      const uint32_t far_here = far_ninths >> (turn * kBatch) & 0xffu;
      if ((far[0] | far[1] | far_here) != 0) {
        // Far taps, each worked out anew by the threads of its pixel; their corners come from global memory.
        uint32_t todo = (far[0] >> (of_pass * kQuad) & 0xfu) | (far[1] >> (of_pass * kQuad) & 0xfu) << kQuad |
                        (far_here >> of_pass & 1) << (2 * kQuad);
#pragma unroll 1
        for (; todo != 0; todo &= todo - 1) {
          const int k = __ffs(int(todo)) - 1;
          const WindowTap tap =
              taps.template tap<true, true>(p, w, o, batch * kBatch + of_pass, pixel, k, w.grid_x[k], w.grid_y[k]);
          const Corners<float> weights = corner_weights(tap.lx, tap.ly, tap.weight, 1.0f);
          const Inside inside(p, o, tap);
          const char* cell = reinterpret_cast<const char*>(map + unit * N);
          cell += int64_t(tap.y + o.y) * int64_t(w.row_bytes) + int64_t(tap.x + o.x) * int64_t(w.value_bytes);
#pragma unroll
          for (int row = 0; row < 2; ++row) {
            // Both loads are on their way before the first is waited for.
            const bool across = row == 0 ? inside.top : inside.bottom;
            const bool left = across && inside.left && side == 0, right = across && inside.right && (SIDES == 1 || side == 1);
            float left_corner[N], right_corner[N];
            load_if<T, N>(left, cell, left_corner);
            load_if<T, N>(right, cell + w.value_bytes, right_corner);
            if (left) add(row == 0 ? weights.w00 : weights.w10, left_corner);
            if (right) add(row == 0 ? weights.w01 : weights.w11, right_corner);
            cell += w.row_bytes;
          }
        }
      }
      T* to = at_pixel(result, pixel.number, p.output_stride) + unit * N;
      if constexpr (SIDES == 2) {
        // Each side takes half of the channels.
        float half[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
          const float give = side ? sums[i] : sums[i + N / 2], keep = side ? sums[i + N / 2] : sums[i];
          half[i] = keep + __shfl_xor_sync(0xffffffffu, give, UNITS);
        }
        if (pixel.live) store<T, N / 2>(to + side * (N / 2), half);
      } else {
        if (pixel.live) store<T, N>(to, sums);
      }
    }
    __syncwarp();  // before the next taps take the place of these
  }
}

template <class T, int UNITS, int SIDES, int TAPS, bool RUNS>
int32_t run(const ForwardCall& call, int64_t slices) {
  const dcnv4_problem& p = call.p;
  constexpr int64_t cell = UNITS * 16;
  WindowBytes bytes{
      cell, RUNS ? kRunBytes<T, TAPS> : 0, staged_bytes<SIDES, TAPS>(), window_fixed<RUNS>(cell), 1, kWarp * 16 / cell};
  // Where threads fetch, cells cost more, and tiles are better larger.
  if (RUNS) bytes.cost = sizeof(T) == 2 ? WindowCost{1.85, 0.2, 0.002, 1} : WindowCost{11.3, 0.32, 0.0042, 2};
  if (UNITS == 8) {
    // Cells of 128 bytes leave room for few warps beside the halo of a tile: worth while for whole maps, and with runs, where
    // tiles cost less, for small ones. In halves of 64 bytes every tap is worked out twice.
    bytes.whole = RUNS ? 256 : INT32_MAX;
    bytes.cost = {8, 0, 0.008, 0};
  }
  const Window w = plan_window(p, slices, bytes);
  BulkMap value_map{}, mask_map{};
  if (w.blocks == 0 || (RUNS && !make_maps<T, TAPS>(p, w, call.value, cell, call.offset_mask, value_map, mask_map)))
    return DCNV4_NO_KERNEL;
  return launch(sample_window<T, UNITS, SIDES, TAPS, RUNS>, w.blocks, w.threads, w.shared, call.stream, p, w, value_map,
                mask_map, static_cast<const T*>(call.value), static_cast<const T*>(call.offset_mask),
                static_cast<T*>(call.output));
}

template <class T, int TAPS, bool RUNS>
int32_t run_units(const ForwardCall& call) {
  const Slicing slicing = slicing_of(call.p);
  if constexpr (sizeof(T) == 4) {
    if (slicing.bytes == 128) {
      const int32_t status = run<T, 8, 1, TAPS, RUNS>(call, slicing.slices);
      if (status != DCNV4_NO_KERNEL || (!RUNS && !forced(call.p, kForceWindow))) return status;
    }
  }
  if (slicing.bytes >= 64) return run<T, 4, 1, TAPS, RUNS>(call, slicing.slices * slicing.bytes / 64);
  if (slicing.bytes == 32) return run<T, 2, 2, TAPS, RUNS>(call, slicing.slices);
  return DCNV4_NO_KERNEL;
}

template <class T, int TAPS>
int32_t run_taps(const ForwardCall& call) {
  if (can_have_runs(call.p, call.offset_mask)) {
    const int32_t status = run_units<T, TAPS, true>(call);
    if (status != DCNV4_NO_KERNEL) return status;
  }
  return run_units<T, TAPS, false>(call);
}

template <class T>
int32_t run_type(const ForwardCall& call) {
  const int taps = taps_of(call.p);
  return taps == 9 ? run_taps<T, 9>(call) : taps == 8 ? run_taps<T, 8>(call) : int32_t(DCNV4_NO_KERNEL);
}

}  // namespace

int32_t forward_window(const ForwardCall& call) {
  const dcnv4_problem& p = call.p;
  const int64_t element = element_bytes(p.dtype);
  if (!aligned(call.value, p.value_stride, element, 16) || !aligned(call.output, p.output_stride, element, 16))
    return DCNV4_NO_KERNEL;
  switch (p.dtype) {
    case DCNV4_FLOAT32:
      return run_type<float>(call);
    case DCNV4_BFLOAT16:
      return run_type<bf16>(call);
    case DCNV4_FLOAT16:
      return run_type<f16>(call);
    default:
      return DCNV4_NO_KERNEL;
  }
}

}  // namespace dcnv4
