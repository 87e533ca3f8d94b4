"""Time on a GPU, peak memory on a CPU: `python -m copd_kernels.benchmarks`."""
