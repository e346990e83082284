"""Exporting a step with `jax.export`: naming the machines whose kernels the program holds, and the check to switch off.

    with lower_for("rocm:gfx942"):
        exported = jax.export.export(step, platforms=["rocm"], disabled_checks=kernel_checks())(*shapes)

Without `lower_for`, a host without GPUs knows no machine to make kernels for: `implementation=None` then means the XLA
body, and `"triton"` an error of jax when it lowers for ROCm or CUDA. Caches, metadata and rows may be arguments and
results: they are registered for serialisation. `Exported.serialize` needs the package flatbuffers.

A step on a mesh is exported in the same way, for as many devices as the mesh has. If experts lie over "data", export a
program for CPUs and one for GPUs: XLA:CPU fails on the branch of a program for both that only a GPU takes.
"""

from __future__ import annotations

from jax.export import DisabledSafetyCheck

from pallas_kernels.targets import lower_for

__all__ = ["kernel_checks", "lower_for"]


def kernel_checks() -> tuple[DisabledSafetyCheck, ...]:
    """The value of `disabled_checks` with which `jax.export.export` accepts kernels, and steps on a mesh.

    jax keeps exported programs readable for months, but only if their custom calls are on its list. Triton's is not,
    nor is `jax.lax.ragged_all_to_all`, which carries tokens to experts on other devices. Load such a program with a
    jaxlib that reads the same Triton IR, best with the release that exported it.
    """
    return tuple(DisabledSafetyCheck.custom_call(name) for name in ("__gpu$xla.gpu.triton", "ragged_all_to_all"))
