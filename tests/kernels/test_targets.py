"""Which machine a program is lowered for, and what happens on GPUs that no kernel was made for."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import targets
from pallas_kernels.targets import GFX942, GFX950, HOST, NVIDIA
from sparse_mla_jax import __main__
from sparse_mla_jax.ops.attention import sparse_mla
from sparse_mla_jax.ops.cache import PagedIndexCache, PagedKVCache, write_token
from sparse_mla_jax.ops.indexer import lightning_indexer
from sparse_mla_jax.ops.norm_rope import Section, norm_rope
from sparse_mla_jax.ops.topk import top_k

CUSTOM_CALL = "__gpu$xla.gpu.triton"
shape = jax.ShapeDtypeStruct
# Kind of the device and platform of GPUs that no kernel was made for.
UNKNOWN = [
    ("gfx90a", "rocm"),
    ("gfx1201", "rocm"),
    ("sm_75", "cuda"),
    ("NVIDIA A100-SXM4-80GB", "cuda"),
]


def lower(kind, platform, fn, *avals):
    """StableHLO text of fn for a GPU that this host does not have."""
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=100, platform="gpu")
    axis = (jax.sharding.AxisType.Explicit,)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("x",), axis, abstract_device=device)):
        # A new function object: what was traced for another GPU must not be found again.
        return jax.jit(lambda *a: fn(*a)).trace(*avals).lower(lowering_platforms=(platform,)).as_text()


def attend(implementation):
    cache = jax.eval_shape(lambda: PagedKVCache.create(16, 64, latent_dim=512, rope_dim=64, group_size=128))

    def fn(q, cache, rows):
        return sparse_mla(q, cache, rows, sm_scale=0.1, value_dim=512, implementation=implementation)

    return fn, shape((2, 16, 576), jnp.bfloat16), cache, shape((2, 256), jnp.int32)


def select(implementation):
    return lambda x: top_k(x, 64, implementation=implementation), shape((2, 4096), jnp.float32)


def index(implementation):
    cache = jax.eval_shape(lambda: PagedIndexCache.create(16, 64, dim=128))
    table, ids = shape((2, 8), jnp.int32), shape((2,), jnp.int32)

    def fn(q, weights, cache, table, ids, lengths):
        options = {"k": 64, "max_length": 512, "implementation": implementation}
        return lightning_indexer(q, weights, cache, table, ids, lengths, **options)

    return fn, shape((2, 64, 128), jnp.bfloat16), shape((2, 64), jnp.float32), cache, table, ids, ids


def write(implementation):
    cache = jax.eval_shape(lambda: PagedKVCache.create(16, 64, latent_dim=512, rope_dim=64, group_size=128))
    keys = jax.eval_shape(lambda: PagedIndexCache.create(16, 64, dim=128))
    rows = [shape((2, n), jnp.bfloat16) for n in (512, 64, 128)]
    return lambda *a: write_token(*a, implementation=implementation), cache, keys, *rows, shape((2,), jnp.int32)


OPERATORS = [attend, select, index, write]


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("kind", "platform"), UNKNOWN)
def test_no_kernel_for_another_gpu(operator, kind, platform):
    """None takes the XLA body; a kernel that is asked for by name is an error that names the GPU."""
    text = lower(kind, platform, *operator(None))
    assert CUSTOM_CALL not in text and "cvt.rn" not in text
    with pytest.raises(ValueError, match=f"no kernel was made for {kind}; kernels are made for gfx942, gfx950"):
        lower(kind, platform, *operator("triton"))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(("kind", "platform"), [("gfx942", "rocm"), ("gfx950", "rocm"), ("NVIDIA H200", "cuda")])
def test_none_takes_the_kernel_of_a_known_gpu(operator, kind, platform):
    text = lower(kind, platform, *operator(None))
    assert CUSTOM_CALL in text and ("cvt.rn" in text) <= (platform == "cuda")


def finish(implementation):
    def fn(x):
        return norm_rope(
            x,
            [Section(0, 4, 128, "float8_e4m3fn")],
            jnp.zeros(2, jnp.int32),
            np.ones(4, np.float32),
            implementation=implementation,
        )

    return fn, shape((2, 512), jnp.float32)


@pytest.mark.parametrize("operator", [write, finish])
@pytest.mark.parametrize(("kind", "platform"), [("gfx942", "rocm"), ("NVIDIA H200", "cuda")])
def test_scales_are_divided_exactly(operator, kind, platform):
    """Triton's own division is approximate on NVIDIA: kernels that quantise ask for the exact instruction there."""
    assert ("div.rn.f32" in lower(kind, platform, *operator("triton"))) == (platform == "cuda")


