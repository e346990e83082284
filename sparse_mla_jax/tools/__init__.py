"""The commands: demo, generate, score, benchmarks, inspection of kernels and steps."""
