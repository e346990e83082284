"""Kernels for AMD's CDNA GPUs without one: compiled, inspected, and executed by our interpreter."""
