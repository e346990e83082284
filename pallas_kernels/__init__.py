"""Pallas kernels of sparse_mla_jax: what runs on the GPU. Users call `sparse_mla_jax.ops`, never this package."""
