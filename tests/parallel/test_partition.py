"""parallel/partition.py: where every weight of every family lies, and the sizes that divide."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_models import SMALL, random_params

from sparse_mla_jax.config import DEEPSEEK_V32, load_config
from sparse_mla_jax.models.family import check_params, family_of
from sparse_mla_jax.parallel.axes import Parallel, make_mesh
from sparse_mla_jax.parallel.partition import (
    check_divides,
    device_bytes,
    local_specs,
    partition_fused,
    partition_params,
)

FAMILIES = ("axk2", "deepseek_v32", "deepseek_v4", "dots3_note", "glm_moe_dsa", "hy_v4", "hy_v4_vl", "mistral_large4")
# What lies over two devices of "tensor" in a layer, by the end of its path; everything else is the same on both.
SPLIT = {
    **dict.fromkeys(("q_b_proj", "q_proj", "output_gate"), P(None, "tensor")),
    **dict.fromkeys(("kv_b_k", "kv_b_v", "o_proj", "sinks", "o_a_proj", "o_b_proj"), P("tensor")),
    **dict.fromkeys(("self_attn.query_scale.scale", "self_attn.query_scale.bias"), P("tensor")),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), P(None, "tensor")),
    **dict.fromkeys(("shared_experts.gate_proj", "shared_experts.up_proj"), P(None, "tensor")),
    **dict.fromkeys(("mlp.down_proj", "shared_experts.down_proj"), P("tensor")),
    **dict.fromkeys((f"mlp.experts.{name}_proj" for name in ("gate", "up", "down")), P("tensor")),
    **{"embed_tokens": P("tensor"), "lm_head": P(None, "tensor")},
}


def model_of(name):
    config = load_config(f"tests/fixtures/{name}_tiny")
    family = family_of(config)
    return config, family, family.param_specs(config, jnp.float32)


def by_name(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_every_weight_of_every_family(name):
    _, _, specs = model_of(name)
    found = by_name(partition_params(specs, Parallel(tensor=2)))
    for path, lies in found.items():
        ends = [end for end in SPLIT if f".{path}".endswith(f".{end}")]
        assert lies == (SPLIT[ends[0]] if ends else P()), path
    # On one device, and on devices that share pages only, nothing is split.
    for parallel in (Parallel(), Parallel(context=4)):
        assert set(by_name(partition_params(specs, parallel)).values()) == {P()}


def test_where_experts_lie():
    _, _, specs = model_of("deepseek_v32")
    expert = "layers.2.mlp.experts.down_proj"

    def lies(**sizes):
        return by_name(partition_params(specs, Parallel(**sizes)))[expert]

    assert lies(data=2, tensor=2) == P(("data", "tensor"))
    assert lies(data=2, context=2) == P("data")
    assert lies(data=2, tensor=2, experts=("tensor",)) == P("tensor")
    assert lies(data=2, tensor=2, experts=("data",)) == P("data")
    assert lies(tensor=2, experts=("data",)) == lies(tensor=2, experts=()) == P(None, "tensor")
    assert lies(data=2, experts=()) == P()
    names = ("replica", "pages", "model")
    assert lies(data=2, tensor=2, names=names) == P(("replica", "model"))
    columns = by_name(partition_params(specs, Parallel(tensor=2, experts=())))
    assert columns["layers.2.mlp.experts.up_proj"] == P(None, None, "tensor")


def test_a_vocabulary_that_does_not_divide_is_the_same_everywhere():
    specs = family_of(SMALL).param_specs(SMALL)
    found = by_name(partition_params(specs, Parallel(tensor=2)))
    assert SMALL.vocab_size % 2 == 1 and found["embed_tokens"] == found["lm_head"] == P()


def test_local_shapes_and_bytes():
    _, _, specs = model_of("deepseek_v32")
    parallel = Parallel(data=2, tensor=2)
    partition = partition_params(specs, parallel)
    local = by_name(local_specs(specs, partition, parallel))
    assert local["layers.1.self_attn.kv_b_v"].shape[0] == 2
    assert local["layers.2.mlp.experts.up_proj"].shape[0] == 2
    mesh = make_mesh(parallel)
    held = 0
    for spec, lies in zip(jax.tree.leaves(specs), jax.tree.leaves(partition)):
        shard = jax.sharding.NamedSharding(mesh, lies).shard_shape(spec.shape)
        held += int(np.prod(shard)) * spec.dtype.itemsize
    assert device_bytes(specs, partition, parallel) == held
    with pytest.raises(ValueError, match="axis of 4 does not divide over 3 devices"):
        local_specs(specs, partition_params(specs, Parallel(tensor=3)), Parallel(tensor=3))


@pytest.mark.parametrize("name", ["dots3_note", "deepseek_v4", "axk2", "mistral_large4"])
def test_fused_on_each_device(name):
    """Fused inside shard_map with the default check; each device has what it would fuse from its own part."""
    _, family, specs = model_of(name)
    parallel = Parallel(tensor=2)
    mesh, partition = make_mesh(parallel), partition_params(specs, parallel)
    fused = partition_fused(family.fuse_projections, specs, parallel)
    one_layer = {"layers": specs["layers"][:1]}
    one = partition_params(one_layer, parallel), partition_fused(family.fuse_projections, one_layer, parallel)
    assert jax.tree.leaves(one[1].specs) == jax.tree.leaves(fused.specs["layers"][:1])
    step = jax.shard_map(family.fuse_projections, mesh=mesh, in_specs=(partition,), out_specs=fused.partition)
    described = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), jax.eval_shape(step, specs))
    assert jax.tree.leaves(described) == jax.tree.leaves(fused.specs)


def test_values_of_fused_columns():
    _, family, specs = model_of("dots3_note")
    specs, parallel = {"layers": [{"self_attn": specs["layers"][0]["self_attn"]}]}, Parallel(tensor=2)
    params, partition = random_params(specs), partition_params(specs, parallel)
    fused = partition_fused(family.fuse_projections, specs, parallel)
    mesh = make_mesh(parallel)
    step = jax.shard_map(family.fuse_projections, mesh=mesh, in_specs=(partition,), out_specs=fused.partition)
    whole = jax.jit(step)(params)["layers"][0]["self_attn"]
    attention = params["layers"][0]["self_attn"]
    for device in range(2):
        heads = slice(2 * device, 2 * device + 2)
        own = {**attention, **{n: attention[n][:, heads] for n in ("q_b_proj", "output_gate") if n in attention}}
        own |= {n: attention[n][heads] for n in ("kv_b_k", "kv_b_v", "o_proj")}
        expected = family.fuse_projections({"layers": [{"self_attn": own}]})["layers"][0]["self_attn"]
        for name in ("hidden_proj", "q_latent_proj"):
            part = np.split(np.asarray(whole[name]), 2, axis=1)[device] if fused_is_split(fused, name) else whole[name]
            np.testing.assert_array_equal(part, expected[name])
        np.testing.assert_array_equal(np.split(np.asarray(whole["q_absorb"]), 2)[device], expected["q_absorb"])


def fused_is_split(fused, name):
    return fused.partition["layers"][0]["self_attn"][name] != P()


def test_fused_and_unknown_weights_are_refused():
    _, family, specs = model_of("deepseek_v32")
    with pytest.raises(ValueError, match="hidden_proj.*partition_fused"):
        partition_params(jax.eval_shape(family.fuse_projections, specs), Parallel(tensor=2))


def test_what_other_devices_fused_is_refused():
    """In this family all fused columns are split, so that every order of them has the same shape."""
    config, family, specs = model_of("axk2")
    parallel, four = Parallel(tensor=2), Parallel(tensor=4)
    mesh = make_mesh(parallel)
    single = random_params(jax.eval_shape(family.fuse_projections, specs))
    lies = partition_fused(family.fuse_projections, specs, parallel).partition
    fused = jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), single, lies)
    check_params(fused, config, parallel=parallel)
    check_params(single, config)
    for params, there in ((single, parallel), (fused, None), (fused, four)):
        with pytest.raises(ValueError, match=r"self_attn.q_absorb has parts of shape .* is expected.*fuse_on_mesh"):
            check_params(params, config, parallel=there)


# --- sizes that do not divide ----------------------------------------------------------------------------------------
def refusal(name_or_config, **sizes):
    config = model_of(name_or_config)[0] if isinstance(name_or_config, str) else name_or_config
    with pytest.raises(ValueError) as error:
        check_divides(config, family_of(config).param_specs(config), Parallel(**sizes))
    return str(error.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_divides(name):
    config, _, specs = model_of(name)
    for sizes in ({"tensor": 2}, {"data": 2, "tensor": 2}, {"context": 3}, {"data": 3, "experts": ()}):
        check_divides(config, specs, Parallel(**sizes))


def test_what_does_not_divide_is_named_with_what_does():
    assert "num_attention_heads is 4" in refusal("axk2", tensor=8)
    # The sliding layers of dots3 have other heads than its first.
    text = refusal("dots3_note", tensor=4)
    assert "num_attention_heads of layers 2, 3 is 2" in text and "layers 0, 1" not in text and "are 1, 2." in text
    text = refusal("deepseek_v4", tensor=4)
    assert "o_groups is 2" in text and "num_attention_heads" not in text and "are 1, 2." in text
    odd = dataclasses.replace(SMALL, first_k_dense_replace=1, intermediate_size=39)
    assert "intermediate_size is 39" in refusal(odd, tensor=2)
    assert "moe_intermediate_size * n_shared_experts is 21" in refusal(
        dataclasses.replace(SMALL, moe_intermediate_size=21), tensor=2, experts=("data",)
    )
    columns = dataclasses.replace(SMALL, moe_intermediate_size=21, n_shared_experts=2)
    assert "moe_intermediate_size is 21" in refusal(columns, tensor=2, experts=())


def test_experts_that_do_not_divide():
    text = refusal(SMALL, data=3, tensor=2)
    assert "n_routed_experts is 9" in text and "6 devices (data=3 times tensor=2)" in text
    assert "are 1, 3, 9." in text and "experts=tensor" in text and "experts= to split" in text
    check_divides(SMALL, family_of(SMALL).param_specs(SMALL), Parallel(data=3, tensor=2, experts=("data",)))


def test_published_shapes_divide_over_eight_devices():
    specs = family_of(DEEPSEEK_V32).param_specs(DEEPSEEK_V32, jnp.bfloat16)
    parallel = Parallel(tensor=8)
    check_divides(DEEPSEEK_V32, specs, parallel)
    share = device_bytes(specs, partition_params(specs, parallel), parallel)
    whole = device_bytes(specs, partition_params(specs, Parallel()), Parallel())
    # Latents, routers and indexers are on every device: 2.1 % more than an eighth.
    assert whole / 8 < share < 1.03 * whole / 8
