"""A slow, plain definition of every operator, to read and to compare with.

Each function follows its formula as directly as jnp allows: no chunks, no tiles, no tricks, unbounded memory. `dtype`
is the type of the arithmetic: float32 as `implementation="reference"`, float64 in the tests (under
`jax.enable_x64(True)`). This module does not import the operators that it is compared with.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

HIGHEST = jax.lax.Precision.HIGHEST


# --- fp8
def dequantize(values: Array, scales: Array, *, group_size: int, dtype=jnp.float32) -> Array:
    """values[..., D] times their group's scale[..., D // group_size], in `dtype`."""
    return values.astype(dtype) * jnp.repeat(scales.astype(dtype), group_size, axis=-1)


def quantize(x: Array, *, group_size: int, dtype, power_of_two: bool = False) -> tuple[Array, Array]:
    """Rounds x / scale to FP8 type `dtype`, ties to the even code: (codes uint8[..., D], scales float32[..., groups]).

    A scale maps the largest magnitude of `group_size` values, at least 1e-4, to 448 or 224; with power_of_two it is the
    smallest power of two not below that. NaN counts as 0. Magnitudes above 1.75 * 2**127 count as that. Values that
    round to zero are +0.
    """
    largest = {"float8_e4m3fn": 448.0, "float8_e4m3fnuz": 224.0}[jnp.dtype(dtype).name]
    values = np.arange(127, dtype=np.uint8).view(dtype).astype(np.float32)
    values = values[values <= largest]
    x = jnp.clip(jnp.nan_to_num(x.astype(jnp.float32), nan=0.0), -1.75 * 2.0**127, 1.75 * 2.0**127)
    groups = x.reshape(*x.shape[:-1], -1, group_size)
    amax = jnp.maximum(jnp.max(jnp.abs(groups), axis=-1, keepdims=True), 1e-4)
    # Hide the constant divisor from XLA, which would multiply by its reciprocal.
    scales = amax / jnp.where(amax > 0, largest, 1.0)
    if power_of_two:
        mantissa, exponent = jnp.frexp(scales)
        scales = jnp.ldexp(jnp.ones_like(scales), jnp.where(mantissa == 0.5, exponent - 1, exponent))
    magnitude = jnp.abs(groups / scales)
    # The code is the number of midpoints (between neighbouring values) below the magnitude. A magnitude equal to a
    # midpoint goes up if the upper code is even.
    middle, odd = (values[:-1] + values[1:]) / 2, np.arange(values.size - 1) % 2 == 1
    codes = jnp.sum((magnitude[..., None] > middle) | ((magnitude[..., None] == middle) & odd), axis=-1)
    codes = jnp.where((groups < 0) & (codes > 0), codes + 128, codes)
    return codes.reshape(x.shape).astype(jnp.uint8), scales[..., 0]


# --- cache
def write(pages: Array, rows: Array, slots: Array) -> Array:
    """Stores rows[t] at slots[t] of pages[N, W], one token after the other; slots outside [0, N) are skipped."""

    def one(t, pages):
        valid = (slots[t] >= 0) & (slots[t] < pages.shape[0])
        at = jnp.where(valid, slots[t], 0)
        return pages.at[at].set(jnp.where(valid, rows[t], pages[at]))

    return jax.lax.fori_loop(0, slots.shape[0], one, pages)


def gather(rows: Array, slots: Array) -> Array:
    """Reads rows[N, D] at slots[...]; a slot outside [0, N) gives zeros."""
    valid = (slots >= 0) & (slots < rows.shape[0])
    zero = jnp.zeros((), rows.dtype)
    taken = jnp.take(rows, jnp.where(valid, slots, 0), axis=0, mode="clip") if rows.shape[0] else zero
    return jnp.where(valid[..., None], taken, zero) * jnp.ones((rows.shape[1],), rows.dtype)


