"""The command line: `python -m sparse_mla_jax demo | score | generate | bench | inspect | info`.

Exit codes: 0 done; 2 invalid input, with one line on stderr that says what to do; 1 the device failed or ran out of
memory, a result was wrong, or a target was missed; 130 interrupted by Ctrl-C. `tools.command_line` has the commands.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sparse_mla_jax._interrupts import leave_on_interrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (listed in the module's docstring).

    Without `argv`, as the program itself, it ends the process: Ctrl-C leaves it from any place, and no exit code is
    returned. With `argv` it is a function like any other, and Ctrl-C is a KeyboardInterrupt.
    """
    if argv is None:
        leave_on_interrupt()
    from sparse_mla_jax.tools import command_line

    if argv is None:
        command_line.run_program(sys.argv[1:])
    return command_line.run_command(argv)


if __name__ == "__main__":
    sys.exit(main())
