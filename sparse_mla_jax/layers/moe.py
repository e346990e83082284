"""Feed-forward layers: SwiGLU, and mixtures of experts with shared experts.

With `parallel`, for use inside `jax.shard_map`, weights are those of one device: columns of dense layers and shared
experts over "tensor", routed experts as `parallel.experts` says, the router whole. `x` is the same on all devices of
"context" and "tensor", and so is the result. Its parts are summed in x.dtype, see `parallel.collectives.sum_over`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.mesh_axes import varying
from sparse_mla_jax._check import require
from sparse_mla_jax.config import DeepseekV4Config
from sparse_mla_jax.layers.projections import matmul
from sparse_mla_jax.mla_shapes import MlaConfig
from sparse_mla_jax.ops.router import biased_grouped_topk, hash_route, softmax_grouped_topk, sqrt_softplus_topk
from sparse_mla_jax.parallel.axes import Parallel, check_axes
from sparse_mla_jax.parallel.collectives import sum_over
from sparse_mla_jax.parallel.experts import counted_once, local_experts, own_experts, partial_axes

__all__ = ["clamped_moe", "matmul", "moe", "moe_v4", "routed_experts", "swiglu"]

# Between so many pairs GPUs use a grouped product, otherwise blocks (measured on an H200, see `routed_experts`).
GROUPED_PAIRS = range(33, 769)
MOST_BLOCK_ROWS = 128


def _activate(gate: Array, up: Array, limit: float | None) -> Array:
    """silu(gate) * up. With a limit, gate is clipped from above and up to +-limit, as in DeepSeek-V4."""
    if limit is not None:
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return jax.nn.silu(gate) * up


def swiglu(
    params: dict[str, Array],
    x: Array,
    *,
    row_weights: Array | None = None,
    limit: float | None = None,
    parallel: Parallel | None = None,
) -> Array:
    """W_down (silu(W_gate x) * W_up x), accumulated in float32 (arXiv:2002.05202).

    Args:
      params: gate_proj [D, I], up_proj [D, I], down_proj [I, D].
      x: [T, D].
      row_weights: float32[T], a router's weights, multiplied into the inner activation; or None.
      limit: upper bound of W_gate x, and bound of W_up x on both sides; None for no limit.
      parallel: I is split over its axis "tensor", and the result is summed over it; None means one device.

    Returns:
      float32[T, D].
    """
    inner = _activate(matmul(x, params["gate_proj"]), matmul(x, params["up_proj"]), limit)
    if row_weights is not None:
        inner = inner * row_weights[:, None]
    out = matmul(inner.astype(x.dtype), params["down_proj"])
    axes = () if parallel is None else parallel.present("tensor")
    return sum_over(out.astype(x.dtype), axes).astype(jnp.float32) if axes else out


def _by_pair(
    experts: dict[str, Array], x: Array, weights: Array, ids: Array, limit: float | None = None, elsewhere: bool = False
) -> Array:
    """Goes over (token, expert) pairs one by one: reads the chosen experts only; best for very few tokens."""
    num_experts, k = experts["gate_proj"].shape[0], ids.shape[1]

    def body(pair: Array, total: Array) -> Array:
        token = pair // k
        number = ids[token, pair % k]
        chosen = jax.tree.map(lambda w: w[jnp.minimum(number, num_experts - 1) if elsewhere else number], experts)
        row = jax.lax.dynamic_slice_in_dim(x, token, 1)
        weight = weights[token, pair % k][None]
        out = swiglu(chosen, row, row_weights=weight, limit=limit)[0]
        return total.at[token].add(jnp.where(number < num_experts, out, 0) if elsewhere else out)

    start = varying(jnp.zeros(x.shape, jnp.float32), experts, x, weights)
    return jax.lax.fori_loop(0, ids.size, body, start)


def _by_expert(
    experts: dict[str, Array], x: Array, weights: Array, ids: Array, limit: float | None = None, elsewhere: bool = False
) -> Array:
    """Applies every expert to every token, with weight 0 if it was not chosen: dense products only."""
    # An id that is no expert's is dropped, whatever `elsewhere` says.
    del elsewhere
    num_experts = experts["gate_proj"].shape[0]
    dense = jnp.zeros((x.shape[0], num_experts), jnp.float32)
    dense = dense.at[jnp.arange(x.shape[0])[:, None], ids].add(weights, mode="drop", wrap_negative_indices=False)

    def body(total: Array, args: tuple[dict[str, Array], Array]) -> tuple[Array, None]:
        expert, weight = args
        return total + swiglu(expert, x, row_weights=weight, limit=limit), None

    start = varying(jnp.zeros(x.shape, jnp.float32), experts, x, weights)
    return jax.lax.scan(body, start, (experts, dense.T))[0]


def _grouped(
    experts: dict[str, Array], x: Array, weights: Array, ids: Array, limit: float | None = None, elsewhere: bool = False
) -> Array:
    """Sorts pairs by expert and uses grouped products: each expert's weights are read once, for its own rows.

    Pairs of experts elsewhere are sorted last and are in no group. A grouped product does not say what it writes after
    its last group, so those rows are replaced by zeros.
    """
    order = jnp.argsort(ids.reshape(-1), stable=True)
    sizes = jnp.bincount(ids.reshape(-1), length=experts["gate_proj"].shape[0]).astype(jnp.int32)
    rows = x[order // ids.shape[1]]
    inside = (jnp.arange(ids.size, dtype=jnp.int32) < sizes.sum(dtype=jnp.int32))[:, None]

    def product(a: Array, name: str) -> Array:
        out = jax.lax.ragged_dot(a, experts[name], sizes, preferred_element_type=jnp.float32)
        return jnp.where(inside, out, 0) if elsewhere else out

    inner = _activate(product(rows, "gate_proj"), product(rows, "up_proj"), limit) * weights.reshape(-1)[order][:, None]
    out = product(inner.astype(x.dtype), "down_proj")
    # Gather back to token order: a scatter-add has no fixed order of sums on a GPU.
    return out[jnp.argsort(order)].reshape(*ids.shape, -1).sum(axis=1)


def _block_loop(
    experts: dict[str, Array], x: Array, weights: Array, ids: Array, limit: float | None, elsewhere: bool
) -> Array:
    """The forward computation of `_by_block`."""
    del elsewhere
    num_experts, k, pairs = experts["gate_proj"].shape[0], ids.shape[1], ids.size
    rows = min(MOST_BLOCK_ROWS, max(16, 1 << (pairs // num_experts).bit_length()))
    order = jnp.argsort(ids.reshape(-1), stable=True).astype(jnp.int32)
    sizes = jnp.bincount(ids.reshape(-1), length=num_experts).astype(jnp.int32)
    ends, last_blocks = jnp.cumsum(sizes, dtype=jnp.int32), jnp.cumsum((sizes + rows - 1) // rows, dtype=jnp.int32)

    def body(block: Array, out: Array) -> Array:
        # A search would be a loop of its own.
        expert = (last_blocks <= block).sum(dtype=jnp.int32)
        before = last_blocks[expert] - (sizes[expert] + rows - 1) // rows
        start = ends[expert] - sizes[expert] + (block - before) * rows
        pair = order[jnp.minimum(start + jnp.arange(rows, dtype=jnp.int32), pairs - 1)]
        chosen = {name: jax.lax.dynamic_index_in_dim(w, expert, keepdims=False) for name, w in experts.items()}
        part = swiglu(chosen, x[pair // k], row_weights=weights.reshape(-1)[pair], limit=limit)
        # Rows after the expert's own are written again by the next block.
        return jax.lax.dynamic_update_slice_in_dim(out, part, start, 0)

    start = varying(jnp.zeros((pairs + rows, x.shape[1]), jnp.float32), experts, x, weights, ids)
    out = jax.lax.fori_loop(0, last_blocks[-1], body, start)[:pairs]
    out = jnp.where((jnp.arange(pairs, dtype=jnp.int32) < ends[-1])[:, None], out, 0)
    return out[jnp.argsort(order)].reshape(*ids.shape, -1).sum(axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _by_block(
    experts: dict[str, Array], x: Array, weights: Array, ids: Array, limit: float | None = None, elsewhere: bool = False
) -> Array:
    """Sorts pairs by expert and goes over blocks of rows of one expert, as many as there are.

    Its work is that of the chosen pairs, rounded up to whole blocks. The derivative is that of `_grouped`.
    """
    return _block_loop(experts, x, weights, ids, limit, elsewhere)


def _by_block_forward(
    experts: dict[str, Array], x: Array, weights: Array, ids: Array, limit: float | None, elsewhere: bool
) -> tuple[Array, tuple[Any, ...]]:
    return _block_loop(experts, x, weights, ids, limit, elsewhere), (experts, x, weights, ids)


def _by_block_backward(
    limit: float | None, elsewhere: bool, saved: tuple[Any, ...], cotangent: Array
) -> tuple[Any, ...]:
    *differentiable, ids = saved
    fn = functools.partial(_grouped, ids=ids, limit=limit, elsewhere=elsewhere)
    return *jax.vjp(fn, *differentiable)[1](cotangent), None


_by_block.defvjp(_by_block_forward, _by_block_backward)


def routed_experts(
    experts: dict[str, Array],
    x: Array,
    weights: Array,
    ids: Array,
    *,
    limit: float | None = None,
    elsewhere: bool = False,
) -> Array:
    """sum_j weights[t, j] * SwiGLU_{ids[t, j]}(x[t]).

    Static shapes and the platform choose one of four methods with the same result. Measured on a 2-core CPU (float32,
    64 experts of 256x128, k 8), in ms: 8 tokens: 1.3 by pair, 2.0 by expert, 9.5 grouped; 512 tokens: 38 by expert,
    350 grouped. XLA for GPUs (jax 0.11.2 and 0.12.0) makes of a grouped product E products of all rows, of which it
    copies the rows once for each expert. One H200 (bfloat16, 256 experts of 7168x2048, k 8), in ms for 1, 4, 16, 64,
    256 and 1024 tokens: grouped 5.1, 5.3, 5.6, 15, 68, 250 with up to 29 GB; by block 0.9, 3.2, 10, 22, 27, 28. The
    weights alone take 0.2, 0.6, 2.0, 4.4, 5.2 and 5.2 ms.

    Args:
      experts: gate_proj [E, D, I], up_proj [E, D, I], down_proj [E, I, D]; any number of experts.
      x: [T, D].
      weights: float32[T, k].
      ids: int32[T, k], inside [0, E).
      limit: see `swiglu`.
      elsewhere: ids may be E, of pairs with weight 0: such a pair is another device's, and adds nothing.

    Returns:
      float32[T, D].
    """
    if x.shape[0] == 0:
        return jnp.zeros(x.shape, jnp.float32)
    num_experts = experts["gate_proj"].shape[0]
    on_cpu = _by_pair if ids.size <= num_experts else _by_expert
    grouped = functools.partial(_grouped, limit=limit, elsewhere=elsewhere)

    def blocks(*args: Array) -> Array:
        # What is not differentiated has to come by position.
        return _by_block(*args, limit, elsewhere)

    return jax.lax.platform_dependent(
        experts,
        x,
        weights,
        ids,
        cpu=functools.partial(on_cpu, limit=limit, elsewhere=elsewhere),
        tpu=grouped,
        default=grouped if ids.size in GROUPED_PAIRS else blocks,
    )


def _router_logits(gate: dict[str, Array], x: Array) -> Array:
    """float32[T, E], at highest precision even if the platform's default is lower: a router compares logits."""
    return jnp.dot(x, gate["weight"], precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def moe(params: dict[str, Any], x: Array, *, config: MlaConfig, parallel: Parallel | None = None) -> Array:
    """Mixture of experts: sigmoid router with bias, or softmax router; routed and shared experts.

    Source: DeepSeek-V3's technical report (arXiv:2412.19437), 2.1.2; the flags of the config tell what other families
    do. Only routed experts are clamped.

    Args:
      params: gate {weight [D, E], e_score_correction_bias float32[E] (sigmoid router)}, experts (see
        `routed_experts`), and shared_experts (see `swiglu`) if config.n_shared_experts > 0.
      x: [T, D], already normed.
      config: the model's shapes.
      parallel: the axes over which the weights are spread, inside `jax.shard_map`; None means one device.

    Returns:
      [T, D] in x.dtype.

    Raises:
      ValueError: devices that do not divide experts, or weights that are not those of one device.
    """
    _check_local(params, config.moe_intermediate_size, config.shared_width, parallel)
    routing = _route(params["gate"], x, config)
    shared = functools.partial(swiglu, params["shared_experts"]) if config.n_shared_experts else None
    return _mixture(params, x, routing, shared, config.swiglu_limit or None, parallel)


def _mixture(
    params: dict[str, Any],
    x: Array,
    routing: tuple[Array, Array],
    shared: Callable[[Array], Array] | None,
    limit: float | None,
    parallel: Parallel | None,
) -> Array:
    """Routed and shared experts on one device or on many, [T, D] in x.dtype."""
    compute = functools.partial(routed_experts, params["experts"], limit=limit)
    if parallel is None or parallel.num_devices == 1:
        out = compute(x, *routing)
        return (out if shared is None else out + shared(x)).astype(x.dtype)
    if x.shape[0] == 0:
        return x
    if parallel.expert_axes:
        compute = functools.partial(compute, elsewhere=True)
        num_experts = params["gate"]["weight"].shape[1]
        out = own_experts(compute, x, *routing, parallel=parallel, num_experts=num_experts)
    else:
        out = compute(x, *routing)
    if shared is not None:
        out = out + counted_once(shared(x), parallel)
    return sum_over(out.astype(x.dtype), partial_axes(parallel))


def _check_local(params: dict[str, Any], width: int, shared_width: int, parallel: Parallel | None) -> None:
    """Raises ValueError unless the weights are those of one device; the widths are those of the model."""
    if parallel is None:
        return
    check_axes(parallel, "tensor", *parallel.experts)
    num_experts = params["gate"]["weight"].shape[1]
    sizes = {"routed experts": (params["experts"]["gate_proj"].shape[0], local_experts(num_experts, parallel))}
    parts = {"experts": width if parallel.expert_axes else _columns("experts", width, parallel)}
    if shared_width:
        parts["shared_experts"] = _columns("shared_experts", shared_width, parallel)
    sizes |= {f"columns of {name}": (params[name]["gate_proj"].shape[-1], wanted) for name, wanted in parts.items()}
    for name, (there, wanted) in sizes.items():
        require(
            there == wanted,
            f"params hold {there} {name}; {wanted} are expected, the share of one device of {parallel}. Call this"
            " inside jax.shard_map with weights split so.",
        )


def _columns(name: str, width: int, parallel: Parallel) -> int:
    """Columns of one device."""
    require(
        width % parallel.tensor == 0,
        f"{name} have {width} columns, and parallel.tensor is {parallel.tensor}; expected is a divisor of {width}.",
    )
    return width // parallel.tensor


def _route(gate: dict[str, Array], x: Array, c: MlaConfig) -> tuple[Array, Array]:
    """Weights float32[T, k] and ids int32[T, k] of each token's experts."""
    logits = _router_logits(gate, x)
    counts = {"num_groups": c.n_group, "groups_kept": c.topk_group, "k": c.num_experts_per_tok}
    options: dict[str, Any] = {**counts, "scale": c.routed_scaling_factor, "renormalize": c.norm_topk_prob}
    if c.scoring_func == "softmax":
        return softmax_grouped_topk(logits, **options)
    excluded = -jnp.inf if c.excluded_experts_lose else 0.0
    return biased_grouped_topk(logits, gate["e_score_correction_bias"], excluded=excluded, **options)


def moe_v4(
    params: dict[str, Any], x: Array, token_ids: Array, *, config: DeepseekV4Config, parallel: Parallel | None = None
) -> Array:
    """DeepSeek-V4's mixture of experts: sqrt(softplus) router or a table of token ids, clamped SwiGLU everywhere.

    Args:
      params: gate {weight [D, E], and e_score_correction_bias float32[E] or, in hash layers, token_experts
        int32[V, k]}, experts (see `routed_experts`), and shared_experts if config.n_shared_experts is not 0.
      x: [T, D], already normed.
      token_ids: int[T], read if the gate has token_experts.
      config: the model's shapes.
      parallel: the axes over which the weights are spread, inside `jax.shard_map`; None means one device.

    Returns:
      [T, D] in x.dtype.

    Raises:
      ValueError: devices that do not divide experts, or weights that are not those of one device.
    """
    _check_local(params, config.moe_intermediate_size, config.moe_intermediate_size * config.n_shared_experts, parallel)
    gate = params["gate"]
    options: dict[str, Any] = {"scale": config.routed_scaling_factor, "renormalize": config.norm_topk_prob}
    logits = _router_logits(gate, x)
    if "token_experts" in gate:
        routing = hash_route(logits, token_ids, gate["token_experts"], **options)
    else:
        bias = gate["e_score_correction_bias"]
        routing = sqrt_softplus_topk(logits, bias, k=config.num_experts_per_tok, **options)
    limit = config.swiglu_limit
    shared = functools.partial(swiglu, params["shared_experts"], limit=limit) if config.n_shared_experts else None
    return _mixture(params, x, routing, shared, limit, parallel)


# The name of release 0.1.
clamped_moe = moe_v4
