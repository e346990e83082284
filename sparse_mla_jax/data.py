"""The former name of `sparse_mla_jax.tools.text`, kept for one release."""

from sparse_mla_jax.tools.text import *  # noqa: F403
