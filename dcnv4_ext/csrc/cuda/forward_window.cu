// The forward kernel for groups of a multiple of 32 bytes and 8 or 9 taps, out of a window in shared memory (window.h).
//
// A thread holds 16 bytes of one pixel's channels, of all four corners or of those on its side. Per tap it reads its weights
// and two places from shared memory, then the corners: a warp reads 512 bytes of cells an instruction without bank conflicts.
#include "forward.h"
#include "window.h"

namespace dcnv4 {
namespace {

// What a thread reads of a tap: weights of its corners, and where the upper and the lower row of them lie in the window.
struct alignas(16) Side {
  float top, bottom;
  uint32_t at_top, at_bottom;
};

// Rows of a batch's taps have odd length, the second plane is half the banks away: threads that read a tap of several pixels
// and both sides touch every bank once.
template <int TAPS>
constexpr DCNV4_HD int plane_length() {
  return kBatch * odd(TAPS) + 4;
}

template <int UNITS, int SIDES, int TAPS>
constexpr DCNV4_HD int64_t staged_bytes() {
  return SIDES == 2 ? 2 * plane_length<TAPS>() * int64_t(sizeof(Side))
                    : plane_length<TAPS>() * int64_t(sizeof(Four<float>) + sizeof(uint2));
}

template <class T, int UNITS, int SIDES, int TAPS>
__global__ void __launch_bounds__(kMostWindowThreads, kWindowBlocks)
    sample_window(const __grid_constant__ dcnv4_problem p, const __grid_constant__ Window w, const T* __restrict__ value,
                  const T* __restrict__ offset_mask, T* __restrict__ output) {
  constexpr int N = 16 / int(sizeof(T)), lanes = UNITS * SIDES, items = kWarp / lanes, cell_bytes = UNITS * 16;
  constexpr int rounds = (kBatch * TAPS + kWarp - 1) / kWarp;
  constexpr int unrolled = UNITS > 2 ? TAPS : sizeof(T) == 4 ? 1 : odd(TAPS) / 3;  // as far as registers allow
  const WindowOrigin o = window_origin(p, w);
  const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, warps = int(blockDim.x) / kWarp;
  const int64_t first_output = o.n * p.Ho * p.Wo;
  const T* runs = offset_mask + first_output * p.offset_mask_stride + o.g * 3 * TAPS;
  const int channel = o.g * int(p.D) + o.slice * UNITS * N;
  const T* map = value + o.n * p.H * p.W * p.value_stride + channel;
  T* result = output + first_output * p.output_stride + channel;

  // The window; behind it two rows whose first two cells are zeros, for taps that add nothing; then each warp's taps.
  char* window = dynamic_shared();
  const uint32_t pitch_bytes = uint32_t(w.pitch) * cell_bytes, nowhere = pitch_bytes * uint32_t(w.height);
  char* staged = window + nowhere + pitch_bytes + 2 * cell_bytes + warp * staged_bytes<UNITS, SIDES, TAPS>();
  fetch_window<UNITS>(p, w, o, map, window);
  clear_nowhere<cell_bytes>(window + nowhere, pitch_bytes);
  TapSlot slots[rounds];
#pragma unroll
  for (int r = 0; r < rounds; ++r) slots[r] = tap_slot<T, TAPS>(p, w, r * kWarp + lane);
  copy_async_wait();
  __syncthreads();

  const int item = lane / lanes, unit = lane % UNITS, side = SIDES == 2 ? lane / UNITS % 2 : 0;
  const char* cells = window + side * cell_bytes + unit * 16;
  for (int batch = warp; batch * kBatch < w.pixels; batch += warps) {
    uint32_t far[rounds];
    work_out_taps<T, TAPS, kBatch>(p, w, o, runs, batch, slots, far, [&](int, const TapSlot& slot, const WindowTap& tap) {
      Corners<float> weights = corner_weights(tap.lx, tap.ly, tap.weight, 1.0f);
      // The zeros outside the map do not make a weight of infinity harmless.
      const Inside inside(p, o, tap);
      if (!inside.left) weights.w00 = weights.w10 = 0;
      if (!inside.right) weights.w01 = weights.w11 = 0;
      if (!inside.top) weights.w00 = weights.w01 = 0;
      if (!inside.bottom) weights.w10 = weights.w11 = 0;
      // Of a far tap, its cell in the map instead of places in the window.
      const bool far_tap = tap.used && !tap.near;
      const uint32_t at_top = tap.near ? uint32_t(tap.y * w.pitch + tap.x) * cell_bytes : nowhere;
      const uint32_t far_x = uint32_t(tap.x + o.x), far_y = uint32_t(tap.y + o.y);
      const int place = slot.of * odd(TAPS) + slot.k;
      if constexpr (SIDES == 2) {
        Side* to = reinterpret_cast<Side*>(staged) + place;
        const uint32_t upper = far_tap ? far_x : at_top, lower = far_tap ? far_y : at_top + pitch_bytes;
        to[0] = {weights.w00, weights.w10, upper, lower};
        to[plane_length<TAPS>()] = {weights.w01, weights.w11, upper, lower};
      } else {
        // Two pixels share the banks where a cell takes half of them: one reads cells of even number first, the other of odd.
        const bool swap = UNITS == 4 && !far_tap && ((at_top / cell_bytes + uint32_t(slot.of)) & 1) != 0;
        const uint32_t left = swap ? at_top + cell_bytes : at_top, right = swap ? at_top : at_top + cell_bytes;
        Four<float>* to = reinterpret_cast<Four<float>*>(staged);
        to[place] = {{swap ? weights.w01 : weights.w00, swap ? weights.w00 : weights.w01, swap ? weights.w11 : weights.w10,
                      swap ? weights.w10 : weights.w11}};
        reinterpret_cast<uint2*>(to + plane_length<TAPS>())[place] =
            make_uint2(far_tap ? far_x : left, far_tap ? far_y : right);
      }
    });
    __syncwarp();
    bool any_far = false;
#pragma unroll
    for (int r = 0; r < rounds; ++r) any_far |= far[r] != 0;

#pragma unroll 1
    for (int pass = 0; pass < kBatch; pass += items) {
      float sums[N] = {};
      const int row = (pass + item) * odd(TAPS);
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
      const auto add_tap = [&](int k, bool from_map) {
        float corner[N];
        if constexpr (SIDES == 2) {
          const Side tap = reinterpret_cast<const Side*>(staged)[side * plane_length<TAPS>() + row + k];
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
          const Four<float> weights = from[row + k];
          const uint2 at = reinterpret_cast<const uint2*>(from + plane_length<TAPS>())[row + k];
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
      const TilePixel pixel = tile_pixel(p, w, o, batch * kBatch + pass + item);
      if (!any_far) {
#pragma unroll(unrolled)
        for (int k = 0; k < TAPS; ++k) add_tap(k, false);
      } else {
        const uint32_t far_bits = far_taps<TAPS>(far, pass + item);
#pragma unroll 1
        for (int k = 0; k < TAPS; ++k) add_tap(k, (far_bits >> k & 1) != 0);
      }

      T* to = at_pixel(result, output_pixel(p, pixel.ho, pixel.wo), p.output_stride) + unit * N;
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
  WindowBytes bytes{cell, 0, staged_bytes<UNITS, SIDES, TAPS>(), 2 * cell, 1};
  bytes.whole = UNITS == 8;
  const Window w = plan_window(p, slices, bytes);
  if (w.blocks == 0) return DCNV4_NO_KERNEL;
  return launch(sample_window<T, UNITS, SIDES, TAPS>, w.blocks, w.threads, w.shared, call.stream, p, w,
                static_cast<const T*>(call.value), static_cast<const T*>(call.offset_mask), static_cast<T*>(call.output));
}

template <class T, int TAPS>
int32_t run_taps(const ForwardCall& call) {
  const Slicing slicing = slicing_of(call.p);
  // Cells of 128 bytes leave room for few warps beside the halo of a tile: worth while for whole maps.
  if constexpr (sizeof(T) == 4)
    if (slicing.bytes == 128) return run<T, 8, 1, TAPS>(call, slicing.slices);
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
