"""`python -m sparse_mla_jax inspect --step`: DeepSeek-V3.2's decode step as XLA:ROCm compiles it, at published sizes.

Shapes only: no weight and no cache is allocated. What is shown is what would be launched: every kernel in order, the
temporary memory, and whether the caches are updated where they lie.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import sys
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import cdna
from pallas_kernels.cdna.program import PRODUCT, Program
from sparse_mla_jax._check import require
from sparse_mla_jax.config import DeepseekV32Config
from sparse_mla_jax.layers.mla import attention_step, fuse_projections
from sparse_mla_jax.layers.norm import rms_norm
from sparse_mla_jax.metadata import decode_metadata
from sparse_mla_jax.models import deepseek_v32

PAGE_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Step:
    """A decode step, or the attention layer of one, and what it is compiled for.

    Attributes:
      fn: (params, inputs, caches, seq_lens[B], page_table[B, P]) -> (outputs, caches). Inputs and outputs are token ids
        int32[B], of a layer the hidden states [B, D].
      args: shapes of its arguments.
      donated: number of the argument that is updated in place: the caches.
    """

    fn: Any
    args: tuple[Any, ...]
    donated: int = 2

    @property
    def caches(self) -> list[jax.ShapeDtypeStruct]:
        """The arrays of all caches."""
        return jax.tree.leaves(self.args[self.donated])

    @property
    def first_cache(self) -> int:
        """Number of the first cache array among all arrays that go in."""
        return len(jax.tree.leaves(self.args[: self.donated]))


def published_config(*, heads: int, layers: int) -> DeepseekV32Config:
    """DeepSeek-V3.2 with the heads of one GPU and so many layers, of which the first is dense.

    Raises:
      ValueError: sizes below 1.
    """
    for name, value in (("heads", heads), ("layers", layers)):
        require(value >= 1, f"{name} is {value}; at least 1 is expected.")
    return dataclasses.replace(
        DeepseekV32Config(), num_attention_heads=heads, num_hidden_layers=layers, first_k_dense_replace=1
    )


def _shapes(config: DeepseekV32Config, batch: int, context: int, cache_dtype: Any) -> tuple[Any, Any, Any]:
    """Shapes of the caches, of an int32 per sequence, and of the page table."""
    for name, value in (("batch", batch), ("context", context)):
        require(value >= 1, f"{name} is {value}; at least 1 is expected.")
    require(context % PAGE_SIZE == 0, f"context is {context}; a multiple of the page size {PAGE_SIZE} is expected.")
    pages = context // PAGE_SIZE
    caches = jax.eval_shape(
        lambda: deepseek_v32.create_caches(config, batch * pages, PAGE_SIZE, dtype=jnp.dtype(cache_dtype))
    )
    return caches, jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((batch, pages), jnp.int32)


def decode_step(
    *, heads: int = 16, batch: int = 64, context: int = 32768, layers: int = 2, cache_dtype: Any = jnp.float8_e4m3fnuz
) -> Step:
    """DeepSeek-V3.2's greedy decode step in bfloat16, for `compile`; weights are those of `fuse_projections`.

    Args:
      heads: attention heads on this GPU (128 over all).
      batch: sequences.
      context: tokens that the caches of a sequence can hold, a multiple of 64.
      layers: the first is dense, the others mixtures of 256 experts; 61 in the published model.
      cache_dtype: of latents and index keys.

    Raises:
      ValueError: sizes below 1, or a context that is not whole pages.
    """
    config = published_config(heads=heads, layers=layers)
    caches, per_sequence, table = _shapes(config, batch, context, cache_dtype)

    def step(params, token_ids, caches, seq_lens, page_table):
        scores, caches = deepseek_v32.decode(
            params, token_ids, caches, seq_lens, page_table, config=config, implementation="triton"
        )
        return jnp.argmax(scores, axis=-1).astype(jnp.int32), caches

    params = jax.eval_shape(deepseek_v32.fuse_projections, deepseek_v32.param_specs(config, jnp.bfloat16))
    return Step(step, (params, per_sequence, caches, per_sequence, table))


def layer_step(
    config: DeepseekV32Config, *, batch: int, context: int, cache_dtype: Any, implementation: str | None = None
) -> Step:
    """The attention layer alone of such a step: normalised hidden states in, the layer's output [B, D] out.

    Its weights are those of `fuse_projections`.

    Args:
      config: of the model, as `published_config` gives it; one layer of it is taken.
      batch, context, cache_dtype: as in `decode_step`.
      implementation: None, "triton", "xla" or "reference", of every operator.

    Raises:
      ValueError: sizes below 1, or a context that is not whole pages.
    """
    caches, per_sequence, table = _shapes(config, batch, context, cache_dtype)

    def step(params, hidden, caches, seq_lens, page_table):
        metadata = decode_metadata(seq_lens, page_table, page_size=PAGE_SIZE)
        out, cache, index_cache = attention_step(
            params, hidden, caches[0], caches[1], metadata, config=config, implementation=implementation
        )
        return out, (cache, index_cache)

    one = dataclasses.replace(config, num_hidden_layers=1)
    specs = deepseek_v32.param_specs(one, jnp.bfloat16)
    params = jax.eval_shape(fuse_projections, specs["layers"][0]["self_attn"])
    hidden = jax.ShapeDtypeStruct((batch, config.hidden_size), jnp.bfloat16)
    return Step(step, (params, hidden, caches[0], per_sequence, table))


def layers_step(
    config: DeepseekV32Config, *, batch: int, context: int, cache_dtype: Any, implementation: str | None = None
) -> Step:
    """config.num_hidden_layers attention layers one after the other, each on the normed sum of what came before it.

    Arguments as those of `layer_step`; params and caches are tuples over layers. Norms have no weights, and no
    feed-forward layer is there.
    """
    caches, per_sequence, table = _shapes(config, batch, context, cache_dtype)
    single = layer_step(config, batch=batch, context=context, cache_dtype=cache_dtype, implementation=implementation)

    @jax.jit
    def layer(params, hidden, cache, seq_lens, page_table):
        out, cache = single.fn(params, rms_norm(hidden, jnp.ones(hidden.shape[1])), cache, seq_lens, page_table)
        return hidden + out, cache

    def step(params, hidden, caches, seq_lens, page_table):
        after = []
        for weights, cache in zip(params, caches):
            # A function of its own: all layers are traced and lowered once.
            hidden, cache = layer(weights, hidden, cache, seq_lens, page_table)
            after.append(cache)
        return hidden, tuple(after)

    params, hidden = single.args[:2]
    return Step(step, ((params,) * config.num_hidden_layers, hidden, caches, per_sequence, table))


def cache_copies(step: Step, program: Program) -> list[str]:
    """What in a compiled step copies a cache or writes one anew, in words; none, if all is well."""
    found = []
    for number, array in enumerate(step.caches, step.first_cache):
        if number not in (program.in_place or ()):
            found.append(f"cache array {number}, {array.dtype}{list(array.shape)}, is not updated in place")
    # XLA sees a cache [pages, page_size, ...] in this shape, with both first axes in one, or flat.
    shapes = {
        (jnp.dtype(a.dtype), shape)
        for a in step.caches
        for shape in (a.shape, (a.shape[0] * a.shape[1], *a.shape[2:]), (math.prod(a.shape),))
    }
    for kernel in program.kernels:
        for a in kernel.arguments:
            if a.role == "output" and a.in_place_of is None and (jnp.dtype(a.dtype), a.shape) in shapes:
                found.append(f"kernel {kernel.name} writes a new {a.dtype}{list(a.shape)}")
    volumes = {dtype.itemsize * math.prod(shape) for dtype, shape in shapes}
    return found + [f"{size} bytes copied by {what}" for size, what in program.copies or () if size in volumes]


def products(program: Program) -> list[str]:
    """Names of the kernels that XLA made for matrix products, and of the libraries' that it calls for them."""
    gemms = [k.name for k in program.kernels if k.origin == "xla" and k.name.startswith("gemm_fusion")]
    return gemms + [name for name in program.library_calls if "gemm" in name or "blas" in name]