# --- indexer
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
    """Scores key_scale[n] * sum_h weights[t, h] * relu(q[t, h] . key[n]) inside the row's interval, -inf outside.

    A start is clamped to 0..N first; the length counts from there.
    q[T, H, D], keys[N, D], key_scales[N] or None, weights[T, H], row_starts[T], row_lengths[T] -> dtype[T, N].
    """
    dots = jnp.einsum("thd,nd->thn", q.astype(dtype), keys.astype(dtype), precision=HIGHEST)
    scores = jnp.einsum("thn,th->tn", jnp.maximum(dots, 0), weights.astype(dtype), precision=HIGHEST)
    if key_scales is not None:
        scores = scores * key_scales.astype(dtype)[None, :]
    columns = jnp.arange(keys.shape[0])[None, :]
    start = jnp.clip(row_starts, 0, keys.shape[0])[:, None]
    inside = (columns >= start) & (columns - start < row_lengths[:, None])
    return jnp.where(inside, scores, -jnp.inf)


def paged_indexer_scores(
    q: Array, keys: Array, key_scales: Array | None, weights: Array, slots: Array, *, dtype=jnp.float32
) -> Array:
    """`indexer_scores` with a row of keys for every query: slots[T, M] into keys[N, D], -inf if a slot is invalid.

    Returns dtype[T, M].
    """
    own = gather(keys.astype(dtype), slots)
    dots = jnp.einsum("thd,tmd->thm", q.astype(dtype), own, precision=HIGHEST)
    scores = jnp.einsum("thm,th->tm", jnp.maximum(dots, 0), weights.astype(dtype), precision=HIGHEST)
    valid = (slots >= 0) & (slots < keys.shape[0])
    if key_scales is not None:
        scores = scores * gather(key_scales.astype(dtype)[:, None], slots)[..., 0]
    return jnp.where(valid, scores, -jnp.inf)


# --- topk
def top_k(scores: Array, k: int, row_starts: Array, row_lengths: Array) -> Array:
    """Columns of the k largest scores of each row's interval, counted from its start, ascending, then -1.

    NaN counts as -inf, -0.0 equals 0.0, ties go to the lower column; exactly min(k, length) results per row.
    scores[R, N], row_starts[R], row_lengths[R] -> int32[R, k].
    """
    columns = scores.shape[1]
    start = jnp.clip(row_starts, 0, columns)[:, None]
    length = jnp.clip(row_lengths, 0, columns - start[:, 0])[:, None]
    column = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32)[None, :], scores.shape)
    inside = (column >= start) & (column < start + length)
    value = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    # Compare integers of the same order: float comparisons may flush subnormals. Both zeros become one integer.
    bits = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.int32)
    value = jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits)
    # Three sort keys: inside first, then the larger value, then the lower column.
    order = jnp.lexsort((column, -value, ~inside), axis=-1)[:, : min(k, columns)].astype(jnp.int32)
    chosen = jnp.arange(order.shape[1])[None, :] < length
    local = jnp.sort(jnp.where(chosen, order - start, jnp.iinfo(jnp.int32).max), axis=-1)
    local = jnp.where(jnp.arange(order.shape[1])[None, :] < length, local, -1)
    # Pad, do not write into an array: under shard_map jaxlib 0.11.2 ends the process when it compiles that scatter.
    return jnp.pad(local, ((0, 0), (0, k - order.shape[1])), constant_values=-1)


# --- attention
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
    """Merges splits of a softmax: outs[S, T, H, V], lses[S, T, H] (not finite: empty) -> (out[T, H, V], lse[T, H])."""
    full = jnp.isfinite(lses)
    weights = jax.nn.softmax(lses, axis=0, where=full)
    out = jnp.where(full[..., None], weights[..., None] * outs, 0).sum(axis=0)
    return out, jax.nn.logsumexp(lses, axis=0, where=full)


def apply_sinks(out: Array, lse: Array, sinks: Array) -> Array:
    """Adds the logits sinks[H], which have no value, to the softmax with result out[T, H, V] and lse[T, H]."""
    sinks = sinks.astype(lse.dtype)
    is_empty = jnp.isneginf(lse)
    share = jnp.where(is_empty, 0, 1 / (1 + jnp.exp(sinks[None, :] - jnp.where(is_empty, 0, lse))))
    return out * share[..., None]


