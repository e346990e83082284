"""A slow, plain oracle of every operator, to read and to compare with.

Each function is the definition, as directly as jnp allows: no chunks, no tiles, no tricks, memory without bound.
`dtype` is the type of the arithmetic: float32 as `implementation="reference"`, float64 in the tests (under
`jax.enable_x64(True)`). Nothing here imports the operators that it judges.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

HIGHEST = jax.lax.Precision.HIGHEST


# --- fp8 -------------------------------------------------------------------------------------------------------------
def dequantize(values: Array, scales: Array, *, group_size: int, dtype=jnp.float32) -> Array:
    """values[..., D] times their group's scale[..., D // group_size], in `dtype`."""
    return values.astype(dtype) * jnp.repeat(scales.astype(dtype), group_size, axis=-1)


def quantize(x: Array, *, group_size: int, dtype, power_of_two: bool = False) -> tuple[Array, Array]:
    """Codes uint8[..., D] of the values of FP8 type `dtype` nearest to x / scale, ties to the even code; and scales.

    Scales float32[..., D // group_size] map a group's largest magnitude, at least 1e-4, to 448 or 224; with
    power_of_two they are the least power of two not below that. NaN counts as 0, no magnitude as more than 1.75 *
    2**127; what rounds to zero has no sign.
    """
    largest = {"float8_e4m3fn": 448.0, "float8_e4m3fnuz": 224.0}[jnp.dtype(dtype).name]
    values = np.arange(127, dtype=np.uint8).view(dtype).astype(np.float32)
    values = values[values <= largest]
    x = jnp.clip(jnp.nan_to_num(x.astype(jnp.float32), nan=0.0), -1.75 * 2.0**127, 1.75 * 2.0**127)
    groups = x.reshape(*x.shape[:-1], -1, group_size)
    amax = jnp.maximum(jnp.max(jnp.abs(groups), axis=-1, keepdims=True), 1e-4)
    # A divisor that XLA does not see: else it multiplies by its reciprocal.
    scales = amax / jnp.where(amax > 0, largest, 1.0)
    if power_of_two:
        mantissa, exponent = jnp.frexp(scales)
        scales = jnp.ldexp(jnp.ones_like(scales), jnp.where(mantissa == 0.5, exponent - 1, exponent))
    magnitude = jnp.abs(groups / scales)
    # How many of the middles between neighbouring values lie below; one that is met counts if its upper code is even.
    middle, odd = (values[:-1] + values[1:]) / 2, np.arange(values.size - 1) % 2 == 1
    codes = jnp.sum((magnitude[..., None] > middle) | ((magnitude[..., None] == middle) & odd), axis=-1)
    codes = jnp.where((groups < 0) & (codes > 0), codes + 128, codes)
    return codes.reshape(x.shape).astype(jnp.uint8), scales[..., 0]


# --- cache -----------------------------------------------------------------------------------------------------------
def write(pages: Array, rows: Array, slots: Array) -> Array:
    """pages[N, W] after rows[t] is stored at slots[t], token after token; a slot outside [0, N) is skipped."""

    def one(t, pages):
        valid = (slots[t] >= 0) & (slots[t] < pages.shape[0])
        at = jnp.where(valid, slots[t], 0)
        return pages.at[at].set(jnp.where(valid, rows[t], pages[at]))

    return jax.lax.fori_loop(0, slots.shape[0], one, pages)


def gather(rows: Array, slots: Array) -> Array:
    """rows[N, D] at slots[...]; a slot outside [0, N) gives zeros."""
    valid = (slots >= 0) & (slots < rows.shape[0])
    taken = (
        jnp.take(rows, jnp.where(valid, slots, 0), axis=0, mode="clip") if rows.shape[0] else jnp.zeros((), rows.dtype)
    )
    return jnp.where(valid[..., None], taken, jnp.zeros((), rows.dtype)) * jnp.ones((rows.shape[1],), rows.dtype)


