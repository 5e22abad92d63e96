"""The CUDA kernels on the CPU: the same sources, compiled with a small emulation of threads, barriers and votes."""
