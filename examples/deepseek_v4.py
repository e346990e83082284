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
# # DeepSeek-V4: what is compressed, what the window holds, what one query reads
#
# Every layer attends to a sliding window of the newest tokens. Most layers also keep compressed entries of everything
# before: one of 4 tokens each, among which an indexer chooses, or one of 128 tokens each, all of which are read.

# %%
import dataclasses
import logging

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from sparse_mla_jax.config import DEEPSEEK_V4_FLASH, DeepseekV4Config
from sparse_mla_jax.layers.compressed_attention import select_entries
from sparse_mla_jax.layers.hyper_connections import split_streams
from sparse_mla_jax.metadata import build_metadata
from sparse_mla_jax.models import deepseek_v4
from sparse_mla_jax.ops.cache import gather
from sparse_mla_jax.ops.compressor import num_entries
from sparse_mla_jax.ops.window import ring_size, window_slots
from sparse_mla_jax.scoring import score
from sparse_mla_jax.serving.engine import Engine

# The ROCm plugin, where it is installed, reports that this machine has no AMD GPU.
logging.getLogger("jax._src.xla_bridge").setLevel(logging.CRITICAL)

# %% [markdown]
# ## What a token costs
#
# V4-Flash as published, a million tokens of context, FP8 caches: computed from the shapes of the caches.

