"""Options and rules of commands that run on several devices, and in several processes.

Every process runs the same command with the same options and keeps its own devices busy; JAX's distributed runtime
joins them. Process 0 reads the inputs, which the others get from it, and it alone prints and writes. What one process
refuses, all refuse: whatever may fail in one of them is done by `agree`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

# `_check` is imported where it is used: it needs jax, and --help is to be quick.
if TYPE_CHECKING:
    from sparse_mla_jax.config import Config
    from sparse_mla_jax.parallel.axes import Parallel


# What `add_mesh_options` adds.
MESH_OPTIONS = ("mesh", "distributed", "coordinator", "processes", "process")
# Environment variables of a process's place, besides those of Slurm, Open MPI and Kubernetes, which JAX itself reads.
_VARIABLES = {"processes": "JAX_NUM_PROCESSES", "process": "JAX_PROCESS_ID"}
# What may differ between processes: their places, and what names files, which each machine may have elsewhere.
_OWN = {"coordinator", "process", "model_dir", "target", "tokens", "prompt", "prompt_file", "output", "json"}
# How long processes wait for each other at the start: what jax itself has by default.
_JOIN_SECONDS = 300
# Texts are exchanged in arrays of multiples of this many bytes, so that few programs are compiled.
_BLOCK = 4096


def add_mesh_options(parser: argparse.ArgumentParser) -> None:
    """Adds --mesh, --distributed and what belongs to them."""
    group = parser.add_argument_group("several devices")
    group.add_argument(
        "--mesh",
        metavar="SIZES",
        help="devices along data, context and tensor, as in data=2,tensor=4 (an axis that is left out has one)",
    )
    group.add_argument(
        "--distributed",
        action="store_true",
        # As of the other options: so that a command can tell that it was left out.
        default=None,
        help="one of several processes; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say which, or"
        " Slurm, Open MPI or Kubernetes",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, in place of the environment's")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="number of this one, from 0 on")


def join_processes(arguments: argparse.Namespace) -> None:
    """Joins the other processes if --distributed is given; call it before anything asks for a device.

    Raises:
      ValueError: options without --distributed, a place that nothing says, a port that is taken, wrong sizes of a mesh,
        or options that differ between processes.
      RuntimeError: the runtime can not start, or finds no device.

    If the other processes do not come within 5 minutes, this one ends with one line and exit code 1.
    """
    from sparse_mla_jax._check import require

    given = [name for name in ("coordinator", "processes", "process") if getattr(arguments, name) is not None]
    if not arguments.distributed:
        options = " and ".join(f"--{name}" for name in given)
        require(not given, f"{options} can not be used without --distributed; pass that too, or leave it out.")
        return
    require(
        arguments.mesh is not None,
        "--distributed is given without --mesh; say how the devices of all processes are used, as in --mesh tensor=8.",
    )
    from sparse_mla_jax.parallel.axes import parse_parallel

    # Before the others are waited for.
    parse_parallel(arguments.mesh)
    place = {name: _place(arguments, name) for name in _VARIABLES}
    count, number = place["processes"], place["process"]
    require(
        count is None or number is None or 0 <= number < count,
        f"this is process {number} of {count}; numbers from 0 to one less than there are processes are expected.",
    )
    _check_address(arguments, number)
    import jax

    from sparse_mla_jax.tools.info import check_backend

    # It would catch SIGTERM, which then would end no process.
    jax.config.update("jax_enable_preemption_service", False)
    # jax's own time-out aborts the process with a stack trace.
    waiting = threading.Timer(_JOIN_SECONDS, _give_up)
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(arguments.coordinator, count, number, initialization_timeout=2 * _JOIN_SECONDS)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"--distributed: {error} Set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or pass"
            " --coordinator, --processes and --process."
        ) from None
    finally:
        waiting.cancel()
    check_backend()
    _keep_stdout()
    _check_alike(arguments)


def _give_up() -> None:
    """Ends a process that has waited long enough; the main thread is in the runtime, which can not be interrupted."""
    message = (
        f"error: the processes have not found each other within {_JOIN_SECONDS} s; start all of them, and see that"
    )
    print(message, "they reach the port of process 0, the coordinator.", file=sys.stderr, flush=True)
    os._exit(1)


def _check_address(arguments: argparse.Namespace, number: int | None) -> None:
    """Raises ValueError for an address without a port, or in process 0 for a port that is taken.

    Of these jax makes an IndexError and a crash.
    """
    from sparse_mla_jax._check import require

    given, variable = arguments.coordinator, "JAX_COORDINATOR_ADDRESS"
    name, address = ("--coordinator", given) if given is not None else (variable, os.environ.get(variable))
    if address is None:
        return
    port = address.rpartition(":")[2]
    require(
        re.fullmatch(r".+:\d{1,5}", address) is not None and 0 < int(port) < 2**16,
        f"{name} is {address!r}; the address of process 0 and a free port there are expected, as in 10.0.0.1:1234.",
    )
    if number == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise ValueError(
                f"{name} is {address!r}, whose port can not be used ({os.strerror(error.errno or 0)})."
            ) from None


def _keep_stdout() -> None:
    """Leaves stdout to us: what libraries in C++ print there goes elsewhere.

    Gloo, of CPUs, says there who is connected, which goes nowhere. NCCL and RCCL say there what NCCL_DEBUG asks for,
    which goes to stderr.
    """
    import jax

    try:
        if sys.stdout.fileno() != 1:
            return
    except (OSError, ValueError):
        return
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)
    if jax.default_backend() == "cpu":
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
    else:
        os.dup2(2, 1)
    sys.stdout = own


def _check_alike(arguments: argparse.Namespace) -> None:
    """Raises ValueError in every process if processes differ in their options or numbers of devices."""
    import jax

    from sparse_mla_jax._check import require

    # The same in every process. The exchange itself needs as many devices in each.
    counts = Counter(device.process_index for device in jax.devices())
    require(
        len(set(counts.values())) == 1,
        f"the processes have {', '.join(str(counts[i]) for i in sorted(counts))} devices; each must have as many.",
    )
    options = {name: value for name, value in vars(arguments).items() if name not in _OWN}
    # As texts: NaN is not equal to itself.
    _check_same("option", {name: json.dumps(value) for name, value in options.items()})


def _check_same(what: str, values: dict[str, str]) -> None:
    """Raises ValueError in every process if a value is not the same in all of them."""
    from sparse_mla_jax._check import require

    everywhere = _exchange(lambda: values)
    for number, other in enumerate(everywhere):
        for name, value in everywhere[0].items():
            require(
                other.get(name) == value,
                f"{what} {name} is {value[:80]} in process 0 and {other.get(name, 'absent')[:80]} in process {number};"
                " run the same command on the same model in all of them.",
            )


def _place(arguments: argparse.Namespace, name: str) -> int | None:
    """An option, or the number in its environment variable."""
    from sparse_mla_jax._check import require

    given, variable = getattr(arguments, name), _VARIABLES[name]
    text = os.environ.get(variable)
    if given is not None or text is None:
        return given
    require(text.isdecimal(), f"{variable} is {text!r}; a number is expected.")
    return int(text)


def is_first() -> bool:
    """Whether this process reads, prints and writes: process 0, or the only one."""
    import jax

    return jax.process_index() == 0


def leave(code: int) -> NoReturn:
    """Ends one of several processes after a failure.

    The usual exit waits for the others, which may be gone; they notice that this one is. None of them survives process
    0, so that it gives them time to say themselves what failed in all.
    """
    try:
        first = is_first()
    except (RuntimeError, AssertionError):
        # jax finds no device.
        first = True
    if first:
        time.sleep(1)
    os._exit(code)


def chosen_mesh(arguments: argparse.Namespace) -> tuple[Any, Parallel] | tuple[None, None]:
    """The mesh of --mesh and its axes; (None, None) without it.

    Raises:
      ValueError: sizes that are not as described, too many devices, or devices of a process that would have no work.
    """
    from sparse_mla_jax._check import require

    if arguments.mesh is None:
        return None, None
    import jax

    from sparse_mla_jax.parallel.axes import make_mesh, parse_parallel

    parallel = parse_parallel(arguments.mesh)
    count = jax.device_count()
    require(
        jax.process_count() == 1 or parallel.num_devices == count,
        f"--mesh {arguments.mesh} has {parallel.num_devices} devices; the {jax.process_count()} processes have {count}"
        " together, all of which must have a part. Choose sizes whose product is that.",
    )
    return make_mesh(parallel), parallel


def read_config(folder: str) -> Config:
    """The config of a model folder, which all processes have.

    Raises:
      ValueError: as `load_config`; or the config is another one in some process. Every process says the same.
    """
    import dataclasses

    from sparse_mla_jax.config import load_config

    config = agree(lambda: load_config(folder))
    if _is_joined():
        fields = {field.name: repr(getattr(config, field.name)) for field in dataclasses.fields(config)}
        _check_same("the config's", fields)
    return config


def read_first(read: Callable[[], Any]) -> Any:
    """What `read` returns in process 0, in every process; something that JSON can express.

    Raises:
      ValueError: `read` raised a ValueError or an OSError in process 0; every process says the same.
    """
    if not _is_joined():
        return read()
    return _exchange(lambda: read() if is_first() else None)[0]


def agree[T](work: Callable[[], T]) -> T:
    """What `work` returns in this process, when it has ended well in all of them. It must not wait for the others.

    Raises:
      ValueError: `work` raised a ValueError or an OSError in some process; every process says the same.
    """
    if not _is_joined():
        return work()
    made: list[T] = []
    _exchange(lambda: made.append(work()))
    return made[0]


def _is_joined() -> bool:
    import jax

    return jax.distributed.is_initialized()


def _exchange(work: Callable[[], Any]) -> list[Any]:
    """What `work` returns in each process, in every process; something that JSON can express.

    Raises:
      ValueError: `work` raised a ValueError or an OSError in some process; every process says the same.
    """
    import numpy as np
    from jax.experimental.multihost_utils import process_allgather

    try:
        outcome = {"value": work()}
    except (ValueError, OSError) as error:
        outcome = {"error": str(error)}
    text = json.dumps(outcome).encode()
    sizes = process_allgather(np.array([len(text)], np.int32)).ravel()
    padded = np.zeros(-(-int(sizes.max()) // _BLOCK) * _BLOCK, np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = process_allgather(padded).reshape(len(sizes), -1)
    outcomes = [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]
    for number, one in enumerate(outcomes):
        if "error" in one:
            raise ValueError(f"process {number}: {one['error']}" if number else one["error"])
    return [one["value"] for one in outcomes]
