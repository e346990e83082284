"""What kernels and whole steps cost on gfx942 and gfx950, compiled and executed without one."""
