"""`python -m sparse_mla_jax demo`: serve a small trained model on real text, and show what sparsity and FP8 cost."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import math
import os
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_mla_jax._check import require
from sparse_mla_jax.config import DeepseekV32Config, load_config
from sparse_mla_jax.layers import mla
from sparse_mla_jax.metadata import build_metadata
from sparse_mla_jax.models import checkpoint, deepseek_v32
from sparse_mla_jax.scoring import score
from sparse_mla_jax.serving.engine import Engine
from sparse_mla_jax.tools.output import PLOT_EXTRA, check_picture, has_matplotlib, whole_file
from sparse_mla_jax.tools.text import stdlib_sources

PACKAGE = pathlib.Path(__file__).parents[1]
# Folders of the small model: inside the package in a wheel, beside it in a checkout.
MODELS = (PACKAGE / "_assets" / "tiny_python", PACKAGE.parent / "examples" / "tiny_python")
DEFAULT_MODEL = next((folder for folder in MODELS if folder.is_dir()), MODELS[-1])
VARIANTS = (
    ("dense attention, float32 cache", True, "float32"),
    ("sparse, float32 cache", False, "float32"),
    ("sparse, e4m3fnuz cache", False, "float8_e4m3fnuz"),
    ("sparse, e4m3fn cache", False, "float8_e4m3fn"),
)
WINDOW = 2048
PICTURE = "out/selected_positions.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the demo's options on `parser`."""
    parser.add_argument("--model", default=os.fspath(DEFAULT_MODEL), help="model folder (byte-level vocabulary)")
    parser.add_argument("--requests", type=int, default=8, help="requests served together")
    parser.add_argument("--prompt-bytes", type=int, default=1024, help="longest prompt; the others are shorter")
    parser.add_argument("--max-tokens", type=int, default=64, help="bytes generated for each request")
    parser.add_argument("--windows", type=int, default=3, help="held-out windows of 2048 bytes in the table")
    parser.add_argument("--picture", metavar="FILE", help=f"where the picture goes (default {PICTURE})")


