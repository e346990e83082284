"""Options and rules of commands that run on several devices, and in several processes.

Every process runs the same command with the same options and keeps its own devices busy; JAX's distributed runtime
joins them. Process 0 reads the inputs, which the others get from it, and it alone prints and writes.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sparse_mla_jax._check import require

if TYPE_CHECKING:
    from sparse_mla_jax.parallel.axes import Parallel

# What `add_mesh_options` adds.
MESH_OPTIONS = ("mesh", "distributed", "coordinator", "processes", "process")
# Environment variables of a process's place, besides those of Slurm, Open MPI and Kubernetes, which JAX itself reads.
_VARIABLES = {"processes": "JAX_NUM_PROCESSES", "process": "JAX_PROCESS_ID"}


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
      ValueError: options without --distributed, or a place that nothing says.
    """
    given = [name for name in ("coordinator", "processes", "process") if getattr(arguments, name) is not None]
    if not arguments.distributed:
        require(not given, f"--{' and --'.join(given)} belong to --distributed; pass that too, or leave them out.")
        return
    require(
        arguments.mesh is not None,
        "--distributed is given without --mesh; say how the devices of all processes are used, as in --mesh tensor=8.",
    )
    place = {name: _place(arguments, name) for name in _VARIABLES}
    import jax

    try:
        jax.distributed.initialize(arguments.coordinator, place["processes"], place["process"])
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"--distributed: {error} Set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or pass"
            " --coordinator, --processes and --process."
        ) from None


def _place(arguments: argparse.Namespace, name: str) -> int | None:
    """An option, or the number in its environment variable."""
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


def chosen_mesh(arguments: argparse.Namespace) -> tuple[Any, Parallel] | tuple[None, None]:
    """The mesh of --mesh and its axes; (None, None) without it.

    Raises:
      ValueError: sizes that are not as described, too many devices, or devices of a process that would have no work.
    """
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


def read_first(read: Callable[[], Any]) -> Any:
    """What `read` returns in process 0, in every process; something that JSON can express.

    Raises:
      ValueError: `read` raised a ValueError or an OSError in process 0; every process says the same.
    """
    import jax

    if jax.process_count() == 1:
        return read()
    import numpy as np
    from jax.experimental import multihost_utils

    outcome: dict[str, Any] = {}
    if is_first():
        try:
            outcome = {"value": read()}
        except (ValueError, OSError) as error:
            outcome = {"error": str(error)}
    text = np.frombuffer(json.dumps(outcome).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.zeros(size, np.uint8)
    padded[: len(text) if is_first() else 0] = text if is_first() else text[:0]
    outcome = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())
    if "error" in outcome:
        raise ValueError(outcome["error"])
    return outcome["value"]
