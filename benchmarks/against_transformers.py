"""Decode throughput of this library and of Hugging Face transformers: same folder, same machine, same run.

    python benchmarks/against_transformers.py MODEL_DIR --transformers-python /path/to/venv/bin/python

The other interpreter needs torch and transformers (5.23 has DeepSeek-V3.2). The two run in turn, `--rounds` times,
neither beside the other; the medians and their ratio are printed.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys

HERE = pathlib.Path(__file__).parent


def last_json(command):
    """The JSON object on the last line that `command` prints; its messages only when it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--transformers-python", required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    sizes = [
        arguments.folder,
        *("--batch", str(arguments.batch)),
        *("--context", str(arguments.context)),
        *("--steps", str(arguments.steps)),
    ]
    ours_command = [sys.executable, "-m", "sparse_mla_jax", "bench", *sizes, "--cache-dtype", "float32", "--json"]
    theirs_command = [arguments.transformers_python, HERE / "transformers_decode.py", *sizes]
    ours, theirs = [], []
    for _ in range(arguments.rounds):
        ours.append(last_json(ours_command)["decode_tokens_per_second"])
        other = last_json(theirs_command)
        theirs.append(other["tokens_per_second"])
    ratio = statistics.median(a / b for a, b in zip(ours, theirs))
    print(f"{'sparse_mla_jax, float32 cache':60} {statistics.median(ours):9.1f} tokens/s")
    print(f"{other['what']:60} {statistics.median(theirs):9.1f} tokens/s")
    print(f"ratio, median of {arguments.rounds} pairs: {ratio:.2f}")


if __name__ == "__main__":
    main()
