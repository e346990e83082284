"""Programs around a step on a mesh: loops of steps, donated caches, 64-bit types, other lengths, `jax.export`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from support.compilations import count_compilations
from support.meshes import Inputs, OnMesh

import sparse_mla_jax as sm
from pallas_kernels.cdna import lowering
from sparse_mla_jax.models.checkpoint import load_checkpoint
from sparse_mla_jax.models.family import family_of

PAGES = {"deepseek_v32": 4, "glm_moe_dsa": 4, "deepseek_v4": 8}
# More than the indexers keep: 16, and 4 entries of 4 tokens.
STEPS, LENGTH = 22, 48


@functools.cache
def load(folder):
    return load_checkpoint(folder, progress=False)


def model_of(fixtures, family, mesh, **sizes):
    config, params = load(fixtures / f"{family}_tiny")
    return OnMesh(config, mesh, 2, LENGTH, PAGES[family], **sizes), params


# --- loops
def decode_on_device(params, caches, inputs, *, model):
    """Decodes greedily, `steps` tokens of every request, in one `while_loop`: (tokens int32 [B, STEPS], caches)."""
    (tokens, steps), lengths, _, table = inputs
    family, options = family_of(model.config), {"config": model.config, "parallel": model.parallel}

    def body(carry):
        i, tokens, lengths, caches, out = carry
        logits, caches = family.decode(params, tokens, caches, lengths, table, page_size=model.page_size, **options)
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return i + 1, tokens, lengths + 1, caches, out.at[:, i[0]].set(tokens)

    out = jnp.zeros((tokens.shape[0], STEPS), jnp.int32) + 0 * tokens[:, None]
    first = jnp.zeros_like(steps)
    _, _, _, caches, out = jax.lax.while_loop(lambda c: c[0][0] < steps[0], body, (first, tokens, lengths, caches, out))
    return out, caches


@functools.partial(jax.jit, static_argnames="model", donate_argnames="caches")
def decode(params, caches, inputs, *, model):
    return model.run(functools.partial(decode_on_device, model=model), params, caches, inputs)


def start(model, lengths, steps):
    """Inputs of `decode`: a first token of each request, which has `lengths` tokens with it."""
    values = np.asarray([7, 200], np.int32), np.full(2, steps, np.int32)
    return Inputs(values, np.asarray(lengths, np.int32), np.ones(2, np.int32), model.page_table())


def decoded(fixtures, family, mesh):
    """Tokens of two calls, of which the second goes on with other lengths and does not compile; checks the caches."""
    model, params = model_of(fixtures, family, mesh)
    caches, params, found = model.create_caches(params), model.place(params), []

    def call(lengths, steps):
        nonlocal caches
        given = caches
        tokens, caches = decode(params, given, start(model, lengths, steps), model=model)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given)), "the caches were given up"
        assert tokens.dtype == jnp.int32
        found.append(np.asarray(tokens)[:, :steps])

    call((1, 1), STEPS)
    assert count_compilations(lambda: call((STEPS + 1, STEPS - 6), 3)) == 0
    return np.concatenate(found, axis=1)


on_one_device = functools.cache(functools.partial(decoded, mesh=""))
MESHES = ("data=2,tensor=2,context=2", "context=4", "tensor=2")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mesh"), [(name, mesh) for name in PAGES for mesh in MESHES])
def test_many_steps_in_one_loop(fixtures, family, mesh):
    """The greedy tokens of one device; donated caches; other lengths do not compile again."""
    np.testing.assert_array_equal(decoded(fixtures, family, mesh), on_one_device(fixtures, family))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "mesh"), [(name, mesh) for name in PAGES for mesh in MESHES[:2]])
def test_loop_with_64_bit_types(fixtures, family, mesh):
    want = on_one_device(fixtures, family)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(decoded(fixtures, family, mesh), want)


# --- export
# What one layer launches on a device of each mesh. Over "context" the devices agree on the keys with one more.
KERNELS = {"norm_rope", "cache_write", "paged_indexer_logits", "top_k", "sparse_mla"}


# XLA:CPU gives up on the GPU's way to spread experts over "data", so that program is not for both.
PLATFORMS = {"context=2": [("cpu", "rocm")], "tensor=2": [("cpu", "rocm")], "data=2": [("cpu",), ("rocm",)]}


def exported(step, args, platforms):
    """A program, written and read back."""
    with sm.lower_for(*("rocm:gfx942" if name == "rocm" else name for name in platforms)):
        program = export.export(jax.jit(step), platforms=platforms, disabled_checks=sm.kernel_checks())(*args)
    return export.deserialize(program.serialize())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", PLATFORMS)
def test_exported_step(fixtures, mesh):
    """Written, read back and run on two CPU devices; the same program, or its sister, holds an AMD GPU's kernels."""
    with np.load(fixtures / "deepseek_v32_tiny" / "expected.npz") as data:
        ids, expected = data["input_ids"].astype(np.int32)[:2, :20], data["logits"][:2, :20]
    model, params = model_of(fixtures, "deepseek_v32", mesh, chunk=20)
    args = model.place(params), model.create_caches(params), tuple(model.inputs(list(ids), [20, 20], 20))

    def step(params, caches, inputs):
        return model.logits(params, caches, Inputs(*inputs))

    programs = [exported(step, args, platforms) for platforms in PLATFORMS[mesh]]
    assert [program.nr_devices for program in programs] == [2] * len(programs)
    found = {call.name for call in lowering.calls_in_exported(programs[-1])}
    assert found == KERNELS | ({"top_k_share"} if mesh == "context=2" else set())
    logits, caches = jax.jit(programs[0].call)(*args)
    assert np.abs(np.asarray(logits).reshape(expected.shape) - expected).max() <= 5e-5
    for got, given in zip(jax.tree.leaves(caches), jax.tree.leaves(args[1]), strict=True):
        assert got.sharding.is_equivalent_to(given.sharding, got.ndim)
