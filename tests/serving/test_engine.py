"""The engine on a small random model: same tokens whatever else happens, nothing leaks, nothing recompiles."""

import dataclasses
import gc
import random
import time
import types

import jax
import numpy as np
import pytest
from support.compilations import count_compilations
from support.marks import slow

from sparse_mla_jax.config import DeepseekV32Config, RopeConfig
from sparse_mla_jax.models import deepseek_v32
from sparse_mla_jax.models.checkpoint import save_checkpoint
from sparse_mla_jax.serving import memory
from sparse_mla_jax.serving import step as step_module
from sparse_mla_jax.serving.engine import Engine, default_buckets
from sparse_mla_jax.serving.scoring import score

pytestmark = pytest.mark.xdist_group("engine")

CONFIG = DeepseekV32Config(
    vocab_size=64,
    hidden_size=24,
    intermediate_size=32,
    moe_intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=3,
    q_lora_rank=20,
    kv_lora_rank=16,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=7,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=2,
    first_k_dense_replace=1,
    index_n_heads=2,
    index_head_dim=12,
    index_topk=9,
    max_position_embeddings=96,
    rope=RopeConfig(),
)
# Every engine of this module has these sizes, so that programs are compiled once.
SIZES = {"page_size": 4, "max_batch": 4, "max_context": 48, "prefill_chunk": 16, "cache_dtype": "float32"}


@pytest.fixture(scope="module")
def params():
    return deepseek_v32.init_params(jax.random.key(0), CONFIG)


def make(params, **options):
    return Engine(params, CONFIG, **{**SIZES, "num_pages": 48, **options})


def prompts(count, seed=0, low=1, high=30):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, CONFIG.vocab_size, rng.integers(low, high)).tolist() for _ in range(count)]


def generate(params, jobs, **options):
    """Runs jobs (prompt, options of submit) together in a fresh engine; returns the finished requests."""
    engine = make(params, **options)
    requests = [engine.submit(prompt, **job) for prompt, job in jobs]
    engine.run()
    assert engine.scheduler.allocator.num_used == 0
    return requests


@pytest.fixture(scope="module")
def jobs():
    """Greedy and sampled requests of different lengths."""
    kinds = [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "top_p": 0.8, "seed": 2**32 - 1}]
    return [(prompt, {"max_tokens": 12, **kinds[i % 3]}) for i, prompt in enumerate(prompts(7))]


@pytest.fixture(scope="module")
def alone(params, jobs):
    """The tokens of each job when it is served alone."""
    return [generate(params, [job])[0].tokens for job in jobs]


def test_greedy_tokens_are_those_of_the_scorer(params):
    """An independent path: whole-sequence prefill logits of the model, then argmax."""
    prompt = prompts(1, seed=5, low=20)[0]
    request = generate(params, [(prompt, {"max_tokens": 10})])[0]
    assert len(request.tokens) == 10 and request.finish_reason == "length"
    whole = np.array([prompt + request.tokens])
    logits = score(params, CONFIG, whole, cache_dtype="float32", page_size=4)
    np.testing.assert_array_equal(logits[0, len(prompt) - 1 : -1].argmax(-1), request.tokens)


def test_tokens_are_the_same_alone_and_in_a_full_batch(params, jobs, alone):
    requests = generate(params, jobs)
    assert [request.tokens for request in requests] == alone
    assert [request.num_preemptions for request in requests] == [0] * len(jobs)


def test_tokens_are_the_same_with_preemption(params, jobs, alone):
    requests = generate(params, jobs, num_pages=13)
    assert sum(request.num_preemptions for request in requests) >= 2
    assert [request.tokens for request in requests] == alone


def test_tokens_do_not_depend_on_chunks_and_buckets(params, jobs, alone):
    requests = generate(params, jobs, prefill_chunk=5, token_buckets=(3, 7))
    assert [request.tokens for request in requests] == alone


def test_seeds_differ(params):
    prompt = prompts(1, seed=1)[0]
    jobs = [(prompt, {"max_tokens": 12, "temperature": 1.0, "seed": seed}) for seed in range(4)]
    assert len({tuple(request.tokens) for request in generate(params, jobs)}) == 4


