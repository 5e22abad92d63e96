// The CPU library's door: which instruction sets this processor runs, the choice among them, the last check of a problem.
#include <string>

#include "../check.h"
#include "plan.h"

#if defined(DCNV4_X86) && defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#elif defined(DCNV4_X86)
#include <cpuid.h>
#endif

namespace dcnv4 {
extern const CpuKernels kAvx512WideKernels, kAvx512Bf16Kernels, kAvx512Bf16CellsKernels, kAvx512Kernels, kAvx512CellsKernels,
    kAvx2Kernels, kPortableKernels;

namespace {

#if defined(DCNV4_X86) && defined(_MSC_VER)
bool bit(int leaf, int word, int position) {
  int words[4];
  __cpuidex(words, leaf, 0);
  return words[word] >> position & 1;
}
// The operating system must save the wide registers as well: bits 1, 2 of XCR0 for AVX, 5 to 7 for AVX-512.
bool saves(unsigned long long mask) { return bit(1, 2, 27) && (_xgetbv(0) & mask) == mask; }
bool has_avx2() { return saves(0x6) && bit(1, 2, 12) && bit(1, 2, 29) && bit(7, 1, 5); }
bool has_avx512() { return has_avx2() && saves(0xe6) && bit(7, 1, 16) && bit(7, 1, 17) && bit(7, 1, 30) && bit(7, 1, 31); }
bool has_avx512_bf16() {
  int words[4];
  __cpuidex(words, 7, 1);
  return has_avx512() && (words[0] >> 5 & 1);
}
#elif defined(DCNV4_X86)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#if defined(DCNV4_AVX512_BF16)
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif
#endif

#if defined(DCNV4_X86)
struct CpuId {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit CpuId(int leaf) {
#if defined(_MSC_VER)
    int words[4];
    __cpuid(words, leaf);
    memcpy(this, words, sizeof words);
#else
    __get_cpuid(leaf, &eax, &ebx, &ecx, &edx);
#endif
  }
};

// Backward by cells was measured on AMD's Zen 5, pixel by pixel on an Intel Xeon (Emerald Rapids); Zen 4, which stores 512 bits
// only every second cycle, is taken for one of its family.
bool goes_by_cells() {
  constexpr unsigned kAuth = 0x68747541;  // of "AuthenticAMD"
  return CpuId(0).ebx == kAuth;
}

#if defined(DCNV4_AVX512_BF16)
// Zen 5 (family 1Ah) was measured: four pipes of 512 bits take bf16 channels apart beside two loads. Others have two such
// pipes, or pipes of half that width.
bool takes_channels_apart() {
  const unsigned version = CpuId(1).eax;
  return goes_by_cells() && (version >> 8 & 0xf) + (version >> 20 & 0xff) >= 0x1a;
}
#endif
#endif

struct Choice {
  const CpuKernels* available[5];
  int count = 0;
  std::string names;
  std::atomic<const CpuKernels*> selected;
  Choice() {
#if defined(DCNV4_X86)
#if defined(DCNV4_AVX512_BF16)
    if (has_avx512_bf16()) {
      available[count++] = &kAvx512WideKernels;
      available[count++] = goes_by_cells() ? &kAvx512Bf16CellsKernels : &kAvx512Bf16Kernels;
      if (!takes_channels_apart()) std::swap(available[0], available[1]);
    }
#endif
    if (has_avx512()) available[count++] = goes_by_cells() ? &kAvx512CellsKernels : &kAvx512Kernels;
    if (has_avx2()) available[count++] = &kAvx2Kernels;
#endif
    available[count++] = &kPortableKernels;
    for (int i = 0; i < count; ++i) names += (i ? " " : "") + std::string(available[i]->name);
    selected = available[0];
  }
};
Choice& choice() {
  static Choice instance;
  return instance;
}

int32_t check(const dcnv4_problem& p) {
  if (const int32_t status = check_sizes(p)) return status;
  // Cells of one packed map are numbered in 32 bits.
  if (p.threads < 1 || (p.H + 4) * (p.W + 2) > INT32_MAX) return DCNV4_BAD_PROBLEM;
  return DCNV4_OK;
}

}  // namespace
}  // namespace dcnv4

using namespace dcnv4;

int32_t dcnv4_cpu_abi(void) { return DCNV4_ABI_VERSION; }

const char* dcnv4_cpu_isas(void) { return choice().names.c_str(); }

int32_t dcnv4_cpu_select(const char* isa) {
  Choice& c = choice();
  if (!isa || !*isa) {
    c.selected = c.available[0];
    return DCNV4_OK;
  }
  for (int i = 0; i < c.count; ++i)
    if (!strcmp(c.available[i]->name, isa)) {
      c.selected = c.available[i];
      return DCNV4_OK;
    }
  return DCNV4_NO_KERNEL;
}

const char* dcnv4_cpu_selected(void) { return choice().selected.load()->name; }

int32_t dcnv4_cpu_forward(const dcnv4_problem* problem, const void* value, const void* offset_mask, void* output) {
  if (!problem) return DCNV4_BAD_PROBLEM;
  const int32_t status = check(*problem);
  if (status != DCNV4_OK || problem->N == 0) return status;
  if (!value || !offset_mask || !output) return DCNV4_BAD_PROBLEM;
  return choice().selected.load()->forward(*problem, value, offset_mask, output);
}

int32_t dcnv4_cpu_backward(const dcnv4_problem* problem, const void* value, const void* offset_mask, const void* grad_output,
                           void* grad_value, void* grad_offset_mask) {
  if (!problem) return DCNV4_BAD_PROBLEM;
  const int32_t status = check(*problem);
  if (status != DCNV4_OK || problem->N == 0 || (!grad_value && !grad_offset_mask)) return status;
  if (const int32_t wrong = check_gradients(*problem, grad_value, grad_offset_mask)) return wrong;
  if (!value || !offset_mask || !grad_output) return DCNV4_BAD_PROBLEM;
  return choice().selected.load()->backward(*problem, value, offset_mask, grad_output, grad_value, grad_offset_mask);
}
