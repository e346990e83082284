"""Builds stub libraries for the ROCm libraries that JAX's ROCm plugin links against, so that it loads without ROCm.

Deviceless compilation needs none of the real libraries. The stubs define every undefined symbol of the plugin under
its version, and every call reports failure (`hipErrorNoDevice`). gcc builds them once per plugin, into a folder whose
name is a hash of the plugin's name, size and version. The libraries run in this process, so a folder or a library that
another user could have written is not used (`private_folder`).
"""

from __future__ import annotations

import collections
import ctypes
import hashlib
import os
import pathlib
import re
import struct
import tempfile

from pallas_kernels.cdna import private_folder, toolchain

_NO_DEVICE = 100
_ROCM = re.compile(r"lib(roc|hip|hsa|rccl|MIOpen|amd)")
# Symbol versions that the C and C++ runtimes of any Linux define.
_SYSTEM = re.compile(r"@(GLIBC|GCC_|CXXABI|GLIBCXX)")


def _output(*command: str) -> str:
    done = toolchain.run_program(command)
    if done.returncode:
        reason = " / ".join(done.stderr.strip().splitlines()[-3:])
        raise RuntimeError(f"{pathlib.PurePath(command[0]).name} failed with exit code {done.returncode}: {reason}")
    return done.stdout


def needed_libraries(plugin: pathlib.Path) -> list[str]:
    """File names of the ROCm libraries that the plugin is linked against."""
    text = _output(toolchain.find_program("readelf", "binutils"), "-d", str(plugin))
    return [name for name in re.findall(r"\(NEEDED\).*\[(.*)\]", text) if _ROCM.match(name)]


def wanted_symbols(plugin: pathlib.Path) -> list[tuple[str, str]]:
    """(name, version or "") of every function that only ROCm can define."""
    text = _output(toolchain.find_program("nm", "binutils"), "-D", "--undefined-only", str(plugin))
    found = []
    for line in text.splitlines():
        kind, symbol = line.split()[-2:]
        if kind == "w" or _SYSTEM.search(symbol) or symbol.startswith(("_Unwind", "ZSTD_")):
            continue
        name, _, version = symbol.partition("@")
        found.append((name, version.lstrip("@")))
    return found


def _body(name: str) -> str:
    """C body of a stub: it returns the failure value of that function's return type."""
    if "String" in name or "GetErrorName" in name:
        return 'return (long)"no ROCm here";'
    if name == "__hipRegisterFatBinary":
        return "return (long)&handle;"
    if name.startswith("__hip"):
        return "return 0;"
    if name == "hipGetDeviceCount":
        return f"if (p) *(int*)p = 0; return {_NO_DEVICE};"
    return f"return {_NO_DEVICE};"


def _home(version: str, libraries: list[str]) -> str:
    """The library that defines symbols of `version`; unversioned symbols may be in any library."""
    prefix = "libamd_smi" if version.startswith("AMDSMI") else "libamdhip64" if version else "librocblas"
    found = next((name for name in libraries if name.startswith(prefix)), None)
    return found or libraries[0]


def _source(symbols: list[tuple[str, str]]) -> tuple[str, str]:
    """C source of one library and its linker version script."""
    code, versions = ["static int handle;"], collections.defaultdict(list)
    for k, (name, version) in enumerate(symbols):
        code.append(f'long f{k}(void* p) __asm__("{name}"); long f{k}(void* p) {{ {_body(name)} }}')
        if version:
            versions[version].append(name)
    script, previous = "", ""
    for version in sorted(versions):
        script += f"{version} {{ global: {'; '.join(versions[version])}; }} {previous};\n"
        previous = version
    return "\n".join(code) + "\n", script


def _compile(folder: pathlib.Path, library: str, symbols: list[tuple[str, str]]) -> None:
    code, script = _source(symbols)
    # Build in a temporary folder and rename, so that two processes can build at the same time.
    with tempfile.TemporaryDirectory(dir=folder) as apart:
        source, versions, made = (pathlib.Path(apart) / name for name in ("stub.c", "stub.map", library))
        source.write_text(code)
        versions.write_text(script)
        command = [toolchain.find_program("gcc", "gcc"), "-w", "-shared", "-fPIC", f"-Wl,-soname,{library}"]
        command += [f"-Wl,--version-script={versions}"] if script else []
        _output(*command, "-o", str(made), str(source))
        made.chmod(0o700)
        os.replace(made, folder / library)


def _is_whole(library: pathlib.Path) -> bool:
    """Whether a library exists, is this user's and is complete: its section headers must end at the end of the file."""
    try:
        elf = library.read_bytes() if private_folder.is_own_file(library.lstat()) else b""
    except OSError:
        return False
    if len(elf) < 64 or elf[:4] != b"\x7fELF":
        return False
    (start,), (size, count) = struct.unpack_from("<Q", elf, 40), struct.unpack_from("<HH", elf, 58)
    return len(elf) == start + size * count


def build(plugin: pathlib.Path, cache: pathlib.Path | None) -> list[pathlib.Path]:
    """Paths of the stub libraries of a plugin; builds them unless all exist and are complete.

    Args:
      plugin: the plugin's library.
      cache: folder for the stubs' folder; None means `toolchain.default_cache()`.

    Raises:
      OSError: the folder cannot be written, or is not private to this user.
      ToolMissing: gcc, nm or readelf is not installed.
      RuntimeError: one of these programs failed.
    """
    libraries = needed_libraries(plugin)
    stat = plugin.stat()
    distribution = toolchain.plugin()
    made_of = f"{distribution} {stat.st_size} {toolchain.version_of(distribution)}"
    key = hashlib.sha256(made_of.encode()).hexdigest()
    root = cache or toolchain.default_cache()
    if root is None:
        raise FileNotFoundError("this user has no home, so there is no folder for the stub libraries")
    folder = root / f"stubs-{key[:16]}"
    private_folder.make_folder(folder)
    opened = private_folder.open_folder(folder, tighten=cache is None)
    if opened is None:
        raise PermissionError(f"{folder} is not a folder of mode 0700 of this user")
    os.close(opened)
    if not all(_is_whole(folder / name) for name in libraries):
        by_library = collections.defaultdict(list)
        for name, version in wanted_symbols(plugin):
            by_library[_home(version, libraries)].append((name, version))
        for library in libraries:
            _compile(folder, library, by_library[library])
    return [folder / name for name in libraries]


def load(plugin: pathlib.Path, cache: pathlib.Path | None) -> None:
    """Builds the stubs and loads them into this process; afterwards the plugin's library can be opened.

    Where the cache cannot be used, the stubs are built in a temporary folder: a loaded library needs no file.
    """
    with tempfile.TemporaryDirectory() as apart:
        try:
            paths = build(plugin, cache)
        except OSError:
            paths = build(plugin, pathlib.Path(apart))
        for path in paths:
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