def test_twenty_repeats_are_equal(params, jobs, alone):
    for _ in range(20):
        assert generate(params, jobs[:2])[1].tokens == alone[1]


@pytest.mark.parametrize("cache_dtype", ["float8_e4m3fnuz", slow("float8_e4m3fn"), slow("bfloat16")])
def test_other_caches_and_types_serve(params, cache_dtype):
    engine = make(params, cache_dtype=cache_dtype, dtype="bfloat16", token_buckets=(16,))
    request = engine.submit(prompts(1)[0], max_tokens=3)
    engine.run()
    assert len(request.tokens) == 3
    assert engine.params["lm_head"].dtype == jax.numpy.bfloat16
    assert engine.bytes_per_token < make(params).bytes_per_token


def test_a_warm_engine_traces_nothing(params, jobs):
    engine = make(params, page_size=3)
    assert count_compilations(engine.warm_up) > 0
    programs = step_module.jitted_step._cache_size()

    def serve():
        for seed in range(3):
            requests = [engine.submit(prompt, max_tokens=7) for prompt in prompts(6, seed=seed)]
            requests += [engine.submit(prompt, **options) for prompt, options in jobs]
            engine.step()
            engine.cancel(requests[3])
            engine.run()

    assert count_compilations(serve) == 0
    assert step_module.jitted_step._cache_size() == programs


def test_warm_up_changes_nothing(params, jobs, alone):
    engine = make(params)
    request = engine.submit(jobs[0][0], **jobs[0][1])
    for _ in range(4):
        engine.step()
    before = jax.tree.map(np.array, engine.caches)
    engine.warm_up()
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, engine.caches))
    engine.run()
    assert request.tokens == alone[0]


def test_padding_can_not_touch_a_request(params, jobs, alone, monkeypatch):
    """Garbage in every padded entry of a step, tokens as without."""
    engine = make(params)
    plain = engine._inputs
    rng = np.random.default_rng(0)

    def poisoned(batch):
        inputs = plain(batch)
        rows, count = len(batch), sum(row.num_tokens for row in batch)
        inputs.token_ids[count:] = rng.integers(-(2**31), 2**31 - 1, len(inputs.token_ids) - count)
        inputs.page_table[rows:] = rng.integers(0, 48, inputs.page_table[rows:].shape)
        inputs.temperature[rows:] = np.nan
        inputs.top_p[rows:] = -3
        inputs.query_lens[rows:] = rng.integers(-5, 1, len(inputs.query_lens) - rows)
        inputs.seq_lens[rows:] = rng.integers(-5, 1000, len(inputs.seq_lens) - rows)
        return inputs

    monkeypatch.setattr(engine, "_inputs", poisoned)
    requests = [engine.submit(prompt, **options) for prompt, options in jobs]
    engine.run()
    assert [request.tokens for request in requests] == alone


def test_caches_are_donated_and_never_fetched(params):
    engine = make(params)
    engine.submit(prompts(1)[0], max_tokens=4)
    for _ in range(3):
        old = jax.tree.leaves(engine.caches)
        engine.step()
        assert all(leaf.is_deleted() for leaf in old)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(engine.caches))
        assert all(leaf._npy_value is None for leaf in jax.tree.leaves((engine.params, engine.caches)))


def test_a_step_has_no_callbacks(params):
    engine = make(params)
    text = engine._step.func.lower(engine.params, engine.caches, engine._padding(16), **engine._step.keywords).as_text()
    assert "callback" not in text and "outfeed" not in text and "infeed" not in text


def test_stop_sequences(params):
    prompt = prompts(1, seed=7)[0]
    free = generate(params, [(prompt, {"max_tokens": 20, "temperature": 1.5, "seed": 8})])[0].tokens
    stop = [free[8:11], free[15]]
    jobs = [(prompt, {"max_tokens": 20, "temperature": 1.5, "seed": 8, "stop": stop})]
    ends = [i for i in range(20) if free[i] == free[15] or (i >= 10 and free[i - 2 : i + 1] == free[8:11])]
    request = generate(params, jobs)[0]
    end = ends[0]
    kept = free[:end] if free[end] == free[15] else free[: end - 2]
    assert (request.tokens, request.finish_reason) == (kept, "stop")


