"""What indexers select on meshes of virtual devices: bit for bit what they select on one device, also among equals.

Every layer gets the same normed input on one device and on the mesh: rounding in earlier layers plays no part.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.marks import slow
from support.meshes import OnMesh

from sparse_mla_jax.config import DeepseekV4Config
from sparse_mla_jax.layers.compressed_attention import compressed_attention_step
from sparse_mla_jax.layers.mla import attention_step
from sparse_mla_jax.models.checkpoint import load_checkpoint
from sparse_mla_jax.parallel.attention import join_selection

# Cases of a family and a mesh share programs.
pytestmark = pytest.mark.xdist_group("selections on meshes")

PAGES = {"deepseek_v32": 4, "glm_moe_dsa": 4, "deepseek_v4": 8}
MESHES = ("tensor=2", "context=2", "context=4", "data=2", "data=2,tensor=2,context=2")
# Each compiles two programs of two or three layers for the mesh and two for one device, in 6 s.
OFTEN = (("glm_moe_dsa", "context=2"),)
CASES = [pair if pair in OFTEN else slow(*pair) for pair in ((name, mesh) for name in PAGES for mesh in MESHES)]
# Tokens of two requests after two chunks and a step; the second chunk of one is short, so that rows are padding.
CHUNK, LENGTHS = 23, ((23, 23), (46, 30), (47, 31))


@functools.cache
def load(folder):
    return load_checkpoint(folder, progress=False)


def indexed(config):
    """Numbers of the layers with an indexer of their own."""
    if isinstance(config, DeepseekV4Config):
        return [number for number in range(config.num_hidden_layers) if config.has_indexer(number)]
    return [layer.number for layer in config.layers if layer.has_indexer]


def select_in_layers(params, caches, inputs, *, model, implementation):
    """Selections int32 [T, layers, W] of the layers with an indexer, from the layers' normed inputs [T, layers, D]."""
    meta, config, found, caches = inputs.metadata(model.page_size), model.config, [], list(caches)
    options = {"return_selection": True, "parallel": model.parallel, "implementation": implementation}
    for entry, number in enumerate(indexed(config)):
        args = params["layers"][number]["self_attn"], inputs.values[:, entry]
        if isinstance(config, DeepseekV4Config):
            _, own, chosen = compressed_attention_step(
                *args, caches[number], meta, config=config, layer=number, **options
            )
        else:
            _, *own, chosen = attention_step(*args, *caches[number], meta, config=config, layer=number, **options)
            own = tuple(own)
        caches[number] = own
        found.append(join_selection(chosen, model.parallel, config.index_topk))
    return jnp.stack(found, axis=1), tuple(caches)


@functools.partial(jax.jit, static_argnames=("model", "implementation"))
def select(params, caches, inputs, *, model, implementation=None):
    return model.run(
        functools.partial(select_in_layers, model=model, implementation=implementation), params, caches, inputs
    )


def normed(config, seed, counts):
    """Normed inputs of counts[b] tokens of request b: values of size 1."""
    rng, shape = np.random.default_rng(seed), (len(indexed(config)), config.hidden_size)
    return [rng.standard_normal((count, *shape)).astype(np.float32) for count in counts]


def model_of(fixtures, family, mesh, **sizes):
    config, params = load(fixtures / f"{family}_tiny")
    return OnMesh(config, mesh, page_size=PAGES[family], chunk=CHUNK, **sizes), params


def selections(fixtures, family, mesh, dtype="float32", implementation=None):
    """Selections of every step: a list of [tokens, layers, W]."""
    model, params = model_of(fixtures, family, mesh, dtype=dtype)
    caches, found, before = model.create_caches(params), [], np.zeros(2, np.int32)
    params = model.place(params)
    for seed, lengths in enumerate(LENGTHS):
        counts, before = np.asarray(lengths) - before, np.asarray(lengths)
        inputs = model.inputs(normed(model.config, seed, counts), lengths, CHUNK if counts.max() > 1 else 1)
        chosen, caches = select(params, caches, inputs, model=model, implementation=implementation)
        assert chosen.dtype == jnp.int32
        found.append(model.rows(chosen, counts))
    return found


