"""Exporting a step with `jax.export`: naming the machines whose kernels the program holds, and the check to switch off.

    with lower_for("rocm:gfx942"):
        exported = jax.export.export(step, platforms=["rocm"], disabled_checks=kernel_checks())(*shapes)

Without `lower_for`, a host without GPUs knows no machine to make kernels for: `implementation=None` then means the XLA
body, and `"triton"` an error of jax when it lowers for ROCm or CUDA. Caches, metadata and rows may be arguments and
results: they are registered for serialisation. `Exported.serialize` needs the package flatbuffers.
"""

from __future__ import annotations

from jax.export import DisabledSafetyCheck

from pallas_kernels.targets import lower_for

__all__ = ["kernel_checks", "lower_for"]


def kernel_checks() -> tuple[DisabledSafetyCheck, ...]:
    """The value of `disabled_checks` with which `jax.export.export` accepts kernels.

    jax keeps exported programs readable for months, but only if their custom calls are on its list; Triton's is not.
    Load such a program with a jaxlib that reads the same Triton IR, best with the release that exported it.
    """
    return (DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton"),)