def held_out_windows(count: int, length: int) -> list[tuple[str, np.ndarray]]:
    """`count` windows of `length` bytes, spread over the held-out modules: (module name, int32[length])."""
    files = [(name, text) for name, text in stdlib_sources(held_out=True) if len(text) >= length]
    require(
        len(files) >= 1,
        f"this interpreter's standard library has no held-out source of {length} bytes; ask for shorter windows.",
    )
    windows = []
    for i in range(count):
        name, text = files[i % len(files)]
        start = min((i // len(files)) * length, len(text) - length)
        windows.append((name, np.frombuffer(text[start : start + length], np.uint8).astype(np.int32)))
    return windows


def bits_per_byte(logits: np.ndarray, token_ids: np.ndarray) -> float:
    """Mean -log2 p(next byte) of logits float32[B, L, V] over token_ids int32[B, L], the first byte given."""
    logp = jax.nn.log_softmax(jnp.asarray(logits[:, :-1]), axis=-1)
    chosen = jnp.take_along_axis(logp, jnp.asarray(token_ids[:, 1:, None]), axis=-1)
    return float(-chosen.mean() / math.log(2.0))


def serve(params: Any, config: DeepseekV32Config, arguments: argparse.Namespace) -> None:
    """Serves requests with continuous batching over FP8 (e4m3fnuz) paged caches; prints the text and the speed."""
    engine = Engine(
        params,
        config,
        cache_dtype="float8_e4m3fnuz",
        page_size=64,
        max_batch=arguments.requests,
        max_context=WINDOW,
        prefill_chunk=512,
        token_buckets=(arguments.requests, max(512, arguments.requests)),
    )
    bytes_per_token = sum(cache.bytes_per_token + index.bytes_per_token for cache, index in engine.caches)
    print(f"caches: FP8 e4m3fnuz latents and index keys, {bytes_per_token} bytes per token over all layers", flush=True)
    engine.warm_up()
    windows = held_out_windows(arguments.requests, WINDOW)
    requests = []
    for i, (_, tokens) in enumerate(windows):
        length = max(1, arguments.prompt_bytes - i * arguments.prompt_bytes // (2 * arguments.requests))
        requests.append(engine.submit(tokens[:length].tolist(), max_tokens=arguments.max_tokens))
    start, decoding, decoded = time.perf_counter(), 0.0, 0
    while engine.has_work():
        before = time.perf_counter()
        pure_decode = all(request.prefilled for request in requests if not request.finished)
        events = engine.step()
        if pure_decode:
            decoding += time.perf_counter() - before
            decoded += len(events)
    elapsed = time.perf_counter() - start
    name, tokens = windows[0]
    prompt = bytes(tokens[: len(requests[0].prompt)].tolist()).decode("utf-8", "replace")
    text = bytes(requests[0].tokens).decode("utf-8", "replace")
    print(f"\n{name}, its last lines as the prompt, then what the model went on with (after >>>):")
    print("\n".join("    " + line for line in ("\n".join(prompt.splitlines()[-6:]) + ">>>" + text).splitlines()))
    total = sum(len(request.tokens) for request in requests)
    prompts = sum(len(request.prompt) for request in requests)
    print(f"\n{len(requests)} requests: {prompts} prompt bytes in, {total} bytes generated, {elapsed:.1f} s")
    if decoding:
        print(
            f"decode, {arguments.requests} requests at a time: {decoded / decoding:.0f} tokens per second on {device()}"
        )


def device() -> str:
    """Name of the machine: the number of CPU cores, or the accelerator's name."""
    first = jax.devices()[0]
    return f"{os.cpu_count()} CPU cores" if first.platform == "cpu" else first.device_kind


def variant_bits(
    params: Any, config: DeepseekV32Config, windows: np.ndarray, *, dense: bool, cache_dtype: str
) -> float:
    """Held-out bits per byte of one variant over windows int32[B, L], prefilled in chunks of 256."""
    logits = score(
        params,
        config.dense() if dense else config,
        windows,
        chunk=256,
        cache_dtype=cache_dtype,
        page_size=64,
    )
    return bits_per_byte(logits, windows)


def table(results: list[float], windows: np.ndarray, topk: int) -> None:
    """Prints the variants' bits per byte, and their differences from the first and the second variant."""
    print(f"\nheld-out bits per byte, {windows.shape[0]} windows of {windows.shape[1]} bytes, top-{topk}")
    print(f"  {'':32} {'bits/byte':>9}  {'vs dense':>9}  {'vs float32 cache':>16}")
    for number, ((name, _, _), bits) in enumerate(zip(VARIANTS, results, strict=True)):
        dense = f"{100 * (bits / results[0] - 1):+.2f} %" if number >= 1 else ""
        float32 = f"{100 * (bits / results[1] - 1):+.2f} %" if number >= 2 else ""
        print(f"  {name:32} {bits:9.4f}  {dense:>9}  {float32:>16}", flush=True)


def last_query_selection(params: Any, config: DeepseekV32Config, tokens: np.ndarray) -> list[np.ndarray]:
    """Positions that the last of tokens int32[L] attends to, one array per layer."""
    length, page_size = len(tokens), 64
    pages = -(-length // page_size)
    page_table = jnp.arange(pages, dtype=jnp.int32)[None]

    @jax.jit
    def run(params: Any, token_ids: jax.Array) -> list[jax.Array]:
        metadata = build_metadata(
            jnp.array([length]), jnp.array([length]), page_table, num_tokens=length, page_size=page_size
        )
        last = build_metadata(jnp.array([length]), jnp.array([1]), page_table, num_tokens=1, page_size=page_size)
        hidden, chosen = deepseek_v32.embed(params, token_ids), []
        caches = deepseek_v32.create_caches(config, pages, page_size, dtype="float32")
        for number, (cache, index_cache) in enumerate(caches):
            entering = deepseek_v32.attention_input(params, number, hidden[-1:], config=config)
            hidden, _, index_cache = deepseek_v32.decoder_layer(
                params, number, hidden, cache, index_cache, metadata, config=config
            )
            layer = params["layers"][number]["self_attn"]
            chosen.append(mla.select_positions(layer, entering, index_cache, last, config=config)[0])
        return chosen

    return [np.asarray(positions) for positions in run(params, tokens)]


def picture(selected: list[np.ndarray], name: str, length: int, path: str) -> None:
    """Saves which of `length` positions the last query of module `name` selected, one row of marks per layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots()
    for layer, positions in enumerate(selected):
        axes.vlines(positions[positions >= 0], layer - 0.4, layer + 0.4, color=f"C{layer}", linewidth=0.8)
    axes.set(
        xlim=(0, length),
        yticks=range(len(selected)),
        xlabel=f"position in {name} (bytes)",
        ylabel="layer",
        title=f"The {len(selected[0])} of {length} positions that the last query attends to, by layer",
    )
    axes.invert_yaxis()
    with whole_file(path) as unfinished:
        figure.savefig(unfinished, dpi=110)
    print(f"\npicture: {path}")


def check_options(arguments: argparse.Namespace) -> None:
    """Raises ValueError for numbers that the demo can not serve."""
    for option in ("requests", "prompt_bytes", "max_tokens", "windows"):
        value = getattr(arguments, option)
        require(value >= 1, f"--{option.replace('_', '-')} is {value}; it must be at least 1.")
    length = arguments.prompt_bytes + arguments.max_tokens
    require(length <= WINDOW, f"--prompt-bytes plus --max-tokens is {length}; at most {WINDOW}.")
    most = sum(len(text) // WINDOW for _, text in stdlib_sources(held_out=True))
    require(
        arguments.windows <= max(most, 1), f"--windows is {arguments.windows}; the held-out text has {most} of them."
    )


def load_model(folder: str) -> tuple[DeepseekV32Config, Any]:
    """Config and weights of a byte-level DeepSeek-V3.2.

    Raises:
      ValueError: another model, told before its weights are read.
    """
    config = load_config(folder)
    if not isinstance(config, DeepseekV32Config):
        raise ValueError(f"--model {folder!r} is a DeepSeek-V4 model; the demo shows V3.2. Try generate.")
    require(config.vocab_size == 256, f"--model has a vocabulary of {config.vocab_size}; the demo needs bytes (256).")
    return config, checkpoint.load_checkpoint(folder, dtype="float32", progress=False)[1]


def check_pictures_path(path: str | None) -> str | None:
    """The file that the picture goes to, the default one in a folder that is made here; None for no picture.

    Raises:
      ValueError: a path that was asked for can not be written, or there is no matplotlib to draw it.
    """
    if path is None and not has_matplotlib():
        print(f"no picture: matplotlib is missing ({PLOT_EXTRA})", file=sys.stderr)
        return None
    if path is None:
        path = PICTURE
        # If it can not be made, the check says so.
        with contextlib.suppress(OSError):
            os.makedirs(os.path.dirname(path), exist_ok=True)
    check_picture("--picture", path)
    return path


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo; returns the exit code."""
    check_options(arguments)
    path = check_pictures_path(arguments.picture)
    start = time.perf_counter()
    config, params = load_model(arguments.model)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"DeepSeek-V3.2 architecture: {config.num_hidden_layers} layers, {size / 1e6:.1f} M parameters, {device()}")
    serve(params, config, arguments)
    names, texts = zip(*held_out_windows(arguments.windows, WINDOW), strict=True)
    windows = np.stack(texts)
    # Run two variants at once: most of the time is compilation, which uses one core.
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        scores = [
            pool.submit(variant_bits, params, config, windows, dense=dense, cache_dtype=cache_dtype)
            for _, dense, cache_dtype in VARIANTS
        ]
        selection = pool.submit(last_query_selection, params, config, windows[0])
        table([future.result() for future in scores], windows, config.index_topk)
        if path is not None:
            picture(selection.result(), names[0], WINDOW, path)
    print(f"done in {time.perf_counter() - start:.0f} s")
    return 0