# %%
flash, page_size, context = DEEPSEEK_V4_FLASH, 256, 1048576
caches = jax.eval_shape(
    lambda: deepseek_v4.create_caches(flash, context // page_size, page_size, num_requests=1, max_query_len=512)
)
kinds = [flash.compress_ratio(layer) for layer in range(flash.num_hidden_layers)]
print({f"ratio {ratio}": kinds.count(ratio) for ratio in (0, 4, 128)})
print(f"{deepseek_v4.bytes_per_token(caches, page_size):.0f} bytes a token over {len(kinds)} layers,")
print(f"and {deepseek_v4.bytes_per_request(caches) / 2**20:.1f} MiB a request, however long it is")

# %% [markdown]
# ## What the window holds
#
# A ring of slots per request. Steps of up to 3 tokens need a ring 2 slots longer than the window, since a step's tokens
# are written before they attend.

# %%
window, step = 6, 3
ring = ring_size(window, step)
held = np.full(ring, -1)
for first in range(0, 12, step):
    tokens = np.arange(first, first + step)
    held[tokens % ring] = tokens
    rows = window_slots(tokens, np.zeros(step, int), window=window, ring=ring)
    seen = [held[row[row >= 0]].tolist() for row in np.asarray(rows)]
    print(f"ring {held.tolist()}: token {first} sees {seen[0]}, token {first + step - 1} sees {seen[-1]}")

# %% [markdown]
# ## A small model
#
# Random weights, published structure: a layer of the window alone, one with entries of 4 tokens and an indexer, one
# with entries of 16 tokens, all of which are read.

# %%
config = DeepseekV4Config(
    vocab_size=256,
    hidden_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=48,
    qk_rope_head_dim=16,
    q_lora_rank=32,
    o_groups=2,
    o_lora_rank=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_hash_layers=1,
    sliding_window=8,
    index_n_heads=2,
    index_head_dim=32,
    index_topk=3,
    compress_ratios=(0, 4, 16),
)
params = deepseek_v4.init_params(jax.random.key(0), config)
ids = np.random.default_rng(0).integers(0, 256, (1, 64)).astype(np.int32)


# %% [markdown]
# ## What is compressed
#
# The same tokens in one step, token by token, and in chunks of 7: the same entries, bit for bit, as long as what goes
# into the compressor is the same. Here its inputs pass through matrix products of other shapes, so the last bits may
# differ; the operator's own tests compare bits.


# %%
def entries(chunk):
    """Compressed entries of the layer with ratio 4 after all tokens, in steps of `chunk`."""
    caches = deepseek_v4.create_caches(config, 4, 16, num_requests=1, max_query_len=chunk, dtype="float32")
    run = jax.jit(deepseek_v4.prefill, static_argnames=("config", "page_size"), donate_argnames="caches")
    for first in range(0, 64, chunk):
        size = min(chunk, 64 - first)
        tokens = np.zeros(chunk, np.int32)
        tokens[:size] = ids[0, first : first + size]
        lens = np.array([first + size]), np.array([size])
        _, caches = run(params, tokens, caches, *lens, np.arange(4)[None], config=config, page_size=16)
    return np.asarray(gather(caches[1].compressed, jnp.arange(int(num_entries(64, ratio=4))), dtype=jnp.float32))


whole = entries(64)
for chunk in (1, 7):
    print(f"chunks of {chunk}: {np.abs(entries(chunk) - whole).max():.1e} off, entries {whole.shape}")

# %% [markdown]
# ## What one query reads
#
# Black: the window. Colour: entries that the query reads besides, drawn over the tokens that they stand for. An entry
# exists from the token on that closes it, and covers tokens that are still in the window, too.


# %%
def reads(config, layer):
    """bool[64, 64] twice: positions in each query's window, and positions behind the entries that it reads."""
    caches = deepseek_v4.create_caches(config, 4, 16, num_requests=1, max_query_len=64, dtype="float32")
    meta = build_metadata(np.array([64]), np.array([64]), np.arange(4)[None], num_tokens=64, page_size=16)
    tokens = jnp.asarray(ids[0])
    streams = jnp.repeat(params["embed_tokens"][tokens][:, None], config.hc_mult, axis=1)
    for number in range(layer + 1):
        weights, entering = params["layers"][number], streams
        streams, written = deepseek_v4.decoder_layer(
            weights, streams, tokens, caches[number], meta, config=config, layer=number
        )
    query, key = np.mgrid[:64, :64]
    near, far = (key <= query) & (key > query - config.sliding_window), np.zeros((64, 64), bool)
    hidden, _ = split_streams(weights["attn_hc"], entering, config=config, norm=weights["input_layernorm"])
    chosen = select_entries(weights["self_attn"], hidden, written.index, meta, config=config, layer=layer)
    ratio = config.compress_ratio(layer)
    for token, row in enumerate(np.asarray(chosen)):
        for entry in row[row >= 0]:
            far[token, entry * ratio : (entry + 1) * ratio] = True
    return near, far


figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), sharey=True)
for layer, axis in enumerate(axes):
    near, far = reads(config, layer)
    picture = np.ones((64, 64, 3))
    picture[far] = (0.95, 0.6, 0.2)
    picture[near] = picture[near] * 0.25
    axis.imshow(picture, interpolation="nearest")
    ratio = config.compress_ratio(layer)
    axis.set_title(f"layer {layer}: " + (f"window, ratio {ratio}" if ratio else "window alone"))
    axis.set_xlabel("key position")
axes[0].set_ylabel("query position")
figure.tight_layout()

# %%
near, far = reads(config, 1)
most = config.index_topk * 4
print("a query of the ratio-4 layer reads at most", near.sum(1).max(), "tokens and", far.sum(1).max() // 4, "entries")
print("never more entries than index_topk:", bool(far.sum(1).max() <= most))
dense = dataclasses.replace(config, index_topk=64)
print("without the indexer's choice there would be", reads(dense, 1)[1].sum(1).max() // 4)

# %% [markdown]
# ## Served
#
# The engine is the same as for DeepSeek-V3.2. Its greedy tokens are those of whole-sequence scores.

# %%
engine = Engine(params, config, max_batch=2, max_context=64, page_size=16, prefill_chunk=16, cache_dtype="float32")
request = engine.submit(ids[0, :40].tolist(), max_tokens=12)
engine.run()
whole = np.concatenate([ids[:, :40], np.array([request.tokens])], axis=1)
logits = score(params, config, whole, cache_dtype="float32", page_size=16)
print("tokens", request.tokens)
print("the scorer's choice:", logits[0, 39:-1].argmax(-1).tolist() == request.tokens)
print(f"{engine.bytes_per_token:.0f} bytes a token, {engine.bytes_per_request} a request")
