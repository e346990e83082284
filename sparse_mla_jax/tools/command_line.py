"""Parses the command line, runs one command, and turns what it raises into one line and an exit code.

The modules of a command are imported only when it is used, so that --help is quick.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

from sparse_mla_jax import __version__
from sparse_mla_jax._interrupts import EXIT_CODE, MESSAGE


class _Parser(argparse.ArgumentParser):
    """Reports bad usage as one line, like every other error here."""

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with code 2."""
        self.exit(2, f"error: {' '.join(message.split())}; see {self.prog} --help\n")


# One line of help for each command.
COMMANDS = {
    "demo": "serve the small trained model on real text and compare caches",
    "score": "logits at every position of given token ids",
    "generate": "continue a prompt",
    "bench": "kernel times, or decode throughput of a model",
    "inspect": "kernels on gfx942 and gfx950 without one: registers, instruction counts, error",
    "info": "backend, FP8 flavour, implementations, versions",
}
DESCRIPTIONS = {
    "score": "Writes float32 logits [B, L, vocabulary] of integer ids [B, L], through prefill and decode steps.",
    "generate": "Streams the continuation of a prompt. The bytes of the prompt are its token ids; a vocabulary of at"
    " most 256 prints text, a larger one prints ids.",
    "bench": "With an area, or without anything: times every kernel on named shapes and checks it."
    " With MODEL_DIR: prefills random prompts, then times decode steps of the whole batch; no sequence exceeds"
    " CONTEXT.",
    "inspect": "Compiles the kernels for MI300X and MI355X and executes them in an interpreter: no timing.",
}


def _add_arguments(command: str, parser: argparse.ArgumentParser) -> None:
    """Adds the options of one command."""
    if command == "bench":
        from sparse_mla_jax.tools.bench.options import add_arguments
    elif command == "demo":
        from sparse_mla_jax.tools.demo import add_arguments
    elif command == "generate":
        from sparse_mla_jax.tools.generate import add_arguments
    elif command == "info":
        from sparse_mla_jax.tools.info import add_arguments
    elif command == "inspect":
        from sparse_mla_jax.tools.inspect.options import add_arguments
    else:
        from sparse_mla_jax.tools.score import add_arguments
    add_arguments(parser)


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser. Only the command named in `arguments` gets its options, since some commands import heavy modules."""
    parser = _Parser(
        prog="python -m sparse_mla_jax", description="DeepSeek Sparse Attention over paged FP8 caches, in JAX."
    )
    parser.add_argument("--version", action="version", version=f"sparse-mla-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=DESCRIPTIONS.get(name))
        if name == wanted:
            _add_arguments(name, command)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    """Runs the chosen command; returns its exit code."""
    if arguments.command == "demo":
        from sparse_mla_jax.tools.demo import run
    elif arguments.command == "generate":
        from sparse_mla_jax.tools.generate import run
    elif arguments.command == "info":
        from sparse_mla_jax.tools.info import run
    elif arguments.command == "score":
        from sparse_mla_jax.tools.score import run
    elif arguments.command == "bench":
        return _bench(arguments)
    elif arguments.step:
        from sparse_mla_jax.tools.inspect.steps import run
    else:
        from sparse_mla_jax.tools.inspect.kernels import run
    return run(arguments) or 0


def _bench(arguments: argparse.Namespace) -> int:
    """The command `bench`: the target is an area of kernels or the folder of a model."""
    from sparse_mla_jax._check import require
    from sparse_mla_jax.tools.bench import model, options, run
    from sparse_mla_jax.tools.info import describe_device

    target = arguments.target
    kernels = target is None or target in run.AREAS
    options.check_form(arguments, kernels)
    if kernels:
        return run.run(arguments, target, describe_device())
    require(
        os.path.isdir(target),
        f"model folder {target!r} does not exist, and it is no area either; give a folder with config.json, or one of"
        f" {', '.join(run.AREAS)}.",
    )
    given = {name: getattr(arguments, name) for name in model.MODEL_BENCH}
    merged = model.MODEL_BENCH | {name: value for name, value in given.items() if value is not None}
    return model.run(argparse.Namespace(**{**vars(arguments), **merged, "model_dir": target}))


def _fail(message: object, code: int) -> int:
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    return code


def run_command(argv: Sequence[str]) -> int:
    """Runs one command; returns its exit code. Bad usage, --help and --version raise SystemExit, as of argparse."""
    try:
        code = _run(build_parser(argv).parse_args(argv))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(MESSAGE.decode(), end="", file=sys.stderr)
        return EXIT_CODE
    except BrokenPipeError:
        # The reader of our output is gone: avoid a second error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        return _fail(error, 2)
    except MemoryError:
        return _fail("out of memory; ask for fewer or shorter sequences (smaller batch, context or chunk).", 1)
    except RuntimeError as error:
        # JaxRuntimeError is a RuntimeError: no accelerator, out of device memory, a failed kernel, a lost process.
        if _is_one_of_several():
            return _fail(f"a step failed in one of several processes, or one of them has ended: {error}", 1)
        return _fail(
            f"the device or its runtime failed: {error}. Run `info`, or ask for a smaller batch or context.", 1
        )


def _is_one_of_several() -> bool:
    """Whether JAX's distributed runtime joins this process with others."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def run_program(argv: Sequence[str]) -> NoReturn:
    """Runs one command as the whole program: ends the process with its exit code."""
    _prepare_streams()
    warnings.formatwarning = _format_warning
    code = run_command(argv)
    if code and _is_one_of_several():
        from sparse_mla_jax.tools.processes import leave

        leave(code)
    # What a usual exit does with time to spare for Ctrl-C: it takes apart the interpreter, which then knows no signals.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _format_warning(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning as one line, without the place in our code that Python adds."""
    return f"warning: {' '.join(str(message).split())}\n"


def _prepare_streams() -> None:
    """Has lines written at once and in any encoding; a stream that was closed goes nowhere."""
    sys.stdout, sys.stderr = _text_stream(sys.stdout, 1), _text_stream(sys.stderr, 2)


def _text_stream(stream: Any, number: int) -> TextIO:
    """A standard stream that is open, writes every line at once, and never fails for its encoding."""
    if stream is None:
        # `leave_on_interrupt` has opened the file.
        stream = open(number, "w", closefd=False)  # noqa: SIM115
    stream.reconfigure(errors="backslashreplace", line_buffering=True)
    return stream
