"""DeepSeek Sparse Attention for JAX: exact top-k selection and sparse latent attention over paged FP8 caches."""

__version__ = "0.1.0"
