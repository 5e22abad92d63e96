// The ways to the gradients, for backward.cu to choose from. To the gradient of `value` each adds
//     weight of the tap * weight of the corner * grad_output[n, ho, wo, g, :]
// to the cell of every corner inside the map.
#pragma once
#include "errand.h"
#include "launch.h"

namespace dcnv4 {

struct BackwardCall {
  const dcnv4_problem& p;
  const void *value, *offset_mask, *grad_output;
  void *grad_value, *grad_offset_mask;  // either may be null
  void* workspace;
  cudaStream_t stream;
};

// The gradient of offset_mask alone, out of a window in shared memory (backward_window.cu), and an errand; DCNV4_NO_KERNEL
// where it cannot be or is not worth while. In halves that other work may lie between: not where there are too few blocks for
// two launches.
enum class Part { all, first, second };
int32_t differentiate_window(const BackwardCall& call, Part part, const Errand& errand, Ahead ahead);

// Tile-merged (scatter_tiled.cu): adds into `sums` (fp32, rows of `sums_stride` elements), which the caller has zeroed. D must
// be a multiple of 4, rows of grad_output and sums aligned for 4 elements.
bool can_scatter_tiled(const dcnv4_problem& p);
int32_t scatter_tiled(const BackwardCall& call, float* sums, int64_t sums_stride);

// Sorted (scatter_sorted.cu): where a block has a `whole` map it writes grad_value itself (`sums` is null), else it adds into
// `sums` like tiles do. Rows aligned for 16 bytes.
enum class Sorted { no, tiles, whole };
Sorted can_scatter_sorted(const dcnv4_problem& p);
int32_t scatter_sorted(const BackwardCall& call, float* sums, int64_t sums_stride, Ahead ahead);

// Ordered (scatter_ordered.cu): writes grad_value itself, the same bits at every run.
int64_t ordered_workspace(const dcnv4_problem& p);
int32_t scatter_ordered(const BackwardCall& call);

}  // namespace dcnv4
