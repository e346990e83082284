"""Executed wave-instructions of every kernel on gfx942 and gfx950, for a fixed list of cases: compared, or renewed.

    python benchmarks/cdna_counts.py            compares with cdna_counts.json; exit code 1 when a count differs
    python benchmarks/cdna_counts.py --renew    writes it
    python benchmarks/cdna_counts.py --table    prints it as docs/performance.md has it

An entry counts the kernel as XLA:ROCm compiles it, which is what JAX launches; "triton" in it counts the same kernel
compiled by the public Triton wheel. Versions are those of the extra `cdna`. Our interpreter executes both, and counts
repeat exactly.
"""

import argparse
import json
import pathlib
import sys

from tqdm import tqdm

from pallas_kernels.cdna.program import ARCHITECTURES
from sparse_mla_jax.cases import catalogue
from sparse_mla_jax.cases.case import FP8, KernelCase
from sparse_mla_jax.tools.inspect.kernels import NATIVE, Measurement, measure

FILE = pathlib.Path(__file__).with_suffix(".json")


def kept(measured: Measurement) -> dict:
    """What the file keeps of one case.

    Raises:
      ValueError: the result is wrong; counts of such a kernel mean nothing.
    """
    if not measured.error <= measured.bound:
        raise ValueError(
            f"{measured.case} {measured.kind} on {measured.launch.kernel.arch}: error {measured.error:.2e}, at most"
            f" {measured.bound:.0e} allowed"
        )
    row = measured.as_dict()
    names = ("compiler", "wave_instructions", "by_class", "vgprs", "agprs", "sgprs", "lds", "occupancy")
    return {k: row[k] for k in names}


def count(case: KernelCase, kind: str, arch: str) -> dict:
    """Executes one case as both compilers make it and returns what the file keeps of it."""
    return kept(measure(case, kind, arch, "xla")) | {"triton": kept(measure(case, kind, arch, "triton"))}


def cases() -> list[tuple[str, str, str]]:
    """(kernel, cache type or "", architecture) of the fixed list."""
    return [
        (case.name, kind, arch)
        for case in catalogue.KERNEL_CASES
        for kind in [k for k in FP8 if k in case.kinds] or [""]
        for arch in ARCHITECTURES
    ]


def key(name: str, kind: str, arch: str) -> str:
    """Key of a case in the file."""
    return " ".join(x for x in (name, kind, arch) if x)


def table(stored: dict) -> str:
    """The file as a Markdown table: each machine's own FP8 type; registers and instructions, XLA:ROCm / Triton."""
    lines = [
        "| kernel | what one launch does | gfx942 VGPRs | gfx942 instructions | gfx950 VGPRs | gfx950 instructions |",
        "|---|---|---|---|---|---|",
    ]
    for case in catalogue.KERNEL_CASES:
        cells = []
        for arch in ARCHITECTURES:
            entry = stored[key(case.name, NATIVE[arch] if NATIVE[arch] in case.kinds else "", arch)]
            for field in ("vgprs", "wave_instructions"):
                cells.append(f"{entry[field]:,} / {entry['triton'][field]:,}")
        lines.append(f"| `{case.name}` | {case.what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _instructions(entry: dict) -> tuple:
    return entry.get("wave_instructions"), entry.get("triton", {}).get("wave_instructions")


def main() -> int:
    """Compares or renews."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="write cdna_counts.json")
    parser.add_argument("--table", action="store_true", help="print the stored counts as a Markdown table")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(json.loads(FILE.read_text())))
        return 0
    every = tqdm(cases(), disable=None)
    found = {key(*c): count(catalogue.kernel_case(c[0]), c[1], c[2]) for c in every}
    if arguments.renew:
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    stored = json.loads(FILE.read_text())
    different = [name for name in sorted({*found, *stored}) if found.get(name) != stored.get(name)]
    for name in different:
        was, now = (_instructions(x.get(name, {})) for x in (stored, found))
        print(f"{name}: {was} wave-instructions in the file (XLA:ROCm, Triton), {now} now")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