def test_end_of_sequence_ids(params):
    prompt = prompts(1, seed=7)[0]
    job = {"max_tokens": 20, "temperature": 1.5, "seed": 8}
    free = generate(params, [(prompt, job)])[0].tokens
    eos = [free[6], free[11]]
    end = next(i for i, token in enumerate(free) if token in eos)
    jobs = [(prompt, job), (prompt, {**job, "ignore_eos": True}), (prompt, {**job, "stop": [free[2]]})]
    ended, ignoring, stopped = generate(params, jobs, eos_token_ids=eos)
    assert (ended.tokens, ended.finish_reason) == (free[:end], "stop")
    assert (ignoring.tokens, ignoring.finish_reason) == (free, "length")
    assert stopped.tokens == free[: min(free.index(free[2]), end)]


def test_an_engine_from_a_folder_ends_at_its_ids(params, tmp_path):
    save_checkpoint(tmp_path, CONFIG, params, extra={"eos_token_id": 3})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert Engine.from_folder(tmp_path, **SIZES).eos_token_ids == (5, 6)
    assert Engine.from_folder(tmp_path, eos_token_ids=(), **SIZES).eos_token_ids == ()
    (tmp_path / "generation_config.json").unlink()
    engine = Engine.from_folder(tmp_path, dtype="bfloat16", **SIZES)
    assert engine.eos_token_ids == (3,) and engine.params["lm_head"].dtype == jax.numpy.bfloat16
    assert engine.submit([1]).stop == ((3,),)


def test_stop_bytes_and_text(params):
    prompt = prompts(1, seed=7)[0]
    free = generate(params, [(prompt, {"max_tokens": 12, "temperature": 1.5, "seed": 8})])[0].tokens
    for stop in (bytes(free[4:7]), bytes(free[4:7]).decode(), [bytes(free[4:7])], [free[4:7]], (np.array(free[4:7]),)):
        request = generate(params, [(prompt, {"max_tokens": 12, "temperature": 1.5, "seed": 8, "stop": stop})])[0]
        assert (request.tokens, request.finish_reason) == (free[:4], "stop")


def test_stream_yields_what_the_request_gets(params, jobs, alone):
    engine = make(params)
    first, second = (engine.submit(prompt, **options) for prompt, options in jobs[:2])
    assert list(engine.stream(first)) == first.tokens == alone[0]
    assert list(engine.stream(second)) == alone[1]
    other = make(params).submit([1])
    with pytest.raises(ValueError, match="not this engine's"):
        list(engine.stream(other))


def test_events_are_the_tokens(params, jobs):
    engine = make(params)
    assert engine.step() == []
    requests = [engine.submit(prompt, **options) for prompt, options in jobs]
    given = {id(request): [] for request in requests}
    while engine.has_work():
        for request, token in engine.step():
            given[id(request)].append(token)
    assert [given[id(request)] for request in requests] == [request.tokens for request in requests]


def test_context_cuts_a_request(params):
    request = generate(params, [(list(range(40)), {"max_tokens": 100})])[0]
    assert len(request.tokens) == 8 and request.finish_reason == "length"
    request = generate(params, [([5] * 6, {"max_tokens": 100})], num_pages=2, token_buckets=(16,))[0]
    assert len(request.tokens) == 2 and request.finish_reason == "length"


def test_a_prompt_that_can_never_fit_is_refused_and_others_go_on(params, jobs, alone):
    engine = make(params)
    request = engine.submit(jobs[0][0], **jobs[0][1])
    with pytest.raises(ValueError, match="prompt has 48 tokens; at most 47 fit.*max_context is 48"):
        engine.submit([1] * 48)
    engine.run()
    assert request.tokens == alone[0]


def test_bytes_and_text_are_their_own_ids(params):
    engine = make(params)
    assert engine.submit(b"\x01\x02").prompt == engine.submit("\x01\x02").prompt == (1, 2)
    assert engine.submit(np.array([1, 2], np.uint8)).prompt == (1, 2)


