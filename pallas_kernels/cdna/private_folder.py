"""Folders and files that only this user can have written.

What compiled code is read from must not be another user's: a planted library runs in this process, and a planted result
is a wrong one. A folder counts if this user owns it and nobody else has any right to it; a file counts if it is a
regular file of this user that nobody else may write to.
"""

from __future__ import annotations

import functools
import logging
import os
import pathlib
import stat

_LOG = logging.getLogger(__name__)
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def make_folder(path: pathlib.Path) -> None:
    """Makes a folder and its missing parents with mode 0700, whatever the umask.

    Raises:
      OSError: the folder cannot be made. An existing folder is no error and keeps its mode.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        return
    # The umask can take bits of the owner away too.
    os.chmod(path, 0o700)


@functools.cache
def _report(path: pathlib.Path, why: str) -> None:
    """Logs that a folder is not used, once a process."""
    _LOG.warning("Nothing is cached in %s: %s. Remove it, or run chmod 700 on it.", path, why)


def open_folder(path: pathlib.Path, *, tighten: bool = False) -> int | None:
    """Opens a folder that is private to this user.

    Args:
      path: the folder; a symbolic link is refused.
      tighten: whether to take the rights of others away from a folder that this user owns. Earlier versions made the
        default cache with such rights.

    Returns:
      A file descriptor, which the caller closes; None if the folder is absent or not private.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    found = os.fstat(handle)
    if found.st_uid == os.geteuid() and found.st_mode & _OTHERS and tighten:
        os.fchmod(handle, 0o700)
        found = os.fstat(handle)
    if found.st_uid == os.geteuid() and not found.st_mode & _OTHERS:
        return handle
    os.close(handle)
    mode = f"{stat.S_IMODE(found.st_mode):o}"
    _report(path, f"user {found.st_uid} owns it and its mode is {mode}; expected user {os.geteuid()} and mode 700")
    return None


def is_own_file(found: os.stat_result) -> bool:
    """Whether a file is a regular file of this user that nobody else may write to."""
    return stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & _OTHERS_WRITE
