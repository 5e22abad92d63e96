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
constexpr int kNinths = 3;            // batches of a warp whose ninth taps are worked out at once: a fourth's room is a block's
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

template <class T, int UNITS, int SIDES, int TAPS>
__global__ void __launch_bounds__(kMostWindowThreads, kWindowBlocks)
    sample_window(const __grid_constant__ dcnv4_problem p, const __grid_constant__ Window w, const T* __restrict__ value,
                  const T* __restrict__ offset_mask, T* __restrict__ output) {
  constexpr int N = 16 / int(sizeof(T)), lanes = UNITS * SIDES, items = kWarp / lanes, cell_bytes = UNITS * 16;
  constexpr int plane = plane_length<TAPS>();
  constexpr int unrolled = UNITS == 4 ? 8 : sizeof(T) == 4 ? 2 : 4;  // as far as registers allow
  const WindowOrigin o = window_origin(p, w);
  const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp), warps = int(blockDim.x / kWarp);
  const int channel = o.g * int(p.D) + o.slice * UNITS * N;
  const T* map = image_of(value, o, w.value_image) + channel;

  // The window; behind it two rows whose first two cells are zeros, for taps that add nothing; then each warp's taps.
  char* window = dynamic_shared();
  const uint32_t pitch_bytes = uint32_t(w.pitch) * cell_bytes, nowhere = pitch_bytes * uint32_t(w.height);
  char* staged = window + nowhere + pitch_bytes + 2 * cell_bytes + warp * staged_bytes<SIDES, TAPS>();
  fetch_window<UNITS>(p, w, o, map, window);
  clear_nowhere<cell_bytes>(window + nowhere, pitch_bytes);
  const int q = lane % kQuad;
  const T* offsets = offsets_of<T, TAPS>(w, o, offset_mask, q);
  const float grid_x[2] = {w.grid_x[q], w.grid_x[q + kQuad]}, grid_y[2] = {w.grid_y[q], w.grid_y[q + kQuad]};
  copy_async_wait();
  __syncthreads();

  const auto stage = [&](int place, int of, const WindowTap& tap) {
    const Corners<float> weights = corner_weights(tap.lx, tap.ly, tap.weight, 1.0f);
    const uint32_t at = tap.near ? uint32_t(tap.y * w.pitch + tap.x) * cell_bytes : nowhere;
    // Of a far tap, its cell in the map instead of places in the window.
    if constexpr (SIDES == 2) {
      Side* to = reinterpret_cast<Side*>(staged) + place;
      const uint32_t upper = tap.far ? uint32_t(tap.x + o.x) : at, lower = tap.far ? uint32_t(tap.y + o.y) : at + pitch_bytes;
      to[0] = {weights.w00, weights.w10, upper, lower};
      to[plane] = {weights.w01, weights.w11, upper, lower};
    } else {
      // Two pixels share the banks where a cell takes half of them: one reads cells of even number first, the other of odd.
      const bool swap = UNITS == 4 && !tap.far && ((at / cell_bytes + uint32_t(of)) & 1) != 0;
      const uint32_t right = swap ? cell_bytes : 0;
      Four<float>* to = reinterpret_cast<Four<float>*>(staged) + place;
      *to = {{swap ? weights.w01 : weights.w00, swap ? weights.w00 : weights.w01, swap ? weights.w11 : weights.w10,
              swap ? weights.w10 : weights.w11}};
      uint2* places = reinterpret_cast<uint2*>(reinterpret_cast<Four<float>*>(staged) + plane) + place;
      *places = make_uint2(at + right, at + cell_bytes - right);
      if (tap.far) *places = make_uint2(uint32_t(tap.x + o.x), uint32_t(tap.y + o.y));
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
      const int of = lane % kBatch;
      const PixelTaps<T> taps = pixel_taps<T, TAPS, true>(
          p, w, tile_pixel(p, w, o, (batch + lane / kBatch * warps) * kBatch + of), offsets + 2 * (8 - q), 8);
      const WindowTap tap = window_tap<true>(w, o, taps, 0, w.grid_x[kMostTaps - 1], w.grid_y[kMostTaps - 1]);
      far_ninths = __ballot_sync(0xffffffffu, tap.far);
      if (lane < kNinths * kBatch) stage(kEights + lane, of, tap);
    }
    const int of = lane / kQuad;
    const TilePixel own = tile_pixel(p, w, o, batch * kBatch + of);
    const PixelTaps<T> taps = pixel_taps<T, TAPS, true>(p, w, own, offsets, q);
    uint32_t far[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const WindowTap tap = window_tap<true>(w, o, taps, r * kQuad, grid_x[r], grid_y[r]);
      far[r] = __ballot_sync(0xffffffffu, tap.far);
      stage(of * kRow + q + r * kQuad, of, tap);
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
      // A corner of a far tap, from global memory.
      const auto add_far = [&](float weight, int x, int y) {
        if (x < 0 || y < 0 || x >= int(p.W) || y >= int(p.H)) return;
        float corner[N];
        load<T, N>(at_pixel(map + unit * N, uint32_t(y) * uint32_t(p.W) + uint32_t(x), p.value_stride), corner);
        add(weight, corner);
      };
      const auto add_tap = [&](int place, bool from_map) {
        float corner[N];
        if constexpr (SIDES == 2) {
          const Side tap = reinterpret_cast<const Side*>(staged)[side * plane + place];
          if (from_map) {
            add_far(tap.top, int(tap.at_top) + side, int(tap.at_bottom));
            add_far(tap.bottom, int(tap.at_top) + side, int(tap.at_bottom) + 1);
            return;
          }
          load_shared<T, N>(cells + tap.at_top, corner);
          add(tap.top, corner);
          load_shared<T, N>(cells + tap.at_bottom, corner);
          add(tap.bottom, corner);
        } else {
          const Four<float>* from = reinterpret_cast<const Four<float>*>(staged);
          const Four<float> weights = from[place];
          const uint2 at = reinterpret_cast<const uint2*>(from + plane)[place];
          if (from_map) {
#pragma unroll
            for (int c = 0; c < kCorners; ++c) add_far(weights.v[c], int(at.x) + c % 2, int(at.y) + c / 2);
            return;
          }
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
      const uint32_t far_here = far_ninths >> (turn * kBatch) & 0xffu;
      if ((far[0] | far[1] | far_here) == 0) {
#pragma unroll(unrolled)
        for (int k = 0; k < 2 * kQuad; ++k) add_tap(row + k, false);
        if (TAPS == 9) add_tap(ninth, false);
      } else {
        const uint32_t far_bits =
            (far[0] >> (of_pass * kQuad) & 0xfu) | (far[1] >> (of_pass * kQuad) & 0xfu) << 4 | (far_here >> of_pass & 1) << 8;
#pragma unroll 1
        for (int k = 0; k < TAPS; ++k) add_tap(k == 8 ? ninth : row + k, (far_bits >> k & 1) != 0);
      }

      const TilePixel pixel = items == kBatch ? own : tile_pixel(p, w, o, batch * kBatch + of_pass);
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

template <class T, int UNITS, int SIDES, int TAPS>
int32_t run(const ForwardCall& call, int64_t slices) {
  const dcnv4_problem& p = call.p;
  constexpr int64_t cell = UNITS * 16;
  WindowBytes bytes{cell, 0, staged_bytes<SIDES, TAPS>(), 2 * cell, 1, kWarp * 16 / cell};
  bytes.whole = UNITS == 8;
  const Window w = plan_window(p, slices, bytes);
  if (w.blocks == 0) return DCNV4_NO_KERNEL;
  return launch(sample_window<T, UNITS, SIDES, TAPS>, w.blocks, w.threads, w.shared, call.stream, p, w,
                static_cast<const T*>(call.value), static_cast<const T*>(call.offset_mask), static_cast<T*>(call.output));
}

template <class T, int TAPS>
int32_t run_taps(const ForwardCall& call) {
  const Slicing slicing = slicing_of(call.p);
  // Cells of 128 bytes leave room for few warps beside the halo of a tile: worth while for whole maps. In halves of 64 bytes
  // every tap is worked out twice.
  if constexpr (sizeof(T) == 4) {
    if (slicing.bytes == 128) {
      const int32_t status = run<T, 8, 1, TAPS>(call, slicing.slices);
      if (status != DCNV4_NO_KERNEL || !forced(call.p, kForceWindow)) return status;
    }
  }
  if (slicing.bytes >= 64) return run<T, 4, 1, TAPS>(call, slicing.slices * slicing.bytes / 64);
  if (slicing.bytes == 32) return run<T, 2, 2, TAPS>(call, slicing.slices);
  return DCNV4_NO_KERNEL;
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
