"""`python -m sparse_mla_jax info`: the device, its FP8 type, operators and their implementations, a model's sizes."""

from __future__ import annotations

import argparse
import json
import types
from typing import Any

from sparse_mla_jax import __version__
from sparse_mla_jax._check import require
from sparse_mla_jax._choices import CACHE_DTYPES, DTYPES
from sparse_mla_jax.tools.layout import add_arguments as add_layout_arguments
from sparse_mla_jax.tools.layout import asked_layout, published_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `info`."""
    parser.add_argument("model_dir", metavar="MODEL_DIR", nargs="?", help="also describe this model")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    add_layout_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """The command `info`."""
    from sparse_mla_jax.ops import KERNEL_OPERATORS, XLA_OPERATORS

    config = _chosen_model(arguments)
    layout = asked_layout(arguments, config)
    found = describe_device()
    report = {
        **found,
        "fp8": fp8_flavour(found["backend"], found["device"], found["architecture"]),
        **{f"implementation of {name}": implementation() for name in KERNEL_OPERATORS},
        **dict.fromkeys((f"implementation of {name}" for name in XLA_OPERATORS), "xla"),
    }
    if reason := no_kernels():
        report["why no kernels"] = reason
    if config is not None:
        skipped = describe_skipped(arguments.model_dir) if arguments.model_dir is not None else {}
        report |= describe_model(config) | skipped | layout
    print_report(report, arguments.json)
    return 0


def _chosen_model(arguments: argparse.Namespace) -> Any:
    """The config of the folder or of --model; None without either."""
    from sparse_mla_jax.config import load_config

    folder, name = arguments.model_dir, arguments.model
    require(folder is None or name is None, f"--model {name} is given with a model folder; give one of the two.")
    if name is not None:
        return published_model(name)
    return load_config(folder) if folder is not None else None


def implementation() -> str:
    """The implementation that `implementation=None` uses on this machine for an operator with a kernel."""
    from sparse_mla_jax.ops import _dispatch

    first = _dispatch.preferred()[0]
    return "xla" if first == "triton" and no_kernels() else first


def no_kernels() -> str:
    """Reason why no kernel runs on this machine's GPU; empty if kernels run, or if there is no GPU."""
    from pallas_kernels.targets import target_of, traced_gpu

    gpu = traced_gpu()
    if gpu is None:
        return ""
    try:
        target_of(gpu)
    except NotImplementedError as error:
        return str(error)
    return ""


def check_backend() -> None:
    """Raises RuntimeError with a readable message if jax finds no device; jax may raise a bare AssertionError."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        wanted = jax.config.jax_platforms or "any platform"
        raise RuntimeError(f"jax finds no device of {wanted} ({error}); set JAX_PLATFORMS=cpu or unset it") from None


def describe_device() -> dict[str, Any]:
    """Backend, device and versions."""
    import platform

    import jax
    import jaxlib
    import numpy as np

    check_backend()
    first = jax.devices()[0]
    architecture = getattr(first, "compute_capability", None)
    client = getattr(first, "client", None)
    return {
        "backend": jax.default_backend(),
        "platform_version": " ".join(str(getattr(client, "platform_version", "")).split()),
        "device": first.device_kind,
        "devices": jax.device_count(),
        "architecture": str(architecture) if architecture else platform.machine(),
        "sparse_mla_jax": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def fp8_flavour(backend: str, device: str, architecture: str) -> str:
    """The FP8 type that the hardware supports, from the names that JAX gives for it."""
    if backend == "cpu":
        return "both, by bit arithmetic (float8_e4m3fnuz and float8_e4m3fn)"
    from pallas_kernels.targets import target_of

    try:
        target = target_of(types.SimpleNamespace(device_kind=device, compute_capability=architecture))
    except NotImplementedError:
        return "both, by bit arithmetic of XLA (float8_e4m3fnuz and float8_e4m3fn)"
    return str(target.native_fp8)


def describe_model(config: Any) -> dict[str, Any]:
    """Family, layers and sizes of a model and of its caches, from its config alone."""
    import math

    import jax
    import jax.numpy as jnp

    from sparse_mla_jax.models.family import family_of

    family = family_of(config)
    shapes = jax.tree.leaves(family.param_specs(config, jnp.float32))
    page_size = family.default_page_size(config)
    report: dict[str, Any] = {
        "family": config.family,
        "layers": config.num_hidden_layers,
        **describe_layers(config),
        "hidden size": config.hidden_size,
        "attention heads": config.num_attention_heads,
        "index_topk": config.index_topk,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "parameters": sum(math.prod(spec.shape) for spec in shapes),
    }
    for dtype in DTYPES:
        specs = jax.tree.leaves(family.param_specs(config, jnp.dtype(dtype)))
        report[f"bytes of weights, {dtype}"] = sum(spec.size * spec.dtype.itemsize for spec in specs)
    for name in CACHE_DTYPES:
        caches = jax.eval_shape(
            lambda name=name: family.create_caches(config, 1, page_size, num_requests=1, max_query_len=1, dtype=name)
        )
        report[f"cache bytes per token, {name}"] = family.bytes_per_token(caches, page_size)
        if per_request := family.bytes_per_request(caches):
            report[f"cache bytes per request, {name}"] = per_request
    return report


def describe_layers(config: Any) -> dict[str, str]:
    """What each layer is; layers that are alike share a row: {"layers 0-2, 6": "attends to chosen keys, ..."}."""
    alike: dict[str, list[int]] = {}
    for number in range(config.num_hidden_layers):
        alike.setdefault(config.describe_layer(number), []).append(number)
    rows = {}
    for words, numbers in alike.items():
        starts = [n for n in numbers if n - 1 not in numbers]
        ends = [n for n in numbers if n + 1 not in numbers]
        ranges = (str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends))
        rows[f"layer{'s' if len(numbers) > 1 else ''} {', '.join(ranges)}"] = words
    return rows


def describe_skipped(folder: str) -> dict[str, str]:
    """The tensors of a folder that the model does not use; nothing for a folder without weights."""
    from sparse_mla_jax._folder import find_weights
    from sparse_mla_jax.models.checkpoint import skipped_tensors

    if find_weights(folder) is None:
        return {}
    counts = skipped_tensors(folder)
    return {"skipped": ", ".join(f"{number} tensors of {kind}" for kind, number in counts.items()) or "nothing"}


def print_report(report: dict[str, Any], as_json: bool) -> None:
    """One line of JSON, or an aligned table."""
    if as_json:
        print(json.dumps(report))
        return
    width = max(map(len, report))
    for name, value in report.items():
        print(f"{name:{width}}  {value}")
