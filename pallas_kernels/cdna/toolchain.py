"""Finds the compilers and tools that this package needs, and names the command that installs a missing one."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import pwd
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

import jax

# The release of jax that the extra `cdna` installs compilers for, and the version of its Triton.
JAX = "0.12.0"
TRITON_VERSION = "3.6.0"
LLVM = "22"
TRITON = "triton"
# The plugin's name contains ROCm's major version. The first installed plugin is used.
PLUGINS = ("jax-rocm7-pjrt", "jax-rocm10-pjrt")
# Seconds after which a program is ended; llvm-objdump takes less than one for the largest kernel.
PROGRAM_SECONDS = 300
# How the names of the environment variables begin that change what a compiler makes.
_BOTH = ("TRITON_", "AMDGCN_", "LLVM_", "MLIR_", "DISABLE_LLVM_OPT", "USE_IR_LOC")
_SETTINGS = {
    "xla": (*_BOTH, "XLA_FLAGS", "TF_XLA_", "TF_ROCM_", "TF_USE_ROCM", "TF_DETERMINISTIC_", "ROCM_", "HIP_DEVICE_LIB_"),
    "triton": _BOTH,
}


class ToolMissing(RuntimeError):
    """A compiler, the plugin or a disassembler is not installed; the message says what to install."""


def release(version: str) -> str:
    """The first three numbers of a version: plugins of 0.12.0 also support jax 0.12.0.1."""
    return ".".join(version.split(".")[:3])


def extra() -> str:
    """The command that installs the compilers for the installed version of jax."""
    mine = release(jax.__version__)
    if mine == JAX:
        return "pip install 'sparse-mla-jax[cdna]'"
    return f"pip install {TRITON}=={TRITON_VERSION} {PLUGINS[0]}=={mine} cramjam"


def default_cache() -> pathlib.Path | None:
    """Folder of compiled kernels and stub libraries: in XDG_CACHE_HOME, else in the home's `.cache`.

    As the XDG Base Directory Specification says, a path that is not absolute is ignored. None if this user has no home
    either; nothing is cached then.
    """
    places = [(os.environ.get("XDG_CACHE_HOME", ""), "."), (os.environ.get("HOME", ""), ".cache")]
    with contextlib.suppress(KeyError):
        places.append((pwd.getpwuid(os.getuid()).pw_dir, ".cache"))
    for root, inside in places:
        if pathlib.Path(root).is_absolute():
            return pathlib.Path(root) / inside / "sparse_mla_jax"
    return None


def run_program(command: Sequence[str], text: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a program to its end, with `text` as its input.

    Returns:
      What it printed, and its exit code, which the caller checks.

    Raises:
      RuntimeError: it ran for PROGRAM_SECONDS, and was ended.
    """
    how: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "check": False}
    how |= {"stdin": subprocess.DEVNULL} if text is None else {"input": text}
    try:
        return subprocess.run(command, timeout=PROGRAM_SECONDS, **how)
    except subprocess.TimeoutExpired:
        name = pathlib.PurePath(command[0]).name
        raise RuntimeError(f"{name} did not end within {PROGRAM_SECONDS} s") from None


@functools.cache
def find_llvm(tool: str) -> str:
    """Path of an LLVM 22 tool: `llvm-objdump`, `llvm-readelf` or `llvm-mca`.

    Raises:
      ToolMissing: it is not installed. Older versions of LLVM do not support gfx950.
    """
    for name in (f"{tool}-{LLVM}", f"/usr/lib/llvm-{LLVM}/bin/{tool}", tool):
        path = shutil.which(name)
        if path and (name != tool or _major(path) >= int(LLVM)):
            return path
    raise ToolMissing(f"{tool}-{LLVM} is not installed: apt-get install llvm-{LLVM}")


@functools.cache
def _llvm_version(path: str) -> str:
    """Version of an LLVM tool, such as "22.1.8"; "0" if it does not print one."""
    found = re.search(r"version (\d[\w.]*)", run_program([path, "--version"]).stdout)
    return found[1] if found else "0"


