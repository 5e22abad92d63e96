// The C interface of the DCNv4 kernels. It knows no torch: plain pointers, one struct a problem, one function a direction and
// device, a status code back. The CPU and the CUDA library export the functions of their own device.
#pragma once
#include <stdint.h>

#if defined(_WIN32)
#define DCNV4_API __declspec(dllexport)
#else
#define DCNV4_API __attribute__((visibility("default")))
#endif

// Raised by one whenever a struct, a function or the meaning of an argument changes; Python refuses a library of another
// version.
#define DCNV4_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { DCNV4_FLOAT32 = 0, DCNV4_FLOAT64 = 1, DCNV4_BFLOAT16 = 2, DCNV4_FLOAT16 = 3 } dcnv4_dtype;

typedef enum {
  DCNV4_OK = 0,
  DCNV4_BAD_PROBLEM = 1,    // sizes that contradict each other or pass an index limit
  DCNV4_OUT_OF_MEMORY = 2,  // host scratch could not be had
  DCNV4_NO_KERNEL = 3,      // this build or this processor has no kernel for it
  DCNV4_CUDA_ERROR = 1000   // 1000 + cudaError_t
} dcnv4_status;

// Names: N images, H x W value map, G groups of D channels, Ho x Wo output map, P channels of offset_mask, K taps.
// Strides are in elements between neighbouring pixels of one row; rows and images follow each other without gaps, so that
// pixel (n, h, w) of `value` starts at ((n * H + h) * W + w) * value_stride.
typedef struct {
  int32_t abi_version;  // DCNV4_ABI_VERSION
  int32_t dtype;        // dcnv4_dtype of every tensor
  int64_t N, H, W, G, D, Ho, Wo, P;
  int64_t value_stride, offset_mask_stride, output_stride;  // output_stride also serves grad_output
  int64_t grad_value_stride, grad_offset_mask_stride;
  int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int32_t remove_center;  // leave out the tap (kernel_w / 2, kernel_h / 2)
  int32_t softmax;        // normalise the K weights of a group (DCNv3)
  int32_t deterministic;  // CUDA: no atomics in an order that changes from run to run
  int32_t threads;        // CPU: threads to use, at least 1
  int32_t device;         // CUDA: device ordinal
  int32_t reserved;       // 0; CUDA tests and benchmarks force a kernel with it (cuda/launch.h)
  double offset_scale;
} dcnv4_problem;

// ---- CPU library
DCNV4_API int32_t dcnv4_cpu_abi(void);
// Instruction sets this build can run on this processor, best first, separated by spaces ("avx512 avx2 portable").
DCNV4_API const char* dcnv4_cpu_isas(void);
// Choose one of them; NULL or "" chooses the best. Returns DCNV4_NO_KERNEL for a name that is not in the list.
DCNV4_API int32_t dcnv4_cpu_select(const char* isa);
DCNV4_API const char* dcnv4_cpu_selected(void);
DCNV4_API int32_t dcnv4_cpu_forward(const dcnv4_problem* problem, const void* value, const void* offset_mask, void* output);
// Either gradient may be NULL. Every element of a gradient is written, the padding channels of grad_offset_mask with zeros.
DCNV4_API int32_t dcnv4_cpu_backward(const dcnv4_problem* problem, const void* value, const void* offset_mask,
                                     const void* grad_output, void* grad_value, void* grad_offset_mask);

// ---- CUDA library. Nothing allocates or synchronises; work goes to `stream` (a cudaStream_t) on `problem->device`.
DCNV4_API int32_t dcnv4_cuda_abi(void);
// Architectures in this build, separated by spaces ("sm_80 sm_90 compute_90").
DCNV4_API const char* dcnv4_cuda_architectures(void);
// The CUDA runtime's name and text of a status of DCNV4_CUDA_ERROR or above.
DCNV4_API const char* dcnv4_cuda_error_string(int32_t status);
DCNV4_API int32_t dcnv4_cuda_forward(const dcnv4_problem* problem, const void* value, const void* offset_mask, void* output,
                                     void* stream);
// Bytes of device memory (256-byte aligned, contents arbitrary) that backward needs; 0 if none, negative: -status.
DCNV4_API int64_t dcnv4_cuda_backward_workspace(const dcnv4_problem* problem, int32_t need_value, int32_t need_offset_mask);
DCNV4_API int32_t dcnv4_cuda_backward(const dcnv4_problem* problem, const void* value, const void* offset_mask,
                                      const void* grad_output, void* grad_value, void* grad_offset_mask, void* workspace,
                                      void* stream);

#ifdef __cplusplus
}
#endif
