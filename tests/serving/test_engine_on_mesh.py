"""The engine on meshes of virtual devices: the tokens of one device, whatever the mesh; nothing leaks or recompiles."""

import dataclasses
import functools
import os
import pathlib
import random
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from small_models import SMALL
from support.compilations import count_compilations
from support.marks import slow

from sparse_mla_jax.config import DEEPSEEK_V4_FLASH
from sparse_mla_jax.models import deepseek_v32
from sparse_mla_jax.ops import cache
from sparse_mla_jax.parallel.axes import Parallel, make_mesh, parse_parallel
from sparse_mla_jax.parallel.caches import partition_caches, place
from sparse_mla_jax.parallel.partition import partition_params
from sparse_mla_jax.serving import memory
from sparse_mla_jax.serving import step as step_module
from sparse_mla_jax.serving.engine import Engine
from sparse_mla_jax.serving.sizes import choose_page_size, choose_sizes

pytestmark = pytest.mark.xdist_group("engine on a mesh")

# Sizes that two devices divide.
CONFIG = dataclasses.replace(SMALL, vocab_size=64, n_routed_experts=4, n_group=2, max_position_embeddings=96)
# A device has hardly more pages than its part of a request's 12, so requests preempt each other.
SIZES = {"page_size": 4, "max_batch": 3, "max_context": 48, "prefill_chunk": 16, "token_buckets": (16,)}
# Compiled once for most of these tests.
BOTH = "data=2,context=2"


@functools.cache
def params():
    return jax.tree.map(np.asarray, deepseek_v32.init_params(jax.random.key(0), CONFIG))


def make(mesh="", **options):
    parallel = parse_parallel(mesh)
    pages = {1: 13, 2: 7, 4: 4}.get(parallel.context, 2)
    where = {"mesh": make_mesh(parallel), "parallel": parallel} if mesh else {}
    return Engine(params(), CONFIG, **where, **{**SIZES, "num_pages": pages, "cache_dtype": "float32", **options})


@functools.cache
def jobs():
    """Greedy and sampled requests of different lengths; the context of some is more than a device's 28 tokens."""
    kinds = [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_p": 0.8, "seed": 2**32 - 1}]
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in (29, 3, 17, 8, 25, 1, 20, 30)]
    return [(prompt, {"max_tokens": 12, **kinds[i % 3]}) for i, prompt in enumerate(prompts)]


def serve(engine):
    requests = [engine.submit(prompt, **job) for prompt, job in jobs()]
    engine.run()
    check_empty(engine)
    return requests


def check_empty(engine):
    for one in engine.groups.schedulers:
        assert one.allocator.num_used == 0 and len(one._free_states) == one.max_batch


def check_lies(leaf, sharding):
    assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@functools.cache
def alone(cache_dtype="float32"):
    """The tokens of each job on one device."""
    return [request.tokens for request in serve(make(num_pages=36, cache_dtype=cache_dtype))]


@pytest.mark.parametrize(
    ("mesh", "cache_dtype"),
    [
        (BOTH, "float8_e4m3fnuz"),
        # Each compiles a program, in 5 to 10 s; sizes and combinations only.
        *(
            slow(mesh, "float32")
            for mesh in ("data=2", "context=2", "tensor=2", "context=4", "tensor=2,experts=", BOTH)
        ),
        *(slow(mesh, "float8_e4m3fnuz") for mesh in ("data=2", "context=2", "tensor=2")),
        slow("data=2,context=2,tensor=2", "float8_e4m3fnuz"),
    ],
)
def test_tokens_are_those_of_one_device(mesh, cache_dtype):
    """With preemption, prompts in chunks, and padding in one group while another is full."""
    requests = serve(make(mesh, cache_dtype=cache_dtype))
    assert [request.tokens for request in requests] == alone(cache_dtype)
    assert sum(request.num_preemptions for request in requests) >= 1