# --- compressor
def pool(
    kv: Array, gate: Array, valid: Array, norm: Array, angles: Array, *, eps: float = 1e-6, dtype=jnp.float32
) -> Array:
    """Entries of W windows of S rows: softmax of the gates over the rows per channel, weighted sum, RMSNorm, rotation.

    kv[W, S, D], gate[W, S, D] (position bias included), valid[W, S] (False: weight 0), norm[D], angles[W, R // 2] of
    the last R values in interleaved pairs -> dtype[W, D].
    """
    valid = valid[..., None]
    gate, kv = jnp.where(valid, gate.astype(dtype), -jnp.inf), jnp.where(valid, kv.astype(dtype), 0)
    entry = (jax.nn.softmax(gate, axis=1) * kv).sum(axis=1)
    entry = entry / jnp.sqrt((entry**2).mean(axis=-1, keepdims=True) + eps) * norm.astype(dtype)
    cos, sin = jnp.cos(angles.astype(dtype)), jnp.sin(angles.astype(dtype))
    still, turning = jnp.split(entry, [entry.shape[1] - 2 * angles.shape[1]], axis=1)
    first, second = turning[:, 0::2], turning[:, 1::2]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([still, turned.reshape(turning.shape)], axis=1)


def compress(
    kv: Array,
    gate: Array,
    position_bias: Array,
    norm: Array,
    frequencies: Array,
    *,
    ratio: int,
    eps: float = 1e-6,
    dtype=jnp.float32,
) -> Array:
    """DeepSeek-V4's entries of one whole sequence kv[T, C], gate[T, C] (C = D, or 2 * D with overlap).

    position_bias[ratio, C], norm[D], frequencies[R // 2] -> dtype[T // ratio, D]. Angles are products in float32.
    """
    count, dim = kv.shape[0] // ratio, norm.shape[0]
    kv = kv[: count * ratio].astype(dtype).reshape(count, ratio, -1)
    gate = gate[: count * ratio].astype(dtype).reshape(count, ratio, -1) + position_bias.astype(dtype)
    valid = jnp.ones((count, ratio), bool)
    if kv.shape[2] == 2 * dim:
        # Rows of a window: the previous window's tokens (first half of the channels), its own tokens (second half).
        before = [jnp.roll(x[..., :dim], 1, axis=0) for x in (kv, gate)]
        kv, gate = (jnp.concatenate([b, x[..., dim:]], axis=1) for b, x in zip(before, (kv, gate)))
        valid = jnp.concatenate([jnp.broadcast_to(jnp.arange(count)[:, None] > 0, valid.shape), valid], axis=1)
    angles = (jnp.arange(count) * ratio).astype(jnp.float32)[:, None] * jnp.asarray(frequencies, jnp.float32)
    return pool(kv, gate, valid, norm, angles, eps=eps, dtype=dtype)


# --- hyper-connections
def merge_streams(
    streams: Array, product: Array, base: Array, scale: Array, norm=None, *, eps, norm_eps, dtype=jnp.float32
) -> Array:
    """Sum over n of (sigmoid(scale[0] * z + base) + eps)[n] * streams[T, n, D], then RMSNorm if given: dtype[T, D].

    z[T, n]: the first columns of product[T, O] = flat(streams) @ fn, divided by the root mean square of the token.
    """
    streams, n = streams.astype(dtype), streams.shape[1]
    z = product.astype(dtype)[:, :n] / jnp.sqrt((streams**2).mean(axis=(1, 2)) + norm_eps)[:, None]
    weights = 1 / (1 + jnp.exp(-(scale.astype(dtype)[0] * z + base.astype(dtype)[:n]))) + eps
    joined = (weights[:, :, None] * streams).sum(axis=1)
    if norm is None:
        return joined
    return joined / jnp.sqrt((joined**2).mean(axis=1, keepdims=True) + norm_eps) * norm.astype(dtype)