def _major(path: str) -> int:
    return int(_llvm_version(path).split(".")[0])


def find_program(name: str, package: str) -> str:
    """Path of a program.

    Raises:
      ToolMissing: it is not installed.
    """
    path = shutil.which(name)
    if not path:
        raise ToolMissing(f"{name} is not installed: apt-get install {package}")
    return path


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def plugin() -> str:
    """Name of the installed distribution that holds XLA:ROCm.

    Raises:
      ToolMissing: none is installed.
    """
    for name in PLUGINS:
        if version_of(name) is not None:
            return name
    raise ToolMissing(f"{PLUGINS[0]} is not installed: {extra()}")


def plugin_library() -> pathlib.Path:
    """The shared library of JAX's ROCm plugin, found without importing it.

    Raises:
      ToolMissing: no plugin is installed, or its release differs from that of jax.
    """
    name, mine = plugin(), release(jax.__version__)
    version = version_of(name)
    if version is None or release(version) != mine:
        raise ToolMissing(f"{name} {version} does not match jax {jax.__version__}: pip install {name}=={mine}")
    files = importlib.metadata.files(name) or []
    found = [pathlib.Path(str(f.locate())) for f in files if f.name == "xla_rocm_plugin.so"]
    if not found or not found[0].exists():
        raise ToolMissing(f"{name} holds no xla_rocm_plugin.so: pip install --force-reinstall {name}=={version}")
    return found[0]


def compiler_name(compiler: str) -> str:
    """Name and version for reports: "Triton 3.6.0", "XLA:ROCm 0.12.0", "XLA:ROCm 0.12.0 (rocm10)"."""
    if compiler == "triton":
        return f"Triton {version_of(TRITON)}"
    name = plugin()
    return f"XLA:ROCm {version_of(name)}" + ("" if name == PLUGINS[0] else f" ({name.split('-')[1]})")


def environment(compiler: str) -> dict[str, str]:
    """The environment variables that change what a compiler makes, and their values."""
    found = {k: v for k, v in os.environ.items() if k.startswith(_SETTINGS[compiler])}
    flags = found.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-"):
        # XLA takes such a value as the name of a file that holds the flags.
        with contextlib.suppress(OSError, ValueError):
            found["contents of XLA_FLAGS"] = pathlib.Path(flags).read_text(errors="replace")
    return found


def child_environment(temporary: str) -> dict[str, str]:
    """The environment of a process whose temporary files go into a folder of its own."""
    return {**os.environ, "TMPDIR": temporary}


def settings(compiler: str) -> dict[str, str]:
    """Everything outside of a program that changes its code: versions, and variables of the environment.

    Compilations of equal texts under equal settings give equal code.
    """
    return {
        "compiler": compiler_name(compiler),
        "jax": f"{jax.__version__}, jaxlib {version_of('jaxlib')}",
        "llvm": f"{LLVM}, found {_llvm_version(find_llvm('llvm-objdump'))}",
        **environment(compiler),
    }


def require(compiler: str) -> None:
    """Checks that everything that `compiler` ("xla" or "triton") needs is installed.

    Raises:
      ToolMissing: something is missing; the message names the first such tool.
    """
    find_llvm("llvm-objdump")
    find_llvm("llvm-readelf")
    if compiler == "triton":
        if version_of(TRITON) is None:
            raise ToolMissing(f"triton is not installed: {extra()}")
        return
    plugin_library()
    find_program("gcc", "gcc")
    for name in ("nm", "readelf"):
        find_program(name, "binutils")
    if importlib.util.find_spec("cramjam") is None:
        raise ToolMissing(f"cramjam is not installed: {extra()}")


def available(compiler: str) -> str | None:
    """None if `compiler` can be used on this host, else a line that says what to install."""
    try:
        require(compiler)
    except ToolMissing as missing:
        return str(missing)
    return None
