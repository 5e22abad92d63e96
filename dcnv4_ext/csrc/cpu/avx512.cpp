// AVX-512 without AVX512_BF16.
#include <immintrin.h>

#include <cmath>

#include "plan.h"

namespace dcnv4 {
namespace avx512 {

#include "avx512.h"
#include "kernels.h"

}  // namespace avx512

extern const CpuKernels kAvx512Kernels, kAvx512CellsKernels;
const CpuKernels kAvx512Kernels = {"avx512", avx512::forward_any<avx512::F32, avx512::F64>,
                                   avx512::backward_any<avx512::F32, avx512::F64>};
// The same with backward by cells: for processors that store little in a cycle beside what they compute.
const CpuKernels kAvx512CellsKernels = {"avx512", avx512::forward_any<avx512::F32, avx512::F64>,
                                        avx512::backward_any<avx512::F32, avx512::F64, true>};
}  // namespace dcnv4
