"""Reads ELF code objects: each kernel's assembly for the interpreter, and the resources it occupies."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import struct
import tempfile
from typing import NamedTuple

from pallas_kernels.cdna import toolchain
from pallas_kernels.cdna.elf import EXECUTABLE, FUNCTION, Elf, Symbol
from pallas_kernels.cdna.program import LANES, LDS_BYTES, SGPR_GRANULE, VGPR_GRANULE, VGPRS, Resources

# Registers are allocated in groups of eight. A SIMD has 512 vector registers per lane and runs at most eight waves.
_MAX_WAVES, _SIMDS = 8, 4
_DESCRIPTOR = struct.Struct("<III4sq20sIIIHH4s")
_WAVE_OF_32 = 1 << 10
# Metadata that every kernel has; those that its descriptor repeats; those that its descriptor bounds.
_SAME = {
    "group_segment_fixed_size": "group_segment_fixed_size",
    "private_segment_fixed_size": "private_segment_fixed_size",
    "kernarg_segment_size": "kernarg_size",
}
_AT_MOST = {"vgpr_count": "next_free_vgpr", "sgpr_count": "next_free_sgpr"}
_WANTED = (*_SAME, *_AT_MOST, "wavefront_size")


class Descriptor(NamedTuple):
    """A kernel descriptor; `rsrc1` to `rsrc3` are the registers COMPUTE_PGM_RSRC of the hardware."""

    lds: int
    scratch: int
    arguments: int
    reserved0: bytes
    entry: int
    reserved1: bytes
    rsrc3: int
    rsrc1: int
    rsrc2: int
    properties: int
    preload: int
    reserved2: bytes


@dataclasses.dataclass(frozen=True)
class KernelCode:
    """One kernel of a code object: its name, its assembly with directives, and its metadata."""

    name: str
    assembly: str
    metadata: dict[str, int]

    def resources(self, arch: str, threads: int, dynamic_lds: int = 0) -> Resources:
        """Resources of a launch with `threads` per workgroup; LDS is the larger of static size and `dynamic_lds`."""
        m = self.metadata
        lds = max(m.get("group_segment_fixed_size", 0), dynamic_lds)
        vgprs = m.get("vgpr_count", 0)
        granted = max(VGPR_GRANULE, -(-vgprs // VGPR_GRANULE) * VGPR_GRANULE)
        waves = -(-threads // 64)
        by_lds = max(1, LDS_BYTES[arch] // lds * waves // _SIMDS) if lds else _MAX_WAVES
        by_lds *= lds <= LDS_BYTES[arch]
        return Resources(
            vgprs=vgprs,
            agprs=m.get("agpr_count", 0),
            sgprs=m.get("sgpr_count", 0),
            vgpr_spills=m.get("vgpr_spill_count", 0),
            sgpr_spills=m.get("sgpr_spill_count", 0),
            scratch=m.get("private_segment_fixed_size", 0),
            lds=lds,
            occupancy=min(_MAX_WAVES, VGPRS // granted, by_lds),
        )


def _descriptors(elf: Elf) -> dict[str, bytes]:
    """The descriptor of every kernel, after a check that it leads to the kernel's function."""
    found = {}
    for symbol in elf.symbols.values():
        if not symbol.name.endswith(".kd"):
            continue
        name = symbol.name.removesuffix(".kd")
        if symbol.size != _DESCRIPTOR.size:
            raise ValueError(f"the descriptor of kernel {name} has {symbol.size} bytes; {_DESCRIPTOR.size} expected")
        descriptor = elf.data[symbol.offset : symbol.offset + symbol.size]
        function = elf.symbols.get(name)
        if function is None or function.kind != FUNCTION:
            raise ValueError(f"kernel {name} has a descriptor, but the code object has no function {name}")
        if not elf.sections[function.section].flags & EXECUTABLE or not function.size or function.size % 4:
            raise ValueError(f"function {name} has {function.size} bytes in section {function.section}; code expected")
        entry = symbol.address + Descriptor(*_DESCRIPTOR.unpack(descriptor)).entry
        if entry != function.address:
            raise ValueError(f"the descriptor of kernel {name} leads to {entry:#x}; {function.address:#x} expected")
        found[name] = descriptor
    return found


def descriptors(elf: bytes) -> dict[str, bytes]:
    """The 64-byte descriptor of every kernel, by kernel name.

    Raises:
      ValueError: `elf` is not a code object, or is damaged.
    """
    return _descriptors(Elf.parse(elf))


