"""How much memory there is, and the refusal of what can not fit."""

from __future__ import annotations

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax

from sparse_mla_jax._check import require

# What limits a container: control groups of version 2, and of version 1.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_memory() -> int | None:
    """Bytes of host memory that a process can still get, or None if this system does not say."""
    found = []
    try:
        text = pathlib.Path("/proc/meminfo").read_text()
        found += [1024 * int(kib) for kib in re.findall(r"^MemAvailable:\s*(\d+) kB$", text, re.MULTILINE)]
    except OSError:
        pass
    if not found and "SC_PHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in _LIMITS:
        try:
            text = pathlib.Path(path).read_text().strip()
        except OSError:
            continue
        # A group of version 2 without a limit says "max".
        found += [int(text)] if text.isdigit() else []
    return min(found, default=None)


def device_memory(device: Any) -> int | None:
    """Bytes that a device can still hold, or None if it does not say; for a CPU that is the host's memory."""
    if device.platform == "cpu":
        return host_memory()
    statistics = device.memory_stats() or {}
    limit = statistics.get("bytes_limit")
    return None if limit is None else limit - statistics.get("bytes_in_use", 0)


def check_memory(
    what: str, *, device_bytes: int, host_bytes: int, hint: str, devices: Sequence[Any] | None = None
) -> None:
    """Checks that each device can hold `device_bytes`, and the host `host_bytes` besides.

    Args:
      what: what needs the memory, for the message.
      device_bytes: bytes on each device; a CPU holds them in the host's memory.
      host_bytes: bytes on the host.
      hint: the remedy, a sentence that ends the message.
      devices: alike, those of this process; None means its first one.

    Raises:
      ValueError: there is less memory.
    """
    devices = jax.local_devices()[:1] if devices is None else devices
    device = devices[0]
    needs = [(device_bytes, device_memory(device), device.device_kind), (host_bytes, host_memory(), "the host")]
    if device.platform == "cpu":
        needs = [(len(devices) * device_bytes + host_bytes, host_memory(), "this machine")]
    for needed, there, where in needs:
        require(
            there is None or needed <= there,
            f"{what} needs at least {_gib(needed)}; {where} has {_gib(there or 0)} free. {hint}",
        )


def _gib(size: int) -> str:
    # Integers: sizes of hundreds of digits are no floats.
    return f"{size / 2**30:.3g} GiB" if size < 2**100 else "2**70 GiB"