@pytest.mark.parametrize("mesh", [BOTH, slow("tensor=2"), slow("data=2,tensor=2,context=2")])
def test_a_warm_engine_traces_nothing_and_donates_its_caches(mesh):
    engine = make(mesh)
    engine.warm_up()
    programs = step_module.jitted_step._cache_size()
    lies = place(partition_caches(engine.caches, engine.parallel), engine._step.keywords["mesh"])

    def serve_some():
        requests = [engine.submit(prompt, **job) for prompt, job in jobs()]
        old = jax.tree.leaves(engine.caches)
        engine.step()
        assert all(leaf.is_deleted() for leaf in old)
        jax.tree.map(check_lies, engine.caches, lies)
        assert engine.cancel(requests[0]) and engine.cancel(requests[5]) and not engine.cancel(requests[5])
        engine.run()
        return requests

    assert count_compilations(serve_some) == 0
    requests = serve_some()
    assert step_module.jitted_step._cache_size() == programs
    assert [request.finish_reason for request in requests].count("cancelled") == 2
    assert requests[1].tokens == alone()[1] and requests[7].tokens == alone()[7]
    check_empty(engine)


def test_one_context_may_exceed_a_device():
    """44 tokens on devices of 28: the request has pages on both."""
    engine = make(BOTH)
    request = engine.submit(jobs()[0][0], max_tokens=15)
    engine.run()
    assert len(request.prompt) + len(request.tokens) == 44 > engine.scheduler.allocator.num_pages * 4
    assert request.tokens[:12] == alone()[0]
    with pytest.raises(ValueError, match="prompt has 60 tokens; at most 47 fit"):
        engine.submit([1] * 60)


def test_load_is_balanced():
    engine = make(BOTH)
    for _ in range(4):
        engine.submit([1, 2], max_tokens=4)
    engine.step()
    assert [len(one.running) for one in engine.groups.schedulers] == [2, 2]
    assert engine.scheduler is engine.groups.schedulers[0]
    engine.run()


@pytest.mark.parametrize("count", [20, slow(300)])
def test_no_page_leaks_over_random_requests(count):
    rng = random.Random(0)
    engine, requests = make(BOTH), []
    for _ in range(count):
        prompt = [rng.randrange(64) for _ in range(rng.choice([1, 3, 13, 23, 25]))]
        sampled = {"temperature": rng.choice([0, 1.0]), "seed": rng.randrange(9), "stop": [rng.randrange(64)]}
        requests.append(engine.submit(prompt, max_tokens=rng.randint(1, 25), **sampled))
        for _ in range(rng.randrange(3)):
            engine.step()
        if rng.random() < 0.2:
            engine.cancel(rng.choice(requests))
    engine.run()
    check_empty(engine)
    assert {request.finish_reason for request in requests} >= {"length", "cancelled"}
    assert sum(request.num_preemptions for request in requests) > 0
    again = [engine.submit(prompt, **job) for prompt, job in jobs()]
    engine.run()
    assert [request.tokens for request in again] == alone()


