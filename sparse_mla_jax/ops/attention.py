"""Sparse multi-head latent attention: every query attends to the cache slots that its row names, and to no others.

    out[t, h] = sum_s softmax_s(sm_scale * q[t, h] . k_s) v_s,   k_s = [latent, rope] of slot s,   v_s = k_s[:value_dim]

One softmax spans every source of a row. A sink is one more logit in the denominator, with no value.

T query tokens, H heads, D = latent + rope dimensions, W row width, V value width, S splits of the keys, N slots.
Sources: DeepSeek-V3.2-Exp's technical report (arXiv:2512.02556), section 2; sinks as in arXiv:2309.17453.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from pallas_kernels import fp8_bits, sparse_attention
from pallas_kernels.mesh_axes import explicit_axes, on_shards, varying
from pallas_kernels.plans.attention import AttentionPlan
from sparse_mla_jax import _check, reference
from sparse_mla_jax._check import describe, require
from sparse_mla_jax.ops._chunks import loop_to, map_row_chunks, rows_from
from sparse_mla_jax.ops._derivative import with_derivative_of
from sparse_mla_jax.ops._dispatch import dispatch, with_plan
from sparse_mla_jax.ops.cache import PagedKVCache
from sparse_mla_jax.ops.ragged import DenseRows, Ragged

# The rows that sparse_mla accepts: the slots of every query.
Rows = Ragged | DenseRows | Array
# Keys and the rows that name them, after the checks. A plain array of slots has become DenseRows without lengths.
_Source = tuple[PagedKVCache | Array, Ragged | DenseRows]

HIGHEST = jax.lax.Precision.HIGHEST
# Temporaries of one chunk of the XLA body. Larger chunks do not fit the CPU's cache and gain nothing (measured).
CHUNK_BYTES = 4 << 20
# Keys gathered per row and step of the XLA body; longer rows go through the online softmax.
MAX_BLOCK = 2048


# --- public
def sparse_mla(
    q: Array,
    kv: PagedKVCache | Array,
    rows: Rows,
    *,
    sm_scale: float,
    value_dim: int,
    sinks: Array | None = None,
    extra: tuple[PagedKVCache | Array, Rows] | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    plan: AttentionPlan | None = None,
    config: AttentionPlan | None = None,
) -> Any:
    """Attention of every query token over the slots that its row names.

    A slot that is negative or beyond the cache is no key. A slot named twice counts twice. Slots that no row names do
    not affect any result, even if they hold NaN. A row without keys gives exactly 0 and an lse of -inf. The same inputs
    give the same bits on every call.

    The "xla" and "reference" bodies compute in float32, and so does the kernel if `q` or an unquantised key is float32.
    Otherwise the kernel reads keys as bfloat16 (exact for FP8) and sums in float32. On NVIDIA GPUs, FP8 caches differ:
    values are float16, and in most shapes logits are FP8 products on tensor cores, whose sums keep about 14 bits. See
    docs/numerics.md.

    Args:
      q: bfloat16 or float32 [T, H, D]; absorbed queries, latent dimensions first, rotated dimensions last.
      kv: a PagedKVCache with latent_dim + rope_dim = D, or a plain array [N, D] whose rows are the slots. FP8 NaN
        codes, which this library never writes, are NaN in "reference". "xla", and the kernel in interpret mode, read
        0x7F of e4m3fn as 480 and 0x80 of e4m3fnuz as 0. GPU kernels vary; on NVIDIA, 0x80 of e4m3fnuz may count as 0.
      rows: int32 [T, W] of slots (-1: none), or Ragged or DenseRows with T rows, which cost by their lengths. Slot =
        page * page_size + offset.
      sm_scale: a Python number that multiplies the logits; required, since it does not follow from absorbed queries.
      value_dim: the first `value_dim` entries of a key are its value (latent_dim for DeepSeek-V3.2).
      sinks: float32 [H] natural-log logits, not scaled by sm_scale, in the denominator only; -inf has no effect.
      extra: (kv, rows) of a second source under the same softmax.
      return_lse: also return the log-sum-exp.
      implementation: None for the best that runs here, or "triton", "xla", "reference".
      plan: block sizes and warps of the kernel (static) in place of the heuristic ones; implies "triton".
      config: the former name of `plan`.

    Returns:
      out [T, H, value_dim] in q's dtype; with `return_lse`, (out, lse float32 [T, H]): natural log, without the sink.

    Raises:
      ValueError: shapes or types that do not fit, or an implementation that does not support the case.
    """
    implementation, plan = with_plan(implementation, plan, config, AttentionPlan)
    q = _check.array("q", q, (jnp.bfloat16, jnp.float32), "T", "H", "D", hint="Cast or reshape it.")
    require(q.shape[1] * q.shape[2] > 0, f"q is {describe(q)}; expected H and D of at least 1.")
    sources = [_check_source("kv", kv, rows, q)]
    if extra is not None:
        sources.append(_check_source("extra", *_pair(extra), q))
    scale = _check_scale(sm_scale)
    hint = f"At most D = {q.shape[2]}: latent_dim for DeepSeek-V3.2."
    value_dim = _check.size("value_dim", value_dim, 1, q.shape[2], hint=hint)
    sinks = None if sinks is None else _check.floats("sinks", sinks, q.shape[1], hint="One logit per head.")
    if q.shape[0] == 0:
        out, lse = jnp.zeros((0, q.shape[1], value_dim), q.dtype), jnp.zeros((0, q.shape[1]), jnp.float32)
    else:
        run = partial(_dispatch, implementation=implementation, plan=plan, sm_scale=scale, value_dim=value_dim)
        out, lse = _on_shards(run, q, sources, sinks) if explicit_axes() else run(q, sources, sinks)
        out = out.astype(q.dtype)
    return (out, lse) if return_lse else out


def merge(outs: Array, lses: Array) -> tuple[Array, Array]:
    """Merges attention over disjoint splits of the keys: outs[S, T, H, V], lses[S, T, H] -> (out[T, H, V], lse[T, H]).

    Splits must exclude sinks: apply them once, to the result. A split whose lse is not finite is empty and contributes
    nothing, whatever its out holds: this library marks empty rows with -inf, other kernels with +inf or NaN. If all
    are empty, the result is 0 and -inf. Returns out in outs' dtype and lse in float32 (natural log).

    Raises:
      ValueError: types or shapes other than these.
    """
    outs = _check.array("outs", outs, jnp.floating, "S", "T", "H", "V", hint="Stack the parts.")
    lses = _check.floats("lses", lses, *outs.shape[:3], hint="One for each row and head of outs.")
    lses = jnp.where(jnp.isfinite(lses), lses, -jnp.inf)
    top = jnp.max(lses, axis=0, initial=-jnp.inf)
    weights = jnp.exp(lses - jnp.where(jnp.isneginf(top), 0.0, top))
    total = weights.sum(axis=0)
    parts = jnp.where((weights > 0)[..., None], outs.astype(jnp.float32), 0.0) * weights[..., None]
    out = parts.sum(axis=0) / jnp.where(total > 0, total, 1.0)[..., None]
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    return out.astype(outs.dtype), lse


def apply_sinks(out: Array, lse: Array, sinks: Array) -> Array:
    """Adds the logits sinks[H] to the denominator of a finished attention: out[T, H, V], lse[T, H] -> out[T, H, V].

    `lse` is the natural logarithm, without the sink. A row with lse -inf stays 0, even if the sink is -inf.

    Raises:
      ValueError: types or shapes other than these.
    """
    out = _check.array("out", out, jnp.floating, "T", "H", "V")
    lse = _check.floats("lse", lse, *out.shape[:2], hint="One for each row and head of out.")
    sinks = _check.floats("sinks", sinks, out.shape[1], hint="One logit per head.")
    is_empty = jnp.isneginf(lse)
    # Mask the argument too: the derivative of the other case would be NaN.
    share = jnp.where(is_empty, 0.0, jax.nn.sigmoid(jnp.where(is_empty, 0.0, lse) - sinks[None, :]))
    return (out.astype(jnp.float32) * share[..., None]).astype(out.dtype)


# --- validation
def _pair(extra: Any) -> tuple[Any, Any]:
    require(
        isinstance(extra, tuple | list) and len(extra) == 2,
        f"extra is {type(extra).__name__}; expected a pair (kv, rows) that names the second source.",
    )
    return extra[0], extra[1]


def key_dim(kv: PagedKVCache | Array) -> int:
    """D of a source: latent plus rope dimensions of a cache, or the width of a plain array."""
    return (kv.latent_dim + kv.rope_dim) if isinstance(kv, PagedKVCache) else kv.shape[1]


def _check_source(name: str, kv: Any, rows: Any, q: Array) -> _Source:
    """(kv, rows) with one int32 row for each token of q."""
    if not isinstance(kv, PagedKVCache):
        hint = "Or a PagedKVCache, where quantised rows belong."
        kv = _check.array(name, kv, (jnp.float32, jnp.bfloat16, jnp.float16), "N", "D", hint=hint)
    require(
        key_dim(kv) == q.shape[2],
        f"{name} has keys of {key_dim(kv)} dimensions and q of {q.shape[2]}; they must agree (latent_dim + rope_dim).",
    )
    if not isinstance(rows, Ragged | DenseRows):
        rows = DenseRows(rows)
    return kv, rows.check(f"rows of {name}", q.shape[0])


def _check_scale(sm_scale: Any) -> float:
    require(
        isinstance(sm_scale, numbers.Real | np.number) and math.isfinite(sm_scale),
        f"sm_scale is {sm_scale!r}; expected a finite Python number (it is a constant of the compiled program).",
    )
    return float(sm_scale)


# --- choice of a body
def _dispatch(
    q: Array,
    sources: list[_Source],
    sinks: Array | None,
    *,
    implementation: str | None,
    plan: AttentionPlan | None,
    **sizes: Any,
) -> tuple[Array, Array]:
    args, definition = (q, sources, sinks), partial(_xla, **sizes, reversible=True)
    return dispatch(
        "sparse_mla",
        implementation,
        {
            "triton": lambda: with_derivative_of(definition, partial(_triton, **sizes, plan=plan), *args),
            "xla": lambda: with_derivative_of(definition, partial(_xla, **sizes), *args),
            "reference": lambda: _reference(*args, **sizes),
        },
    )


def _on_shards(run: Callable[..., Any], q: Array, sources: list[_Source], sinks: Array | None) -> tuple[Array, Array]:
    """`run` in a mesh with Explicit axes: every device attends with its own tokens and heads of q to all keys."""
    tokens, heads, _ = jax.typeof(q).sharding.spec
    # Rows of a Ragged can not be told apart by their place.
    tokens = None if any(isinstance(rows, Ragged) for _, rows in sources) else tokens
    whole, by_token = PartitionSpec(), PartitionSpec(tokens)
    sources_specs = [
        (jax.tree.map(lambda _: whole, kv), jax.tree.map(lambda _: by_token if tokens else whole, rows))
        for kv, rows in sources
    ]
    specs = PartitionSpec(tokens, heads), sources_specs, None if sinks is None else PartitionSpec(heads)
    return on_shards(run, (q, sources, sinks), specs, PartitionSpec(tokens, heads))


# --- keys
def num_slots(kv: PagedKVCache | Array) -> int:
    """N, the number of slots of a source."""
    return kv.num_slots if isinstance(kv, PagedKVCache) else kv.shape[0]


def _take(array: Array, slots: Array) -> Array:
    """array[N, ...] at slots that are known to lie in [0, N)."""
    return array.at[slots].get(mode="promise_in_bounds")


def _scale(scales: Array, slots: Array) -> Array:
    """float32 scales of slots. E8M0 is gathered as bytes."""
    if scales.dtype == jnp.float32:
        return _take(scales, slots)
    return fp8_bits.e8m0_to_float32(_take(jax.lax.bitcast_convert_type(scales, jnp.uint8), slots))


def _latent(kv: PagedKVCache, slots: Array) -> Array:
    """Dequantised latents of the slots, float32 [..., L]. The caller masks slots that are not keys."""
    flat = kv.latent.reshape(kv.num_slots, -1)
    if kv.scale is None:
        return _take(flat, slots).astype(jnp.float32)
    codes = jax.lax.bitcast_convert_type(_take(flat, slots), jnp.uint8)
    scale = _scale(kv.scale.reshape(kv.num_slots, -1), slots)
    values = fp8_bits.decode_float32(codes.reshape(*slots.shape, scale.shape[-1], -1), kv.dtype)
    return (values * scale[..., None]).reshape(*slots.shape, -1)


def _keys(kv: PagedKVCache | Array, slots: Array) -> tuple[list[Array], Array]:
    """Keys in sections along D, float32 [..., d_i], exactly 0 where a slot is invalid; and which slots are valid."""
    count = num_slots(kv)
    valid = (slots >= 0) & (slots < count)
    safe = jnp.where(valid, slots, 0)
    if count == 0:
        return [jnp.zeros((*slots.shape, key_dim(kv)), jnp.float32)], valid
    if isinstance(kv, PagedKVCache):
        parts = [_latent(kv, safe)]
        if kv.rope_dim:
            parts.append(_take(kv.rope.reshape(count, -1), safe).astype(jnp.float32))
    else:
        parts = [_take(kv, safe).astype(jnp.float32)]
    return [jnp.where(valid[..., None], part, 0.0) for part in parts], valid


# --- XLA body
def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, precision=HIGHEST, preferred_element_type=jnp.float32)


def _attend(q: Array, keys: list[Array], valid: Array, value_dim: int, state):
    """Adds a block of keys [T, W, d_i] to the online softmax (top[T, H], total[T, H], acc[T, H, V]), None at first."""
    logits, at = jnp.zeros((), jnp.float32), 0
    for part in keys:
        logits = logits + _dot("thd,twd->thw", q[..., at : at + part.shape[-1]], part)
        at += part.shape[-1]
    logits = jnp.where(valid[:, None, :], logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, initial=-jnp.inf)
    if state is not None:
        top = jnp.maximum(top, state[0])
    base = jnp.where(jnp.isneginf(top), 0.0, top)
    weights = jnp.exp(logits - base[..., None])
    total, values, at = weights.sum(axis=-1), [], 0
    for part in keys:
        width = min(part.shape[-1], value_dim - at)
        if width > 0:
            values.append(_dot("thw,twd->thd", weights, part[..., :width]))
        at += part.shape[-1]
    acc = values[0] if len(values) == 1 else jnp.concatenate(values, axis=-1)
    if state is not None:
        keep = jnp.exp(state[0] - base)
        total, acc = total + state[1] * keep, acc + state[2] * keep[..., None]
    return top, total, acc


def _over_source(q: Array, source: _Source, width: int, value_dim: int, state: Any, reversible: bool) -> Any:
    """Adds a source to the state of the online softmax, `width` keys of every row at a time. Row t belongs to q[t]."""
    kv, rows = source
    if rows.longest == 0:
        return state
    if rows.longest <= width:
        return _attend(q, *_keys(kv, rows.masked()), value_dim, state)
    values, starts, lengths = rows.flatten()
    if state is None:
        zero = jnp.zeros(q.shape[:2], jnp.float32)
        state = (zero - jnp.inf, zero, jnp.zeros((*q.shape[:2], value_dim), jnp.float32))
    state = varying(state, q, kv, rows)

    def step(i: Array, state: Any) -> Any:
        offset = i * width + jnp.arange(width, dtype=jnp.int32)[None, :]
        at = jnp.minimum(starts[:, None] + offset, values.shape[0] - 1)
        slots = jnp.where(offset < lengths[:, None], _take(values, at), -1)
        return _attend(q, *_keys(kv, slots), value_dim, state)

    stop = (jnp.max(lengths) + width - 1) // width
    return loop_to(stop, -(-rows.longest // width), step, state, reversible=reversible)


def _finish(state, q: Array, value_dim: int, sinks: Array | None) -> tuple[Array, Array]:
    if state is None:
        zero = varying(jnp.zeros(q.shape[:2], jnp.float32), q)
        return jnp.broadcast_to(zero[..., None], (*zero.shape, value_dim)), zero - jnp.inf
    top, total, acc = state
    safe = jnp.where(total > 0, total, 1.0)
    out = acc / safe[..., None]
    lse = jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)
    return (out if sinks is None else apply_sinks(out, lse, sinks)), lse


def _xla(
    q: Array,
    sources: list[_Source],
    sinks: Array | None,
    *,
    sm_scale: float,
    value_dim: int,
    reversible: bool = False,
) -> tuple[Array, Array]:
    """Gathers and dequantises the keys of a chunk of rows once, then two matrix products. Long rows go by blocks.

    See `loop_to` for `reversible`.
    """
    tokens, heads, dim = q.shape
    widths = [max(1, min(MAX_BLOCK, rows.width)) for _, rows in sources]
    chunk = max(1, min(tokens, CHUNK_BYTES // (4 * (2 * dim + 2 * heads) * max(widths))))

    def body(first: Array) -> tuple[Array, Array]:
        queries = rows_from(q, first, chunk).astype(jnp.float32) * sm_scale
        state = None
        for (kv, rows), width in zip(sources, widths):
            state = _over_source(queries, (kv, rows.take(first, chunk)), width, value_dim, state, reversible)
        out, lse = _finish(state, queries, value_dim, sinks)
        return out.astype(q.dtype), lse

    return map_row_chunks(body, tokens, chunk, like=(q, sources, sinks))


# --- reference and kernel bodies
def dense_rows(kv: PagedKVCache | Array) -> Array:
    """All keys of a source, dequantised: float32 [N, D]."""
    if not isinstance(kv, PagedKVCache):
        return kv.astype(jnp.float32)
    values = kv.values().reshape(kv.num_slots, -1)
    rope = kv.rope.reshape(kv.num_slots, -1).astype(jnp.float32)
    if kv.scale is None:
        return jnp.concatenate([values.astype(jnp.float32), rope], axis=-1)
    scales = kv.scale.reshape(kv.num_slots, -1).astype(jnp.float32)
    return jnp.concatenate([reference.dequantize(values, scales, group_size=kv.group_size), rope], axis=-1)


def _reference(
    q: Array, sources: list[_Source], sinks: Array | None, *, sm_scale: float, value_dim: int
) -> tuple[Array, Array]:
    dense = [(dense_rows(kv), rows.masked()) for kv, rows in sources]
    return reference.sparse_mla(q, dense, sm_scale=sm_scale, value_dim=value_dim, sinks=sinks)


def _kernel_keys(kv: PagedKVCache | Array) -> dict[str, Any]:
    """The key fields of a kernel's `Source`."""
    if isinstance(kv, PagedKVCache):
        return {name: getattr(kv, name) for name in ("latent", "scale", "rope", "dtype", "group_size")}
    return {"latent": kv, "scale": None, "rope": None, "dtype": kv.dtype, "group_size": 0}


def _triton(
    q: Array,
    sources: list[_Source],
    sinks: Array | None,
    *,
    sm_scale: float,
    value_dim: int,
    plan: AttentionPlan | None,
) -> tuple[Array, Array]:
    tables = [sparse_attention.Source(**_kernel_keys(kv), **rows.kernel_arguments()) for kv, rows in sources]
    return sparse_attention.sparse_attention(q, tables, sm_scale=sm_scale, value_dim=value_dim, sinks=sinks, plan=plan)
