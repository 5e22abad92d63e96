// The ways to the output, for forward.cu to choose from.
#pragma once
#include "launch.h"

namespace dcnv4 {

struct ForwardCall {
  const dcnv4_problem& p;
  const void *value, *offset_mask;
  void* output;
  cudaStream_t stream;
};

// Out of a window in shared memory; DCNV4_NO_KERNEL where it cannot be or is not worth while.
int32_t forward_window(const ForwardCall& call);

}  // namespace dcnv4
