"""The name of `models.mla` in the releases that read one family of latent attention."""

from sparse_mla_jax.models.mla import *  # noqa: F403
