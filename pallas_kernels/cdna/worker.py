"""Compiles in worker processes, one per architecture and compiler.

Separate processes are needed for three reasons: Triton 3.6.0 leaks state from one architecture to the next, the ROCm
plugin can be loaded only once, and a crash of the compiler must not end the caller. Messages are pickles over pipes
that nobody else has: this process unpickles only what its own child sent. The length precedes each pickle.

A worker has a temporary folder of its own (TMPDIR), for XLA and Triton write their intermediate files there. The folder
goes with the worker, also if it is killed at work.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from typing import IO, Any

from pallas_kernels.cdna import toolchain

# Seconds after which a compilation is ended; a whole step at published sizes takes a minute.
REQUEST_SECONDS = 3600
_LENGTH = struct.Struct("<Q")
_workers: dict[tuple[str, str], _Worker] = {}
_lock = threading.Lock()


def _send(stream: IO[bytes], value: Any) -> None:
    data = pickle.dumps(value)
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    """Reads the next message; raises EOFError when the other process has ended."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError
    (size,) = _LENGTH.unpack(head)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)


class _Worker:
    """A worker process, seen from its parent."""

    def __init__(self, arch: str, compiler: str):
        self.lock = threading.Lock()
        self.settings = toolchain.environment(compiler)
        self.late = False
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self.folder = tempfile.TemporaryDirectory(prefix="cdna-worker-")
        root = pathlib.Path(__file__).parents[2]
        code = f"import sys; sys.path.insert(0, {str(root)!r}); from pallas_kernels.cdna.worker import serve; serve()"
        # -P: a file in the current folder does not replace a module.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code, self.folder.name, arch, compiler],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=toolchain.child_environment(self.folder.name),
        )

    def request(self, what: str, *arguments: Any) -> Any:
        with self.lock:
            if self.errors.closed:
                raise RuntimeError("the compiler's process died during another request")
            before = os.fstat(self.errors.fileno()).st_size
            limit = threading.Timer(REQUEST_SECONDS, self._end_late)
            limit.daemon = True
            limit.start()
            try:
                _send(self.process.stdin, (what, arguments))  # type: ignore[arg-type]
                good, value = _receive(self.process.stdout)  # type: ignore[arg-type]
            except (EOFError, BrokenPipeError):
                self.process.kill()
                why = f"exit code {self.process.wait()}{self._last_lines(before)}"
                why = f"it had not answered after {REQUEST_SECONDS} s" if self.late else why
                self.close()
                raise RuntimeError(f"the compiler's process died: {why}") from None
            except BaseException:
                # Interrupted: the next request must not read the answer to this one.
                self.close()
                raise
            finally:
                limit.cancel()
            if not good:
                # Compilers print the reason of a refusal to stderr, so the message quotes it.
                raise RuntimeError(f"{value}{self._last_lines(before)}")
        return value

    def _end_late(self) -> None:
        self.late = True
        self.process.kill()

    def _last_lines(self, since: int) -> str:
        """The last five lines printed since byte `since`; pread leaves the process's file position unchanged."""
        handle = self.errors.fileno()
        text = os.pread(handle, os.fstat(handle).st_size - since, since).decode(errors="replace")
        # The folder is gone when somebody reads its name.
        text = text.replace(f"{self.folder.name}/", "")
        return "".join(f" / {line}" for line in text.strip().splitlines()[-5:])

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]
        self.process.kill()
        self.process.wait()
        self.errors.close()
        # Where a file of it cannot be deleted, the system's own cleaning has to do it.
        with contextlib.suppress(OSError):
            self.folder.cleanup()


def request(arch: str, compiler: str, what: str, *arguments: Any) -> Any:
    """Sends the request `what` to the worker of an architecture and compiler; starts the worker if necessary.

    A compiler reads its settings from the environment when it starts, so a worker that started under other settings is
    replaced.

    Raises:
      RuntimeError: the compiler refused, or its process died or took longer than REQUEST_SECONDS. The next request
        starts a new process.
    """
    with _lock:
        worker = _workers.get((arch, compiler))
        if worker is None or worker.process.poll() is not None or worker.settings != toolchain.environment(compiler):
            if worker is not None:
                with worker.lock:
                    worker.close()
            worker = _workers[arch, compiler] = _Worker(arch, compiler)
    return worker.request(what, *arguments)


@atexit.register
def close_all() -> None:
    """Ends all workers."""
    with _lock:
        for worker in _workers.values():
            worker.close()
        _workers.clear()


# --- the worker's side
def _compile_ir(arch: str, *arguments: Any) -> Any:
    from pallas_kernels.cdna import triton_wheel

    text, num_warps, num_stages = arguments
    return triton_wheel.compile_ir(text, arch, num_warps, num_stages)


def _compile_module(arch: str, *arguments: Any) -> Any:
    from pallas_kernels.cdna import xla_rocm

    text, cache = arguments
    return xla_rocm.compile_module(text, arch, cache)


_HANDLERS = {"ir": _compile_ir, "module": _compile_module}


def serve() -> None:
    """Answers requests until the parent closes the pipe; output that a compiler prints goes to stderr."""
    folder, arch = sys.argv[1:3]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            what, arguments = _receive(sys.stdin.buffer)
        except EOFError:
            # The parent deletes the folder, unless it was killed.
            shutil.rmtree(folder, ignore_errors=True)
            return
        try:
            answer = True, _HANDLERS[what](arch, *arguments)
        except Exception as error:
            answer = False, f"{type(error).__name__}: {error}"
        _send(answers, answer)