def directives(descriptor: bytes) -> dict[str, int]:
    """The `.amdhsa_` settings that affect execution, from a kernel descriptor (LLVM's AMDGPU usage guide).

    Numbers of registers are those that the hardware allocates, so they are multiples of 4, 8 or 16.

    Raises:
      ValueError: the descriptor is not one of 64 bytes, or asks for waves of 32 lanes.
    """
    if len(descriptor) != _DESCRIPTOR.size:
        raise ValueError(f"a kernel descriptor of {len(descriptor)} bytes; {_DESCRIPTOR.size} expected")
    d = Descriptor(*_DESCRIPTOR.unpack(descriptor))
    if any(d.reserved0 + d.reserved1 + d.reserved2) or d.properties & _WAVE_OF_32:
        raise ValueError("a kernel descriptor with bits that CDNA does not define")
    return {
        "group_segment_fixed_size": d.lds,
        "private_segment_fixed_size": d.scratch,
        "kernarg_size": d.arguments,
        "next_free_vgpr": ((d.rsrc1 & 63) + 1) * VGPR_GRANULE,
        "accum_offset": ((d.rsrc3 & 63) + 1) * 4,
        "next_free_sgpr": ((d.rsrc1 >> 6 & 15) // 2 + 1) * SGPR_GRANULE,
        "user_sgpr_count": d.rsrc2 >> 1 & 31,
        **{f"system_sgpr_workgroup_id_{axis}": d.rsrc2 >> 7 + k & 1 for k, axis in enumerate("xyz")},
        "user_sgpr_private_segment_buffer": d.properties & 1,
        "user_sgpr_dispatch_ptr": d.properties >> 1 & 1,
        "user_sgpr_queue_ptr": d.properties >> 2 & 1,
    }


def _run(tool: str, path: pathlib.Path, *options: str) -> str:
    done = toolchain.run_program([toolchain.find_llvm(tool), *options, str(path)])
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1].replace(str(path), path.name)
        raise ValueError(f"{tool} refuses the code object: {reason}")
    return done.stdout


def _metadata(notes: str) -> dict[str, dict[str, int]]:
    """Integer fields of `amdhsa.kernels` by kernel name, from llvm-readelf's YAML, indented by four."""
    if "amdhsa.kernels:" not in notes or "Invalid AMDGPU Metadata" in notes:
        raise ValueError("the code object's note with the kernels' metadata is missing or damaged")
    found = {}
    for part in re.split(r"^  - ", notes, flags=re.M)[1:]:
        entry = dict(re.findall(r"^    \.(\w+):\s+(\S+)\s*$", f"    {part}", re.M))
        if "name" in entry:
            found[entry["name"].strip("'")] = {k: int(v) for k, v in entry.items() if v.isascii() and v.isdigit()}
    return found


def _check_metadata(name: str, metadata: dict[str, int], settings: dict[str, int]) -> None:
    """Checks that metadata and descriptor of a kernel say the same."""
    missing = [k for k in _WANTED if k not in metadata]
    if missing:
        raise ValueError(f"the metadata of kernel {name} lack {', '.join(missing)}")
    if metadata["wavefront_size"] != LANES:
        raise ValueError(f"kernel {name} is for waves of {metadata['wavefront_size']} lanes; {LANES} expected")
    for key, setting in _SAME.items():
        if metadata[key] != settings[setting]:
            raise ValueError(
                f"the metadata of kernel {name} say {key} {metadata[key]}, and its descriptor {settings[setting]}"
            )
    for key, setting in _AT_MOST.items():
        if metadata[key] > settings[setting]:
            raise ValueError(
                f"the metadata of kernel {name} say {key} {metadata[key]}; its descriptor allocates {settings[setting]}"
            )


def _assembly(symbol: Symbol, listing: str, settings: dict[str, int]) -> str:
    """Formats a disassembled function: adds directives, gives labels their own lines, drops addresses."""
    text = re.sub(r"\A.*?^(?=[0-9a-f]{16} <)", "", listing, flags=re.M | re.S)
    text = re.sub(r"\s*//.*$", "", text, flags=re.M)
    text = re.sub(r"^[0-9a-f]{16} <([^>]+)>:", r"\1:", text, flags=re.M)
    text = re.sub(r"^<(L\d+)>:", r"\1:", text, flags=re.M)
    text = re.sub(r"(\ss_c?branch\w*\s+)<?(L\d+)>?", r"\1\2", text)
    unknown = re.search(r"^\s+(\.\w+ .*)$", text, flags=re.M)
    if unknown:
        raise ValueError(f"the code of kernel {symbol.name} holds `{unknown[1]}`, which is no instruction")
    if not text.startswith(f"{symbol.name}:\n"):
        raise ValueError(f"llvm-objdump finds {text[:40]!r} at the start of kernel {symbol.name}")
    return "\n".join([*(f".amdhsa_{k} {v}" for k, v in settings.items()), text.strip(), ""])


def kernels(elf: bytes, arch: str) -> list[KernelCode]:
    """All kernels of a code object.

    Raises:
      ValueError: `elf` is not a code object for this architecture, or is damaged; the message says what is wrong.
      ToolMissing: LLVM 22 is not installed.
      RuntimeError: a tool did not end.
    """
    parsed = Elf.parse(elf)
    if parsed.machine != arch:
        raise ValueError(f"an ELF file for machine {parsed.machine}; {arch} expected")
    settings = {name: directives(descriptor) for name, descriptor in _descriptors(parsed).items()}
    if not settings:
        raise ValueError("the code object holds no kernel: no symbol ends in .kd")
    out = []
    target = f'.amdgcn_target "amdgcn-amd-amdhsa--{arch}"\n'
    options = ("-d", f"--mcpu={arch}", "--symbolize-operands", "--no-show-raw-insn")
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "code.hsaco"
        path.write_bytes(elf)
        metadata = _metadata(_run("llvm-readelf", path, "--notes"))
        for name, setting in settings.items():
            _check_metadata(name, metadata.get(name, {}), setting)
            symbol = parsed.symbols[name]
            # Padding follows the function; only the function is disassembled.
            ends = (f"--start-address={symbol.address}", f"--stop-address={symbol.address + symbol.size}")
            assembly = _assembly(symbol, _run("llvm-objdump", path, *options, *ends), setting)
            out.append(KernelCode(name, target + assembly, metadata[name]))
    return out
