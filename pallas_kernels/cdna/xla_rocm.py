"""Compiles StableHLO with XLA:ROCm to the executable that JAX would load on the GPU. Runs in a worker process.

The plugin never opens a device: it compiles for a textual description of the target ("deviceless" compilation).
"""

from __future__ import annotations

import functools
import logging
import pathlib
import re
from typing import Any

import numpy as np

from pallas_kernels.cdna import rocm_stubs, toolchain
from pallas_kernels.cdna.program import BANDWIDTH, CLOCK, COMPUTE_UNITS, LDS_BYTES, MEMORY, PRODUCT
from pallas_kernels.targets import CDNA_PER_HOST

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
_PARTITIONS = re.compile(r"\bmhlo\.num_partitions = (\d+)")


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


def partitions(text: str) -> int:
    """The number of devices of a StableHLO module, from its first line; 1 if it does not say."""
    found = _PARTITIONS.search(text.partition("\n")[0])
    return int(found[1]) if found else 1


def topology(devices: int) -> str:
    """Slices x machines x GPUs of a machine, as XLA describes them.

    Raises:
      ValueError: more GPUs than one machine has, and no whole number of machines.
    """
    if devices > CDNA_PER_HOST and devices % CDNA_PER_HOST:
        raise ValueError(
            f"the program runs on {devices} devices; expected at most {CDNA_PER_HOST}, the GPUs of one machine, or a"
            " multiple of it"
        )
    return f"1x{-(-devices // CDNA_PER_HOST)}x{min(devices, CDNA_PER_HOST)}"


@functools.cache
def _devices(arch: str, count: int, cache: pathlib.Path | None) -> tuple[Any, ...]:
    """Compile-only devices, in the order of their numbers; the first call loads the plugin into this process."""
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
        "offline", platform="rocm", target_config=target_config(arch), topology=topology(count)
    )
    return tuple(description.devices)


def _options(devices: tuple[Any, ...], meshes: bool) -> Any:
    """Options as jax sets them: one replica, as many partitions as devices; Shardy divides a program with meshes."""
    from jax._src.lib import xla_client

    options = xla_client.CompileOptions()
    build = options.executable_build_options
    options.num_replicas = build.num_replicas = 1
    options.num_partitions = build.num_partitions = len(devices)
    options.device_assignment = xla_client.DeviceAssignment.create(np.array([[d.id for d in devices]]))
    if meshes:
        build.use_spmd_partitioning = build.use_shardy_partitioner = True
    return options


def compile_module(text: str, arch: str, cache: pathlib.Path | None) -> dict[str, Any]:
    """Compiles StableHLO text for as many devices as it says.

    Returns:
      The serialized executable, the optimised HLO's text, and the memory of one device.
    """
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir

    devices = _devices(arch, partitions(text), cache)
    with mlir.make_ir_context():
        module = ir.Module.parse(text)
        options = _options(devices, "sdy.mesh" in text)
        executable = devices[0].client.compile(module, xla_client.DeviceList(devices), options)
    stats = executable.get_compiled_memory_stats()
    return {
        "executable": executable.serialize(),
        "hlo": executable.hlo_modules()[0].to_string(),
        "devices": len(devices),
        "temporary_bytes": stats.temp_size_in_bytes,
        "argument_bytes": stats.argument_size_in_bytes,
        "output_bytes": stats.output_size_in_bytes,
        "alias_bytes": stats.alias_size_in_bytes,
    }
