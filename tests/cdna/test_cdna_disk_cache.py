"""The cache of compiled code: data only, of this user only, whole or absent, and nothing left behind."""

import errno
import logging
import os
import pathlib
import pickle
import random
import stat
import time

import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.cdna import disk_cache, private_folder, stored_values, toolchain
from pallas_kernels.cdna.code_object import KernelCode
from pallas_kernels.cdna.program import Argument, Kernel, Program, Resources

KEY = disk_cache.key_of(what="a test")
VALUE = (b"\0code\xff", 5, KernelCode("kernel", "s_endpgm\n", {"vgpr_count": 8}))


@pytest.fixture
def folder(tmp_path):
    """A cache with one entry."""
    disk_cache.write(KEY, VALUE, tmp_path)
    assert disk_cache.read(KEY, tmp_path) == VALUE
    return tmp_path


@pytest.fixture(autouse=True)
def usual_umask():
    """What a test sets is set back."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def entry(folder):
    (path,) = (folder / "code").iterdir()
    return path


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# --- values ----------------------------------------------------------------------------------------------------------
def kernel(dtype):
    arguments = (Argument((3, 2), np.dtype(dtype), "input"), Argument((), np.dtype(dtype), "output", 0))
    resources = Resources(vgprs=8, agprs=0, sgprs=16, vgpr_spills=0, sgpr_spills=0, scratch=0, lds=512, occupancy=8)
    return Kernel("k", "gfx942", "Triton", "pallas", (1, 2, 3), (64, 1, 1), b"\x7fELF", "text\n", resources, arguments)


DTYPES = [np.bool_, np.int64, np.float64, np.complex64, ml_dtypes.bfloat16, ml_dtypes.int4, ml_dtypes.float8_e8m0fnu]
VALUES = [
    None,
    True,
    1,
    -(2**70),
    0.1,
    float("inf"),
    "ü\ud800",
    b"",
    bytes(range(256)),
    [],
    (),
    ([1], (2, b"3")),
    {"a": {"b": (None,)}, "tuple": [1]},
    VALUE,
    Program("gfx942", "XLA", tuple(kernel(t) for t in DTYPES), 5, (0, 2), ((7, "copy"),), ("gemm",), "HLO"),
    Program("gfx950", "Triton", ()),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_values_come_back(value, tmp_path):
    disk_cache.write(KEY, value, tmp_path)
    back = disk_cache.read(KEY, tmp_path)
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize(
    "value",
    [object(), {1: 2}, {"a": {2}}, np.float32(1), np.zeros(3), len, type, pathlib.Path(), np.dtype([("a", "i4")])],
    ids=lambda v: type(v).__name__,
)
def test_other_values_are_refused(value, tmp_path):
    with pytest.raises(TypeError, match="cannot be stored; expected compiled code"):
        disk_cache.write(KEY, [value], tmp_path)
    assert list((tmp_path / "code").iterdir()) == [] and disk_cache.read(KEY, tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"{}",
        b'{"bytes": "?"}',
        b'{"bytes": 3}',
        b'{"os.system": {"command": "true"}}',
        b'{"Kernel": {"name": "k"}}',
        b'{"Kernel": []}',
        b'{"dtype": "no_such"}',
        b'{"dtype": 3}',
        b'{"tuple": 3}',
        b'{"dict": {}, "tuple": []}',
        b"[" * 100_000,
        b"\xff",
        b"1" * 5000,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_what_is_no_value(text):
    with pytest.raises(ValueError):
        stored_values.from_bytes(text)


@pytest.mark.parametrize("key", ["", "../x", "a/b", "\0"])
def test_no_key(key, tmp_path):
    for call in (lambda: disk_cache.read(key, tmp_path), lambda: disk_cache.write(key, 1, tmp_path)):
        with pytest.raises(ValueError, match="expected what `key_of` returns"):
            call()


# --- damage ----------------------------------------------------------------------------------------------------------
def test_damaged_entries(folder):
    """Cut, and bytes changed, 200 times: nothing comes back but the value itself, if its bytes are unchanged."""
    path, rnd = entry(folder), random.Random(0)
    good = path.read_bytes()
    for _ in range(200):
        bad = bytearray(good)
        if rnd.random() < 0.4:
            bad = bad[: rnd.randrange(len(bad))]
        else:
            for _ in range(rnd.choice([1, 2, 8])):
                bad[rnd.randrange(len(bad))] = rnd.randrange(256)
        path.write_bytes(bad)
        assert disk_cache.read(KEY, folder) == (VALUE if bad == good else None)


def test_a_pickle_is_not_executed(folder):
    mark = folder / "executed"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)

    for data in (pickle.dumps((KEY, Evil())), disk_cache._first_line(pickle.dumps(Evil())) + pickle.dumps(Evil())):
        entry(folder).write_bytes(data)
        assert disk_cache.read(KEY, folder) is None and not mark.exists()


def test_the_entry_of_another_key(folder):
    path, other = entry(folder), disk_cache.key_of(what="another")
    path.rename(path.with_name(f"{other}.json"))
    assert disk_cache.read(other, folder) is None and disk_cache.read(KEY, folder) is None


def put_link(path):
    kept = path.with_name("kept")
    path.rename(kept)
    path.symlink_to(kept)


def put_folder(path):
    path.unlink()
    path.mkdir()


def put_pipe(path):
    path.unlink()
    os.mkfifo(path)


def put_huge(path):
    """A file without blocks whose size is beyond any entry's."""
    os.truncate(path, disk_cache.MOST_BYTES + 1)


