// Stands in for the CUDA toolkit's header of this name when the kernels are compiled for the CPU.
#include "host_cuda.h"
