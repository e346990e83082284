"""Compiles StableHLO with XLA:ROCm to the executable that JAX would load on the GPU. Runs in a worker process.

The plugin never opens a device: it compiles for a textual description of the target ("deviceless" compilation).
"""

from __future__ import annotations

import functools
import logging
import pathlib
from typing import Any

import numpy as np

from pallas_kernels.cdna import rocm_stubs, toolchain
from pallas_kernels.cdna.program import BANDWIDTH, CLOCK, COMPUTE_UNITS, LDS_BYTES, PRODUCT

# An xla.GpuTargetConfigProto. The constants are limits of the programming model, equal for both architectures.
_TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 64 threads_per_core_limit: 2048
  shared_memory_per_block: {lds} shared_memory_per_block_optin: {lds} shared_memory_per_core: {lds}
  core_count: {cores} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65536 block_dim_limit_z: 65536
  memory_bandwidth: {bandwidth} l2_cache_size: 4194304 clock_rate_ghz: {clock} device_memory_size: {memory}
  registers_per_core_limit: 131072 registers_per_block_limit: 131072
  rocm_compute_capability {{ gcn_arch_name: "{arch}:sramecc+:xnack-" }}
}}
platform_name: "ROCM" dnn_version_info {{ major: 3 minor: 5 }} device_description_str: "AMD Instinct {product}"
"""
MEMORY = {"gfx942": 192 << 30, "gfx950": 288 << 30}


def target_config(arch: str) -> str:
    """Description of the GPU as a text protocol buffer."""
    return _TARGET.format(
        arch=arch,
        lds=LDS_BYTES[arch],
        cores=COMPUTE_UNITS[arch],
        bandwidth=int(BANDWIDTH[arch]),
        clock=CLOCK[arch] / 1e9,
        memory=MEMORY[arch],
        product=PRODUCT[arch],
    )


@functools.cache
def _device(arch: str, cache: pathlib.Path | None) -> Any:
    """A compile-only device; the first call loads the plugin into this process."""
    import jax
    from jax._src import xla_bridge
    from jax._src.lib import xla_client
    from jax.experimental import topologies

    # Register the library here: the plugin's own registration looks for a GPU and logs an error without one.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)
    jax.config.update("jax_platforms", "cpu")
    jax.devices()
    if not xla_client.pjrt_plugin_loaded("rocm"):
        library = toolchain.plugin_library()
        rocm_stubs.load(library, cache)
        options = {**xla_client.generate_pjrt_gpu_plugin_options(), "platform_name": "ROCM"}
        xla_bridge.register_plugin("rocm", priority=-500, library_path=str(library), options=options)
    description = topologies.get_topology_desc(
        "offline", platform="rocm", target_config=target_config(arch), topology="1x1x1"
    )
    return description.devices[0]


def compile_module(text: str, arch: str, cache: pathlib.Path | None) -> dict[str, Any]:
    """Compiles StableHLO text; returns the serialized executable, the optimised HLO's text and memory statistics."""
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir

    device = _device(arch, cache)
    options = xla_client.CompileOptions()
    options.num_replicas = options.num_partitions = 1
    options.executable_build_options.num_replicas = options.executable_build_options.num_partitions = 1
    options.device_assignment = xla_client.DeviceAssignment.create(np.array([[device.id]]))
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        executable = device.client.compile(module, xla_client.DeviceList((device,)), options)
    stats = executable.get_compiled_memory_stats()
    return {
        "executable": executable.serialize(),
        "hlo": executable.hlo_modules()[0].to_string(),
        "temporary_bytes": stats.temp_size_in_bytes,
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "alias_bytes": stats.alias_size_in_bytes,
    }