def test_a_failed_step_ends_the_requests_of_all_groups(monkeypatch):
    engine = make(BOTH)
    requests = [engine.submit(prompt, **job) for prompt, job in jobs()]
    monkeypatch.setattr(engine, "_step", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert engine.failed and {request.finish_reason for request in requests} == {"error"}
    check_empty(engine)


def test_what_a_device_has():
    """Pages, requests and parameters are spread; sizes are those of a group and of a device."""
    engine = make("data=2,context=2,tensor=2", num_pages=None)
    assert [one.allocator.num_pages for one in engine.groups.schedulers] == [18, 18]
    latent = jax.tree.leaves(engine.caches)[0]
    assert latent.addressable_shards[0].data.shape[0] * 4 == latent.shape[0]
    assert engine.params["lm_head"].addressable_shards[0].data.shape == (CONFIG.hidden_size, 32)
    assert engine.bytes_per_token == make().bytes_per_token
    assert engine._padding(16).token_ids.shape == (32,) and engine._padding(16).page_table.shape == (6, 12)


BAD = [
    ({"mesh": "tensor=4"}, r"tensor=4 does not divide this model: .*num_attention_heads is 6.* Sizes of tensor that"),
    ({"mesh": "data=8"}, "n_routed_experts is 4; the experts lie over 8 devices"),
    ({"mesh": BOTH, "num_pages": 0}, "num_pages is 0"),
    ({"mesh": BOTH, "parallel": Parallel(data=4)}, "make the mesh with parallel.make_mesh"),
    ({"parallel": Parallel(data=2)}, "parallel is given without a mesh"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_refusals(options, message):
    if "mesh" in options:
        options = {**options, "parallel": options.get("parallel", parse_parallel(options["mesh"]))}
        options["mesh"] = make_mesh(parse_parallel(options["mesh"]))
    with pytest.raises(ValueError, match=message):
        Engine(params(), CONFIG, **{**SIZES, **options})


def test_refused_meshes():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match=r"mesh has the axes x; expected are some of data, context, tensor.*names="):
        Engine(params(), CONFIG, mesh=mesh)
    with pytest.raises(ValueError, match="mesh is"):
        Engine(params(), CONFIG, mesh="tensor=2")


def test_pages_smaller_than_a_window_are_refused_at_set_up():
    """Of DeepSeek-V4, whose published windows have up to 128 tokens."""
    assert choose_page_size(DEEPSEEK_V4_FLASH, 64) == 64 and choose_page_size(DEEPSEEK_V4_FLASH, None, 8) == 256
    for call in (choose_page_size, lambda *args: choose_sizes(args[0], page_size=args[1], context=args[2])):
        with pytest.raises(ValueError, match=r"page_size is 64 in a layer with compress_ratio 128.* whole windows"):
            call(DEEPSEEK_V4_FLASH, 64, 2)


def test_memory_is_that_of_all_devices_of_a_process(monkeypatch):
    """One device's caches of 10 000 pages would fit."""
    monkeypatch.setattr(memory, "host_memory", lambda: 24 << 20)
    with pytest.raises(ValueError, match="an engine of 10000 pages of 4 tokens.* on each of 8 devices needs at least"):
        make("context=8", num_pages=10**4, cache_dtype="float8_e4m3fnuz")
    make(num_pages=10**4, cache_dtype="float8_e4m3fnuz")


def test_only_the_slots_of_a_device_must_fit_int32(monkeypatch):
    """The caches of a mesh of many devices have more."""
    monkeypatch.setattr(cache, "MAX_SLOTS", 64)
    engine = make(BOTH, max_batch=1, num_pages=16)
    assert engine.caches[0][0].num_pages == 64
    with pytest.raises(ValueError, match="slots are int32"):
        make(BOTH, max_batch=1, num_pages=17)


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        ("deepseek_v32", ""),
        *(slow(family, mesh) for family in ("deepseek_v4", "glm_moe_dsa") for mesh in (BOTH, "tensor=2")),
    ],
)
def test_from_folder(fixtures, family, mesh):
    """Weights are read onto the mesh; tokens are those of one device."""
    folder, options = fixtures / f"{family}_tiny", {"max_context": 64, "max_batch": 2, "prefill_chunk": 16}
    options |= {"page_size": 8, "cache_dtype": "float32", "token_buckets": (16,), "progress": False}
    if not mesh:
        parallel = Parallel(data=2)
        engine = Engine.from_folder(folder, mesh=make_mesh(parallel), **options)
        lies = place(partition_params(engine.params, parallel), make_mesh(parallel))
        jax.tree.map(check_lies, engine.params, lies)
        return
    found = []
    for where in ({}, {"mesh": make_mesh(parse_parallel(mesh)), "num_pages": 9}):
        engine = Engine.from_folder(folder, **where, **options)
        rng = np.random.default_rng(1)
        prompts = [rng.integers(0, engine.config.vocab_size, length).tolist() for length in (40, 5, 21, 33, 12)]
        requests = [
            engine.submit(prompt, max_tokens=10, temperature=i % 2, ignore_eos=True) for i, prompt in enumerate(prompts)
        ]
        engine.run()
        check_empty(engine)
        found.append([request.tokens for request in requests])
    assert found[0] == found[1]


PROCESS = """
import sys
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import test_engine_on_mesh as t
engine = t.make(t.BOTH)
engine.warm_up()
requests = []
assert t.count_compilations(lambda: requests.extend(t.serve(engine))) == 0
print([request.tokens for request in requests])
"""


@pytest.mark.slow
def test_two_processes_have_the_same_schedule_and_tokens():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    here = pathlib.Path(__file__).parent
    # Hashes of strings differ between the processes.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), str(here.parents[1])])
    command = [sys.executable, "-c", PROCESS, address]
    started = [
        subprocess.Popen([*command, str(i)], env=environment, stdout=subprocess.PIPE, text=True) for i in range(2)
    ]
    try:
        lines = [process.communicate(timeout=300)[0].splitlines()[-1:] for process in started]
    finally:
        for process in started:
            process.kill()
    assert lines == [[str(alone())]] * 2