# --- indexer ---------------------------------------------------------------------------------------------------------
def indexer_scores(
    q: Array,
    keys: Array,
    key_scales: Array | None,
    weights: Array,
    *,
    row_starts: Array,
    row_lengths: Array,
    dtype=jnp.float32,
) -> Array:
    """Scores key_scale[n] * sum_h weights[t, h] * relu(q[t, h] . key[n]) inside the interval of the row, else -inf.

    q[T, H, D], keys[N, D], key_scales[N] or None, weights[T, H], row_starts[T], row_lengths[T] -> dtype[T, N].
    """
    dots = jnp.einsum("thd,nd->thn", q.astype(dtype), keys.astype(dtype), precision=HIGHEST)
    scores = jnp.einsum("thn,th->tn", jnp.maximum(dots, 0), weights.astype(dtype), precision=HIGHEST)
    if key_scales is not None:
        scores = scores * key_scales.astype(dtype)[None, :]
    columns = jnp.arange(keys.shape[0])[None, :]
    inside = (columns >= row_starts[:, None]) & (columns < row_starts[:, None] + row_lengths[:, None])
    return jnp.where(inside, scores, -jnp.inf)


def paged_indexer_scores(
    q: Array, keys: Array, key_scales: Array | None, weights: Array, slots: Array, *, dtype=jnp.float32
) -> Array:
    """The same with a row of keys for every query: slots[T, M] into keys[N, D], -inf where the slot is invalid.

    Returns dtype[T, M].
    """
    own = gather(keys.astype(dtype), slots)
    dots = jnp.einsum("thd,tmd->thm", q.astype(dtype), own, precision=HIGHEST)
    scores = jnp.einsum("thm,th->tm", jnp.maximum(dots, 0), weights.astype(dtype), precision=HIGHEST)
    valid = (slots >= 0) & (slots < keys.shape[0])
    if key_scales is not None:
        scores = scores * gather(key_scales.astype(dtype)[:, None], slots)[..., 0]
    return jnp.where(valid, scores, -jnp.inf)


# --- topk ------------------------------------------------------------------------------------------------------------
def top_k(scores: Array, k: int, row_starts: Array, row_lengths: Array) -> Array:
    """Row-local columns of the k largest scores of each row's interval, ascending, then -1.

    NaN counts as -inf, -0.0 equals 0.0, ties go to the lower column; exactly min(k, length) results per row.
    scores[R, N], row_starts[R], row_lengths[R] -> int32[R, k].
    """
    rows, columns = scores.shape
    start = jnp.clip(row_starts, 0, columns)[:, None]
    length = jnp.clip(row_lengths, 0, columns - start[:, 0])[:, None]
    column = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32)[None, :], scores.shape)
    inside = (column >= start) & (column < start + length)
    value = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    # Integers of the same order: float comparisons may flush subnormals to zero, and both zeros are one integer.
    bits = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.int32)
    value = jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits)
    # Three sort keys: inside first, then the larger value, then the lower column.
    order = jnp.lexsort((column, -value, ~inside), axis=-1)[:, : min(k, columns)].astype(jnp.int32)
    chosen = jnp.arange(order.shape[1])[None, :] < length
    local = jnp.sort(jnp.where(chosen, order - start, jnp.iinfo(jnp.int32).max), axis=-1)
    local = jnp.where(jnp.arange(order.shape[1])[None, :] < length, local, -1)
    return jnp.full((rows, k), -1, jnp.int32).at[:, : order.shape[1]].set(local)


