"""What `make mutants` found untested: in which type each tensor of a checkpoint is written."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from sparse_mla_jax.config import DeepseekV32Config
from sparse_mla_jax.models import deepseek_v32
from sparse_mla_jax.models.checkpoint import published_shapes, save_checkpoint

CONFIG = DeepseekV32Config(
    vocab_size=11,
    hidden_size=20,
    intermediate_size=12,
    moe_intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=6,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=6,
    v_head_dim=4,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
    index_n_heads=2,
    index_head_dim=8,
    index_topk=4,
)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_vectors_are_float32_and_matrices_of_the_type_asked_for(tmp_path, dtype):
    """Norms, biases and routers keep their bits, whatever type the matrices take."""
    specs = deepseek_v32.param_specs(CONFIG)
    params = jax.tree.map(lambda spec: jnp.full(spec.shape, 1 + 2.0**-20, spec.dtype), specs)
    save_checkpoint(tmp_path, CONFIG, params, dtype=dtype)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == published_shapes(CONFIG).keys()
    for name, value in saved.items():
        is_wide = value.ndim == 1 or name.endswith("mlp.gate.weight")
        expected = np.float32 if is_wide else np.dtype(dtype)
        assert value.dtype == expected, name
        assert value.dtype == ml_dtypes.bfloat16 or (value == np.float32(1 + 2.0**-20)).all(), name
