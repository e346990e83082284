"""Files that commands write: checked before work begins, and replaced as a whole when it is done."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import stat
from collections.abc import Iterator

from sparse_mla_jax._check import require
from sparse_mla_jax._interrupts import begin_file, end_file

PLOT_EXTRA = "pip install 'sparse-mla-jax[plot]'"


def _temporary(target: str) -> str:
    """A name for the unfinished file, in the folder of the finished one and with its suffix, which names a format."""
    suffix = os.path.splitext(target)[1]
    return os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.part{suffix[:16]}")


def _is_special(path: str) -> bool:
    """Whether `path` is neither a file nor a folder: a device or a pipe, which nothing may replace."""
    try:
        kind = os.stat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(kind) or stat.S_ISDIR(kind))


def check_output(name: str, path: str) -> None:
    """Checks an output path before any work is done, by making a file beside it; `name` is the option's name.

    Raises:
      ValueError: the path is empty or a folder, its folder does not exist, or no file can be made there.
    """
    require(path != "", f"{name} is empty; give the name of a file.")
    blocked = os.path.exists(path) and not os.access(path, os.W_OK)
    require(not blocked, f"{name} {path!r} is not writable; choose another place.")
    if _is_special(path):
        return
    target = os.path.realpath(path)
    folder = os.path.dirname(target)
    require(not os.path.isdir(target), f"{name} {path!r} is a folder; give the name of a file.")
    require(not path.endswith(os.sep), f"{name} {path!r} ends like a folder; give the name of a file.")
    require(os.path.exists(folder), f"{name} {path!r}: folder {folder!r} does not exist; make it first.")
    require(os.path.isdir(folder), f"{name} {path!r}: {folder!r} is a file, not a folder; choose another place.")
    try:
        # The name itself may be too long; only asking for it shows that.
        with contextlib.suppress(FileNotFoundError):
            os.lstat(target)
        temporary = _temporary(target)
        begin_file(temporary)
        end_file(temporary, None)
    except OSError as error:
        raise ValueError(f"{name} {path!r} can not be written ({error.strerror}); choose another place.") from None


def check_picture(name: str, path: str) -> None:
    """Checks the path of a picture, and that it can be drawn, before any work is done.

    Raises:
      ValueError: as of `check_output`; matplotlib is missing, or does not know the file type.
    """
    check_output(name, path)
    require(has_matplotlib(), f"{name} needs matplotlib, which is not installed: {PLOT_EXTRA}.")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = sorted(FigureCanvasBase.filetypes)
    ending = os.path.splitext(path)[1].removeprefix(".").lower()
    require(ending in kinds, f"{name} {path!r} is no picture; give a name that ends in one of {', '.join(kinds)}.")


def has_matplotlib() -> bool:
    """Whether pictures can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[str]:
    """Gives the name of a new, empty file to write, which replaces `path` when the block ends without an exception.

    Until then `path` keeps its old contents. The new file is removed if the block raises, and on Ctrl-C. A device or a
    pipe is written directly.

    Raises:
      OSError: the file can not be made or renamed.
    """
    if _is_special(path):
        yield path
        return
    target = os.path.realpath(path)
    temporary = _temporary(target)
    begin_file(temporary)
    try:
        yield temporary
    except BaseException as error:
        end_file(temporary, None)
        if isinstance(error, OSError) and error.filename is None:
            # A full disk does not say which file it is about.
            raise OSError(error.errno, error.strerror, path) from error
        raise
    if os.path.exists(target):
        os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
    end_file(temporary, target)