def split_streams(
    streams: Array,
    product: Array,
    base: Array,
    scale: Array,
    norm: Array | None = None,
    *,
    iterations: int | None,
    eps: float,
    norm_eps: float,
    magnitude: float = 2.0,
    writes_eps: float = 0.0,
    dtype=jnp.float32,
) -> tuple[Array, ...]:
    """(input of a sub-layer dtype[T, D], weights of its output dtype[T, n], mixing matrices dtype[T, n, n]).

    Columns of product[T, O], see `merge_streams`: n for the input, n for the output, n * n of the matrix, row by row.
    Without iterations there is no matrix.
    """
    constants = {"eps": eps, "norm_eps": norm_eps, "dtype": dtype}
    joined, n = merge_streams(streams, product, base, scale, norm, **constants), streams.shape[1]
    z = product.astype(dtype) / jnp.sqrt((streams.astype(dtype) ** 2).mean(axis=(1, 2)) + norm_eps)[:, None]
    scale, base = scale.astype(dtype), base.astype(dtype)
    writes = magnitude / (1 + jnp.exp(-(scale[1] * z + base)[:, n : 2 * n])) + writes_eps
    if iterations is None:
        return joined, writes
    mixing = jax.nn.softmax((scale[2] * z + base)[:, 2 * n :].reshape(-1, n, n), axis=2) + eps

    def by_columns(mixing):
        return mixing / (mixing.sum(axis=1, keepdims=True) + eps)

    def once(_, mixing):
        return by_columns(mixing / (mixing.sum(axis=2, keepdims=True) + eps))

    return joined, writes, jax.lax.fori_loop(0, iterations - 1, once, by_columns(mixing))


# --- output projection
def rotated_projection(out: Array, weight: Array, angles: Array, *, dtype=jnp.float32) -> Array:
    """Rotates the last r values of out[T, H, d] back, multiplies by weight[g, I, O] per group: dtype[T, g, O].

    angles[T, r / 2] of interleaved pairs; I = H // g * d.
    """
    tokens, kept = out.shape[0], out.shape[2] - 2 * angles.shape[1]
    cos, sin = (f(angles.astype(dtype))[:, None, :] for f in (jnp.cos, jnp.sin))
    x = out.astype(dtype)
    first, second = x[..., kept::2], x[..., kept + 1 :: 2]
    x = x.at[..., kept::2].set(first * cos + second * sin).at[..., kept + 1 :: 2].set(second * cos - first * sin)
    rows = x.reshape(tokens, *weight.shape[:2])
    return jnp.einsum("tgi,gio->tgo", rows, weight.astype(dtype), precision=HIGHEST)


# --- router
def biased_grouped_topk(logits: Array, bias: Array, *, excluded: float = -jnp.inf, **sizes) -> tuple[Array, Array]:
    """DeepSeek-V3's noaux_tc router: (weights float32[T, k], ids int32[T, k]), ids by descending biased score."""
    score = jax.nn.sigmoid(_nan_as_lowest(logits))
    return _grouped(score, score + bias.astype(jnp.float32), excluded, **sizes)


def softmax_grouped_topk(logits: Array, **sizes) -> tuple[Array, Array]:
    """Mistral Large 4's router: a softmax over all experts, no bias; results as of `biased_grouped_topk`."""
    share = jnp.nan_to_num(jax.nn.softmax(jnp.minimum(_nan_as_lowest(logits), jnp.finfo(jnp.float32).max)))
    return _grouped(share, share, -jnp.inf, **sizes)


def _nan_as_lowest(logits: Array) -> Array:
    return jnp.where(jnp.isnan(logits), -jnp.inf, logits.astype(jnp.float32))


