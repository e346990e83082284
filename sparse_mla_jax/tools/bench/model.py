"""`python -m sparse_mla_jax bench MODEL_DIR`: decode throughput of a model, through the engine."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from sparse_mla_jax._check import require
from sparse_mla_jax.tools.info import check_backend, describe_device, implementation, print_report
from sparse_mla_jax.tools.options import load_model
from sparse_mla_jax.tools.output import check_output, whole_file
from sparse_mla_jax.tools.processes import agree, chosen_mesh, is_first, join_processes, read_config

if TYPE_CHECKING:
    from sparse_mla_jax.serving.engine import Engine

# What `--json` without a file means, and with "-": one line on stdout.
STDOUT = "-"
# Options of `bench MODEL_DIR` only, with their defaults.
MODEL_BENCH = {
    "batch": 8,
    "context": 2048,
    "steps": 32,
    "prefill_chunk": 512,
    "page_size": None,
    "cache_dtype": "float8_e4m3fnuz",
    "dtype": "float32",
}


def writes_file(json_option: str | None) -> bool:
    """Whether `--json` names a file."""
    return json_option not in (None, STDOUT)


# Decode steps before the timed ones.
_WARM_STEPS = 2


def _prompt_length(batch: int, budget: int, context: int, steps: int) -> int:
    """Tokens of every prompt, so that `steps` timed steps end before `context`; `budget` is tokens per step.

    Raises:
      ValueError: `context` is too short for the steps.
    """
    # Leave room for the tokens that early requests decode while the others still prefill.
    length = context - steps - _WARM_STEPS - 2 * (-(-batch * context // budget)) - 1
    require(
        length >= 1,
        f"context is {context}; {steps} steps and the prefill of {batch} prompts, {budget} tokens a step, do not fit. "
        "Raise --context or lower --steps or --batch.",
    )
    return length


def measure_decode(engine: Engine, *, context: int, steps: int, seed: int = 0) -> dict[str, Any]:
    """Times decode steps of a full batch on random prompts, prefilled by the engine itself; of every group of a mesh.

    Args:
      engine: newly made; its max_context must be at least `context`.
      context: most tokens of a sequence; sequences are nearly that long while timed.
      steps: timed steps.
      seed: of the prompts.

    Returns:
      Tokens per second of decode and of prefill, milliseconds per step (mean and median).

    Raises:
      ValueError: `context` is too short for the steps.
    """
    import numpy as np

    own, allocator = engine.scheduler.max_batch, engine.scheduler.allocator
    prompt_length = _prompt_length(own, engine.scheduler.token_budget, context, steps)
    # Of a sequence's pages the first device has the most.
    needed = allocator.per_device(-(-context // engine.scheduler.page_size))[0]
    require(
        allocator.num_pages >= own * needed,
        f"the engine has {allocator.num_pages} pages; {own} sequences of {context} tokens need more.",
    )
    batch = own * len(engine.groups.schedulers)
    prompts = np.random.default_rng(seed).integers(0, engine.config.vocab_size, (batch, prompt_length))
    engine.warm_up(progress=is_first())
    requests = [engine.submit(prompt, max_tokens=context, ignore_eos=True) for prompt in prompts]
    start = time.perf_counter()
    while engine.has_work() and not all(request.prefilled for request in requests):
        engine.step()
    prefill = time.perf_counter() - start
    for _ in range(_WARM_STEPS):
        engine.step()
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        events = engine.step()
        times.append(time.perf_counter() - start)
        assert len(events) == batch
    for request in requests:
        engine.cancel(request)
    return {
        "decode_tokens_per_second": batch * steps / sum(times),
        "milliseconds_per_step": 1e3 * sum(times) / steps,
        "median_milliseconds_per_step": 1e3 * float(np.median(times)),
        "prefill_tokens_per_second": batch * prompt_length / prefill,
        "prompt_length": prompt_length,
    }


def run(arguments: argparse.Namespace) -> int:
    """The command `bench MODEL_DIR`."""
    from sparse_mla_jax.serving.sizes import check_sizes_fit, choose_sizes

    join_processes(arguments)
    config = read_config(arguments.model_dir)
    agree(lambda: check_output("--json", arguments.json) if is_first() and writes_file(arguments.json) else None)
    for name in ("batch", "context", "steps", "prefill_chunk", "page_size"):
        value = getattr(arguments, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')} is {value}; at least 1 is expected.")
    require(
        arguments.context <= config.max_position_embeddings,
        f"--context is {arguments.context}; the model's context is {config.max_position_embeddings}.",
    )
    # Before the weights are read and caches allocated.
    budget = max(arguments.prefill_chunk, arguments.batch)
    _prompt_length(arguments.batch, budget, arguments.context, arguments.steps)
    check_backend()
    mesh, parallel = chosen_mesh(arguments)
    sizes = choose_sizes(config, context=1 if parallel is None else parallel.context, **_sizes(arguments))
    check_sizes_fit(config, sizes, arguments.cache_dtype, mesh)
    report = _measure(arguments)
    if not is_first():
        return 0
    if writes_file(arguments.json):
        with whole_file(arguments.json) as unfinished, open(unfinished, "w", encoding="utf-8") as file:
            file.write(json.dumps(report) + "\n")
    print_report(report, arguments.json == STDOUT)
    return 0


def _sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that are sizes of an engine."""
    return {
        "page_size": arguments.page_size,
        "max_batch": arguments.batch,
        "max_context": arguments.context,
        "prefill_chunk": arguments.prefill_chunk,
    }


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of the report."""
    from sparse_mla_jax.serving.engine import Engine

    mesh, parallel = chosen_mesh(arguments)
    config, params = load_model(arguments.model_dir, arguments.dtype, mesh, parallel)
    engine = Engine(
        params,
        config,
        cache_dtype=arguments.cache_dtype,
        implementation=arguments.implementation,
        mesh=mesh,
        parallel=parallel,
        **_sizes(arguments),
    )
    measured = measure_decode(engine, context=arguments.context, steps=arguments.steps)
    device = describe_device()
    return {
        **({} if mesh is None else {"mesh": arguments.mesh}),
        "batch": arguments.batch,
        "context": arguments.context,
        "steps": arguments.steps,
        **{name: round(value, 3) for name, value in measured.items()},
        "cache_bytes_per_token": engine.bytes_per_token,
        "dtype": arguments.dtype,
        "cache_dtype": arguments.cache_dtype,
        "page_size": engine.scheduler.page_size,
        "implementation": arguments.implementation or implementation(),
        "backend": device["backend"],
        "device": device["device"],
        "jax": device["jax"],
    }
