"""Steps of a model on a mesh of virtual devices, or on one device: the same requests, with caches of their own."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from sparse_mla_jax.metadata import build_metadata
from sparse_mla_jax.models.family import family_of, fuse_on_mesh, matmul_precision, partition_model
from sparse_mla_jax.parallel.axes import make_mesh, parse_parallel
from sparse_mla_jax.parallel.run import Where, create_on_mesh, place_params, run_on_mesh


class Inputs(NamedTuple):
    """What a step gets: values, a pytree of [T, ...]; int32 seq_lens [B], query_lens [B] and page_table [B, P]."""

    values: Any
    seq_lens: Any
    query_lens: Any
    page_table: Any

    def metadata(self, page_size):
        tokens = jax.tree.leaves(self.values)[0].shape[0]
        return build_metadata(*self[1:], num_tokens=tokens, page_size=page_size)


@dataclasses.dataclass(frozen=True)
class OnMesh:
    """Requests of a model on the mesh that `mesh` describes; "" is one device.

    Attributes:
      config: the model's shapes.
      mesh: as for `parse_parallel`.
      batch: requests; the groups of "data" have equally many.
      length: most tokens of a request.
      page_size: tokens of a page.
      chunk: most tokens of a request in a step.
      dtype: of the caches.
    """

    config: Any
    mesh: str = ""
    batch: int = 2
    length: int = 48
    page_size: int = 4
    chunk: int = 1
    dtype: Any = "float32"

    @functools.cached_property
    def parallel(self):
        return parse_parallel(self.mesh) if self.mesh else None

    @property
    def groups(self):
        return self.parallel.data if self.parallel else 1

    def where(self, params):
        """None on one device."""
        if self.parallel is None:
            return None
        return Where(make_mesh(self.parallel), self.parallel, partition_model(params, self.config, self.parallel))

    def place(self, params, *, fused=False):
        """The parameters where the mesh needs them."""
        if self.parallel is None:
            return family_of(self.config).fuse_projections(params) if fused else params
        # Fusing may give its arguments up.
        params = place_params(jax.tree.map(np.asarray, params), self.where(params))
        return fuse_on_mesh(params, self.config, make_mesh(self.parallel), self.parallel) if fused else params

    def create_caches(self, params):
        width, parts = -(-self.length // self.page_size), self.parallel.context if self.parallel else 1
        sizes = {"num_requests": self.batch, "max_query_len": self.chunk, "dtype": self.dtype}
        pages = self.batch * -(-width // parts) * parts
        create = functools.partial(family_of(self.config).create_caches, self.config, pages, self.page_size, **sizes)
        where = self.where(params)
        return create() if where is None else create_on_mesh(create, where)

    def page_table(self):
        """int32 [B, P]: page column p is on device p % context, which has the pages of its group's requests."""
        width, parts = -(-self.length // self.page_size), self.parallel.context if self.parallel else 1
        row, column = np.arange(self.batch) % (self.batch // self.groups), np.arange(width)
        return (row[:, None] * -(-width // parts) + column // parts).astype(np.int32)

    def inputs(self, values, seq_lens, size):
        """A step of values[b] [n_b, ...], the last n_b tokens of request b; `size` rows a request, some padding."""
        own = self.batch // self.groups
        packed = []
        for first in range(0, self.batch, own):
            rows = np.concatenate(values[first : first + own])
            packed.append(np.pad(rows, ((0, own * size - len(rows)), *((0, 0),) * (rows.ndim - 1))))
        counts = np.asarray([len(one) for one in values], np.int32)
        return Inputs(np.concatenate(packed), np.asarray(seq_lens, np.int32), counts, self.page_table())

    def rows(self, result, counts):
        """The rows of each request, one after the other, of a result of a step with counts[b] tokens of request b."""
        by_group = np.asarray(result).reshape(self.groups, -1, *result.shape[1:])
        counts = np.reshape(counts, (self.groups, -1))
        return np.concatenate([rows[:count] for rows, count in zip(by_group, counts.sum(axis=1))])

    def run(self, body, params, caches, inputs):
        """`body` of (params, caches, inputs) wherever the model lies; call it inside `jax.jit`."""
        with matmul_precision(params):
            where = self.where(params)
            if where is None:
                return body(params, caches, inputs)
            return run_on_mesh(body, where, params, caches, inputs)

    def logits(self, params, caches, inputs, implementation=None):
        """(logits float32 [T, V], caches) of a step whose values are token ids; call it inside `jax.jit`."""

        def body(params, caches, inputs):
            family, options = family_of(self.config), {"config": self.config, "parallel": self.parallel}
            meta, tokens = inputs.metadata(self.page_size), inputs.values
            hidden, caches = family.forward(params, tokens, caches, meta, implementation=implementation, **options)
            return family.logits(params, hidden, self.config, self.parallel), caches

        return self.run(body, params, caches, inputs)
