"""Block sizes that were weighed for gfx942 and gfx950: every kernel with its shipped plan and with others, as a table.

    python benchmarks/cdna_candidates.py [--kernel NAME] [--arch gfx942|gfx950|both] [--write]

`--write` renews cdna_candidates.md. Kernels are compiled by the Triton version of the extra `cdna` and executed by our
interpreter on the problems of `sparse_mla_jax.cases`: nothing was timed on an AMD GPU. Bounds are LLVM's model,
summed per pipe over what was executed and spread evenly over the machine, without latency.
"""

import argparse
import pathlib
import sys

from pallas_kernels.cdna.program import ARCHITECTURES, PRODUCT
from sparse_mla_jax.cases import catalogue
from sparse_mla_jax.cases.case import KernelCase
from sparse_mla_jax.tools.inspect.kernels import NATIVE, measure

FILE = pathlib.Path(__file__).with_suffix(".md")

# What one machine ships is a candidate for the other.
ATTENTION = [
    {"num_warps": 1},
    {"num_warps": 2},
    {"fenced": False},
    {"anchored": False},
    {"anchored": True},
    {"tile": 16},
    {"tile": 32},
    {"key_block": 32},
    {"exact_weights": False},
]
# By case: changes to the shipped plan.
CANDIDATES = {
    "sparse_mla": ATTENTION,
    "sparse_mla_v4": ATTENTION,
    "sparse_mla_v4_window": ATTENTION[:7],
    "indexer": [
        {"num_warps": 2},
        {"num_warps": 8},
        {"key_block": 32},
        {"token_block": 4},
        {"head_block": 32},
        {"keys_first": False},
    ],
    "paged_indexer": [
        {"num_warps": 2},
        {"num_warps": 8},
        {"key_block": 32},
        {"head_block": 32},
        {"keys_first": False},
        {"key_steps": 2},
    ],
    "top_k": [{"num_warps": 2}, {"num_warps": 8}],
    "top_k_long": [{"num_warps": 8}, {"block": 8192}, {"groups": 0}, {"run": 32}, {"unroll": 1}],
    "cache_write": [{"num_warps": 1}, {"num_warps": 4}, {"scan": 64}],
    "compress": [{"num_warps": 1}, {"num_warps": 2}, {"num_warps": 8}, {"block": 4}],
    "compress_128": [{"num_warps": 2}, {"num_warps": 8}, {"block": 8}, {"block": 32}],
    "norm_rope": [{"num_warps": 2}, {"num_warps": 4}, {"tile": 2048}],
    "norm_rope_query": [{"num_warps": 2}, {"num_warps": 4}, {"tile": 512}, {"tile": 2048}],
    "rotated_projection": [{"num_warps": 1}, {"num_warps": 4}, {"num_stages": 1}, {"columns": 64}, {"step": 32}],
}
HEADER = (
    "change",
    "VGPRs",
    "spilled",
    "scratch",
    "LDS",
    "waves/SIMD",
    "wave-instructions",
    "busiest pipe",
    "its bound, us",
    "HBM floor, us",
    "error",
)


def row(case: KernelCase, arch: str, change: dict) -> tuple:
    """One line of a table."""
    name = ", ".join(f"{k} {v}" for k, v in change.items()) or "**shipped**"
    try:
        r = measure(case, NATIVE[arch], arch, "triton", changes=change).as_dict()
    except Exception as error:  # a candidate may be refused anywhere between Pallas and the assembler
        return (name, *["-"] * (len(HEADER) - 2), f"{type(error).__name__}: {str(error).splitlines()[0][:60]}")
    pipe, bound = max(r["lower_bound_us"].items(), key=lambda item: item[1])
    return (
        name,
        r["vgprs"],
        r["vgpr_spills"] + r["sgpr_spills"],
        r["scratch"],
        r["lds"],
        r["occupancy"],
        r["wave_instructions"],
        pipe,
        f"{bound:.4f}",
        f"{r['hbm_floor_us']:.4f}",
        f"{r['error']:.1e}" if r["error"] else "0",
    )


def table(case: KernelCase, arch: str) -> str:
    """All candidates of a kernel on one architecture, in Markdown."""
    rows = [HEADER, ["---"] * len(HEADER)]
    for change in [{}, *CANDIDATES[case.name]]:
        print(f"{case.name} {arch} {change}", file=sys.stderr)
        rows.append(row(case, arch, change))
    lines = "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in rows)
    return f"### {case.name} on {arch} ({PRODUCT[arch]}): {case.what}\n\n{lines}\n"


def main() -> None:
    """Prints the tables, or writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", action="append", choices=list(CANDIDATES), help="may be repeated (default: all)")
    parser.add_argument("--arch", choices=(*ARCHITECTURES, "both"), default="both")
    parser.add_argument("--write", action="store_true", help=f"write {FILE.name}")
    arguments = parser.parse_args()
    tables = [
        table(catalogue.kernel_case(name), arch)
        for name in arguments.kernel or CANDIDATES
        for arch in (ARCHITECTURES if arguments.arch == "both" else (arguments.arch,))
    ]
    text = f"# Plans weighed for gfx942 and gfx950\n\n{__doc__.split('`--write`')[0].splitlines()[0]}\n\n"
    text += (
        "`python benchmarks/cdna_candidates.py --write` renews this file. Compiled by Triton 3.6.0, executed by our\n"
    )
    text += "interpreter, native FP8 flavour of each machine; nothing was timed on an AMD GPU.\n\n" + "\n".join(tables)
    if arguments.write:
        FILE.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