one_device = functools.cache(functools.partial(selections, mesh=""))


def check_same(got, want):
    """The same bits, and rows that are selections: some full, none of keys that come later."""
    assert (want[-1] >= 0).all(), "every token of the last step has more keys than it selects"
    for step, (mine, other) in enumerate(zip(got, want, strict=True)):
        np.testing.assert_array_equal(mine, other, f"step {step}")


@pytest.mark.parametrize(("family", "mesh"), CASES)
def test_selections_are_those_of_one_device(fixtures, family, mesh):
    """Two chunks of a prompt, the second with padding, and a step of single tokens."""
    check_same(selections(fixtures, family, mesh), one_device(fixtures, family))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float8_e4m3fnuz", "float8_e4m3fn", "bfloat16"])
@pytest.mark.parametrize(("family", "mesh"), [(name, mesh) for name in PAGES for mesh in (MESHES[0], MESHES[2])])
def test_selections_by_cache_type(fixtures, family, mesh, dtype):
    check_same(selections(fixtures, family, mesh, dtype), one_device(fixtures, family, dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("family", PAGES)
def test_selections_with_64_bit_types(fixtures, family):
    want = one_device(fixtures, family)
    with jax.enable_x64(True):
        check_same(selections(fixtures, family, MESHES[4]), want)


# --- ties
def with_index_keys(caches, keys):
    """Caches whose index keys are `keys` [n, Di], by turns in every page: float32, all pages alike."""

    def fill(one):
        pages, size, dim = one.data.shape
        whole = np.broadcast_to(np.resize(keys[:, :dim], (size, dim)), (pages, size, dim))
        return dataclasses.replace(one, data=jnp.zeros_like(one.data) + whole.astype(np.float32))

    def change(own):
        if not isinstance(own, tuple):
            return own if own.index is None else dataclasses.replace(own, index=fill(own.index))
        return own if own[1] is None else (own[0], fill(own[1]))

    return tuple(change(own) for own in caches)


# A key with one 1 gives the same score in whatever order a device adds.
KEYS = {"all equal": np.eye(1, 64), "two kinds": np.eye(2, 64), "none": np.zeros((1, 64))}


def tied(fixtures, family, mesh, kind, implementation=None):
    """Selections [tokens, layers, W] of a step of single tokens over caches with equal keys."""
    model, params = model_of(fixtures, family, mesh)
    caches = with_index_keys(model.create_caches(params), KEYS[kind])
    inputs = model.inputs(normed(model.config, 5, (1, 1)), LENGTHS[2], 1)
    chosen, _ = select(model.place(params), caches, inputs, model=model, implementation=implementation)
    return model.rows(chosen, (1, 1))


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize(("family", "mesh"), CASES)
def test_ties_across_devices_go_to_the_lower_position(fixtures, family, mesh, kind):
    """Equal keys lie on every device of "context"; the programs are those of the test above."""
    want = tied(fixtures, family, "", kind)
    np.testing.assert_array_equal(tied(fixtures, family, mesh, kind), want)
    if kind != "two kinds":
        # All but the newest key, or entry, are equal.
        lowest = np.arange(want.shape[-1])
        assert (want[..., :-1] == lowest[:-1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("family", PAGES)
@pytest.mark.parametrize("mesh", ["tensor=2", "context=2", "data=2"])
def test_kernels_select_the_same(fixtures, family, mesh):
    """In interpret mode, on one device and on the mesh; the tied ones too."""
    check_same(selections(fixtures, family, mesh, implementation="triton"), one_device(fixtures, family))
    for kind in KEYS:
        want = tied(fixtures, family, "", kind)
        np.testing.assert_array_equal(tied(fixtures, family, mesh, kind, "triton"), want)