BAD_REQUESTS = [
    ({"prompt": b""}, "prompt is empty"),
    ({"prompt": []}, "prompt is empty"),
    ({"prompt": [1, 64]}, r"token id 64; the model's vocabulary is 0..63"),
    ({"prompt": [-1]}, "token id -1"),
    ({"prompt": [1.5]}, "prompt is float64"),
    ({"prompt": [[1], [2]]}, "prompt is int64"),
    ({"prompt": "é"}, "token id 195"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": 1.5}, "max_tokens is 1.5"),
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": "hot"}, "temperature is 'hot'"),
    ({"top_p": 0}, "top_p is 0"),
    ({"top_p": 1.1}, "top_p is 1.1"),
    ({"top_p": None}, "top_p is None"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 2**32}, "seed is 4294967296"),
    ({"ignore_eos": 1}, "ignore_eos is 1; True or False"),
    ({"stop": [b"a", b""]}, "stop holds token id 97"),
    ({"stop": [b""]}, "empty sequence"),
    ({"stop": ""}, "empty sequence"),
]


@pytest.mark.parametrize(("options", "message"), BAD_REQUESTS, ids=[str(options) for options, _ in BAD_REQUESTS])
def test_bad_requests(shared, options, message):
    prompt = options.get("prompt", [1])
    rest = {name: value for name, value in options.items() if name != "prompt"}
    with pytest.raises(ValueError, match=message):
        shared.submit(prompt, **rest)
    assert not shared.has_work()


@pytest.fixture(scope="module")
def shared(params):
    return make(params)


BAD_ENGINES = [
    ({"page_size": 0}, "page_size is 0"),
    ({"page_size": 2.5}, "page_size is 2.5"),
    ({"num_pages": 0}, "num_pages is 0"),
    ({"max_batch": 0}, "max_batch is 0"),
    ({"max_context": 1}, "max_context is 1"),
    ({"max_context": 97}, "positions end at 96"),
    ({"prefill_chunk": 0}, "prefill_chunk is 0"),
    ({"token_buckets": (4, 8)}, "must hold a whole step of 16 tokens"),
    ({"token_buckets": ()}, "must hold a whole step"),
    ({"cache_dtype": "int8"}, "cache_dtype is int8; expected float32, bfloat16, float8_e4m3fnuz or float8_e4m3fn"),
    ({"cache_dtype": "nonsense"}, "cache_dtype is 'nonsense'; expected float32, bfloat16"),
    ({"dtype": "float16"}, "dtype is float16; expected float32 or bfloat16"),
    ({"implementation": "cuda"}, "implementation is 'cuda'"),
    ({"eos_token_ids": 64}, "eos_token_ids holds token id 64"),
    ({"token_buckets": 16}, "token_buckets is 16; a sequence of integers"),
    ({"max_batch": 10**9, "num_pages": None}, "num_pages is 12000000000 and page_size 4; slots are int32"),
]
TOO_LARGE = [
    ({"max_batch": 10**9}, "Lower max_batch, max_context, num_pages or prefill_chunk."),
    ({"num_pages": 10**8}, "an engine of 100000000 pages of 4 tokens, 4 requests and steps of 16 tokens"),
    ({"prefill_chunk": 10**12}, "steps of 1000000000000 tokens needs at least .* GiB; this machine has 4 GiB free"),
    ({"prefill_chunk": 10**400}, "this machine has 4 GiB free"),
]


@pytest.mark.parametrize(("options", "message"), BAD_ENGINES, ids=[str(options) for options, _ in BAD_ENGINES])
def test_bad_engines(params, options, message):
    with pytest.raises(ValueError, match=message):
        make(params, **options)


@pytest.mark.parametrize(("options", "message"), TOO_LARGE, ids=[str(options)[:25] for options, _ in TOO_LARGE])
def test_what_does_not_fit_is_refused_before_memory_is_taken(params, monkeypatch, options, message):
    monkeypatch.setattr(memory, "host_memory", lambda: 4 << 30)
    with pytest.raises(ValueError, match=message):
        make(params, **options)


