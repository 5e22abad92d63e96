#!/usr/bin/env bash
# Builds the official operator (its folder DCNv4_op, the working directory) for a current PyTorch, in place: a header and macros that
# it asks for are gone. Its arithmetic is left alone. benchmarks/gpu.py runs this where the sources bring no build.sh of their own.
set -euo pipefail
if [ ! -e patched ]; then # once: what is not newer than its object is not compiled again
  sed -i.before -e 's#<THC/THCAtomics.cuh>#<ATen/cuda/Atomic.cuh>#' -e 's/AT_ASSERTM/TORCH_CHECK/' \
    -e 's/AT_ERROR(/TORCH_CHECK(false, /' -e 's/\.type()\.is_cuda()/.is_cuda()/' -e 's/value\.type(),/value.scalar_type(),/' \
    -e 's/\.data<opmath_t>()/.data_ptr<opmath_t>()/' src/*.h src/cuda/*.cu src/cuda/*.cuh src/cuda/*.h
  touch patched
fi
"${PYTHON:-python3}" setup.py build_ext --inplace
