"""The command line: `python -m sparse_mla_jax demo | score | generate | bench | inspect | info`.

Exit codes: 0 done; 2 input that can not be served, with one line on stderr that says what to do; 1 the device failed or
ran out of memory; 130 interrupted by Ctrl-C. Heavy imports are inside the handlers, so that --help is quick.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from sparse_mla_jax import __version__
from sparse_mla_jax._check import require
from sparse_mla_jax.config import load_config

if TYPE_CHECKING:
    import numpy as np

    from sparse_mla_jax.serving.engine import Engine

DTYPES = ("float32", "bfloat16")
CACHE_DTYPES = ("float32", "bfloat16", "float8_e4m3fnuz", "float8_e4m3fn")
IMPLEMENTATIONS = ("triton", "xla", "reference")
# Operators that have kernels; the others are plain XLA everywhere.
KERNEL_OPERATORS = (
    "top_k",
    "indexer_scores",
    "paged_indexer_scores",
    "lightning_indexer",
    "sparse_mla",
    "write",
    "write_index",
    "write_token",
    "norm_rope",
    "compress",
    "split_streams",
    "merge_streams",
    "rotated_projection",
)
XLA_OPERATORS = ("gather", "rotate", "biased_grouped_topk", "sqrt_softplus_topk", "hash_route", "merge")


class _Parser(argparse.ArgumentParser):
    """Reports bad usage as one line, like every other error here."""

    def error(self, message: str) -> NoReturn:
        """Prints one line and leaves with exit code 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _add_model_options(parser: argparse.ArgumentParser, *, cache_dtype: str) -> None:
    """The options that every command with a model has."""
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="Hugging Face folder: config.json and safetensors")
    parser.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES, default=cache_dtype, help="type of the caches (default %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="type of weights and activations (default %(default)s)"
    )
    parser.add_argument(
        "--page-size", type=int, metavar="N", help="tokens per cache page (default 64, of DeepSeek-V4 256)"
    )
    parser.add_argument(
        "--implementation", choices=IMPLEMENTATIONS, help="of every operator (default: the best that runs here)"
    )


# Options of `bench MODEL_DIR` alone, and what they are unless given.
MODEL_BENCH = {
    "batch": 8,
    "context": 2048,
    "steps": 32,
    "prefill_chunk": 512,
    "page_size": None,
    "cache_dtype": "float8_e4m3fnuz",
    "dtype": "float32",
}


