"""The engine on meshes of virtual devices: the tokens of one device, whatever the mesh; nothing leaks or recompiles."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from support.marks import slow
from test_engine import CONFIG as SMALL
from test_engine import count_compilations

from sparse_mla_jax.models import deepseek_v32
from sparse_mla_jax.parallel.axes import make_mesh, parse_parallel
from sparse_mla_jax.serving.engine import Engine

pytestmark = pytest.mark.xdist_group("engine on a mesh")

# Two heads a device of "tensor".
CONFIG = dataclasses.replace(SMALL, num_attention_heads=4)
SIZES = {"page_size": 4, "max_batch": 3, "max_context": 48, "prefill_chunk": 16, "token_buckets": (16,)}
SIZES |= {"cache_dtype": "float32", "num_pages": 36}


@functools.cache
def params():
    return deepseek_v32.init_params(jax.random.key(0), CONFIG)


def make(mesh="", **options):
    parallel = parse_parallel(mesh)
    where = {"mesh": make_mesh(parallel), "parallel": parallel} if mesh else {}
    return Engine(params(), CONFIG, **where, **{**SIZES, **options})


@functools.cache
def jobs():
    """Greedy and sampled requests of different lengths."""
    kinds = [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_p": 0.8, "seed": 2**32 - 1}]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in (29, 3, 17, 8, 25, 1, 20)]
    return [(prompt, {"max_tokens": 12, **kinds[i % 3]}) for i, prompt in enumerate(prompts)]


def serve(engine):
    requests = [engine.submit(prompt, **job) for prompt, job in jobs()]
    engine.run()
    check_empty(engine)
    return requests


def check_empty(engine):
    for one in engine.groups.schedulers:
        assert one.allocator.num_used == 0 and len(one._free_states) == one.max_batch


@functools.cache
def alone(cache_dtype):
    """The tokens of each job on one device."""
    return [request.tokens for request in serve(make(cache_dtype=cache_dtype))]


MESHES = ("data=2", "context=2", "tensor=2", "data=2,context=2", "data=2,context=2,tensor=2")


@pytest.mark.parametrize("cache_dtype", ["float32", "float8_e4m3fnuz"])
@pytest.mark.parametrize("mesh", MESHES)
def test_tokens_are_those_of_one_device(mesh, cache_dtype):
    engine = make(mesh, cache_dtype=cache_dtype)
    assert [request.tokens for request in serve(engine)] == alone(cache_dtype)
