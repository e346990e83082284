"""Caches, rows, and what a cache holds of them, byte for byte."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparse_mla_jax.ops import fp8
from sparse_mla_jax.ops.cache import (
    PagedIndexCache,
    PagedKVCache,
    gather,
    gather_index,
    write,
    write_index,
    write_token,
)
from support.equivalence import Operator, Same, assert_same_bits, bits

FP8 = [jnp.float8_e4m3fnuz, jnp.float8_e4m3fn]
DTYPES = [*FP8, jnp.bfloat16, jnp.float32]
PAGES, PAGE, LATENT, ROPE, GROUP, DIM = 5, 3, 24, 6, 8, 20
SLOTS = PAGES * PAGE


SAME: dict[str, Any] = dict.fromkeys(("cache", "index"), Same())
# Caches hold NaN on purpose: they are compared by `same_bytes`, not by these.
write_token_op = Operator(write_token, ("cache", "index"), SAME)
write_op = Operator(write, ("cache",), SAME)
write_index_op = Operator(write_index, ("cache",), SAME)
write_jit = functools.partial(write_op, implementation=None)
write_index_jit = functools.partial(write_index_op, implementation=None)
gather_jit = jax.jit(gather, static_argnames="dtype")
gather_index_jit = jax.jit(gather_index, static_argnames="dtype")


def kv_cache(dtype, **changes):
    sizes: Any = dict(latent_dim=LATENT, rope_dim=ROPE, group_size=GROUP) | changes
    return PagedKVCache.create(PAGES, PAGE, dtype=dtype, **sizes)


def rows(tokens, seed=0) -> Any:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal((tokens, width)), jnp.float32) for width in (LATENT, ROPE, DIM)]


def expected_rows(latent, rope, dtype):
    """What a cache of `dtype` holds of the tokens, in float32."""
    if dtype in FP8:
        values, scales = jax.jit(fp8.quantize, static_argnames=("group_size", "dtype"))(
            latent, group_size=GROUP, dtype=dtype
        )
        latent = np.asarray(values).astype(np.float32) * np.asarray(scales).repeat(GROUP, -1)
    else:
        latent = np.asarray(latent.astype(dtype), np.float32)
    rope = np.asarray(rope.astype(jnp.float32 if dtype == jnp.float32 else jnp.bfloat16), np.float32)
    return np.concatenate([latent, rope], -1)


def poisoned(cache, keep=()):
    """The cache with every byte of every slot but `keep` set to 0xFF (NaN in every float type) or 0x80."""

    def poison(leaf):
        array = np.array(leaf)
        raw = array.reshape(cache.num_slots, -1).view(np.uint8)
        others = np.setdiff1d(np.arange(cache.num_slots), keep)
        raw[others] = np.where(np.arange(raw.shape[1]) % 2, 0xFF, 0x80 if array.itemsize == 1 else 0xFF)
        return jnp.asarray(array)

    return jax.tree.map(poison, cache)


def same_bytes(got, want, label="cache"):
    assert_same_bits(got, want, label)


def slots_of(cache, chosen):
    """What the cache holds in these slots, [slots, bytes] of every leaf."""
    return jax.tree.map(lambda x: x.reshape(cache.num_slots, -1)[chosen], bits(cache))


SPECIAL = np.array(
    [np.nan, -np.nan, np.inf, -np.inf, 3e38, -3.3e38, 1e-45, -1e-40, 2e-38, 0, -0.0, 1e-4, 448, 448 * 1.0625],
    np.float32,
)
# A NaN with a payload, which a machine's own cast to bfloat16 may lose.
SPECIAL = np.append(SPECIAL, np.array([0x7F80_0001, 0xFFA0_1234], np.uint32).view(np.float32))


@dataclasses.dataclass(frozen=True)
class Bytes:
    """One write of tokens whose slots are skipped, repeated or valid, among values of all magnitudes and kinds."""

    dtype: Any
    scale_dtype: Any = jnp.float32
    rows_dtype: Any = jnp.float32
    sizes: tuple[int, int, int, int] = (LATENT, ROPE, DIM, GROUP)
    slots: tuple[int, ...] = (3, -1, 7, SLOTS, 3, 14, 0, -(2**31), 2**31 - 1, 7, 5, 3)

    def __str__(self):
        names = [jnp.dtype(d).name.removeprefix("float8_") for d in (self.dtype, self.scale_dtype, self.rows_dtype)]
        return "-".join([*names, *map(str, self.sizes), f"t{len(self.slots)}"])

    def build(self):
        """(caches full of NaN, rows and slots)."""
        latent, rope, dim, group = self.sizes
        sizes: Any = dict(latent_dim=latent, rope_dim=rope, group_size=group, scale_dtype=self.scale_dtype)
        cache = PagedKVCache.create(PAGES, PAGE, dtype=self.dtype, **sizes)
        # One page more: the slot after the last of the other cache is one of this.
        index = PagedIndexCache.create(PAGES + 1, PAGE, dim=dim, dtype=self.dtype)
        rng, rows = np.random.default_rng(len(str(self))), []
        for width in (latent, rope, dim):
            x = rng.standard_normal((len(self.slots), width)) * np.exp(rng.uniform(-14, 9, (len(self.slots), 1)))
            # Also ties: multiples of a code's half unit.
            x = np.where(rng.random(x.shape) < 0.2, np.round(x * 16) / 16, x).astype(np.float32)
            odd = (rng.random(x.shape) < 0.1) & (rng.random((len(self.slots), 1)) < 0.5)
            with np.errstate(invalid="ignore"):
                x = np.where(odd, rng.choice(SPECIAL, x.shape), x).astype(self.rows_dtype)
            if x.itemsize == 2:
                # A cast on the host loses the payload, so this type gets one of its own.
                x.view(np.uint16)[0, 0] = 0xFF81 if self.rows_dtype == jnp.bfloat16 else 0xFD01
            rows.append(jnp.asarray(x))
        return (poisoned(cache), poisoned(index)), rows, np.array(self.slots, np.int32)