def summary(step: Step, program: Program) -> dict[str, Any]:
    """What a compiled step launches and holds, as plain numbers and strings."""
    return {
        "arch": program.arch,
        "compiler": program.compiler,
        "launches": len(program.kernels),
        "launches_of_products": len(products(program)),
        "launches_of_pallas_kernels": len(program.pallas_kernels),
        "library_calls": list(program.library_calls),
        "copies": [[size, what] for size, what in program.copies or ()],
        "temporary_bytes": program.temporary_bytes,
        "cache_bytes": sum(a.dtype.itemsize * math.prod(a.shape) for a in step.caches),
        "cache_copies": cache_copies(step, program),
        "kernels": [
            {
                "name": k.name,
                "origin": k.origin,
                "grid": list(k.grid),
                "threads": k.threads,
                "lds": k.resources.lds,
                "vgprs": k.resources.vgprs,
                "spills": k.resources.vgpr_spills + k.resources.sgpr_spills,
                "scratch": k.resources.scratch,
            }
            for k in program.kernels
        ],
    }


def report(row: dict[str, Any]) -> str:
    """Launches and memory of one compiled step, as text."""
    from sparse_mla_jax.inspection import table

    times = collections.Counter((k["origin"], k["name"], *k["grid"], k["threads"], k["vgprs"]) for k in row["kernels"])
    launches = table(
        ["kernel", "made by", "launches", "grid", "threads", "VGPRs"],
        [
            (name, origin, n, f"{x}x{y}x{z}", threads, vgprs)
            for (origin, name, x, y, z, threads, vgprs), n in times.items()
        ],
    )
    copied = sum(size for size, _ in row["copies"])
    return (
        f"{PRODUCT[row['arch']]} ({row['arch']}), compiled by {row['compiler']}\n"
        f"{row['launches']} launches, {row['launches_of_pallas_kernels']} of them Pallas kernels and"
        f" {row['launches_of_products']} matrix products;"
        f" {len(row['library_calls'])} library calls and fills; {len(row['copies'])} copies of {copied} bytes in all\n"
        f"temporary memory {row['temporary_bytes'] / 2**20:.1f} MiB, caches {row['cache_bytes'] / 2**30:.2f} GiB\n"
        f"copies of a cache: {'; '.join(row['cache_copies']) or 'none'}\n\n{launches}\n"
    )


def run(arguments: argparse.Namespace) -> int:
    """The command `inspect --step`; returns 1 when a cache is copied or a Pallas kernel spills."""
    from sparse_mla_jax.inspection import chosen_architectures

    step = decode_step(
        heads=arguments.heads or 16,
        batch=arguments.batch,
        context=arguments.context,
        layers=arguments.layers,
        cache_dtype=arguments.cache_dtype or jnp.float8_e4m3fnuz,
    )
    rows = []
    for arch in chosen_architectures(arguments):
        program = cdna.compile(step.fn, *step.args, arch=arch, donate_argnums=step.donated)
        rows.append(summary(step, program))
        if not arguments.json:
            print(report(rows[-1]))
    if arguments.json:
        print(json.dumps(rows))
    broken = [f"{row['arch']}: {what}" for row in rows for what in row["cache_copies"]]
    broken += [
        f"{row['arch']}: kernel {k['name']} spills {k['spills']} registers, {k['scratch']} bytes of scratch"
        for row in rows
        for k in row["kernels"]
        if k["origin"] == "pallas" and (k["spills"] or k["scratch"])
    ]
    print(*broken, sep="\n", end="\n" if broken else "", file=sys.stderr)
    return 1 if broken else 0
