"""Replaces the checkpoint of a folder in one step: whoever is killed leaves the old checkpoint or the new one.

    FOLDER/.saving-checkpoint-*   the new files while they are written, in no part of the checkpoint
    FOLDER/.saved-checkpoint      the same folder after one rename: its files are the checkpoint

The rename is the step. Afterwards the files move to FOLDER one by one, and the weights that they replace are removed.
`load_checkpoint` and `load_config` read each file where it is (`_folder.find_file`). The next save completes a move
that was interrupted, and removes what a killed save had begun to write.

Programs that do not know .saved-checkpoint never see old and new files together. A single file of weights with an
unchanged config.json is replaced in one step for them too. Otherwise they find no weights while the files move.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator

from safetensors import SafetensorError

from sparse_mla_jax._folder import CONFIG, INDEX, SAVED, SHARD, SINGLE

try:
    import fcntl
except ImportError:  # Windows: two saves at once are not kept apart, and folders can not be synchronised
    fcntl = None  # type: ignore[assignment]

_SAVING = ".saving-checkpoint-"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def replace_checkpoint(folder: str, num_bytes: int) -> Iterator[str]:
    """Yields an empty folder for config.json and the weights, which replace those of `folder` when the block ends.

    If the block raises, nothing of it is left, and the folder's checkpoint is as it was. The folder's other files stay.
    Several processes may replace one folder's checkpoint at a time: the last one to finish wins.

    Args:
      folder: made if it does not exist, parents included.
      num_bytes: size of the files to come.

    Raises:
      OSError: the files could not be written; the message names the folder, the size and the remedy.
    """
    staging, made, lock = os.path.join(folder, _SAVING + secrets.token_hex(4)), _missing_folders(folder), None
    try:
        os.makedirs(folder, exist_ok=True)
        lock = _create_staging(folder, staging)
        if shutil.disk_usage(folder).total and shutil.disk_usage(folder).free < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield staging
        _make_durable(staging)
        with _locked(folder):
            _complete(folder)
            os.replace(staging, os.path.join(folder, SAVED))
            staging = ""
            _complete(folder)
        for path in made:
            _synchronise(os.path.dirname(path))
    except BaseException as error:
        if staging:
            shutil.rmtree(staging, ignore_errors=True)
        for path in made:
            with contextlib.suppress(OSError):  # not empty: another save has written into it
                os.rmdir(path)
        if isinstance(error, OSError | SafetensorError):
            raise _explain(error, folder, num_bytes, committed=not staging) from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _missing_folders(folder: str) -> list[str]:
    """The folder and those of its parents that do not exist yet, the innermost first."""
    missing, path = [], os.path.abspath(folder)
    while not os.path.lexists(path):
        missing.append(path)
        path = os.path.dirname(path)
    return missing


# --- the new files


def _create_staging(folder: str, staging: str) -> int | None:
    """Makes the folder for the files. Returns the lock that tells other saves that its owner is alive."""
    with _locked(folder):
        _complete(folder)
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if name.startswith(_SAVING) and not _is_in_use(path):
                shutil.rmtree(path, ignore_errors=True)
        os.mkdir(staging)
        return _lock(staging, wait=False)


def _make_durable(staging: str) -> None:
    """Waits until the files are on the disk, readable for whoever may read config.json."""
    # safetensors makes files that only their owner may read.
    mode = os.stat(os.path.join(staging, CONFIG)).st_mode
    for name in os.listdir(staging):
        path = os.path.join(staging, name)
        with contextlib.suppress(OSError):  # a file system without permissions
            os.chmod(path, mode)
        _synchronise(path)
    _synchronise(staging)


def _synchronise(path: str) -> None:
    """Waits until a file, or the names in a folder, are on the disk, where the file system can tell."""
    if fcntl is None:
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


# --- the move


def _complete(folder: str) -> None:
    """Moves the files of a committed checkpoint to `folder` and removes the weights that they replace.

    It can be interrupted anywhere and repeated.
    """
    saved = os.path.join(folder, SAVED)
    if not os.path.isdir(saved):
        return
    _synchronise(folder)
    names = os.listdir(saved)
    weights = next((name for name in (SINGLE, INDEX) if name in names), None)
    # Without their index, old files are no checkpoint: nobody combines them with new ones.
    if weights == INDEX or (weights == SINGLE and not _is_unchanged(folder, CONFIG)):
        for name in (SINGLE, INDEX):
            _remove(os.path.join(folder, name))
    for name in sorted(names, key=lambda name: name == weights):
        os.replace(os.path.join(saved, name), os.path.join(folder, name))
    _remove_replaced(folder)
    os.rmdir(saved)
    _synchronise(folder)


def _is_unchanged(folder: str, name: str) -> bool:
    """Whether a file of a committed checkpoint is the folder's own, or has been moved already."""
    new, old = os.path.join(folder, SAVED, name), os.path.join(folder, name)
    if not os.path.exists(new):
        return True
    if not os.path.exists(old):
        return False
    with open(new, "rb") as a, open(old, "rb") as b:
        return a.read() == b.read()


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