def test_scores_that_do_not_fit(params, monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: 1 << 20)
    with pytest.raises(
        ValueError, match="the scores of 200 sequences of 90 tokens over 64 ids needs at least .* chunk"
    ):
        score(params, CONFIG, np.zeros((200, 90), int))


def test_how_much_memory_there_is(monkeypatch, tmp_path):
    assert 1 << 28 < memory.host_memory() < 1 << 50
    (tmp_path / "memory.max").write_text("123456\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(memory, "_LIMITS", (str(tmp_path / "none"), str(tmp_path / "memory.max")))
    assert memory.host_memory() == 123456
    gpu = types.SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 100, "bytes_in_use": 30})
    assert memory.device_memory(gpu) == 70
    assert memory.device_memory(types.SimpleNamespace(platform="gpu", memory_stats=lambda: None)) is None


def test_params_of_another_config(params):
    with pytest.raises(ValueError, match=r"params layers.*expert.*has shape|params .* has shape"):
        Engine(params, dataclasses.replace(CONFIG, moe_intermediate_size=10))
    with pytest.raises(ValueError, match="missing .*layers.2"):
        Engine(params, dataclasses.replace(CONFIG, num_hidden_layers=3))
    with pytest.raises(ValueError, match="params do not fit"):
        Engine({}, CONFIG)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_failed_step_leaves_a_clear_state(params, jobs, error, monkeypatch):
    engine = make(params)
    requests = [engine.submit(prompt, **options) for prompt, options in jobs]
    for _ in range(6):
        engine.step()
    kept = [list(request.tokens) for request in requests]
    finished = [request.finish_reason for request in requests]

    def broken(*arguments):
        raise error("the device caught fire")

    monkeypatch.setattr(engine, "_step", broken)
    with pytest.raises(error, match="caught fire"):
        engine.step()
    assert engine.failed and not engine.has_work()
    assert engine.scheduler.allocator.num_used == 0
    for request, tokens, reason in zip(requests, kept, finished, strict=True):
        assert request.tokens == tokens
        assert request.finish_reason == (reason or "error")
        assert reason or "caught fire" in request.error
    for refused in (engine.step, engine.warm_up, lambda: engine.submit([1])):
        with pytest.raises(RuntimeError, match=rf"failed in an earlier step \({error.__name__}.*make a new Engine"):
            refused()
    assert engine.cancel(requests[-1]) is False
    engine.run()


def test_no_page_leaks_with_cancellations_and_preemption(params):
    rng = random.Random(0)
    engine = make(params, num_pages=13)
    requests = []
    for prompt in prompts(40, seed=9):
        requests.append(engine.submit(prompt, max_tokens=rng.randint(1, 15), stop=[rng.randrange(64)]))
        for _ in range(rng.randrange(4)):
            engine.step()
        if rng.random() < 0.3:
            engine.cancel(rng.choice(requests))
    engine.run()
    assert engine.scheduler.allocator.num_used == 0
    assert {request.finish_reason for request in requests} >= {"length", "cancelled"}
    assert sum(request.num_preemptions for request in requests) > 0


@pytest.mark.parametrize(
    ("batch", "budget", "expected"),
    [(1, 1, (1,)), (8, 512, (8, 32, 128, 512)), (8, 8, (8,)), (3, 16, (3, 6, 16)), (5, 300, (5, 20, 80, 300))],
)
def test_default_buckets(batch, budget, expected):
    sizes = default_buckets(batch, budget)
    assert sizes[0] == batch and sizes[-1] == budget
    assert sizes == expected


def test_host_work_of_a_step_is_small(params, monkeypatch):
    """Everything of a decode step of 8 requests but the device's call: well under a millisecond."""
    engine = make(params, max_batch=8, num_pages=200)
    for _ in range(8):
        engine.submit([1, 2, 3], max_tokens=40)
    monkeypatch.setattr(engine, "_execute", lambda inputs: np.ones(8, np.int32))
    engine.step()
    engine.step()
    gc.collect()
    times = []
    for _ in range(30):
        start = time.perf_counter()
        assert len(engine.step()) == 8
        times.append(time.perf_counter() - start)
    assert np.median(times) < 1e-3
