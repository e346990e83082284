"""Files that commands write: refused before any work, written whole, and pictures that can not be drawn."""

import os
import stat

import pytest

from sparse_mla_jax.__main__ import main
from sparse_mla_jax.tools import demo, output


@pytest.fixture
def places(tmp_path):
    """A folder with a file in it."""
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    return tmp_path


BAD = [
    ("", "--out is empty; give the name of a file"),
    ("folder", "is a folder; give the name of a file"),
    ("folder/", "is a folder"),
    ("new/", "ends like a folder"),
    ("missing/x", "does not exist; make it first"),
    ("file/x", "is a file, not a folder"),
    ("n" * 300, "can not be written (File name too long)"),
]


@pytest.mark.parametrize(("path", "message"), BAD, ids=[path[:20] for path, _ in BAD])
def test_bad_outputs(places, monkeypatch, path, message):
    monkeypatch.chdir(places)
    with pytest.raises(ValueError) as error:
        output.check_output("--out", path)
    assert message in str(error.value)
    assert sorted(os.listdir(places)) == ["file", "folder"]


@pytest.mark.parametrize("path", ["new", "file", "folder/x", "link", "/dev/null"])
def test_good_outputs(places, monkeypatch, path):
    monkeypatch.chdir(places)
    (places / "link").symlink_to("file")
    output.check_output("--out", path)
    assert sorted(os.listdir(places)) == ["file", "folder", "link"] and (places / "file").read_text() == "old"
    assert os.listdir(places / "folder") == []


def test_a_folder_that_nothing_can_be_made_in():
    with pytest.raises(ValueError, match="can not be written"):
        output.check_output("--out", "/proc/self/x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_file_that_may_not_be_written(places):
    (places / "file").chmod(0o444)
    with pytest.raises(ValueError, match="is not writable"):
        output.check_output("--out", str(places / "file"))


def test_a_file_is_replaced_at_the_end(places):
    path = places / "file"
    path.chmod(0o640)
    (places / "link").symlink_to("file")
    with output.whole_file(str(places / "link")) as name:
        assert name.endswith(".part") and os.path.dirname(name) == str(places)
        with open(name, "w") as file:
            file.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert (places / "link").is_symlink() and sorted(os.listdir(places)) == ["file", "folder", "link"]


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_error_leaves_the_old_file(places, error):
    with pytest.raises(type(error)) as raised, output.whole_file(str(places / "file")):
        raise error
    assert (places / "file").read_text() == "old" and sorted(os.listdir(places)) == ["file", "folder"]
    if isinstance(error, OSError):
        assert str(raised.value) == f"[Errno 28] No space left on device: {str(places / 'file')!r}"


def test_devices_and_pipes_are_written_directly(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/null", str(tmp_path / "pipe")):
        with output.whole_file(path) as name:
            assert name == path
    assert os.listdir(tmp_path) == ["pipe"]


def test_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output.check_picture("--picture", "x.png")
    for path, message in (("x.nonsense", "ends in one of"), ("x", "ends in one of"), ("", "empty")):
        with pytest.raises(ValueError, match=message):
            output.check_picture("--picture", path)
    monkeypatch.setattr(output, "has_matplotlib", lambda: False)
    with pytest.raises(ValueError, match="--picture needs matplotlib, which is not installed: pip install"):
        output.check_picture("--picture", "x.png")


# --- the demo, whose work takes half a minute


def refused(capsys, *arguments):
    code = main(["demo", *arguments])
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, (code, out, err)
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--picture", ""], "--picture is empty"),
        (["--picture", "no/x.png"], "does not exist; make it first"),
        (["--picture", "x.nonsense"], "is no picture"),
        (["--requests", "0"], "--requests is 0"),
        (["--windows", "1000000000"], "--windows is 1000000000; the held-out text has"),
        (["--max-tokens", "2048"], "at most 2048"),
        (["--model", "no"], "does not exist"),
    ],
)
def test_the_demo_refuses_before_it_begins(capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "serve", None)
    assert message in refused(capsys, *arguments)
    assert set(os.listdir(tmp_path)) <= {"out"}


def test_the_demo_without_matplotlib(capsys, monkeypatch, tmp_path):
    """It draws nothing and says so at once; a picture that was asked for is refused."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "has_matplotlib", lambda: False)
    monkeypatch.setattr(output, "has_matplotlib", lambda: False)
    assert demo.check_pictures_path(None) is None
    assert "no picture: matplotlib is missing (pip install" in capsys.readouterr().err
    assert "needs matplotlib" in refused(capsys, "--picture", "x.png")
    assert os.listdir(tmp_path) == []


def test_the_demo_where_no_folder_can_be_made(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").write_text("")
    assert "'out/selected_positions.png'" in refused(capsys)