@pytest.mark.parametrize("put", [put_link, put_folder, put_pipe, put_huge], ids=lambda f: f.__name__)
def test_something_else_in_place_of_an_entry(folder, put):
    put(entry(folder))
    assert disk_cache.read(KEY, folder) is None
    disk_cache.write(KEY, VALUE, folder)
    assert disk_cache.read(KEY, folder) == (None if put is put_folder else VALUE)
    assert not [p for p in (folder / "code").iterdir() if p.name.endswith(".part")]


def test_a_huge_file_is_not_read(folder, monkeypatch):
    put_huge(entry(folder))
    monkeypatch.setattr(disk_cache, "_first_line", None)
    assert disk_cache.read(KEY, folder) is None


# --- whose it is -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077, 0o777])
def test_modes_do_not_depend_on_the_umask(tmp_path, umask):
    os.umask(umask)
    root = tmp_path / "a" / "b"
    disk_cache.write(KEY, 1, root)
    assert [mode(p) for p in (root.parent, root, root / "code", entry(root))] == [0o700, 0o700, 0o700, 0o600]


@pytest.mark.parametrize("bits", [0o777, 0o770, 0o707, 0o755, 0o750, 0o701])
def test_folders_that_others_may_enter(folder, bits, caplog):
    """Neither read nor written; one line says why, once."""
    private_folder._report.cache_clear()
    before = entry(folder).read_bytes()
    (folder / "code").chmod(bits)
    for _ in range(2):
        assert disk_cache.read(KEY, folder) is None
        disk_cache.write(KEY, 1, folder)
    assert entry(folder).read_bytes() == before and mode(folder / "code") == bits
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and f"its mode is {bits:o}; expected user" in record.getMessage()
    (folder / "code").chmod(0o700)
    assert disk_cache.read(KEY, folder) == VALUE


def test_a_link_in_place_of_the_folder(folder):
    (folder / "code").rename(folder / "kept")
    (folder / "code").symlink_to(folder / "kept")
    assert disk_cache.read(KEY, folder) is None


@pytest.mark.parametrize("bits", [0o622, 0o602, 0o620, 0o666])
def test_entries_that_others_may_write(folder, bits):
    entry(folder).chmod(bits)
    assert disk_cache.read(KEY, folder) is None
    disk_cache.write(KEY, VALUE, folder)
    assert disk_cache.read(KEY, folder) == VALUE and mode(entry(folder)) == 0o600