def _add_bench_options(parser: argparse.ArgumentParser, *, heavy: bool) -> None:
    """Options of both forms; None unless given, so that each form can refuse the other's."""
    parser.add_argument(
        "target",
        nargs="?",
        metavar="AREA | MODEL_DIR",
        help="topk, indexer, decode, prefill, cache, projection, streams or step; or a Hugging Face folder"
        " (default: all areas)",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="",
        metavar="FILE",
        help="write JSON to FILE; without FILE one line of it is printed instead of a table (put it last then)",
    )
    parser.add_argument(
        "--implementation", choices=IMPLEMENTATIONS, help="of every operator (default: the best that runs here)"
    )
    model = parser.add_argument_group("a model (bench MODEL_DIR)")
    sizes = {
        "batch": "sequences",
        "context": "tokens at the end",
        "steps": "timed decode steps",
        "prefill_chunk": "tokens per step",
        "page_size": "tokens per cache page",
    }
    for name, what in sizes.items():
        option = f"--{name.replace('_', '-')}"
        default = MODEL_BENCH[name] or "the model's own"
        model.add_argument(option, type=int, metavar="N", help=f"{what} (default {default})")
    model.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES, help=f"type of the caches (default {MODEL_BENCH['cache_dtype']})"
    )
    model.add_argument(
        "--dtype", choices=DTYPES, help=f"type of weights and activations (default {MODEL_BENCH['dtype']})"
    )
    if heavy:
        from sparse_mla_jax import bench

        bench.add_arguments(parser)


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; `arguments` tells whose options are needed: the modules of some commands are heavy."""
    parser = _Parser(
        prog="python -m sparse_mla_jax", description="DeepSeek Sparse Attention over paged FP8 caches, in JAX."
    )
    parser.add_argument("--version", action="version", version=f"sparse-mla-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="serve the small trained model on real text and compare caches")
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    if wanted == "demo":
        from sparse_mla_jax import demo as demo_module

        demo_module.add_arguments(demo)
    demo.set_defaults(handler=_demo)

    score = commands.add_parser(
        "score",
        help="logits at every position of given token ids",
        description="Writes float32 logits [B, L, vocabulary] of integer ids [B, L], through prefill and decode steps.",
    )
    _add_model_options(score, cache_dtype="float32")
    score.add_argument("--tokens", required=True, metavar="FILE.npy", help="integer token ids [B, L]")
    score.add_argument("--output", required=True, metavar="FILE.npy", help="where the logits go")
    score.add_argument(
        "--prompt-length",
        type=int,
        metavar="P",
        help="tokens that go through prefill; the rest goes one by one through decode (default: all of them, L;"
        " 0 decodes from an empty cache)",
    )
    score.add_argument(
        "--chunk", type=int, metavar="C", help="tokens of a sequence per prefill step (default: the whole prompt)"
    )
    score.set_defaults(handler=_score)

    generate = commands.add_parser(
        "generate",
        help="continue a prompt",
        description="Streams the continuation of a prompt. The bytes of the prompt are its token ids; a vocabulary of"
        " at most 256 prints text, a larger one prints ids.",
    )
    _add_model_options(generate, cache_dtype="float8_e4m3fnuz")
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="a file of bytes, or of token ids if it ends in .npy; - is stdin"
    )
    generate.add_argument("--max-tokens", type=int, default=128, metavar="N", help="most tokens (default 128)")
    generate.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default 0)")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="X", help="nucleus, 0 < X <= 1 (default 1)")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default 0)")
    generate.add_argument(
        "--stop", action="append", default=[], metavar="STR", help="end before this text; may be repeated"
    )
    generate.set_defaults(handler=_generate)

    bench = commands.add_parser(
        "bench",
        help="kernel times, or decode throughput of a model",
        description="With an area, or without anything: times every kernel on named shapes and checks it."
        " With MODEL_DIR: prefills random prompts, then times decode steps of the whole batch; no sequence exceeds"
        " CONTEXT.",
    )
    _add_bench_options(bench, heavy=wanted == "bench")
    bench.set_defaults(handler=_bench)

    inspect = commands.add_parser(
        "inspect",
        help="kernels on gfx942 and gfx950 without one: registers, instruction counts, error",
        description="Compiles the kernels for MI300X and MI355X and executes them in an interpreter: no timing.",
    )
    if wanted == "inspect":
        from sparse_mla_jax import inspection

        inspection.add_arguments(inspect)
    inspect.set_defaults(handler=_inspect)

    info = commands.add_parser("info", help="backend, FP8 flavour, implementations, versions")
    info.add_argument("model_dir", metavar="MODEL_DIR", nargs="?", help="also describe this model")
    info.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    info.set_defaults(handler=_info)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    from sparse_mla_jax import demo

    return demo.run(arguments) or 0


def _inspect(arguments: argparse.Namespace) -> int:
    from sparse_mla_jax import inspection

    return inspection.run(arguments)


def _load_array(path: str, name: str) -> np.ndarray:
    """Reads one array of a .npy file."""
    import numpy as np

    require(os.path.isfile(path), f"{name} {path!r} is not a file; give a .npy file (numpy.save).")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{name} {path!r} is not a readable .npy file ({error}); write it with numpy.save.") from None
    require(isinstance(array, np.ndarray), f"{name} {path!r} holds several arrays; give a .npy file with one.")
    return array


def _score(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.model_dir)
    tokens = _load_array(arguments.tokens, "--tokens")
    import numpy as np

    from sparse_mla_jax import _options, scoring
    from sparse_mla_jax.models.checkpoint import load_checkpoint

    _options.check_writable("--output", arguments.output)
    # Everything that can be wrong with the ids is said before gigabytes are read.
    ids = scoring.check_arguments(
        config,
        tokens,
        prompt_length=arguments.prompt_length,
        chunk=arguments.chunk,
        page_size=arguments.page_size,
    )[0]
    _check_backend()
    config, params = load_checkpoint(arguments.model_dir, dtype=arguments.dtype)
    logits = scoring.score(
        params,
        config,
        ids,
        prompt_length=arguments.prompt_length,
        chunk=arguments.chunk,
        cache_dtype=arguments.cache_dtype,
        page_size=arguments.page_size,
        implementation=arguments.implementation,
        progress=True,
    )
    with open(arguments.output, "wb") as file:
        np.save(file, logits)
    print(f"wrote float32 logits {list(logits.shape)} to {arguments.output}")
    return 0


def _read_prompt(arguments: argparse.Namespace) -> bytes | np.ndarray:
    """The prompt: bytes, or an integer array from a .npy file."""
    if arguments.prompt is not None:
        return os.fsencode(arguments.prompt)
    if arguments.prompt_file == "-":
        return sys.stdin.buffer.read()
    if arguments.prompt_file.endswith(".npy"):
        return _load_array(arguments.prompt_file, "--prompt-file")
    require(os.path.isfile(arguments.prompt_file), f"--prompt-file {arguments.prompt_file!r} is not a file.")
    with open(arguments.prompt_file, "rb") as file:
        return file.read()


def _generate(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.model_dir)
    prompt = _read_prompt(arguments)
    require(len(prompt) > 0, "the prompt is empty; give at least one byte or token.")
    require(arguments.max_tokens >= 1, f"--max-tokens is {arguments.max_tokens}; at least 1 is expected.")
    limit = config.max_position_embeddings
    require(
        len(prompt) < limit,
        f"the prompt has {len(prompt)} tokens; the model's context is {limit}, one more must fit. Shorten the prompt.",
    )
    import codecs

    from sparse_mla_jax.models.checkpoint import load_checkpoint
    from sparse_mla_jax.serving.engine import Engine, check_request

    stop = [os.fsencode(text) for text in arguments.stop]
    options = {name: getattr(arguments, name) for name in ("max_tokens", "temperature", "top_p", "seed")}
    check_request(config, prompt, stop=stop, **options)
    _check_backend()
    config, params = load_checkpoint(arguments.model_dir, dtype=arguments.dtype)
    engine = Engine(
        params,
        config,
        cache_dtype=arguments.cache_dtype,
        page_size=arguments.page_size,
        max_batch=1,
        max_context=min(len(prompt) + arguments.max_tokens, limit),
        prefill_chunk=min(512, len(prompt)),
        implementation=arguments.implementation,
    )
    request = engine.submit(prompt, stop=stop, **options)
    text = config.vocab_size <= 256
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in engine.stream(request):
        print(decoder.decode(bytes([token])) if text else f"{token} ", end="", flush=True)
    print(decoder.decode(b"", final=True))
    return 0


def measure_decode(engine: Engine, *, context: int, steps: int, seed: int = 0) -> dict[str, Any]:
    """Times decode steps of a full batch on random prompts, prefilled by the engine itself.

    Args:
      engine: fresh; its max_context at least `context`.
      context: no sequence is longer; they are nearly that long while timed.
      steps: timed steps.
      seed: of the prompts.

    Returns:
      Tokens per second of decode and of prefill, milliseconds per step (mean and median).

    Raises:
      ValueError: `context` has no room for the steps.
    """
    import numpy as np

    batch, budget, warm = engine.scheduler.max_batch, engine.scheduler.token_budget, 2
    # Whoever is prefilled first decodes while the others prefill: that, too, must fit into the context.
    prompt_length = context - steps - warm - 2 * (-(-batch * context // budget)) - 1
    require(
        prompt_length >= 1,
        f"context is {context}; {steps} steps and the prefill of {batch} prompts, {budget} tokens a step, do not fit. "
        "Raise --context or lower --steps.",
    )
    pages = engine.scheduler.allocator.num_pages
    require(
        pages >= batch * -(-context // engine.scheduler.page_size),
        f"the engine has {pages} pages; {batch} sequences of {context} tokens need more.",
    )
    prompts = np.random.default_rng(seed).integers(0, engine.config.vocab_size, (batch, prompt_length))
    engine.warm_up(progress=True)
    requests = [engine.submit(prompt, max_tokens=context) for prompt in prompts]
    start = time.perf_counter()
    while engine.has_work() and not all(request.prefilled for request in requests):
        engine.step()
    prefill = time.perf_counter() - start
    for _ in range(warm):
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


def _bench(arguments: argparse.Namespace) -> int:
    from sparse_mla_jax import bench

    target = arguments.target
    kernels = target is None or target in bench.AREAS
    here, other = ("[AREA]", "MODEL_DIR") if kernels else ("MODEL_DIR", "[AREA]")
    for name in MODEL_BENCH if kernels else bench.OPTIONS:
        require(
            getattr(arguments, name) is None,
            f"--{name.replace('_', '-')} belongs to `bench {other}`, not to `bench {here}`; leave it out.",
        )
    if kernels:
        return bench.run(arguments, target, _device())
    require(
        os.path.isdir(target),
        f"model folder {target!r} does not exist, and it is no area either; give a folder with config.json, or one of"
        f" {', '.join(bench.AREAS)}.",
    )
    given = {name: getattr(arguments, name) for name in MODEL_BENCH}
    merged = MODEL_BENCH | {name: value for name, value in given.items() if value is not None}
    return _bench_model(argparse.Namespace(**{**vars(arguments), **merged, "model_dir": target}))


def _bench_model(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.model_dir)
    if arguments.json:
        from sparse_mla_jax import _options

        _options.check_writable("--json", arguments.json)
    for name in ("batch", "context", "steps", "prefill_chunk", "page_size"):
        value = getattr(arguments, name)
        require(value is None or value >= 1, f"--{name.replace('_', '-')} is {value}; at least 1 is expected.")
    require(
        arguments.context <= config.max_position_embeddings,
        f"--context is {arguments.context}; the model's context is {config.max_position_embeddings}.",
    )
    from sparse_mla_jax.models.checkpoint import load_checkpoint
    from sparse_mla_jax.serving.engine import Engine

    _check_backend()
    config, params = load_checkpoint(arguments.model_dir, dtype=arguments.dtype)
    engine = Engine(
        params,
        config,
        cache_dtype=arguments.cache_dtype,
        page_size=arguments.page_size,
        max_batch=arguments.batch,
        max_context=arguments.context,
        prefill_chunk=arguments.prefill_chunk,
        implementation=arguments.implementation,
    )
    device = _device()
    report = {
        "batch": arguments.batch,
        "context": arguments.context,
        "steps": arguments.steps,
        **{
            name: round(value, 3)
            for name, value in measure_decode(engine, context=arguments.context, steps=arguments.steps).items()
        },
        "cache_bytes_per_token": engine.bytes_per_token,
        "dtype": arguments.dtype,
        "cache_dtype": arguments.cache_dtype,
        "page_size": engine.scheduler.page_size,
        "implementation": arguments.implementation or _implementation(),
        "backend": device["backend"],
        "device": device["device"],
        "jax": device["jax"],
    }
    if arguments.json:
        with open(arguments.json, "w") as file:
            file.write(json.dumps(report) + "\n")
    _print_report(report, arguments.json == "")
    return 0


def _implementation() -> str:
    from sparse_mla_jax.ops import _dispatch

    return _dispatch.preferred()[0]


def _check_backend() -> None:
    """Says in words when jax finds no device; it answers a platform without a plugin with a bare assertion."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        wanted = jax.config.jax_platforms or "any platform"
        raise RuntimeError(f"jax finds no device of {wanted} ({error}); set JAX_PLATFORMS=cpu or unset it") from None


