"""Options that are chosen by name. This file imports nothing, so that the command line's `--help` is quick."""

# Types of weights and activations.
DTYPES = ("float32", "bfloat16")
CACHE_DTYPES = ("float32", "bfloat16", "float8_e4m3fnuz", "float8_e4m3fn")
# Implementations of an operator.
IMPLEMENTATIONS = ("triton", "xla", "reference")
