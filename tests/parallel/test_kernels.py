"""Whole models on meshes of virtual devices with their kernels: in interpret mode, and as machine code of AMD GPUs."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from support.marks import running, slow
from support.meshes import OnMesh

from pallas_kernels.cdna import ARCHITECTURES
from sparse_mla_jax.models.checkpoint import load_checkpoint

# As tests/parallel/test_models.py.
BOUND, PAGES = 5e-5, {"deepseek_v32": 4, "glm_moe_dsa": 4, "deepseek_v4": 8}
# A few tokens more than the indexers keep: 16, and 4 entries of 4 tokens. Both steps are one program.
STEPS = {"deepseek_v32": (10, 10), "glm_moe_dsa": (10, 10), "deepseek_v4": (11, 11)}


@functools.cache
def load(folder):
    config, params = load_checkpoint(folder, progress=False)
    with np.load(folder / "expected.npz") as data:
        return config, params, data["input_ids"].astype(np.int32), data["logits"]


@functools.partial(jax.jit, static_argnames=("model", "implementation"), donate_argnames=("caches",))
def step(params, caches, inputs, *, model, implementation):
    return model.logits(params, caches, inputs, implementation)


class Run(NamedTuple):
    """logits and expected float32 [B, tokens, V], and the caches after all steps."""

    logits: Any
    expected: Any
    caches: Any


def run(fixtures, family, mesh, *, implementation=None, dtype="float32", steps=None):
    """Two requests' prompts in steps of so many tokens, with fused weights."""
    config, params, ids, expected = load(fixtures / f"{family}_tiny")
    steps = STEPS[family] if steps is None else steps
    model = OnMesh(config, mesh, 2, sum(steps), PAGES[family], max(steps), dtype)
    caches, found, end = model.create_caches(params), [], 0
    params = model.place(params, fused=True)
    for size in steps:
        start, end = end, end + size
        inputs = model.inputs(list(ids[:2, start:end]), [end] * 2, size)
        logits, caches = step(params, caches, inputs, model=model, implementation=implementation)
        found.append(np.asarray(logits).reshape(2, size, -1))
    return Run(np.concatenate(found, axis=1), expected[:2, :end], caches)


def check(got, expected, bound=BOUND):
    error = np.abs(got - expected).max(axis=(0, 2))
    assert error.max() <= bound, f"position {error.argmax()}: {error.max()}"
    np.testing.assert_array_equal(got.argmax(axis=-1), expected.argmax(axis=-1))


# Of one machine in turn, see tests/support/turns.py: XLA compiles one program in 3 s, and LLVM its kernels in 3 s.
OFTEN = [("deepseek_v32", "tensor=2,context=2", arch) for arch in ARCHITECTURES]
RARELY = [(family, "tensor=2,context=2", arch) for family in ("glm_moe_dsa", "deepseek_v4") for arch in ARCHITECTURES]
RARELY += [(family, mesh, "triton") for family in PAGES for mesh in ("data=2", "tensor=2", "context=2")]
RARELY += [("deepseek_v32", "data=2,tensor=2", name) for name in ("triton", "gfx942")]


@pytest.mark.parametrize(("family", "mesh", "implementation"), [*OFTEN, *(slow(*case) for case in RARELY)])
def test_kernels_inside_shard_map(fixtures, family, mesh, implementation):
    """With the default check of what varies; each device selects fewer keys than it has, and reads earlier pages."""
    with running(implementation) as name:
        check(*run(fixtures, family, mesh, implementation=name)[:2])


@pytest.mark.slow
@pytest.mark.parametrize("family", PAGES)
def test_decode_with_kernels(fixtures, family):
    with running("gfx942") as name:
        check(*run(fixtures, family, "data=2,context=2", implementation=name, steps=(*STEPS[family], 1))[:2])


# --- FP8 caches
# A sum in another order may round a value near the middle of two FP8 numbers to the other one: one byte, which moved
# logits by 5e-4 where it was measured. A wrong page or scale moves them by more than 0.1.
MOST_FLIPS, FLIPPED = 4, 2**-8


def stored(caches):
    """The rows of all FP8 arrays, wherever their pages lie. Latents are words of four values each."""
    leaves = (x for x in jax.tree.leaves(caches) if x.dtype.itemsize == 1 or x.dtype == np.uint32)
    rows = (np.asarray(x).reshape(-1, x.shape[-1]) for x in leaves)
    return {row.tobytes() for own in rows for row in own}


def check_fp8(got, want):
    """Logits as exact as with float32 caches, as long as the caches are the same."""
    flips = len(stored(got.caches) - stored(want.caches))
    assert flips <= MOST_FLIPS
    check(got.logits, want.logits, FLIPPED if flips else BOUND)


CASES = [
    (family, mesh) for family in PAGES for mesh in ("data=2", "tensor=2", "context=4", "data=2,tensor=2,context=2")
]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float8_e4m3fnuz", "float8_e4m3fn"])
def test_fp8_caches(fixtures, case, dtype):
    """As one device with such caches. One program on the mesh and one on a device: 5 s."""
    check_fp8(run(fixtures, *case, dtype=dtype), run(fixtures, case[0], "", dtype=dtype))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["triton", *ARCHITECTURES])
@pytest.mark.parametrize("family", PAGES)
def test_fp8_caches_with_kernels(fixtures, family, implementation):
    with running(implementation) as name:
        got = run(fixtures, family, "context=2", implementation=name, dtype="float8_e4m3fnuz")
    check_fp8(got, run(fixtures, family, "", dtype="float8_e4m3fnuz"))
