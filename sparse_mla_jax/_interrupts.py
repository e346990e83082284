"""Ends the command line on Ctrl-C: one line on stderr and exit code 130, whatever the program is doing.

Python calls a signal's handler in the main thread, between two of its own instructions. While XLA compiles, that may be
minutes later, and an exception raised there may be lost in a callback. So a second thread waits for the signal too. The
first of the two ends the process at once: no exception is raised, nothing is unwound.

Library users keep Python's own KeyboardInterrupt: only the command line calls `leave_on_interrupt`. This file imports
nothing that the interpreter has not loaded at its start, so that little time passes before Ctrl-C is handled.
"""

from __future__ import annotations

import _thread
import os
import sys

EXIT_CODE = 130
MESSAGE = b"interrupted\n"

# Files that are being written; an interrupt removes them.
_unfinished: set[str] = set()
# Held while the process ends, and while a file is put into `_unfinished` and made.
_busy = _thread.allocate_lock()
_installed = False


def leave_if_program() -> None:
    """Calls `leave_on_interrupt` if this process was started as `python -m sparse_mla_jax`.

    The package is imported before its `__main__`. sys.argv[0] is "-m" until that is found.
    """
    if sys.argv[:1] == ["-m"] and ("-m", __package__) in zip(sys.orig_argv, sys.orig_argv[1:]):
        leave_on_interrupt()


def leave_on_interrupt() -> None:
    """From now on Ctrl-C ends this process, unless whoever started it has it ignored, as a shell's background jobs."""
    global _installed
    _take_standard_files()
    try:
        import signal
    except KeyboardInterrupt:
        _leave(wait=True)
    if _installed or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    _installed = True
    signal.signal(signal.SIGINT, lambda number, frame: _leave(wait=False))
    # The interpreter's own C handler writes the signal's number into this pipe, whatever the main thread does.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _thread.start_new_thread(_wait_for_signal, (reader, signal.SIGINT))


def _take_standard_files() -> None:
    """Opens /dev/null for every standard stream that is closed: no other file may get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Gets the lowest number that is free, so this one.
            os.open(os.devnull, os.O_RDWR)


def _wait_for_signal(reader: int, number: int) -> None:
    while number not in os.read(reader, 64):
        pass
    _leave(wait=True)


def _leave(wait: bool) -> None:
    """Ends the process. Without `wait` it returns if another thread is at it, or is about to make a file."""
    if not _busy.acquire(wait):
        return
    for path in tuple(_unfinished):
        _remove(path)
    _say(MESSAGE)
    os._exit(EXIT_CODE)


def _say(message: bytes) -> None:
    """Writes to stderr, on a line of its own on a terminal; not at all if that would block."""
    import select

    try:
        if select.select((), (2,), (), 0)[1]:
            os.write(2, b"\n" + message if os.isatty(2) else message)
    except (OSError, ValueError):
        pass


def _remove(path: str) -> None:
    try:  # noqa: SIM105 - contextlib would have to be imported
        os.unlink(path)
    except OSError:
        pass


def begin_file(path: str) -> None:
    """Makes the new, empty file `path`, which an interrupt removes until `end_file`.

    Raises:
      OSError: it exists already, or can not be made.
    """
    with _busy:
        _unfinished.add(path)
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except OSError:
            _unfinished.discard(path)
            raise


def end_file(path: str, target: str | None) -> None:
    """Renames a file of `begin_file` to `target`, or removes it if `target` is None.

    Raises:
      OSError: it can not be renamed; it is removed then.
    """
    try:
        if target is not None:
            os.replace(path, target)
    finally:
        _remove(path)
        _unfinished.discard(path)
