"""Reads ELF code objects: each kernel's assembly for the interpreter, and the resources it occupies."""

from __future__ import annotations

import dataclasses
import pathlib
import re
import struct
import subprocess
import tempfile

from pallas_kernels.cdna import toolchain
from pallas_kernels.cdna.program import LDS_BYTES, Resources

# Registers are allocated in groups of eight. A SIMD has 512 vector registers per lane and runs at most eight waves.
_VGPR_GRANULE, _VGPRS, _MAX_WAVES, _SIMDS = 8, 512, 8, 4
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SYMBOL_TABLE, _DYNAMIC_SYMBOLS = 2, 11


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
        granted = max(_VGPR_GRANULE, -(-vgprs // _VGPR_GRANULE) * _VGPR_GRANULE)
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
            occupancy=min(_MAX_WAVES, _VGPRS // granted, by_lds),
        )


def _sections(elf: bytes) -> list[tuple[int, ...]]:
    """Section headers: (name, type, flags, address, offset, size, link, info, alignment, entry size)."""
    if elf[:5] != b"\x7fELF\x02" or len(elf) < 64:
        raise ValueError(f"not a 64-bit ELF file: {len(elf)} bytes that start with {elf[:5]!r}")
    offset, size, count = *struct.unpack_from("<Q", elf, 40), *struct.unpack_from("<HH", elf, 58)
    if len(elf) < offset + size * count or size < _SECTION.size:
        raise ValueError(f"an ELF file of {len(elf)} bytes; its section headers end at byte {offset + size * count}")
    return [_SECTION.unpack_from(elf, offset + k * size) for k in range(count)]


def _text_at(table: bytes, at: int) -> str:
    return table[at : table.index(b"\0", at)].decode()


def descriptors(elf: bytes) -> dict[str, bytes]:
    """The 64-byte descriptor of every kernel, by kernel name.

    Raises:
      ValueError: `elf` is not an ELF file.
    """
    sections = _sections(elf)
    found = {}
    for section in sections:
        if section[1] not in (_SYMBOL_TABLE, _DYNAMIC_SYMBOLS):
            continue
        strings = sections[section[6]]
        names = elf[strings[4] : strings[4] + strings[5]]
        for at in range(section[4], section[4] + section[5], _SYMBOL.size):
            name, _, _, where, value, _ = _SYMBOL.unpack_from(elf, at)
            symbol = _text_at(names, name)
            if symbol.endswith(".kd") and 0 < where < len(sections):
                home = sections[where]
                start = home[4] + value - home[3]
                found[symbol.removesuffix(".kd")] = elf[start : start + 64]
    return found


def directives(descriptor: bytes) -> dict[str, int]:
    """The `.amdhsa_` settings that affect execution, from a kernel descriptor (LLVM's AMDGPU usage guide)."""
    lds, scratch, arguments = struct.unpack_from("<III", descriptor)
    (rsrc2,) = struct.unpack_from("<I", descriptor, 52)
    (properties,) = struct.unpack_from("<H", descriptor, 56)
    return {
        "group_segment_fixed_size": lds,
        "private_segment_fixed_size": scratch,
        "kernarg_size": arguments,
        "user_sgpr_count": rsrc2 >> 1 & 31,
        **{f"system_sgpr_workgroup_id_{axis}": rsrc2 >> 7 + k & 1 for k, axis in enumerate("xyz")},
        "user_sgpr_private_segment_buffer": properties & 1,
        "user_sgpr_dispatch_ptr": properties >> 1 & 1,
        "user_sgpr_queue_ptr": properties >> 2 & 1,
    }


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([toolchain.find_llvm(tool), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{tool} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout


def _metadata(notes: str) -> dict[str, dict[str, int]]:
    """Integer fields of `amdhsa.kernels` by kernel name, from llvm-readelf's YAML, indented by four."""
    found = {}
    for part in re.split(r"^  - ", notes, flags=re.M)[1:]:
        entry = dict(re.findall(r"^    \.(\w+):\s+(\S+)\s*$", f"    {part}", re.M))
        if "name" in entry:
            found[entry["name"].strip("'")] = {k: int(v) for k, v in entry.items() if v.isdigit()}
    return found


def _assembly(body: str, arch: str, settings: dict[str, int]) -> str:
    """Formats a disassembled function: adds directives, gives labels their own lines, drops addresses and padding."""
    text = re.sub(r"\s*//.*$", "", body, flags=re.M)
    text = re.sub(r"^[0-9a-f]{16} <([^>]+)>:", r"\1:", text, flags=re.M)
    text = re.sub(r"^<(L\d+)>:", r"\1:", text, flags=re.M)
    text = re.sub(r"(\ss_c?branch\w*\s+)<?(L\d+)>?", r"\1\2", text)
    # Control never falls through s_endpgm or s_branch, so text behind the last of these is padding.
    ends = list(re.finditer(r"^\s+(?:s_endpgm|s_branch\s+\S+)\s*$", text, flags=re.M))
    text = text[: ends[-1].end()] if ends else text
    head = [f'.amdgcn_target "amdgcn-amd-amdhsa--{arch}"', *(f".amdhsa_{k} {v}" for k, v in settings.items())]
    return "\n".join([*head, text.strip(), ""])


def kernels(elf: bytes, arch: str) -> list[KernelCode]:
    """All kernels of a code object.

    Raises:
      ValueError: `elf` is not a code object for this architecture.
      ToolMissing: LLVM 22 is not installed.
    """
    found = descriptors(elf)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "code.hsaco"
        path.write_bytes(elf)
        text = _run("llvm-objdump", "-d", f"--mcpu={arch}", "--symbolize-operands", "--no-show-raw-insn", str(path))
        metadata = _metadata(_run("llvm-readelf", "--notes", str(path)))
    out = []
    # Split at functions only: local labels (L1, L2, ...) stay in the text of their function.
    for body in re.split(r"^(?=[0-9a-f]{16} <(?!L\d+>))", text, flags=re.M)[1:]:
        name = re.match(r"[0-9a-f]{16} <([^>]+)>", body)[1]  # type: ignore[index]
        if name in found:
            out.append(KernelCode(name, _assembly(body, arch, directives(found[name])), metadata.get(name, {})))
    if not out:
        raise ValueError(f"the code object holds no kernel for {arch}; descriptors of {', '.join(found) or 'none'}")
    return out
