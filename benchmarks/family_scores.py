"""Scores small checkpoints of model families against expected logits, with every implementation and cache type.

    python benchmarks/family_scores.py FOLDER...

A folder is a model folder with `expected.npz` beside it: input_ids [B, L], prompt_length, logits [B, L, V] of another
implementation. Prints a table: the largest |logit - expected| with float32 caches over three ways (decode from empty,
the prompt in one step, chunks of 23), and the relative error (root mean square) with the other caches.
"""

import argparse
import pathlib

import jax
import numpy as np

import sparse_mla_jax as sm
from sparse_mla_jax.tools.tables import table

CACHES = ("bfloat16", "float8_e4m3fnuz", "float8_e4m3fn")


def measure(folder: pathlib.Path, implementation: str) -> list[str]:
    """One row of the table."""
    config, params = sm.load_checkpoint(folder, progress=False)
    with np.load(folder / "expected.npz") as data:
        ids, expected, prompt_length = data["input_ids"], data["logits"], int(data["prompt_length"])
    ways = ({"prompt_length": 0}, {"prompt_length": prompt_length}, {"chunk": 23})

    def run(**options) -> np.ndarray:
        return sm.score(params, config, ids, implementation=implementation, **options) - expected

    exact = max(float(np.abs(run(cache_dtype="float32", **way)).max()) for way in ways)
    rest = [float(np.sqrt(np.mean(run(cache_dtype=kind, **ways[1]) ** 2) / np.mean(expected**2))) for kind in CACHES]
    return [config.family, implementation, f"{exact:.1e}", *(f"{error:.3f}" for error in rest)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=pathlib.Path, metavar="FOLDER")
    parser.add_argument("--implementation", action="append", choices=("triton", "xla", "reference"))
    arguments = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    implementations = arguments.implementation or ["triton", "xla"]
    rows = [measure(folder, name) for folder in arguments.folders for name in implementations]
    print(table(["family", "implementation", "float32", *CACHES], rows))


if __name__ == "__main__":
    main()
