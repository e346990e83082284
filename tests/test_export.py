"""A decode step through `jax.export`: on a CPU it runs; for an AMD GPU it holds the kernels, and they compile."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from small_models import ONE_LAYER, random_params
from support.equivalence import assert_same_bits
from support.marks import machine_code_runs

import sparse_mla_jax as sm
from pallas_kernels.cdna import compiler, lowering
from pallas_kernels.targets import named_targets
from sparse_mla_jax.layers.compressed_attention import LayerCaches
from sparse_mla_jax.models.deepseek_v32 import create_caches, param_specs


def step(params, hidden, caches, metadata, *, name):
    return sm.attention_step(params, hidden, *caches, metadata, config=ONE_LAYER, implementation=name)


def arguments():
    params = random_params(param_specs(ONE_LAYER)["layers"][0]["self_attn"])
    caches = create_caches(ONE_LAYER, num_pages=8, page_size=4, dtype="float8_e4m3fnuz")[0]
    metadata = sm.decode_metadata(jnp.asarray([5, 11]), jnp.arange(8).reshape(2, 4), page_size=4)
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((2, 24)), jnp.float32)
    return params, hidden, caches, metadata


def exported(*machines, name="triton"):
    platforms = [machine.split(":")[0] for machine in machines]
    with sm.lower_for(*machines):
        jitted = jax.jit(functools.partial(step, name=name))
        return export.export(jitted, platforms=platforms, disabled_checks=sm.kernel_checks())(*arguments())


def read_back(program):
    return export.deserialize(program.serialize())


def test_exported_step_runs_on_a_cpu():
    """Written, read back and called with caches and metadata; None means the XLA body on the CPU."""
    args = arguments()
    program = read_back(exported("cpu", "rocm:gfx942", name=None))
    assert program.platforms == ("cpu", "rocm")
    got = program.call(*args)
    assert_same_bits(got, jax.jit(functools.partial(step, name="xla"))(*args))
    assert isinstance(got[1], sm.PagedKVCache) and got[1].dtype == jnp.float8_e4m3fnuz


@pytest.mark.parametrize("machines", [("rocm:gfx942",), pytest.param(("cuda", "rocm:gfx950"), marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["triton", pytest.param(None, marks=pytest.mark.slow)])
def test_kernels_are_in_the_program(machines, name):
    """Never the XLA body in silence; for one AMD GPU each kernel compiles without spills."""
    calls = lowering.calls_in_exported(exported(*machines, name=name))
    found = [call.name for call in calls]
    assert len(found) == 10 * len(machines)
    assert {"top_k"} < set(found), found
    if machine_code_runs() and len(machines) == 1:
        for call in calls:
            assert compiler.compile_kernel(call, "gfx942", "triton").resources.vgpr_spills == 0


def test_without_a_name_there_is_no_kernel_for_an_amd_gpu():
    jitted = jax.jit(functools.partial(step, name="triton"))
    with pytest.raises(NotImplementedError, match="not found for platform rocm"):
        export.export(jitted, platforms=["rocm"], disabled_checks=sm.kernel_checks())(*arguments())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), "names are absent; expected one machine at least"),
        (("rocm:gfx942", "rocm:gfx950"), "names are 'rocm:gfx942', 'rocm:gfx950'; .* one of each platform"),
        (("gfx90a",), "target is 'gfx90a'"),
    ],
)
def test_machines_that_can_not_be(names, message):
    with pytest.raises(ValueError, match=message), sm.lower_for(*names):
        pass
    assert named_targets() == ()


def test_every_pytree_is_written():
    cache = sm.PagedKVCache.create(2, 4, latent_dim=8, rope_dim=4, group_size=8, scale_dtype="float8_e8m0fnu")
    state = sm.CompressorState.create(1, ratio=4, dim=8, overlap=False)
    index = sm.PagedIndexCache.create(2, 4, dim=8, dtype="bfloat16")
    tree = {
        "rows": (sm.DenseRows(jnp.ones((1, 1), jnp.int32)), sm.pack_rows(jnp.ones((1, 1), jnp.int32))),
        "window": sm.WindowCache(cache),
        "layer": LayerCaches(cache, cache, state, index, page_size=4),
        "weights": sm.CompressorWeights(
            jnp.ones((4, 8), jnp.float32), jnp.ones(8, jnp.float32), jnp.ones(2, jnp.float32), eps=1e-5
        ),
        "metadata": arguments()[3],
    }
    program = read_back(export.export(jax.jit(lambda tree: tree))(tree))
    got = program.call(tree)
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    assert dataclasses.replace(got["weights"], position_bias=0, norm=0, frequencies=0).eps == 1e-5