def _remove_replaced(folder: str) -> None:
    """Removes the files of weights that do not belong to the folder's model.safetensors or index."""
    kept = {SINGLE}
    if not os.path.exists(os.path.join(folder, SINGLE)):
        with open(os.path.join(folder, INDEX), encoding="utf-8") as f:
            kept = {INDEX, *json.load(f)["weight_map"].values()}
    for name in os.listdir(folder):
        if name not in kept and (name in (SINGLE, INDEX) or SHARD.fullmatch(name)):
            _remove(os.path.join(folder, name))


# --- locks


def _lock(path: str, wait: bool) -> int | None:
    """Locks a folder for this process and thread: a descriptor that holds the lock until it is closed.

    A file system without locks behaves as if nobody else had one.

    Raises:
      BlockingIOError: somebody else holds the lock, and `wait` is false.
    """
    if fcntl is None:
        return None
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass
    return descriptor


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Keeps other saves from changing the folder's names. Held for renames only, never while weights are written."""
    descriptor = _lock(folder, wait=True)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _is_in_use(staging: str) -> bool:
    """Whether the save that made this folder is still running."""
    try:
        descriptor = _lock(staging, wait=False)
    except BlockingIOError:
        return True
    if descriptor is not None:
        os.close(descriptor)
    return False


# --- errors


def _explain(error: Exception, folder: str, num_bytes: int, committed: bool) -> OSError:
    """The error of a save as an OSError that names the folder, the bytes it takes, and the remedy."""
    number = error.errno if isinstance(error, OSError) else _error_number(str(error))
    reason = os.strerror(number) if number else str(error)
    if committed:
        return OSError(
            number or errno.EIO,
            f"the checkpoint is saved in {os.path.join(folder, SAVED)!r}, but its files could not be moved to"
            f" {folder!r} ({reason}). load_checkpoint reads it there. Mend the folder and save again, or move the files"
            " by hand.",
        )
    size = f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e3:.3g} kB"
    if number in _FULL:
        need = f"The save takes {num_bytes} bytes ({size}) beside the checkpoint that is there"
        with contextlib.suppress(OSError):
            need += f"; {shutil.disk_usage(_existing(folder)).free} are free"
        remedy = f"{need}. Free space, or save into a folder on another disk."
    elif number in _FORBIDDEN:
        remedy = f"Give a folder that this process may write to; the save takes {num_bytes} bytes ({size})."
    else:
        remedy = f"Give another folder, with room for {num_bytes} bytes ({size})."
    return OSError(
        number or errno.EIO,
        f"can not save into {folder!r}: {reason}. Nothing there has changed. {remedy}",
    )


def _error_number(text: str) -> int | None:
    """The number of the system's error in a message of safetensors, which raises no OSError."""
    found = re.search(r"os error (\d+)", text)
    return int(found.group(1)) if found else None


def _existing(folder: str) -> str:
    """The innermost folder of a path that exists."""
    path = os.path.abspath(folder)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path