def _device() -> dict[str, Any]:
    """Backend, device and versions."""
    import platform

    import jax
    import jaxlib
    import numpy as np

    _check_backend()
    device = jax.devices()[0]
    architecture = getattr(device, "compute_capability", None)
    client = getattr(device, "client", None)
    return {
        "backend": jax.default_backend(),
        "platform_version": " ".join(str(getattr(client, "platform_version", "")).split()),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "architecture": str(architecture) if architecture else platform.machine(),
        "sparse_mla_jax": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def fp8_flavour(backend: str, device: str, architecture: str) -> str:
    """Which FP8 type the hardware computes with, from the names that JAX gives it."""
    if backend == "cpu":
        return "both, by bit arithmetic (float8_e4m3fnuz and float8_e4m3fn)"
    described = f"{device} {architecture}".lower()
    if "gfx942" in described or "mi300" in described or "mi325" in described:
        return "float8_e4m3fnuz"
    return "float8_e4m3fn"


def _info(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.model_dir) if arguments.model_dir is not None else None
    device = _device()
    report = {
        **device,
        "fp8": fp8_flavour(device["backend"], device["device"], device["architecture"]),
        **{f"implementation of {name}": _implementation() for name in KERNEL_OPERATORS},
        **dict.fromkeys((f"implementation of {name}" for name in XLA_OPERATORS), "xla"),
    }
    if config is not None:
        report |= _describe(config)
    _print_report(report, arguments.json)
    return 0


def _describe(config: Any) -> dict[str, Any]:
    """Sizes of a model and of its caches, from its config alone."""
    import math

    import jax
    import jax.numpy as jnp

    from sparse_mla_jax.models.family import family_of

    family = family_of(config)
    shapes = jax.tree.leaves(family.param_specs(config, jnp.float32))
    page_size = family.default_page_size(config)
    report: dict[str, Any] = {
        "layers": config.num_hidden_layers,
        "hidden size": config.hidden_size,
        "attention heads": config.num_attention_heads,
        "index_topk": config.index_topk,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "parameters": sum(math.prod(spec.shape) for spec in shapes),
    }
    for name in CACHE_DTYPES:
        caches = jax.eval_shape(
            lambda name=name: family.create_caches(config, 1, page_size, num_requests=1, max_query_len=1, dtype=name)
        )
        report[f"cache bytes per token, {name}"] = family.bytes_per_token(caches, page_size)
        if per_request := family.bytes_per_request(caches):
            report[f"cache bytes per request, {name}"] = per_request
    return report


def _print_report(report: dict[str, Any], as_json: bool) -> None:
    """One line of JSON, or an aligned table."""
    if as_json:
        print(json.dumps(report))
        return
    width = max(map(len, report))
    for name, value in report.items():
        print(f"{name:{width}}  {value}")


def _fail(message: object, code: int) -> int:
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (see the module)."""
    argv = sys.argv[1:] if argv is None else argv
    # The ROCm plugin of the extra `cdna` reports at length, as an error, that this machine has no AMD GPU.
    logging.getLogger("jax._src.xla_bridge").addFilter(lambda record: "plugin configuration" not in record.getMessage())
    try:
        arguments = build_parser(argv).parse_args(argv)
        code = arguments.handler(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; a second complaint at exit is of no use.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        return _fail(error, 2)
    except MemoryError:
        return _fail("out of memory; ask for fewer or shorter sequences (smaller batch, context or chunk).", 1)
    except RuntimeError as error:
        # JaxRuntimeError is one: no accelerator, out of device memory, a kernel that failed.
        return _fail(
            f"the device or its runtime failed: {error}. Run `info`, or ask for a smaller batch or context.", 1
        )


if __name__ == "__main__":
    sys.exit(main())
