"""What people run: the demo, generation, benchmarks, inspection of kernels and steps."""
