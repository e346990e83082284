"""The engine on a small DeepSeek-V4: rings and compressor states follow their requests, whatever else happens."""

import jax
import numpy as np
import pytest

from sparse_mla_jax.config import DeepseekV4Config
from sparse_mla_jax.models import deepseek_v4
from sparse_mla_jax.serving import step as step_module
from sparse_mla_jax.serving.engine import Engine
from sparse_mla_jax.serving.scoring import score

pytestmark = pytest.mark.xdist_group("v4 engine")

CONFIG = DeepseekV4Config(
    vocab_size=64,
    hidden_size=24,
    moe_intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    head_dim=16,
    qk_rope_head_dim=4,
    q_lora_rank=20,
    o_groups=2,
    o_lora_rank=9,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_hash_layers=1,
    sliding_window=6,
    index_n_heads=2,
    index_head_dim=8,
    index_topk=3,
    hc_mult=2,
    hc_sinkhorn_iters=4,
    compress_ratios=(4, 8),
    max_position_embeddings=96,
)
# Every engine of this module has these sizes, so that programs are compiled once.
SIZES = {"page_size": 4, "max_batch": 3, "max_context": 48, "prefill_chunk": 16, "cache_dtype": "float32"}
# As many pages as one request may need: several preempt each other.
SIZES |= {"token_buckets": (3, 16), "num_pages": 13}


@pytest.fixture(scope="module")
def params():
    return deepseek_v4.init_params(jax.random.key(0), CONFIG)


@pytest.fixture(scope="module")
def jobs():
    rng = np.random.default_rng(0)
    kinds = [{}, {"temperature": 1.0, "seed": 3}]
    prompts = [rng.integers(0, CONFIG.vocab_size, length).tolist() for length in (29, 3, 17, 8, 25)]
    return [(prompt, {"max_tokens": 12, **kinds[i % 2]}) for i, prompt in enumerate(prompts)]


def generate(params, jobs, **options):
    engine = Engine(params, CONFIG, **{**SIZES, **options})
    requests = [engine.submit(prompt, **job) for prompt, job in jobs]
    engine.run()
    assert engine.scheduler.allocator.num_used == 0
    assert sorted(engine.scheduler._free_states) == list(range(SIZES["max_batch"]))
    return requests


@pytest.fixture(scope="module")
def alone(params, jobs):
    """The tokens of each job when it is served alone."""
    return [generate(params, [job])[0].tokens for job in jobs]


def test_greedy_tokens_are_those_of_the_scorer(params, jobs, alone):
    prompt = jobs[0][0]
    logits = score(params, CONFIG, np.array([prompt + alone[0]]), cache_dtype="float32", page_size=4)
    np.testing.assert_array_equal(logits[0, len(prompt) - 1 : -1].argmax(-1), alone[0])


@pytest.mark.slow
def test_tokens_are_the_same_alone_and_in_a_full_batch(params, jobs, alone):
    requests = generate(params, jobs, num_pages=36)
    assert not any(request.num_preemptions for request in requests)
    assert [request.tokens for request in requests] == alone


def test_tokens_are_the_same_with_preemption(params, jobs, alone):
    requests = generate(params, jobs)
    assert sum(request.num_preemptions for request in requests) >= 1
    assert [request.tokens for request in requests] == alone


def test_running_requests_never_share_a_state(params, jobs):
    engine = Engine(params, CONFIG, **SIZES)
    for prompt, job in jobs:
        engine.submit(prompt, **job)
    engine.cancel(engine.scheduler.waiting[1])
    while engine.has_work():
        engine.step()
        states = [request._state for request in engine.scheduler.running]
        assert len(set(states)) == len(states) and min(states, default=0) >= 0
        free = engine.scheduler._free_states
        assert not set(states) & set(free) and len(states) + len(free) == SIZES["max_batch"]


def test_a_warm_engine_traces_nothing(params, jobs):
    engine = Engine(params, CONFIG, **SIZES)
    engine.warm_up()
    before = step_module.jitted_step._cache_size()
    for prompt, job in jobs[:3]:
        engine.submit(prompt, **job)
    engine.run()
    assert step_module.jitted_step._cache_size() == before


def test_default_pages_fit_every_ratio(params):
    engine = Engine(params, CONFIG, max_batch=1, max_context=40, prefill_chunk=8)
    assert engine.scheduler.page_size == 256
    # Entries of 4 and of 8 tokens: 12 + 4 values, a scale; an index key of 8 and its scale.
    assert engine.bytes_per_token == (12 + 1 + 8 + 8 + 4) / 4 + (12 + 1 + 8) / 8
    assert engine.bytes_per_request > 0
