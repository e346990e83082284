"""models/sharded_checkpoint.py: each device's part is that of `load_checkpoint`, and little else is read or held."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from deepseek_v32_oracle import random_tensors
from jax.sharding import AxisType, NamedSharding
from safetensors.numpy import save_file
from small_models import SMALL, write_folder
from support.marks import slow

from sparse_mla_jax.config import DeepseekV4Config
from sparse_mla_jax.models import sharded_checkpoint
from sparse_mla_jax.models.checkpoint import (
    OpenCheckpoint,
    config_to_json,
    load_checkpoint,
    open_checkpoint,
    published_shapes,
    save_checkpoint,
)
from sparse_mla_jax.models.sharded_checkpoint import shard_checkpoint
from sparse_mla_jax.parallel.axes import Parallel, make_mesh
from sparse_mla_jax.parallel.partition import partition_params

FAMILIES = ("axk2", "deepseek_v32", "deepseek_v4", "dots3_note", "glm_moe_dsa", "hy_v4", "hy_v4_vl", "mistral_large4")
MESHES = {
    "tensor": Parallel(tensor=2),
    "experts": Parallel(data=2, tensor=2),
    "context": Parallel(context=2),
    "columns": Parallel(data=2, tensor=2, experts=()),
}
# Two of everything that is split, in blocks of 4x6 that end within what one device has.
CONFIG = dataclasses.replace(
    SMALL, vocab_size=22, hidden_size=20, num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=8, n_group=2
)
V4 = DeepseekV4Config(
    vocab_size=11,
    hidden_size=38,
    moe_intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=10,
    qk_rope_head_dim=6,
    q_lora_rank=21,
    o_groups=2,
    o_lora_rank=5,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_hash_layers=1,
    index_n_heads=3,
    index_head_dim=8,
    hc_mult=2,
    compress_ratios=(0, 4),
    tie_word_embeddings=True,
)
FN = ml_dtypes.float8_e4m3fn


def check(folder, parallel, dtype=jnp.float32):
    """Every device has its part of what one device reads, bit for bit."""
    config, expected = load_checkpoint(folder, dtype=dtype)
    mesh = make_mesh(parallel)
    found_config, params = shard_checkpoint(folder, mesh, parallel, dtype=dtype)
    assert found_config == config

    def same(whole, array, lies):
        assert (array.shape, array.dtype) == (whole.shape, whole.dtype)
        assert array.sharding == NamedSharding(mesh, lies)
        assert len(array.addressable_shards) == parallel.num_devices
        whole = np.asarray(whole)
        for shard in array.addressable_shards:
            assert np.asarray(shard.data).tobytes() == whole[shard.index].tobytes()

    jax.tree.map(same, expected, params, partition_params(expected, parallel))


# 1 s each; the mesh with experts spreads most.
@pytest.mark.parametrize("mesh", [name if name == "experts" else slow(name) for name in MESHES])
@pytest.mark.parametrize("name", FAMILIES)
def test_fixtures(fixtures, name, mesh):
    check(fixtures / f"{name}_tiny", MESHES[mesh])


def test_names_of_axes_and_further_ones(fixtures):
    """A larger mesh that has the axes: the weights are the same along its other ones."""
    parallel = Parallel(tensor=2, names=("replica", "pages", "model"))
    mesh = jax.make_mesh((2, 2), ("stage", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    folder = fixtures / "deepseek_v32_tiny"
    whole, params = load_checkpoint(folder)[1], shard_checkpoint(folder, mesh, parallel)[1]
    assert len(params["lm_head"].addressable_shards) == 4
    np.testing.assert_array_equal(params["lm_head"], whole["lm_head"])


# --- quantised and fused ---------------------------------------------------------------------------------------------
def quantise(tensors, rng, suffix, is_quantised):
    """FP8 in blocks of 4x6."""
    stored = dict(tensors)
    for name in filter(is_quantised, tensors):
        shape = tensors[name].shape
        stored[name] = (tensors[name] * 20).astype(FN)
        scales = (*shape[:-2], -(-shape[-2] // 4), -(-shape[-1] // 6))
        stored[suffix(name)] = rng.uniform(0.01, 0.1, scales).astype(np.float32)
    return stored


def fuse_experts(tensors):
    """The experts of layer 1 as two tensors."""
    prefix, stored = "model.layers.1.mlp.experts.", dict(tensors)
    rows = []
    for expert in range(CONFIG.n_routed_experts):
        gate, up, down = (stored.pop(f"{prefix}{expert}.{kind}_proj.weight") for kind in ("gate", "up", "down"))
        rows.append((np.concatenate([gate, up]), down))
    gate_up, down = map(np.stack, zip(*rows))
    return stored | {prefix + "gate_up_proj": gate_up, prefix + "down_proj": down}


@pytest.mark.parametrize("dtype", [slow(jnp.float32, id="float32"), pytest.param(jnp.bfloat16, id="bfloat16")])
@pytest.mark.parametrize("fused", [False, True], ids=["single", "fused"])
def test_fp8(tmp_path, monkeypatch, fused, dtype):
    """Also where the rows are dequantised three at a time, in blocks of four."""
    monkeypatch.setattr("sparse_mla_jax.models.tensor_forms._CHUNK", 60)
    tensors = random_tensors(published_shapes(CONFIG), 0)
    tensors = fuse_experts(tensors) if fused else tensors
    stored = quantise(
        tensors,
        np.random.default_rng(0),
        lambda name: name + "_scale_inv",
        lambda name: name.removesuffix(".weight").endswith("_proj") and "weights_proj" not in name,
    )
    assert len(stored) > len(tensors) + 12
    write_folder(tmp_path / "fp8", CONFIG, stored, quantization_config={"weight_block_size": [4, 6]})
    for mesh in ("experts", "columns"):
        check(tmp_path / "fp8", MESHES[mesh], dtype)


@pytest.mark.slow
def test_v4_with_fp4_experts_fp8_and_a_table(tmp_path):
    rng = np.random.default_rng(0)
    tensors = random_tensors(published_shapes(V4), 0)
    table = "layers.0.ffn.gate.tid2eid"
    tensors[table] = rng.integers(0, 4, tensors[table].shape)
    stored = quantise(
        tensors,
        rng,
        lambda name: name.removesuffix(".weight") + ".scale",
        lambda name: ".attn.w" in name or "shared_experts.w" in name,
    )
    for name in [name for name in tensors if ".ffn.experts." in name]:
        rows, columns = tensors[name].shape
        stored[name] = rng.integers(0, 256, (rows, columns // 2), np.uint8)
        scales = rng.integers(110, 140, (rows, -(-columns // 32)), np.uint8)
        stored[name.removesuffix(".weight") + ".scale"] = scales
    folder = tmp_path / "v4"
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    quantization = {"quantization_config": {"weight_block_size": [4, 6]}}
    (folder / "config.json").write_text(json.dumps({**config_to_json(V4), **quantization}))
    for mesh in ("experts", "columns"):
        check(folder, MESHES[mesh], jnp.bfloat16)
    save_file({**stored, table: tensors[table] + 1}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"tid2eid names experts 1 to 4; there are 4"):
        shard_checkpoint(folder, make_mesh(Parallel()), Parallel())


# --- what is read and held -------------------------------------------------------------------------------------------
def test_only_the_experts_of_a_device_are_read(fixtures, monkeypatch):
    """As in a process that has the second of four parts of the experts."""
    opened = open_checkpoint(fixtures / "deepseek_v32_tiny", jnp.float32, progress=False)
    names, read = [], OpenCheckpoint.read
    monkeypatch.setattr(
        OpenCheckpoint, "read", lambda self, tensor, rows=None: names.append(tensor.name) or read(self, tensor, rows)
    )
    keys = ("layers", 2, "mlp", "experts", "up_proj")
    places = sharded_checkpoint._list_places(opened)[keys]
    spec = opened.specs["layers"][2]["mlp"]["experts"]["up_proj"]
    part = ((2, 4), *((0, size) for size in spec.shape[1:]))
    ((_, value, order),) = sharded_checkpoint._read_parts(opened, places, spec, [part])
    assert value.transpose(np.argsort(order)).shape == (2, *spec.shape[1:])
    assert names == [f"model.layers.2.mlp.experts.{expert}.up_proj.weight" for expert in (2, 3)]


def test_only_the_rows_of_a_device_are_dequantised(tmp_path):
    """The values of two of six heads; the keys of a head come before its values."""
    tensors = random_tensors(published_shapes(CONFIG), 0)
    stored = quantise(tensors, np.random.default_rng(0), lambda n: n + "_scale_inv", lambda n: "kv_b_proj" in n)
    write_folder(tmp_path / "fp8", CONFIG, stored, quantization_config={"weight_block_size": [4, 6]})
    opened = open_checkpoint(tmp_path / "fp8", jnp.float32, progress=False)
    place = sharded_checkpoint._list_places(opened)["layers", 1, "self_attn", "kv_b_v"][0]
    heads, rank, width = place.tensor.specs[1].shape
    rows = sharded_checkpoint._rows(place, [((2, 4), (0, rank), (0, width))])
    keys = CONFIG.qk_nope_head_dim
    assert place.tensor.shape[0] == heads * (keys + width)
    assert rows == slice(2 * (keys + width) + keys, 4 * (keys + width))
    assert opened.read(place.tensor, rows).dtype == jnp.float32


@pytest.mark.parametrize("kind", ["plain", "fp8"])
def test_little_memory_beside_the_devices_own(tmp_path, monkeypatch, kind):
    """What numpy holds at most; mapped files do not count.

    Of a model of 45 MB, a device has 0.8 of 6.3 MB of the experts in one array of a layer.
    """
    config = dataclasses.replace(
        CONFIG,
        hidden_size=512,
        intermediate_size=512,
        moe_intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=8,
        n_routed_experts=16,
        q_lora_rank=64,
        kv_lora_rank=64,
    )
    tensors = random_tensors(published_shapes(config), 0)
    total = sum(value.nbytes for value in tensors.values())
    if kind == "fp8":
        tensors = quantise(tensors, np.random.default_rng(0), lambda n: n + "_scale_inv", lambda n: ".experts." in n)
    write_folder(tmp_path / "model", config, tensors, quantization_config={"weight_block_size": [4, 6]})
    del tensors
    parallel = Parallel(tensor=8)
    # Devices that have memory of their own: jax on a CPU may keep the host's.
    monkeypatch.setattr(sharded_checkpoint, "put", lambda values, order, device: jnp.zeros(()))
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda shape, sharding, pieces, dtype: None)
    mesh = make_mesh(parallel)
    tracemalloc.start()
    try:
        shard_checkpoint(tmp_path / "model", mesh, parallel)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    whole_stack = 4 * config.n_routed_experts * config.hidden_size * config.moe_intermediate_size
    assert peak < whole_stack / 2 < total / 6


# --- what is refused -------------------------------------------------------------------------------------------------
def test_meshes_that_do_not_fit(fixtures):
    folder = fixtures / "deepseek_v32_tiny"
    with pytest.raises(ValueError, match=r"num_attention_heads is 4.*Sizes of tensor that divide it are 1, 2, 4\."):
        shard_checkpoint(folder, make_mesh(Parallel(tensor=3)), Parallel(tensor=3))
    with pytest.raises(ValueError, match=r"n_routed_experts is 8.*are 1, 2, 4, 8\..*experts=tensor"):
        shard_checkpoint(folder, make_mesh(Parallel(data=3)), Parallel(data=3))
    with pytest.raises(ValueError, match=r"mesh has the axes .*'tensor': 2.*parallel .*'tensor': 4"):
        shard_checkpoint(folder, make_mesh(Parallel(tensor=2)), Parallel(tensor=4))
    with pytest.raises(ValueError, match="mesh is NoneType"):
        shard_checkpoint(folder, None, Parallel())
    with pytest.raises(ValueError, match="dtype is"):
        shard_checkpoint(folder, make_mesh(Parallel()), Parallel(), dtype=jnp.float16)


def test_a_saved_folder_comes_back(tmp_path, fixtures):
    """`save_checkpoint` takes parameters that lie on a mesh."""
    parallel = Parallel(data=2, tensor=2)
    config, params = shard_checkpoint(fixtures / "deepseek_v4_tiny", make_mesh(parallel), parallel)
    save_checkpoint(tmp_path / "again", config, params)
    jax.tree.map(np.testing.assert_array_equal, load_checkpoint(tmp_path / "again")[1], params)
