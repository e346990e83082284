"""`serving.scoring` under its old name, kept for one release."""

from sparse_mla_jax.serving.scoring import *  # noqa: F403
