"""The README's ten lines do what they say."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from cdna_support import require_cdna
from small_models import SMALL, random_params

from sparse_mla_jax.config import DeepseekV4Config
from sparse_mla_jax.models import deepseek_v4, deepseek_v32

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_layer_called_from_a_users_own_jit():
    code = CODE[0]
    assert len(code.strip().splitlines()) <= 12
    names = {}
    exec(code, names)
    params = random_params(deepseek_v32.param_specs(SMALL))["layers"][0]["self_attn"]
    (cache, index_cache), _ = deepseek_v32.create_caches(SMALL, 4, 8)
    given = cache.latent
    hidden = jnp.asarray(np.random.default_rng(1).standard_normal((3, SMALL.hidden_size)), jnp.float32)
    lengths = np.array([5, 0, 3]), np.array([2, 0, 1])  # a chunk of two tokens, a padded request, a decode token
    table = jnp.array([[2, -1], [-1, -1], [0, -1]])
    out, cache, index_cache = names["decode"](params, hidden, cache, index_cache, *lengths, table, config=SMALL)
    assert out.shape == hidden.shape and bool(jnp.isfinite(out).all())
    assert given.is_deleted(), "the cache was copied, not donated"
    written = np.flatnonzero(np.asarray(cache.scale).reshape(-1))
    np.testing.assert_array_equal(written, [2, 2 * 8 + 3, 2 * 8 + 4])


def test_a_decode_step_of_v4():
    config = DeepseekV4Config(
        vocab_size=16,
        hidden_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_dim=12,
        qk_rope_head_dim=4,
        q_lora_rank=8,
        o_groups=1,
        o_lora_rank=8,
        n_routed_experts=2,
        num_experts_per_tok=1,
        index_n_heads=1,
        index_head_dim=8,
        hc_mult=2,
        hc_sinkhorn_iters=2,
        compress_ratios=(0, 128),
    )
    params = random_params(deepseek_v4.param_specs(config), config.n_routed_experts)
    names = dict(jax=jax, config=config, num_pages=3, params=params)
    names |= dict(token_ids=np.array([3, 5]), seq_lens=np.array([1, 0]), page_table=np.array([[2], [-1]]))
    names |= dict(rows=np.array([60, -1]))
    exec(CODE[1], names)
    assert names["logits"].shape == (2, 16) and bool(jnp.isfinite(names["logits"][0]).all())


def test_a_kernel_as_machine_code(capsys):
    require_cdna("triton")
    names = {}
    exec(CODE[2], names)
    scores = np.sin(np.arange(500, dtype=np.float32))
    np.testing.assert_array_equal(names["positions"][0], np.sort(np.argsort(-scores, kind="stable")[:8]))
    assert "vgprs" in capsys.readouterr().out
    assert len(CODE) == 3
