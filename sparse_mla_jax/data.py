"""Moved to `sparse_mla_jax.tools.text`; this name stays for one release."""

from sparse_mla_jax.tools.text import *  # noqa: F403
