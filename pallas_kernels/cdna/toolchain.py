"""Finds the compilers and tools that this package needs, and names the command that installs a missing one."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import pathlib
import shutil
import subprocess

import jax

# The release of jax that the extra `cdna` installs compilers for, and the version of its Triton.
JAX = "0.12.0"
TRITON_VERSION = "3.6.0"
LLVM = "22"
TRITON = "triton"
# The plugin's name contains ROCm's major version. The first installed plugin is used.
PLUGINS = ("jax-rocm7-pjrt", "jax-rocm10-pjrt")


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


def default_cache() -> pathlib.Path:
    """Folder of compiled kernels and stub libraries."""
    return pathlib.Path.home() / ".cache" / "sparse_mla_jax"


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


def _major(path: str) -> int:
    text = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    words = text.split("version ")
    return int(words[1].split(".")[0]) if len(words) > 1 and words[1][:1].isdigit() else 0


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
