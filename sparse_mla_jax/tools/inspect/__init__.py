"""Costs of kernels and whole steps on gfx942 and gfx950, compiled and executed without such a GPU."""
