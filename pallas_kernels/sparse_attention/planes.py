"""Sparse latent attention: one program handles the slots of one query row for some heads, with an online softmax.

The kernel loads keys from the cache without a copy. It loads FP8 latents as 32-bit words of four values and decodes
them into four byte planes, with one matrix product per plane. A plane is every fourth column, so queries are loaded
with the same stride. Group scales are float32. They multiply the scores and the probabilities, never the keys: FP8
values are exact in bfloat16, but their products with a scale are not. NVIDIA GPUs have other kernels for FP8 keys:
sparse_attention.fp8 and sparse_attention.float16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import fp8_bits
from pallas_kernels._call import load
from pallas_kernels._primitives import fence, hidden, load_from
from pallas_kernels.online_softmax import LOG2E, NONE, dot, softmax_step
from pallas_kernels.plans.attention import AttentionPlan
from pallas_kernels.sparse_attention.program import AttentionCall, kernel_arguments, launch_rows, unpack
from pallas_kernels.sparse_attention.results import finish_softmax, store_values
from pallas_kernels.sparse_attention.rows import RowPart, Source, choose, key_slots, some_keys
from pallas_kernels.targets import CDNA, Target
from pallas_kernels.tiles import grid2, power_of_two


# --- tiles
@dataclasses.dataclass(frozen=True)
class Tile:
    """Columns of a key that are loaded together.

    Attributes:
      array: which array, "latent" or "rope".
      start, count: first element and number of elements in that array (words of four columns if planes is 4).
      width: count rounded up to a power of two, at least 16.
      column: column of the key where the tile starts.
      planes: 4 for FP8 words, else 1.
      group: index of the scale, or None.
    """

    array: str
    start: int
    count: int
    width: int
    column: int
    planes: int
    group: int | None

    @property
    def full(self) -> bool:
        """Whether the tile has no padding."""
        return self.count == self.width


def _tiles(array: str, count: int, column: int, widest: int, planes: int = 1, group: int | None = None, start: int = 0):
    """Cuts `count` elements from `start` on into tiles of at most `widest`."""
    return [
        Tile(
            array,
            start + at,
            n := min(widest, count - at),
            max(16, power_of_two(n)),
            column + at * planes,
            planes,
            group,
        )
        for at in range(0, count, widest)
    ]


def layout(source: Source, plan: AttentionPlan) -> tuple[Tile, ...]:
    """The tiles of a source's keys.

    Raises:
      NotImplementedError: FP8 groups that split a word of four values.
    """
    latent = source.latent.shape[-1] * (1 if source.scale is None else 4)
    tiles: list[Tile] = []
    if source.scale is None:
        tiles += _tiles("latent", latent, 0, plan.tile)
    else:
        if source.group_size % 4:
            raise NotImplementedError(f"FP8 groups of {source.group_size} values; the kernel reads words of four")
        words = source.group_size // 4
        for group in range(latent // source.group_size):
            tiles += _tiles("latent", words, group * source.group_size, plan.tile, 4, group, group * words)
    if source.rope is not None and source.rope.shape[-1]:
        tiles += _tiles("rope", source.rope.shape[-1], latent, plan.tile)
    return tuple(tiles)


# --- arithmetic on arrays
def planes_of(words: Array, s: PlanesSpecialization) -> list[Array]:
    """Decodes uint32 [K, W] into four [K, W] in the compute dtype, without the flavour's power of two (exact)."""
    raw = fp8_bits.decode_words(words, s.fp8, s.target)
    return [fp8_bits.truncate_to_bfloat16(x) for x in raw] if s.compute == jnp.bfloat16 else raw


def scores_of(queries, keys, factors) -> Array:
    """float32 [H, K]: sum over tiles of factor[K] * sum over planes of q[H, W] . k[K, W]."""
    total = jnp.zeros((queries[0][0].shape[0], keys[0][0].shape[0]), jnp.float32)
    for qs, ks, factor in zip(queries, keys, factors):
        part = dot(qs[0], ks[0], 1)
        for q, k in zip(qs[1:], ks[1:]):
            part += dot(q, k, 1)
        total += part if factor is None else part * factor[None, :]
    return total


