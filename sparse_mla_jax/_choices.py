"""What may be chosen by name. The command line reads this file alone, so that `--help` is quick: it imports nothing."""

# Types of weights and activations.
DTYPES = ("float32", "bfloat16")
CACHE_DTYPES = ("float32", "bfloat16", "float8_e4m3fnuz", "float8_e4m3fn")
# Bodies of an operator.
IMPLEMENTATIONS = ("triton", "xla", "reference")
