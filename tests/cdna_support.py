"""What the tests of machine code share."""

import functools

import pytest

from pallas_kernels.cdna import toolchain


@functools.cache
def _reason(compiler):
    return toolchain.available(compiler)


def require_cdna(compiler):
    """Skips a test whose compiler is not installed, with the line that says how to get it."""
    reason = _reason(compiler)
    if reason:
        pytest.skip(reason)
