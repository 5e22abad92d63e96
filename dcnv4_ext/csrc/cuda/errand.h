// What a kernel does beside its own work, which leaves memory idle: its blocks, a share each, clear the fp32 sums of the
// gradient of `value` before another kernel adds to them, or round them to the storage type afterwards.
#pragma once
#include "launch.h"

namespace dcnv4 {

constexpr int kErrandStep = 4;  // sums that a thread takes at once

struct Errand {
  float* sums;
  void* rounded;  // null: the sums are cleared
  int64_t sums_stride, rounded_stride;
  uint32_t vectors, share;  // runs of kErrandStep sums, 0 for no errand; of a block, set by divide_errand
  uint32_t late_blocks;     // so many blocks start before the kernel ahead has ended; the others share the errand
  Divisor by_row;
};

// Rows of `channels` sums, to be rounded without gaps between them; no errand where they cannot be taken kErrandStep at a time,
// or are too many to be counted.
inline Errand make_errand(int64_t rows, int64_t channels, float* sums, int64_t sums_stride, void* rounded,
                          int64_t rounded_stride, int64_t rounded_bytes) {
  Errand errand{};
  if (channels % kErrandStep != 0 || !aligned(sums, sums_stride, sizeof(float), kErrandStep * sizeof(float))) return errand;
  if (rounded && (sums_stride != channels || !aligned(rounded, rounded_stride, rounded_bytes, kErrandStep * rounded_bytes)))
    return errand;
  if (rows > INT32_MAX / (channels / kErrandStep)) return errand;
  errand.sums = sums;
  errand.rounded = rounded;
  errand.sums_stride = sums_stride;
  errand.rounded_stride = rounded_stride;
  errand.vectors = uint32_t(rows * (channels / kErrandStep));
  errand.by_row = divisor_of(channels / kErrandStep);
  return errand;
}

// With `late` the first wave of blocks starts early, unless too few would be left for the errand.
inline Errand divide_errand(Errand errand, int64_t blocks, int64_t resident, bool late) {
  if (late && (errand.vectors == 0 || blocks >= 3 * resident)) errand.late_blocks = uint32_t(std::min(blocks, resident));
  errand.share = errand.vectors == 0 ? 0 : uint32_t(divide_up(errand.vectors, blocks - errand.late_blocks));
  return errand;
}

// A block's share.
template <class T>
DCNV4_DEVICE void run_errand(const Errand& errand) {
  const uint32_t first = (blockIdx.x - errand.late_blocks) * errand.share, end = min(first + errand.share, errand.vectors);
  const auto in_rows = [&](uint32_t i, int64_t stride) {
    const uint32_t row = errand.by_row.quotient(i);
    return int64_t(row) * stride + (i - row * errand.by_row.divisor) * kErrandStep;
  };
  if (!errand.rounded) {
    const float zeros[kErrandStep] = {};
    for (uint32_t i = first + threadIdx.x; i < end; i += blockDim.x)
      store<float, kErrandStep>(errand.sums + in_rows(i, errand.sums_stride), zeros);
  } else if constexpr (sizeof(T) == 2) {
    constexpr uint32_t at_once = 4;  // each waits for memory
    T* rounded = static_cast<T*>(errand.rounded);
    const float* from = errand.sums + int64_t(first + threadIdx.x) * kErrandStep;
    for (uint32_t i = first + threadIdx.x; i < end; i += at_once * blockDim.x) {
      float sums[at_once][kErrandStep];
#pragma unroll
      for (uint32_t j = 0; j < at_once; ++j, from += blockDim.x * kErrandStep)
        if (i + j * blockDim.x < end) load_written<float, kErrandStep>(from, sums[j]);
#pragma unroll
      for (uint32_t j = 0; j < at_once; ++j)
        if (i + j * blockDim.x < end)
          store<T, kErrandStep>(rounded + in_rows(i + j * blockDim.x, errand.rounded_stride), sums[j]);
    }
  }
}

}  // namespace dcnv4