def device(kind, architecture=None):
    return types.SimpleNamespace(device_kind=kind, compute_capability=architecture, platform="gpu")


@pytest.mark.parametrize(
    ("gpu", "target"),
    [
        (device("AMD Instinct MI300X", "gfx942:sramecc+:xnack-"), GFX942),
        (device("AMD Instinct MI325X"), GFX942),
        (device("gfx950"), GFX950),
        (device("AMD Instinct MI355X", "gfx950"), GFX950),
        (device("NVIDIA H200", "9.0"), NVIDIA),
        (device("NVIDIA H100 80GB HBM3"), NVIDIA),
        (device("NVIDIA B200", "10.0"), NVIDIA),
        (device("sm_90"), NVIDIA),
        (device("sm_100"), NVIDIA),
    ],
    ids=lambda x: getattr(x, "device_kind", getattr(x, "name", "")),
)
def test_target_of_a_device(gpu, target):
    assert targets.target_of(gpu) is target


@pytest.mark.parametrize(
    "gpu",
    [
        device("AMD Instinct MI250X", "gfx90a"),
        device("AMD Radeon RX 9070", "gfx1201"),
        device("gfx9420"),
        device("Tesla T4", "7.5"),
        device("NVIDIA A100-SXM4-80GB", "8.0"),
        device("NVIDIA L40S", "8.9"),
        device("NVIDIA GeForce RTX 5090", "12.0"),
        device("sm_120"),
        device("Intel Data Center GPU Max"),
    ],
    ids=lambda gpu: gpu.device_kind,
)
def test_other_gpus_are_refused(gpu):
    with pytest.raises(NotImplementedError, match="no kernel was made for"):
        targets.target_of(gpu)


def test_a_host_that_names_no_gpu():
    """Interpret mode here, and the program can still be lowered for NVIDIA."""
    scores = np.arange(20, dtype=np.float32)[None]
    fn = jax.jit(lambda x: top_k(x, 4, implementation="triton"))
    np.testing.assert_array_equal(fn(scores), [[16, 17, 18, 19]])
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert targets.traced_gpu() is None
        np.testing.assert_array_equal(jax.jit(lambda x: top_k(x, 4, implementation="triton"))(scores), fn(scores))


def test_names():
    assert targets.find("gfx942") is GFX942 and targets.find(HOST) is HOST and targets.find("gpu") is NVIDIA
    with pytest.raises(ValueError, match="target is 'gfx90a'; expected one of cpu, gfx942, gfx950, nvidia"):
        targets.find("gfx90a")


def test_info_says_why_no_kernel_runs(monkeypatch, capsys):
    monkeypatch.setattr(targets, "traced_gpu", lambda: device("AMD Instinct MI250X", "gfx90a"))
    monkeypatch.setattr("sparse_mla_jax.ops._dispatch.preferred", lambda: ("triton", "xla"))
    assert __main__.main(["info"]) == 0
    out = capsys.readouterr().out
    assert "no kernel was made for AMD Instinct MI250X gfx90a" in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("implementation of sparse_mla ")] == [
        "xla"
    ]
