"""Hides one message of jax: that a plugin for AMD GPUs, installed for its compiler, finds no such GPU.

The extra `cdna` installs jax's ROCm plugin on machines without an AMD GPU. jax then logs an error with a traceback when
it first looks for devices, although nothing is wrong. JAX_PLATFORMS=cpu would not prevent it, and a library must not
choose a platform anyway. So a filter drops this one record, and only where the kernel has no driver of an AMD GPU;
jax's other records pass.
"""

from __future__ import annotations

import os

# For type checkers, which know the name: `typing` takes longer to import than this package.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import logging

# jax's logger of messages about plugins, and how the exception of the plugin begins.
LOGGER = "jax._src.xla_bridge"
NO_GPU = "No AMD GPUs were found"
# The kernel's driver of AMD GPUs, on Linux and on Windows' Linux: where one is, the message says what is wrong.
DRIVERS = ("/dev/kfd", "/dev/dxg")


def passes(record: logging.LogRecord) -> bool:
    """Whether a log record is to be shown."""
    error = record.exc_info[1] if record.exc_info else None
    return not str(error).startswith(NO_GPU) or any(map(os.path.exists, DRIVERS))


def hide_plugin_message() -> None:
    """Installs the filter; a second call changes nothing."""
    import logging

    logging.getLogger(LOGGER).addFilter(passes)
