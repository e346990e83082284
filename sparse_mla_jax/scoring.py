"""The former name of `sparse_mla_jax.serving.scoring`, kept for one release."""

from sparse_mla_jax.serving.scoring import *  # noqa: F403
