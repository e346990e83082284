"""Whole models on meshes of virtual devices, against the same float64 logits as on one device."""

import functools

import jax
import numpy as np
import pytest
from support.widened import widen

from sparse_mla_jax.models.checkpoint import load_checkpoint
from sparse_mla_jax.parallel.axes import make_mesh, parse_parallel
from sparse_mla_jax.serving.scoring import score

BOUND = 5e-5
# Small pages, so that every device of "context" has some; a page of V4 holds whole windows.
PAGES = {"deepseek_v32": 4, "glm_moe_dsa": 4, "deepseek_v4": 8}
MESHES = (
    *("data=8", "tensor=2", "tensor=4", "tensor=8", "context=2", "context=4", "context=8"),
    *("data=4", "data=2,tensor=2,context=2", "tensor=2,experts=", "context=2,tensor=2,experts=context+tensor"),
)
# Of other families: gates, sinks, scaled queries, hyper-connections, windows, one embedding for both ends.
OTHERS = ("axk2", "dots3_note", "hy_v4", "hy_v4_vl", "mistral_large4")
OTHER_MESHES = ("tensor=2", "context=2", "data=2", "tensor=2,context=2", "data=2,tensor=2,context=2")


@functools.cache
def load(folder):
    config, params = load_checkpoint(folder, progress=False)
    with np.load(folder / "expected.npz") as data:
        return config, params, data["input_ids"].astype(np.int32), data["logits"]


def cases():
    every = [(family, mesh) for family in PAGES for mesh in MESHES]
    every += [(family, mesh) for family in OTHERS for mesh in OTHER_MESHES]
    return every


def on_mesh(fixtures, family, mesh, **options):
    """(logits, expected logits) of a fixture whose heads divide, and as many sequences as the mesh has groups."""
    config, params, ids, expected = load(fixtures / f"{family}_tiny")
    parallel = parse_parallel(mesh)
    times = max(1, parallel.tensor // getattr(config, "o_groups", config.num_attention_heads))
    config, params = widen(config, params, times)
    rows = np.arange(max(len(ids), parallel.data)) % len(ids)
    options = {"cache_dtype": "float32", "page_size": PAGES.get(family, 4), **options}
    got = score(params, config, ids[rows], mesh=make_mesh(parallel), parallel=parallel, **options)
    return got, expected[rows]


# Two programs, 5 to 10 s. By default test_kernels has logits of V3.2 on a mesh, and the engine's tests have tokens.
@pytest.mark.slow
@pytest.mark.parametrize(("family", "mesh"), cases())
def test_logits(fixtures, family, mesh):
    """A prompt in chunks, then single tokens; also the tokens that are most likely."""
    if family == "mistral_large4" and jax.__version_info__ < (0, 12):
        pytest.skip("XLA:CPU of jaxlib 0.11.2 ends the process for a sharded array without elements: keys without rope")
    got, expected = on_mesh(fixtures, family, mesh, prompt_length=46, chunk=23)
    error = np.abs(got - expected).max(axis=(0, 2))
    assert error.max() <= BOUND, f"position {error.argmax()}: {error.max()}"
    np.testing.assert_array_equal(got.argmax(axis=-1), expected.argmax(axis=-1))
