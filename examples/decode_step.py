# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # One decode step of sparse latent attention
#
# We follow one query token through a layer of DeepSeek Sparse Attention, operator by operator, with the trained
# byte-level model of this repository: keys into paged FP8 caches, indexer scores, exact top-k, ragged rows, attention;
# then what sparsity and poison do to the layer's output.

# %%
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from sparse_mla_jax.layers.mla import attention_step, index_query
from sparse_mla_jax.layers.norm import rms_norm
from sparse_mla_jax.metadata import build_metadata
from sparse_mla_jax.models import checkpoint, deepseek_v32
from sparse_mla_jax.ops.cache import PagedKVCache, gather, write
from sparse_mla_jax.ops.fp8 import dequantize, quantize, reinterpret
from sparse_mla_jax.ops.indexer import paged_indexer_scores
from sparse_mla_jax.ops.ragged import select_to_ragged
from sparse_mla_jax.ops.topk import top_k
from sparse_mla_jax.tools.text import stdlib_sources

FOLDER = next(p for p in (pathlib.Path("examples/tiny_python"), pathlib.Path("tiny_python")) if p.exists())
config, params = checkpoint.load_checkpoint(FOLDER, dtype="float32", progress=False)
name, text = next((n, t) for n, t in stdlib_sources(held_out=True) if len(t) >= 1024)
tokens = np.frombuffer(text[:1024], np.uint8).astype(np.int32)
print(
    f"{config.num_hidden_layers} layers, latent {config.kv_lora_rank} + rope {config.qk_rope_head_dim}; reading {name}"
)

# %% [markdown]
# ## FP8 in two flavours, one byte
#
# A cached latent is a byte per value and a float32 scale per group. `quantize` only writes bytes that both flavours
# can read: as the other flavour a byte means exactly half or twice as much, so a cache moves between an MI300X
# (e4m3fnuz) and an MI355X or an NVIDIA GPU (e4m3fn) by a change of its scales, and not of one byte.

# %%
x = jax.random.normal(jax.random.key(0), (1, 64))
values, scales = quantize(x, group_size=64, dtype=jnp.float8_e4m3fnuz)
other, other_scales = reinterpret(values, scales, jnp.float8_e4m3fn)
same = jnp.array_equal(
    dequantize(values, scales, group_size=64, dtype=jnp.float32),
    dequantize(other, other_scales, group_size=64, dtype=jnp.float32),
)
print("same numbers after reinterpret:", bool(same), "| scale ratio:", float(other_scales[0, 0] / scales[0, 0]))

# %%
grid = jnp.linspace(-3, 3, 2001)[:, None] * jnp.ones((1, 4))
values, scales = quantize(grid, group_size=4, dtype=jnp.float8_e4m3fnuz)
back = dequantize(values, scales, group_size=4, dtype=jnp.float32)
plt.figure(figsize=(8, 2.5))
plt.plot(grid[:, 0], (back - grid)[:, 0] / jnp.maximum(jnp.abs(grid[:, 0]), 1e-3), linewidth=0.7)
plt.gca().set(
    xlabel="value (alone in its group)", ylabel="relative error", title="A group's largest value is all but exact"
)
plt.show()

# %%
# Next to one large value, the smaller ones of its group round to three mantissa bits.
ramp = jnp.concatenate([jnp.linspace(0.01, 1, 127), jnp.array([4.0])])[None]
values, scales = quantize(ramp, group_size=128, dtype=jnp.float8_e4m3fnuz)
back = dequantize(values, scales, group_size=128, dtype=jnp.float32)
plt.figure(figsize=(8, 2.5))
plt.plot(ramp[0], ((back - ramp) / ramp)[0], ".", markersize=3)
plt.gca().set(xlabel="value, in a group whose largest is 4", ylabel="relative error", title="e4m3: at most 1/16 off")
plt.show()

# %% [markdown]
# ## The caches
#
# We prefill 1023 tokens: the model writes its latents and index keys into pages. The page table is deliberately
# shuffled; a slot is `page * page_size + offset`.

# %%
page_size, num_pages = 64, 24
page_table = np.random.default_rng(0).permutation(num_pages)[None, :16].astype(np.int32)
caches = deepseek_v32.create_caches(config, num_pages, page_size, dtype=jnp.float8_e4m3fnuz)


@jax.jit
def prefill(params, token_ids, caches):
    n = token_ids.shape[0]
    metadata = build_metadata(
        jnp.array([n]), jnp.array([n]), jnp.asarray(page_table), num_tokens=n, page_size=page_size
    )
    return deepseek_v32.forward(params, token_ids, caches, metadata, config=config)


