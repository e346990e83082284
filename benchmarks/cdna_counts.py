"""Executed wave-instructions of every kernel on gfx942 and gfx950, for a fixed list of cases: compared, or renewed.

    python benchmarks/cdna_counts.py            compares with cdna_counts.json; exit code 1 when a count differs
    python benchmarks/cdna_counts.py --renew    writes it

Kernels are compiled by the Triton version of the extra `cdna` and executed by our interpreter: counts repeat exactly.
"""

import argparse
import json
import pathlib
import sys

from pallas_kernels.cdna.program import ARCHITECTURES
from sparse_mla_jax.cases import catalogue
from sparse_mla_jax.cases.case import FP8, KernelCase
from sparse_mla_jax.tools.inspect.kernels import Measurement, measure

FILE = pathlib.Path(__file__).with_suffix(".json")
COMPILER = "triton"


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
    """Executes one case and returns what the file keeps of it."""
    return kept(measure(case, kind, arch, COMPILER))


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


def main() -> int:
    """Compares or renews."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--renew", action="store_true", help="write cdna_counts.json")
    renew = parser.parse_args().renew
    found = {key(*c): count(catalogue.kernel_case(c[0]), c[1], c[2]) for c in cases()}
    if renew:
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    stored = json.loads(FILE.read_text())
    different = 0
    for name in sorted({*found, *stored}):
        if found.get(name) != stored.get(name):
            different += 1
            was, now = (x.get(name, {}).get("wave_instructions") for x in (stored, found))
            print(f"{name}: {was} wave-instructions in the file, {now} now")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
