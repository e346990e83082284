"""Lowers operators for GPUs that this host does not have."""

import jax

# Device kind, compute units, platform.
TARGETS = [("NVIDIA H200", 132, "cuda"), ("gfx942", 304, "rocm"), ("gfx950", 256, "rocm")]
CUSTOM_CALL = "__gpu$xla.gpu.triton"


def lower(target, fn, *avals):
    """StableHLO text of fn for a GPU that this host does not have."""
    kind, cores, platform = target[:3]
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu")
    axis = (jax.sharding.AxisType.Explicit,)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), axis, abstract_device=device)):
        return jax.jit(fn).trace(*avals).lower(lowering_platforms=(platform,)).as_text()