_, caches = prefill(params, tokens[:-1], caches)
latent_cache, index_cache = caches[0]
print(
    "bytes per token and layer:", latent_cache.bytes_per_token, "latent and rope,", index_cache.bytes_per_token, "index"
)

# %% [markdown]
# ## The indexer scores every key, and top-k picks
#
# The last token is the query. Layer 0's input is its embedding, normalised.

# %%
layer = params["layers"][0]
metadata = build_metadata(
    jnp.array([len(tokens)]), jnp.array([1]), jnp.asarray(page_table), num_tokens=1, page_size=page_size
)
embedded = params["embed_tokens"][tokens[-1:]]
hidden = rms_norm(embedded, layer["input_layernorm"], eps=config.rms_norm_eps)
out, latent_cache, index_cache = attention_step(
    layer["self_attn"], hidden, latent_cache, index_cache, metadata, config=config
)
query, weights = index_query(layer["self_attn"], hidden, metadata, config=config)
scores = paged_indexer_scores(
    query,
    weights,
    index_cache,
    metadata.page_table,
    metadata.request_ids,
    metadata.lengths,
    max_length=metadata.max_length,
)
chosen = top_k(scores, config.index_topk, metadata.lengths)
print("scores", scores.shape, "-> positions", chosen.shape, chosen[0, :8], "...")

# %%
figure, axis = plt.subplots(figsize=(9, 3))
axis.plot(scores[0], linewidth=0.5, label="indexer score")
axis.plot(chosen[0], scores[0][chosen[0]], ".", markersize=3, label=f"top {config.index_topk}")
axis.set(xlabel="position", title="What layer 0's indexer makes of 1024 keys")
axis.legend()
plt.show()

# %% [markdown]
# Top-k is exact and has one tie rule (the lower position), so every implementation gives the same array, bit for bit.

# %%
for implementation in ("reference", "xla", "triton"):
    again = top_k(scores, config.index_topk, metadata.lengths, implementation=implementation)
    print(f"{implementation:10}", bool(jnp.array_equal(again, chosen)))

# %% [markdown]
# ## Ragged rows of slots
#
# Positions become slots through the page table; rows are packed one behind the other, and `indptr` says where each
# begins.

# %%
rows = select_to_ragged(chosen, metadata.request_ids, metadata.page_table, page_size=page_size)
print("indptr", rows.indptr, "| first slots", rows.values[:6])
keys = gather(latent_cache, rows.values[:6], dtype=jnp.float32)
print("gathered keys:", keys.shape)

# %% [markdown]
# ## What sparsity costs
#
# The same layer with every visible key, against the 128 that the indexer chose, and with fewer.

# %%
dense, _, _ = attention_step(layer["self_attn"], hidden, latent_cache, index_cache, metadata, config=config.dense())
budgets = [8, 32, 128, 512]
errors = []
for k in budgets:
    fewer = dataclasses.replace(config, index_topk=k)
    sparse, _, _ = attention_step(layer["self_attn"], hidden, latent_cache, index_cache, metadata, config=fewer)
    errors.append(float(jnp.linalg.norm(sparse - dense) / jnp.linalg.norm(dense)))
plt.figure(figsize=(7, 3))
plt.loglog(budgets, errors, "o-")
plt.gca().set(
    xlabel="positions attended to", ylabel="relative change of the layer's output", title="Layer 0, this query"
)
plt.show()

# %% [markdown]
# ## Poison
#
# Pages that no row names may hold anything, NaN included: the output does not move by a bit.

# %%
free = np.setdiff1d(np.arange(num_pages), page_table[0])
poisoned = PagedKVCache(
    latent=latent_cache.latent.at[free].set(jnp.uint32(0x80808080)),
    scale=latent_cache.scale.at[free].set(jnp.nan),
    rope=latent_cache.rope.at[free].set(jnp.nan),
    dtype=latent_cache.dtype,
    group_size=latent_cache.group_size,
)
after, _, _ = attention_step(layer["self_attn"], hidden, poisoned, index_cache, metadata, config=config)
clean, _, _ = attention_step(layer["self_attn"], hidden, latent_cache, index_cache, metadata, config=config)
print("unchanged:", bool(jnp.array_equal(after, clean)))
skipped = write(
    latent_cache, jnp.ones((1, config.kv_lora_rank)), jnp.ones((1, config.qk_rope_head_dim)), jnp.array([-1])
)
print("slot -1 writes nothing:", bool(jnp.array_equal(skipped.latent, latent_cache.latent)))
