"""Small models of awkward sizes, as published folders written without the library's own writer."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from deepseek_v32_oracle import random_tensors
from safetensors.numpy import save_file

from sparse_mla_jax.config import DeepseekV32Config, RopeConfig
from sparse_mla_jax.models.checkpoint import config_to_json, published_shapes

PAGE_SIZE = 16

SMALL = DeepseekV32Config(
    vocab_size=61,
    hidden_size=48,
    intermediate_size=40,
    moe_intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=6,
    q_lora_rank=21,
    kv_lora_rank=24,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=7,
    n_routed_experts=9,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=3,
    topk_group=2,
    first_k_dense_replace=0,
    index_n_heads=3,
    index_head_dim=12,
    index_topk=5,
    rope=RopeConfig(factor=40.0, mscale_all_dim=1.0),
)


def scattered_pages(batch, length, page_size=PAGE_SIZE, spare=3):
    """A page table of pages in no order, and how many pages the caches need."""
    pages = -(-length // page_size)
    order = np.random.default_rng(1).permutation(batch * pages + spare)[: batch * pages]
    return order.reshape(batch, pages).astype(np.int32), batch * pages + spare


def write_folder(folder, config, tensors=None, seed=0, **extra):
    """A folder of random tensors, or of those given; returns them by their published names."""
    tensors = random_tensors(published_shapes(config), seed) if tensors is None else tensors
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config_to_json(config), **extra}))
    return tensors


# Shapes of one attention layer with an even number of heads.
ONE_LAYER = DeepseekV32Config(
    vocab_size=64,
    hidden_size=24,
    num_attention_heads=4,
    q_lora_rank=20,
    kv_lora_rank=16,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=8,
    index_n_heads=2,
    index_head_dim=12,
    index_topk=9,
    rope=RopeConfig(),
)


def random_params(specs, experts=0, seed=0):
    """Parameters of a tree of shapes and types, by numpy: `init_params` compiles a program for each shape.

    Integers are tables of `experts`: different ones in a row.
    """
    rng = np.random.default_rng(seed)

    def draw(spec):
        if np.issubdtype(spec.dtype, np.integer):
            tokens, chosen = spec.shape
            return jnp.asarray(rng.random((tokens, experts)).argsort(axis=1)[:, :chosen], spec.dtype)
        return jnp.asarray((rng.standard_normal(spec.shape) * spec.shape[0] ** -0.5).astype(spec.dtype))

    return jax.tree.map(draw, specs)


def check_in_place(decode, params, create_caches):
    """A compiled step gives donated caches back where they lay, and what it needs besides does not grow with them.

    decode(params, token_ids, caches, seq_lens, page_table) of two requests; create_caches(number of pages).
    """
    lens, table = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2,), (2, 32)))
    temporary = []
    for pages in (64, 8192):
        caches = jax.eval_shape(lambda pages=pages: create_caches(pages))
        compiled = jax.jit(decode, donate_argnums=2).lower(params, lens, caches, lens, table).compile()
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
        assert compiled.memory_analysis().alias_size_in_bytes == size
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
    assert size > 10 * temporary[0] and temporary[1] == temporary[0], (size, temporary)