@pytest.mark.parametrize("what", ["folder", "entry"])
def test_what_another_user_owns(folder, what):
    if os.getuid():
        pytest.skip("only root can give a file away")
    os.chown(entry(folder) if what == "entry" else folder / "code", 65534, 65534)
    assert disk_cache.read(KEY, folder) is None
    disk_cache.write(KEY, 1, folder)
    assert disk_cache.read(KEY, folder) == (1 if what == "entry" else None)


def test_another_user(folder, monkeypatch):
    """The same without root: this process becomes another user in the eyes of the check."""
    monkeypatch.setattr(private_folder.os, "geteuid", lambda: 12345)
    assert disk_cache.read(KEY, folder) is None


def test_the_default_folder_of_earlier_versions(tmp_path, monkeypatch):
    """It is the package's own, so its mode is set right, and used."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = tmp_path / "sparse_mla_jax" / "code"
    code.mkdir(parents=True)
    (code / f"{KEY}.pickle").write_bytes(b"")
    disk_cache.write(KEY, VALUE)
    assert disk_cache.read(KEY) == VALUE and mode(code) == 0o700


# --- what goes wrong -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("function", ["replace", "fchmod"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=str)
def test_no_temporary_file_stays(folder, monkeypatch, function, error):
    def fail(*arguments, **how):
        raise error

    monkeypatch.setattr(disk_cache.os, function, fail)
    if isinstance(error, OSError):
        disk_cache.write(KEY, 1, folder)
    else:
        with pytest.raises(KeyboardInterrupt):
            disk_cache.write(KEY, 1, folder)
    assert entry(folder).suffix == ".json" and disk_cache.read(KEY, folder) == VALUE


def test_files_of_killed_writers_are_deleted(folder):
    """Later than an hour after; a younger one may belong to a writer at work."""
    old, young = (folder / "code" / name for name in ("old.part", "young.part"))
    for path in (old, young):
        path.write_bytes(b"")
    os.utime(old, (time.time() - 4000,) * 2)
    disk_cache.write(KEY, 1, folder)
    assert young.exists() and not old.exists()


@pytest.mark.parametrize("what", ["a file", "a file above", "nowhere"])
def test_folders_that_cannot_be_made(tmp_path, what):
    blocked = {"a file": tmp_path / "root", "a file above": tmp_path / "file" / "root", "nowhere": "/proc/none"}[what]
    (tmp_path / "file").write_bytes(b"")
    if what == "a file":
        (tmp_path / "root").mkdir()
        (tmp_path / "root" / "code").write_bytes(b"")
    disk_cache.write(KEY, 1, pathlib.Path(blocked))
    assert disk_cache.read(KEY, pathlib.Path(blocked)) is None


def test_too_large_for_an_entry(folder, monkeypatch):
    monkeypatch.setattr(disk_cache, "MOST_BYTES", 1000)
    disk_cache.write(KEY, b"\0" * 1000, folder)
    assert disk_cache.read(KEY, folder) == VALUE


@pytest.mark.parametrize(
    ("xdg", "home", "expected"),
    [
        ("/x", "/h", "/x/sparse_mla_jax"),
        ("x", "/h", "/h/.cache/sparse_mla_jax"),
        ("", "/h", "/h/.cache/sparse_mla_jax"),
        (None, "/h", "/h/.cache/sparse_mla_jax"),
        (None, "h", "/users/.cache/sparse_mla_jax"),
        (None, None, "/users/.cache/sparse_mla_jax"),
    ],
)
def test_the_default_folder(monkeypatch, xdg, home, expected):
    for name, value in (("XDG_CACHE_HOME", xdg), ("HOME", home)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    user = type("User", (), {"pw_dir": "/users"})
    monkeypatch.setattr(toolchain.pwd, "getpwuid", lambda number: user)
    assert toolchain.default_cache() == pathlib.Path(expected)


def test_a_user_without_a_home(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(toolchain.pwd, "getpwuid", lambda number: {}[number])
    assert toolchain.default_cache() is None
    disk_cache.write(KEY, 1)
    assert disk_cache.read(KEY) is None
