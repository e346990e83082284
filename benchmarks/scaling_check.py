"""Whether several devices choose and say what one does: selections bit for bit, and greedy tokens.

    python benchmarks/scaling_check.py --devices 2,4,8

Selections: an index cache of random keys, its pages spread over n devices of "context", against one device with all of
them. Tokens: the small trained model through the engine, on every mesh of n devices, against one device.
"""

from __future__ import annotations

import argparse
import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

import sparse_mla_jax as sm
from sparse_mla_jax.parallel.axes import Parallel, make_mesh

PAGE, TOP_K = 64, 2048
PROMPTS = (b"def main(", b"class A:\n    def __init__(self", b"import os\n", b"for i in range(10):\n", b"x = [")


def compare_selections(devices: int, *, batch: int, context: int, cache_dtype: str) -> dict[str, object]:
    """Rows of `lightning_indexer` that differ between one device and `devices` of "context"."""
    pages, dim, heads = context // PAGE, 128, 64
    keys = jax.random.split(jax.random.key(devices), 3)
    slots = jnp.arange(batch * context, dtype=jnp.int32)
    empty = sm.PagedIndexCache.create(batch * pages, PAGE, dim=dim, dtype=jnp.dtype(cache_dtype))
    cache = jax.jit(sm.write_index)(empty, jax.random.normal(keys[0], (slots.size, dim), jnp.float32), slots)
    q = jax.random.normal(keys[1], (batch, heads, dim), jnp.bfloat16)
    weights = jax.random.normal(keys[2], (batch, heads), jnp.float32)
    requests = jnp.arange(batch, dtype=jnp.int32)
    lengths = context - 7 * requests

    def select(cache, table, **axis):
        k = min(TOP_K, context // 4)
        return sm.lightning_indexer(q, weights, cache, table, requests, lengths, k=k, max_length=context, **axis)

    column = np.arange(batch * pages).reshape(batch, pages)
    whole = np.asarray(jax.jit(select)(cache, jnp.asarray(column, jnp.int32)))
    mesh = make_mesh(Parallel(context=devices))
    # Page column p lies on device p % devices, numbered from 0 on there.
    per_request = -(-pages // devices)
    table = np.arange(batch)[:, None] * per_request + np.arange(pages) // devices
    own = [
        np.pad(column[:, i::devices], ((0, 0), (0, per_request - column[:, i::devices].shape[1])))
        for i in range(devices)
    ]
    moved = jax.tree.map(lambda array: array[np.concatenate([part.ravel() for part in own])], cache)
    lies = PartitionSpec("context")
    spread = jax.shard_map(
        lambda cache, table: select(cache, table, axis_name="context"),
        mesh=mesh,
        in_specs=(lies, PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    got = np.asarray(jax.jit(spread)(moved, jnp.asarray(table, jnp.int32)))
    return {"check": "selections", "context": devices, "rows": batch, "differ": int((got != whole).any(axis=1).sum())}


def tokens(folder: str, parallel: Parallel | None) -> list[list[int]]:
    """What the engine says to PROMPTS, greedily."""
    config, params = sm.load_checkpoint(folder, progress=False)
    mesh = None if parallel is None else make_mesh(parallel)
    sizes = {"page_size": 16, "max_batch": 3, "max_context": 128, "prefill_chunk": 32}
    engine = sm.Engine(params, config, cache_dtype="float32", mesh=mesh, parallel=parallel, **sizes)
    requests = [engine.submit(prompt, max_tokens=24) for prompt in PROMPTS]
    engine.run()
    return [request.tokens for request in requests]


def main() -> None:
    """Prints a row of JSON for each comparison; exit code 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", default="2")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--cache-dtype", default="float8_e4m3fn")
    parser.add_argument("--model", default="examples/tiny_python")
    arguments = parser.parse_args()
    one, failed = tokens(arguments.model, None), 0
    for devices in map(int, arguments.devices.split(",")):
        rows = [
            compare_selections(
                devices, batch=arguments.batch, context=arguments.context, cache_dtype=arguments.cache_dtype
            )
        ]
        # The small model has six heads.
        meshes = {"data": devices, "context": devices, "tensor": devices if devices in (2, 3) else 1}
        for axis, size in meshes.items():
            if size > 1:
                differ = sum(a != b for a, b in zip(one, tokens(arguments.model, Parallel(**{axis: size}))))
                rows.append({"check": "tokens", axis: size, "requests": len(PROMPTS), "differ": differ})
        for row in rows:
            failed += int(row["differ"])
            print(json.dumps(row), flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
