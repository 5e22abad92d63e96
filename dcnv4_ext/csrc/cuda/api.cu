// What the CUDA library says about itself.
#include <cuda_runtime.h>

#include <algorithm>
#include <string>

#include "../dcnv4.h"

namespace {

// The build passes what CMake was given ("80-real 90-real 90-virtual 100"); here it reads "sm_80 sm_90 compute_90 sm_100
// compute_100", since a plain number stands for both.
#if defined(DCNV4_CUDA_ARCHITECTURES)
constexpr const char* kArchitectures = DCNV4_CUDA_ARCHITECTURES;
#else
constexpr const char* kArchitectures = "";
#endif

std::string readable(const std::string& architectures) {
  std::string text;
  for (size_t begin = 0; begin < architectures.size();) {
    const size_t end = std::min(architectures.find_first_of(" ;", begin), architectures.size());
    const std::string entry = architectures.substr(begin, end - begin);
    const std::string number = entry.substr(0, entry.find('-'));
    begin = end + 1;
    if (number.empty()) continue;
    if (entry.find("-virtual") == std::string::npos) text += (text.empty() ? "sm_" : " sm_") + number;
    if (entry.find("-real") == std::string::npos) text += (text.empty() ? "compute_" : " compute_") + number;
  }
  return text;
}

}  // namespace

int32_t dcnv4_cuda_abi(void) { return DCNV4_ABI_VERSION; }

const char* dcnv4_cuda_architectures(void) {
  static const std::string text = readable(kArchitectures);
  return text.c_str();
}

const char* dcnv4_cuda_error_string(int32_t status) {
  thread_local std::string text;
  if (status < DCNV4_CUDA_ERROR) return "";
  const cudaError_t error = cudaError_t(status - DCNV4_CUDA_ERROR);
  text = std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
  return text.c_str();
}
