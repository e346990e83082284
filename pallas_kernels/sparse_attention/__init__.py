"""Sparse latent attention: `launch` chooses a kernel (`fp8`, `float16` or `planes`), runs it and merges splits."""

from pallas_kernels.sparse_attention.launch import sparse_attention
from pallas_kernels.sparse_attention.planes import Tile, layout
from pallas_kernels.sparse_attention.rows import Source

__all__ = ["Source", "Tile", "layout", "sparse_attention"]
