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


def require_cramjam():
    """The module that packs and unpacks Snappy; without it the test is skipped, with the same line."""
    return pytest.importorskip("cramjam", reason=f"cramjam is not installed: {toolchain.extra()}")
