// Runs problems from a file through the CPU kernels, on whatever platform this was compiled for, and writes what they gave:
//     driver INSTRUCTION_SET PROBLEMS RESULTS
// Of a problem PROBLEMS holds the struct, value, offset_mask and grad_output, each behind its length in bytes; RESULTS then
// holds output, grad_value and grad_offset_mask likewise. See tests/test_portability.py.
#include <cstdio>
#include <vector>

#include "../../dcnv4_ext/csrc/dcnv4.h"

namespace {

using Bytes = std::vector<char>;

bool read(std::FILE* file, Bytes& bytes) {
  int64_t length = 0;
  if (std::fread(&length, sizeof length, 1, file) != 1) return false;
  bytes.resize(size_t(length));
  return std::fread(bytes.data(), 1, bytes.size(), file) == bytes.size();
}

bool write(std::FILE* file, const Bytes& bytes) {
  const int64_t length = int64_t(bytes.size());
  return std::fwrite(&length, sizeof length, 1, file) == 1 && std::fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size();
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4 || dcnv4_cpu_select(arguments[1]) != DCNV4_OK) {
    std::fprintf(stderr, "this build has %s\n", dcnv4_cpu_isas());
    return 2;
  }
  std::FILE *problems = std::fopen(arguments[2], "rb"), *results = std::fopen(arguments[3], "wb");
  if (!problems || !results) return 2;
  Bytes problem, value, offset_mask, gradient;
  while (read(problems, problem)) {
    if (problem.size() != sizeof(dcnv4_problem)) return 3;
    const dcnv4_problem& p = *reinterpret_cast<const dcnv4_problem*>(problem.data());
    if (!read(problems, value) || !read(problems, offset_mask) || !read(problems, gradient)) return 3;
    Bytes output(gradient.size()), grad_value(value.size()), grad_offset_mask(offset_mask.size());
    const int32_t forward = dcnv4_cpu_forward(&p, value.data(), offset_mask.data(), output.data());
    const int32_t backward =
        dcnv4_cpu_backward(&p, value.data(), offset_mask.data(), gradient.data(), grad_value.data(), grad_offset_mask.data());
    if (forward != DCNV4_OK || backward != DCNV4_OK) return 4;
    if (!write(results, output) || !write(results, grad_value) || !write(results, grad_offset_mask)) return 3;
  }
  return std::fclose(results) == 0 ? 0 : 3;
}
