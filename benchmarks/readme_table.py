"""The README's table of kernel times, from what `python -m sparse_mla_jax bench --json FILE` wrote.

python benchmarks/readme_table.py FILE.json [--area decode] [--case TEXT]
"""

import argparse
import sys

from sparse_mla_jax.cases.catalogue import AREAS
from sparse_mla_jax.tools.bench import report


def main(argv=None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.json")
    parser.add_argument("--area", choices=AREAS, help="of this one only")
    parser.add_argument("--case", metavar="TEXT", help="only cases with this in their name")
    arguments = parser.parse_args(argv)
    try:
        print(report.markdown(report.load(arguments.file), area=arguments.area, text=arguments.case))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
