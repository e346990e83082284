"""The held-out modules are whole, are there, and never reach the training text."""

import pathlib
import sysconfig

import pytest

from sparse_mla_jax.tools import text


@pytest.fixture(scope="module")
def training():
    return text.stdlib_sources(held_out=False)


def test_held_out_modules_are_read_whole_and_in_order():
    sources = text.stdlib_sources(held_out=True)
    assert [name for name, _ in sources] == [f"{module}.py" for module in text.HELD_OUT]
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    assert all(source == (root / name).read_bytes() for name, source in sources)
    assert sum(len(source) // 2048 for _, source in sources) >= 20


def test_training_text_holds_no_held_out_module(training):
    names = [name for name, _ in training]
    assert names == sorted(names, key=pathlib.PurePosixPath) and len(set(names)) == len(names) > 100
    assert not [name for name in names if text.is_held_out(name) or "-packages" in name]
    assert "argparse.py" in names
    everything = b"\0".join(source for _, source in training)
    for name, source in text.stdlib_sources(held_out=True):
        middle = len(source) // 2
        assert source[middle : middle + 200] not in everything, f"the middle of {name} is in the training text"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("csv.py", True),
        ("test/test_csv.py", True),
        ("test/test_csv/test_reader.py", True),
        ("test/test_difflib_expect.py", True),
        ("csv/__init__.py", True),
        ("_csv_like.py", False),
        ("test/test_csvlike.py", False),
        ("argparse.py", False),
        ("test/bisect_cmd.py", False),
    ],
)
def test_what_belongs_to_a_held_out_module(name, expected):
    assert text.is_held_out(name) is expected


def test_an_interpreter_without_sources_gives_an_empty_list(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    assert text.stdlib_sources(held_out=True) == text.stdlib_sources(held_out=False) == []
