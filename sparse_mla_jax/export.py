"""Exporting a step with `jax.export`: naming the machines whose kernels the program holds, and the check to switch off.

    with lower_for("rocm:gfx942"):
        exported = jax.export.export(step, platforms=["rocm"], disabled_checks=KERNEL_CHECKS)(*shapes)

Without `lower_for`, a host without GPUs knows no machine to make kernels for: `implementation=None` then means the XLA
body, and `"triton"` an error of jax when it lowers for ROCm or CUDA. Caches, metadata and rows may be arguments and
results: they are registered for serialisation. `Exported.serialize` needs the package flatbuffers.
"""

from __future__ import annotations

from jax.export import DisabledSafetyCheck

from pallas_kernels.targets import lower_for

__all__ = ["KERNEL_CHECKS", "lower_for"]

# jax promises stability only for custom calls that it lists, and Triton's is not among them: whoever loads the program
# must use a jaxlib that reads the same Triton IR, best the release that exported it.
KERNEL_CHECKS = (DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton"),)