# --- kernel
@dataclasses.dataclass(frozen=True)
class PlanesSpecialization:
    """Compile-time constants of the kernel."""

    heads: int
    dim: int
    value_dim: int
    scale: float
    tiles: tuple[Tile, ...]
    names: tuple[tuple[str, ...], ...]  # arrays of each source, in argument order
    counts: tuple[int, ...]  # slots of each source
    widths: tuple[int, ...]  # dense width of each source, 0 when ragged
    fp8: jnp.dtype | None
    compute: jnp.dtype
    has_sinks: bool
    plan: AttentionPlan
    target: Target


def _columns(tile: Tile, byte: int) -> tuple[Array, Array | None]:
    """Key columns [width] of one plane of a tile, and the mask of those that are not padding (None: all)."""
    i = jnp.arange(tile.width, dtype=jnp.int32)
    columns = tile.column + i * tile.planes + byte
    # Select only if there is padding: a select hides from Triton that columns are consecutive, so loads are narrow.
    return (columns, None) if tile.full else (jnp.where(i < tile.count, columns, 0), i < tile.count)


def _load_queries(q_ref, token, heads: Array, s: PlanesSpecialization):
    """Loads q of every tile and plane, [head_block, width] in the compute dtype; padded columns are 0."""
    out = []
    for tile in s.tiles:
        parts = []
        for byte in range(tile.planes):
            columns, inside = _columns(tile, byte)
            # Padded heads repeat the last head: their results are not stored.
            rows, cols = grid2(jnp.minimum(heads, s.heads - 1), columns)
            part = load(q_ref.at[jnp.full_like(rows, token), rows, cols])
            parts.append((part if inside is None else jnp.where(inside[None, :], part, 0)).astype(s.compute))
        out.append(parts)
    return out


def _read_keys(
    sources: Sequence[dict], number, slots: Array, s: PlanesSpecialization
) -> tuple[list[Array], list[Array]]:
    """Loads undecoded keys: every tile [key_block, width], and the scales [key_block] of tiles that have one.

    Loads have no mask, since every masked load is a branch on CDNA. Absent keys load another slot instead.
    """

    def read(name, rows, cols):
        return load_from([refs[name] for refs in sources], number, rows, cols, target=s.target)

    parts, scales = [], []
    for tile in s.tiles:
        i = jnp.arange(tile.width, dtype=jnp.int32)
        rows, cols = grid2(slots, tile.start + i if tile.full else jnp.where(i < tile.count, tile.start + i, 0))
        parts.append(read(tile.array, rows, cols))
        if tile.group is not None:
            scales.append(read("scale", slots, jnp.full_like(slots, tile.group)))
    return parts, scales


def _decode_keys(parts: Sequence[Array], scales: Sequence[Array], valid: Array, s: PlanesSpecialization):
    """Decodes keys of every tile ([key_block, width] per plane) and their factors ([key_block] or None).

    Absent keys become 0. With `plan.anchored` they stay copies of a present key: a loaded value that passes through no
    select can go to the tensor cores through shared memory alone.
    """
    keys: list[list[Array]] = []
    factors: list[Array | None] = []
    unused = iter(scales)
    for tile, part in zip(s.tiles, parts):
        if not (s.plan.anchored and tile.full):
            exists = valid[:, None]
            if not tile.full:
                exists = exists & (jnp.arange(tile.width, dtype=jnp.int32) < tile.count)[None, :]
            part = jnp.where(exists, part, jnp.zeros_like(part))
        if tile.group is None:
            keys.append([part.astype(s.compute)])
            factors.append(None)
            continue
        scale = next(unused)
        scale = fp8_bits.e8m0_to_float32(scale) if scale.dtype == jnp.uint8 else scale
        keys.append(planes_of(part, s))
        factors.append(jnp.where(valid, scale * fp8_bits.power(s.fp8, s.target), 0.0))
    return keys, factors


def _over_blocks(sources: Sequence[dict], part: RowPart, queries, state, s: PlanesSpecialization):
    """Folds the key blocks of the program into the softmax state."""
    number_of, slots_of = key_slots(sources, part, s)
    present, first, last = [jnp.int32(0)] * len(sources), part.first, part.last
    if s.plan.anchored:
        present, first, last = some_keys(slots_of, part)

    def body(i, state):
        top, total, sums = state
        number, slots = number_of(i), slots_of(i)
        valid = slots >= 0
        parts, scales = _read_keys(sources, number, jnp.where(valid, slots, choose(number, present)), s)
        if s.plan.fenced:
            parts = fence(parts, s.target)
        keys, factors = _decode_keys(parts, scales, valid, s)
        scores = scores_of(queries, keys, factors) * (s.scale * LOG2E)
        top, total, keep, probabilities = softmax_step(top, total, scores, valid)
        return top, total, _add_values(sums, keep, probabilities, keys, factors, s)

    return jax.lax.fori_loop(first, last, body, state)


