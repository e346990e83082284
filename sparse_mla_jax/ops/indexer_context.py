"""The lightning indexer when the pages of a request are spread over a mesh axis: `lightning_indexer(axis_name=...)`.

Every device scores its own keys and takes its own top-k. The devices exchange positions and scores of these, and agree
on the top-k of all: `top_k` of the scores that one device with the whole cache would have, with the same rule for ties.
Scores never cross devices otherwise.

A device sends min(k, own columns) int32 positions and as many float32 scores of each token to each of the other n - 1
devices: at most 8 k bytes a token, 16 KiB for k 2048, and receives n - 1 times as much.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.mesh_axes import axes_of, spread
from sparse_mla_jax._check import require
from sparse_mla_jax.ops import context_pages, topk
from sparse_mla_jax.ops._axis import axis_size
from sparse_mla_jax.ops._visible_keys import VisibleKeys
from sparse_mla_jax.ops.topk_merge import top_k_merge, top_k_share


@dataclasses.dataclass(frozen=True)
class SpreadKeys:
    """This device's share of the keys.

    Attributes:
      axis_name: the mesh axis.
      page_size: positions of a page.
      own_keys: whether only the selected positions of this device are wanted.
    """

    axis_name: str
    page_size: int
    own_keys: bool

    @property
    def _place(self) -> tuple[Array, int, int]:
        return jax.lax.axis_index(self.axis_name), axis_size(self.axis_name), self.page_size

    def own(self, keys: VisibleKeys) -> VisibleKeys:
        """The visible keys that lie on this device, by local positions."""
        index, n, page_size = self._place
        cycle = n * page_size
        # The first device has the most.
        columns = keys.columns // cycle * page_size + min(keys.columns % cycle, page_size)
        return dataclasses.replace(
            keys,
            pages=context_pages.own_pages(keys.pages, index, n),
            lengths=self.own_lengths(keys.lengths),
            columns=columns,
        )

    def own_lengths(self, lengths: Array) -> Array:
        """How many of the first `lengths` positions of a request lie on this device."""
        return context_pages.own_lengths(lengths, *self._place)

    def to_global(self, local: Array) -> Array:
        """Positions in the request of local positions; -1 stays -1."""
        return context_pages.to_global(local, *self._place)

    def type_of(self, operands: Any) -> Array:
        """A scalar that varies over the axes over which the result does."""
        axes = axes_of(operands) - {self.axis_name}
        return spread(jnp.int32(0), axes | {self.axis_name} if self.own_keys else axes)

    def select(
        self, scores: Array, lengths: Array, k: int, *, return_scores: bool, implementation: str | None
    ) -> Array | tuple[Array, Array]:
        """The top-k of all devices, of this device's scores[T, N] of the columns below `lengths`: int32 [T, k].

        Only this device's part of them with `own_keys`; with `return_scores` also float32 [T, k].
        """
        kept = min(k, scores.shape[1])
        local, values = topk.top_k(scores, kept, lengths, return_scores=True, implementation=implementation)
        mine = spread((self.to_global(local), values), frozenset([self.axis_name]))
        positions, values = (jax.lax.all_gather(x, self.axis_name, to="invarying") for x in mine)
        if not self.own_keys:
            how: Any = dict(return_scores=return_scores, implementation=implementation)
            return top_k_merge(positions, values, k, **how)
        index = jax.lax.axis_index(self.axis_name)
        share, _ = top_k_share(positions, values, index, k, implementation=implementation)
        return jnp.pad(share, ((0, 0), (0, k - kept)), constant_values=-1)


def spread_keys(axis_name: Any, page_size: int, *, own_keys: bool, return_scores: bool) -> SpreadKeys | None:
    """How keys are spread over an axis; None without one.

    Raises:
      ValueError: an axis that does not exist here, own_keys without one or with return_scores.
    """
    if axis_name is None:
        require(not own_keys, "own_keys is set without axis_name; pass the mesh axis over which pages are spread.")
        return None
    axis_size(axis_name)
    require(
        not (own_keys and return_scores),
        "return_scores is set with own_keys, which gives positions alone; pass one of the two.",
    )
    return SpreadKeys(axis_name, page_size, own_keys)


def all_visible(lengths: Array, k: int, keys: SpreadKeys | None) -> Array:
    """All positions below lengths[T], which are at most k: int32 [T, k], ascending, then -1; or this device's own."""
    positions = jnp.arange(k, dtype=jnp.int32)[None, :]
    if keys is None or not keys.own_keys:
        return jnp.where(positions < lengths[:, None], positions, -1)
    return keys.to_global(jnp.where(positions < keys.own_lengths(lengths)[:, None], positions, -1))
