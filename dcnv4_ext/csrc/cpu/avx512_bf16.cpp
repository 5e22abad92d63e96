// AVX-512 with AVX512_BF16: bf16 problems; the others are those of AVX-512.
#include <immintrin.h>

#include <cmath>

#include "plan.h"

#define DCNV4_BF16_INSTRUCTIONS

namespace dcnv4 {
extern const CpuKernels kAvx512Kernels;

namespace avx512_bf16 {

#include "avx512.h"
#include "kernels.h"

namespace {

int32_t forward_of(const dcnv4_problem& p, const void* value, const void* offset_mask, void* output) {
  return p.dtype == DCNV4_BFLOAT16 ? forward<F32, bf16>(p, value, offset_mask, output)
                                   : kAvx512Kernels.forward(p, value, offset_mask, output);
}

int32_t backward_of(const dcnv4_problem& p, const void* value, const void* offset_mask, const void* grad_output,
                    void* grad_value, void* grad_offset_mask) {
  return p.dtype == DCNV4_BFLOAT16 ? backward<F32, bf16>(p, value, offset_mask, grad_output, grad_value, grad_offset_mask)
                                   : kAvx512Kernels.backward(p, value, offset_mask, grad_output, grad_value, grad_offset_mask);
}

}  // namespace
}  // namespace avx512_bf16

extern const CpuKernels kAvx512Bf16Kernels;
const CpuKernels kAvx512Bf16Kernels = {"avx512_bf16", avx512_bf16::forward_of, avx512_bf16::backward_of};
}  // namespace dcnv4
