"""Ctrl-C in real processes of the command line: exit code 130, one line, at once, and no half file is left."""

import io
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from support.marks import slow

from sparse_mla_jax.__main__ import main
from sparse_mla_jax.tools import info

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ROOT / "examples" / "tiny_python"
PROGRAM = [sys.executable, "-m", "sparse_mla_jax"]
# What an installed `sparse-mla-jax` runs.
SCRIPT = "import re, sys; sys.argv[0] = 'sparse-mla-jax'; from sparse_mla_jax.__main__ import main; sys.exit(main())"
GENERATE = ["generate", str(MODEL), "--prompt", "def main(", "--max-tokens", "2000"]

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux' /proc")


def start(command, **options):
    """A process that does not ignore the signal, as a shell's background jobs and their children do."""
    # A child inherits that a signal is ignored, and no handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for_handler(process):
    """Waits for the thread that waits for the signal: the interpreter itself takes some milliseconds to start."""
    status = pathlib.Path(f"/proc/{process.pid}/status")
    while process.poll() is None and "Threads:\t1\n" in status.read_text():
        time.sleep(0.001)


def interrupt(command, delay):
    """Interrupts a command `delay` seconds after its handler is there; False if it had ended before."""
    with start(command) as process:
        try:
            wait_for_handler(process)
            time.sleep(delay)
            ended = process.poll() is not None
            sent = time.perf_counter()
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
            took = time.perf_counter() - sent
        finally:
            process.kill()
    # `bench topk` names its cases.
    said = "".join(line for line in said.splitlines(keepends=True) if not line.startswith("topk-"))
    if ended or (process.returncode, said) == (0, ""):
        # Done, or on its way out when the signal came.
        return False
    assert (process.returncode, said) == (130, "interrupted\n") and took < 2, (delay, took)
    return True


@pytest.mark.parametrize("command", [[*PROGRAM, "info"], [sys.executable, "-c", SCRIPT, "info"]], ids=["-m", "script"])
def test_while_modules_are_imported(command):
    rng = random.Random(0)
    assert interrupt(command, 0)
    for _ in range(3):
        interrupt(command, rng.uniform(0, 0.5))


def test_while_a_program_is_compiled():
    """Weights are read after a second or two; compiling takes longer, or else tokens are streamed."""
    assert interrupt([*PROGRAM, *GENERATE], 2.5)


def test_while_the_main_thread_is_in_c():
    """As in a long compilation: no handler of Python's can run there, and this call does not end for a signal."""
    code = "from sparse_mla_jax._interrupts import leave_on_interrupt; leave_on_interrupt(); import hashlib\n"
    code += "print('ready', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    with start([sys.executable, "-c", code]) as process:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=2)
        finally:
            process.kill()
    assert (process.returncode, said) == (130, "interrupted\n")


@pytest.mark.parametrize(
    "command", [slow(["info"]), slow(GENERATE), slow(["bench", str(MODEL)]), slow(["bench", "topk", "--repeats", "1"])]
)
def test_at_any_moment(command):
    rng = random.Random(1)
    count, longest = (25, 1.0) if command == ["info"] else (8, 12.0)
    for _ in range(count):
        interrupt([*PROGRAM, *command], rng.uniform(0, longest))


def run_python(code, **options):
    process = start([sys.executable, "-c", code], **options)
    with process:
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "out").write_text("old")
    code = "from sparse_mla_jax._interrupts import leave_on_interrupt; leave_on_interrupt()\n"
    code += "from sparse_mla_jax.tools.output import whole_file\nimport time\n"
    code += f"with whole_file({str(tmp_path / 'out')!r}) as name, open(name, 'w') as file:\n"
    code += "    file.write('half'); file.flush(); print(name, flush=True); time.sleep(60)\n"
    with start([sys.executable, "-c", code]) as process:
        name = process.stdout.readline().strip()
        assert pathlib.Path(name).read_text() == "half" and pathlib.Path(name).parent == tmp_path
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out").read_text() == "old"


def test_a_library_keeps_pythons_own_handler():
    code = "import signal, sparse_mla_jax; from sparse_mla_jax.__main__ import main; main(['info'])\n"
    code += "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler; print('kept')"
    returned, out, _ = run_python(code)
    assert returned == 0 and out.endswith("kept\n")


def test_who_ignores_the_signal_goes_on_ignoring_it():
    code = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code += "from sparse_mla_jax._interrupts import leave_on_interrupt; leave_on_interrupt()\n"
    code += "signal.raise_signal(signal.SIGINT); print('alive')"
    assert run_python(code) == (0, "alive\n", "")


def test_as_a_function_it_is_a_keyboard_interrupt(capsys, monkeypatch):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


# --- streams


def test_a_warning_is_one_line(tmp_path):
    """As about fields of a config that are not known."""
    code = "import sys, warnings; from sparse_mla_jax.tools import command_line as c\n"
    code += "c.run_command = lambda argv: warnings.warn('first\\nsecond', stacklevel=1)\n"
    code += "c.os._exit = lambda code: sys.exit(0); c.run_program([])"
    assert run_python(code) == (0, "", "warning: first second\n")


def test_closed_streams():
    """No file of ours may get the number of a standard stream, and nothing is to fail for lack of one."""
    shell = f"exec {sys.executable} -m sparse_mla_jax info <&- >&- 2>&-"
    assert subprocess.run(shell, shell=True, cwd=ROOT, timeout=60).returncode == 0


def test_a_reader_that_is_gone():
    """As of `info | head -1`: exit code 1, and no word about it."""
    with start([*PROGRAM, "info"]) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_a_disk_that_is_full(capsys, monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