def _add_values(sums, keep: Array, probabilities: Array, keys, factors, s: PlanesSpecialization):
    """Returns sums * keep + probabilities . values, per tile and plane that holds value columns."""
    out, at = [], 0
    for tile, ks, factor in zip(s.tiles, keys, factors):
        if tile.column >= s.value_dim:
            continue
        weights = _halves(probabilities if factor is None else probabilities * factor[None, :], s)
        for k in ks:
            total = sums[at] * keep[:, None]
            for term in weights:
                total += dot(term, k, 0)
            out.append(total)
            at += 1
    return tuple(out)


def _halves(weights: Array, s: PlanesSpecialization) -> list[Array]:
    """Splits float32 weights into one term of the compute dtype, or (plan.exact_weights) two truncated 8-bit terms."""
    if s.compute == jnp.float32 or not s.plan.exact_weights:
        return [weights.astype(s.compute)]
    upper = fp8_bits.truncate_to_bfloat16(weights)
    return [upper, fp8_bits.truncate_to_bfloat16(weights - upper.astype(jnp.float32))]


def _kernel(*refs, part: RowPart, s: PlanesSpecialization):
    """Grid (T, head blocks, splits): out[split, token, heads, value_dim] and lse[split, token, heads]."""
    q_ref, sources, sink_ref, out_ref, lse_ref, _ = unpack(refs, s)
    queries = _load_queries(q_ref, part.token, part.heads, s)
    block = (s.plan.head_block,)
    state = (
        jnp.full(block, NONE, jnp.float32),
        jnp.zeros(block, jnp.float32),
        tuple(
            jnp.zeros((*block, tile.width), jnp.float32)
            for tile in s.tiles
            if tile.column < s.value_dim
            for _ in range(tile.planes)
        ),
    )

    state = _over_blocks(sources, part, queries, state, s)
    _store_results(out_ref, lse_ref, sink_ref, part, state, s)


def _store_results(out_ref, lse_ref, sink_ref, part: RowPart, state, s: PlanesSpecialization):
    top, total, sums = state
    if s.target in CDNA:
        part = dataclasses.replace(part, heads=hidden(part.heads, s.target))
    share = finish_softmax(lse_ref, sink_ref, part, top, total, s)
    at = 0
    for tile in s.tiles:
        if tile.column >= s.value_dim:
            continue
        for byte in range(tile.planes):
            columns, inside = _columns(tile, byte)
            if tile.column + tile.count * tile.planes > s.value_dim:
                inside = columns < s.value_dim if inside is None else inside & (columns < s.value_dim)
            store_values(out_ref, part, columns, sums[at] * share[:, None], inside, s)
            at += 1


# --- launch
def launch(request: AttentionCall, compute: jnp.dtype) -> tuple[Array, Array]:
    """Runs the kernel of this file: (out[splits, T, H, value_dim], lse[splits, T, H])."""
    _, heads, dim = request.q.shape
    tiles = {(layout(s, request.plan), None if s.scale is None else jnp.dtype(s.dtype)) for s in request.sources}
    if len(tiles) > 1:
        raise NotImplementedError("the two sources store keys in different layouts; the kernel follows one layout")
    if any(a.dtype not in (jnp.bfloat16, jnp.float32) for s in request.sources if s.scale is None for a in [s.latent]):
        raise NotImplementedError("unquantised keys must be bfloat16 or float32")
    ((common, flavour),) = tiles
    arrays, meta = kernel_arguments(request.sources)
    static = PlanesSpecialization(
        heads=heads,
        dim=dim,
        value_dim=request.value_dim,
        scale=request.sm_scale,
        tiles=common,
        **meta,
        fp8=flavour,
        compute=compute,
        has_sinks=request.sinks is not None and request.plan.splits == 1,
        plan=request.plan,
        target=request.target,
    )
    return launch_rows(_kernel, static, request, arrays)
