"""The GPU kernels of sparse_mla_jax, written in Pallas. Users call `sparse_mla_jax.ops`, never this package."""