# --- attention -------------------------------------------------------------------------------------------------------
def sparse_mla(
    q: Array,
    sources: list[tuple[Array, Array]],
    *,
    sm_scale: float,
    value_dim: int,
    sinks: Array | None = None,
    dtype=jnp.float32,
) -> tuple[Array, Array]:
    """One softmax over every valid slot of every source.

    q[T, H, D]; sources: pairs of dequantised rows [N, D] and slots [T, W] (outside [0, N) means none) ->
    (out[T, H, value_dim], lse[T, H]); lse is natural-log and excludes the sink; an empty row gives 0 and -inf.
    """
    keys, valids = [], []
    for rows, slots in sources:
        keys.append(gather(rows.astype(dtype), slots))
        valids.append((slots >= 0) & (slots < rows.shape[0]))
    key, valid = jnp.concatenate(keys, axis=1), jnp.concatenate(valids, axis=1)
    logits = sm_scale * jnp.einsum("thd,twd->thw", q.astype(dtype), key, precision=HIGHEST)
    logits = jnp.where(valid[:, None, :], logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, initial=-jnp.inf)
    base = jnp.where(jnp.isfinite(top), top, 0)[..., None]
    weights = jnp.where(valid[:, None, :], jnp.exp(logits - base), 0)
    total = weights.sum(axis=-1)
    lse = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)) + base[..., 0], -jnp.inf)
    out = jnp.einsum("thw,twd->thd", weights, key[..., :value_dim], precision=HIGHEST)
    out = out / jnp.where(total > 0, total, 1)[..., None]
    return (out if sinks is None else apply_sinks(out, lse, sinks)), lse


def merge(outs: Array, lses: Array) -> tuple[Array, Array]:
    """Parts of one softmax, outs[S, T, H, V] with lses[S, T, H], joined into (out[T, H, V], lse[T, H])."""
    top = jnp.max(lses, axis=0, initial=-jnp.inf)
    base = jnp.where(jnp.isfinite(top), top, 0)
    weights = jnp.exp(lses - base)
    total = weights.sum(axis=0)
    out = (weights[..., None] * outs).sum(axis=0) / jnp.where(total > 0, total, 1)[..., None]
    return out, jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1)) + base, -jnp.inf)


def apply_sinks(out: Array, lse: Array, sinks: Array) -> Array:
    """out[T, H, V] as if a logit sinks[H] with no value had been in the softmax whose log-sum-exp is lse[T, H]."""
    sinks = sinks.astype(lse.dtype)
    share = jnp.where(jnp.isneginf(lse), 0, 1 / (1 + jnp.exp(sinks[None, :] - lse)))
    return out * share[..., None]


# --- router ----------------------------------------------------------------------------------------------------------
def biased_grouped_topk(
    logits: Array, bias: Array, *, num_groups: int, groups_kept: int, k: int, scale: float, renormalize: bool = True
) -> tuple[Array, Array]:
    """DeepSeek-V3's noaux_tc router: (weights float32[T, k], ids int32[T, k]), ids by descending biased score."""
    tokens, experts = logits.shape
    logits = logits.astype(jnp.float32)
    score = jax.nn.sigmoid(jnp.where(jnp.isnan(logits), -jnp.inf, logits))
    choice = score + bias.astype(jnp.float32)
    grouped = choice.reshape(tokens, num_groups, experts // num_groups)
    group_score = jnp.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
    kept = jnp.argsort(-group_score, axis=-1, stable=True)[:, :groups_kept]
    alive = jnp.any(jnp.arange(num_groups)[None, None, :] == kept[:, :, None], axis=1)
    choice = jnp.where(jnp.repeat(alive, experts // num_groups, axis=-1), choice, -jnp.inf)
    ids = jnp.argsort(-choice, axis=-1, stable=True)[:, :k].astype(jnp.int32)
    weights = jnp.take_along_axis(score, ids, axis=-1)
    if renormalize:
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1)
    return weights * scale, ids


# --- rope ------------------------------------------------------------------------------------------------------------
def rotate(x: np.ndarray, angles: np.ndarray, *, interleaved: bool, inverse: bool = False) -> np.ndarray:
    """Rotates pairs of x[..., d] by angles[..., d // 2] (numpy, float64): (x_2i, x_2i+1) or (x_i, x_{i + d/2})."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turn = (first + 1j * second) * np.exp((-1j if inverse else 1j) * np.asarray(angles, np.float64))
    return (
        np.stack([turn.real, turn.imag], -1).reshape(x.shape)
        if interleaved
        else np.concatenate([turn.real, turn.imag], -1)
    )