def _grouped(score, choice, excluded, *, num_groups: int, groups_kept: int, k: int, scale: float, renormalize=True):
    """The k experts of the largest choice[T, E], which is `excluded` outside the groups whose two best sum highest."""
    grouped = choice.reshape(choice.shape[0], num_groups, choice.shape[1] // num_groups)
    group_score = jnp.sort(grouped, axis=-1)[..., -2:].sum(axis=-1)
    kept = jnp.argsort(-group_score, axis=-1, stable=True)[:, :groups_kept]
    alive = jnp.any(jnp.arange(num_groups)[None, None, :] == kept[:, :, None], axis=1)
    choice = jnp.where(jnp.repeat(alive, grouped.shape[2], axis=-1), choice, excluded)
    ids = jnp.argsort(-choice, axis=-1, stable=True)[:, :k].astype(jnp.int32)
    return _shares(jnp.take_along_axis(score, ids, axis=-1), scale, renormalize), ids


def sqrt_softplus_topk(logits: Array, bias: Array, *, k: int, scale: float, renormalize=True) -> tuple[Array, Array]:
    """DeepSeek-V4's router: (weights float32[T, k], ids int32[T, k]), ids by descending biased score."""
    score = sqrt_softplus(logits)
    how = {"num_groups": 1, "groups_kept": 1, "k": k, "scale": scale, "renormalize": renormalize}
    return _grouped(score, score + bias.astype(jnp.float32), -jnp.inf, **how)


def hash_route(logits: Array, token_ids: Array, table: Array, *, scale, renormalize=True) -> tuple[Array, Array]:
    """Routing in DeepSeek-V4's first layers: experts table[token id], weights from their scores."""
    ids = jnp.clip(table[jnp.clip(token_ids, 0, table.shape[0] - 1)], 0, logits.shape[1] - 1).astype(jnp.int32)
    return _shares(jnp.take_along_axis(sqrt_softplus(logits), ids, axis=-1), scale, renormalize), ids


def sqrt_softplus(logits: Array) -> Array:
    """sqrt(ln(1 + e^x)) in float32, always finite; NaN gives 0."""
    logits = jnp.minimum(_nan_as_lowest(logits), jnp.finfo(jnp.float32).max)
    return jnp.sqrt(jnp.maximum(logits, 0) + jnp.log1p(jnp.exp(-jnp.abs(logits))))


def _shares(weights: Array, scale: float, renormalize: bool) -> Array:
    """weights[T, k] times scale; with `renormalize` first divided by their sum if that is positive."""
    if renormalize:
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1)
    return weights * scale


# --- rope
def rotate(x: np.ndarray, angles: np.ndarray, *, interleaved: bool, inverse: bool = False) -> np.ndarray:
    """Rotates pairs of x[..., d] by angles[..., d // 2] (numpy, float64): (x_2i, x_2i+1) or (x_i, x_{i + d/2})."""
    x = np.asarray(x, np.float64)
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turn = (first + 1j * second) * np.exp((-1j if inverse else 1j) * np.asarray(angles, np.float64))
    both = turn.real, turn.imag
    return np.stack(both, -1).reshape(x.shape) if interleaved else np.concatenate(both, -1)


# --- projections
def norm_rope(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    angles: Array,
    *,
    rotated: int | None,
    interleaved: bool,
    eps: float,
    dtype=jnp.float32,
) -> Array:
    """Norm over W of x[T, H, W] (none without weight, RMSNorm without bias, else layer norm), then a rotation.

    Columns from `rotated` on are rotated by angles[T, pairs]: pairs (2i, 2i + 1) if interleaved, else (i, pairs + i).
    """
    x = x.astype(dtype)
    if weight is not None:
        x = x if bias is None else x - x.mean(axis=-1, keepdims=True)
        x = x / jnp.sqrt((x**2).mean(axis=-1, keepdims=True) + eps) * weight.astype(dtype)
        x = x if bias is None else x + bias.astype(dtype)
    if rotated is None:
        return x
    pairs = angles.shape[1]
    cos, sin = (f(angles.astype(dtype))[:, None, :] for f in (jnp.cos, jnp.sin))
    pair = np.arange(pairs)
    a, b = (rotated + 2 * pair, rotated + 2 * pair + 1) if interleaved else (rotated + pair, rotated + pairs + pair)
    first, second = x[..., a], x[..., b]
    return x.at[..., a].set(first * cos - second * sin).at[..., b].set(second * cos + first * sin)
