"""save_checkpoint into a folder with a checkpoint: killed, failing, at once with other saves and with readers."""

import contextlib
import dataclasses
import errno
import functools
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import load_file
from small_models import random_params

from sparse_mla_jax._folder import SAVED
from sparse_mla_jax.config import DeepseekV32Config, load_config
from sparse_mla_jax.models import checkpoint, folder_replacement, weight_files
from sparse_mla_jax.models.checkpoint import load_checkpoint, save_checkpoint
from sparse_mla_jax.models.deepseek_v32 import param_specs
from sparse_mla_jax.models.weight_files import open_folder

A = DeepseekV32Config(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=6,
    moe_intermediate_size=4,
    num_hidden_layers=1,
    num_attention_heads=2,
    q_lora_rank=6,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=6,
    v_head_dim=4,
    n_routed_experts=0,
    n_shared_experts=0,
    index_n_heads=2,
    index_head_dim=8,
    index_topk=4,
)
# The same shapes, another constant: a mixture would go unnoticed.
B = dataclasses.replace(A, routed_scaling_factor=1.25)
ONE, MANY, MORE = 10**9, 2000, 1000


@functools.cache
def params(name):
    return random_params(param_specs(A), seed=ord(name))


def save(folder, name, shard_bytes=ONE, config=None):
    """Saves the weights `name`, with the config of that name."""
    save_checkpoint(folder, config or {"A": A, "B": B}[name], params(name), max_shard_bytes=shard_bytes)


def which(folder):
    """The name of the checkpoint in a folder, "A" or "B"; fails for anything else."""
    config, loaded = load_checkpoint(folder)
    (name,) = [n for n in "AB" if all(map(np.array_equal, jax.tree.leaves(params(n)), jax.tree.leaves(loaded)))]
    return name, {A: "A", B: "B"}[config]


def foreign(folder):
    """What another program finds: names of weights and config, or None without weights."""
    if not (folder / "config.json").exists():
        return None
    if (folder / "model.safetensors").exists():
        found = load_file(folder / "model.safetensors")
    elif (folder / "model.safetensors.index.json").exists():
        weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        found = {name: load_file(folder / file)[name] for name, file in weight_map.items()}
    else:
        return None
    factor = json.loads((folder / "config.json").read_text())["routed_scaling_factor"]
    (name,) = [n for n in "AB" if np.array_equal(found["model.embed_tokens.weight"], params(n)["embed_tokens"])]
    (head,) = [n for n in "AB" if np.array_equal(found["lm_head.weight"].T, params(n)["lm_head"])]
    assert name == head
    return name, "A" if factor == A.routed_scaling_factor else "B"


def listing(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextlib.contextmanager
def snapshots(folder, target):
    """Copies the folder whenever a line of the save finds it changed: what a kill before that line would leave."""
    kept, seen = [], set()

    def look(frame, event, argument):
        del argument
        if event != "line":
            return look
        files = sorted(folder.rglob("*"))
        state = tuple((path, path.stat().st_ino, path.stat().st_size) for path in files if path.exists())
        if state not in seen:
            seen.add(state)
            kept.append(target / str(len(kept)))
            shutil.copytree(folder, kept[-1], copy_function=os.link)
        return look

    def enter(frame, event, argument):
        del event, argument
        return look if frame.f_code.co_filename in (checkpoint.__file__, folder_replacement.__file__) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield kept
    finally:
        sys.settrace(before)


SIZES = [(ONE, ONE), (ONE, MANY), (MANY, ONE), (MANY, MORE)]


# --- killed ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("old", "new"), SIZES, ids=["one-one", "one-many", "many-one", "many-more"])
@pytest.mark.parametrize("config", [A, B], ids=["same config", "other config"])
def test_killed_before_any_line(tmp_path, old, new, config):
    """The old checkpoint or the new one, never old again after new; other programs find one of them or no weights."""
    folder = tmp_path / "model"
    save(folder, "A", old)
    with snapshots(folder, tmp_path / "killed") as killed:
        save(folder, "B", new, config)
    states = [which(one) for one in killed]
    after = ("B", "A" if config == A else "B")
    commit = states.index(after)
    assert commit > 3 and states == [("A", "A")] * commit + [after] * (len(states) - commit)
    assert [load_config(one) for one in killed] == [A] * commit + [config] * (len(states) - commit)
    others = {foreign(one) for one in killed}
    assert others <= {("A", "A"), after, None}
    # One rename replaces a single file of the same model: there is no moment without weights.
    assert (None in others) == (new != ONE or config == B)
    # The next save completes the move and leaves nothing of the killed one.
    for one in killed[commit - 1 :: 3]:
        save(one, "A", MANY)
        assert which(one) == ("A", "A") and foreign(one) == ("A", "A")
        names = set(json.loads((one / "model.safetensors.index.json").read_text())["weight_map"].values())
        assert set(os.listdir(one)) == {"config.json", "model.safetensors.index.json", *names}


def test_killed_while_completing(tmp_path):
    """A save that completes another's move can be killed too."""
    folder = tmp_path / "model"
    save(folder, "A", MANY)
    with snapshots(folder, tmp_path / "first") as killed:
        save(folder, "B", MORE)
    half = next(one for one in killed if (one / SAVED).exists() and not (one / SAVED / "config.json").exists())
    with snapshots(half, tmp_path / "second") as again:
        save(half, "A", ONE)
    states = [which(one) for one in again]
    commit = states.index(("A", "A"))
    assert states == [("B", "B")] * commit + [("A", "A")] * (len(states) - commit)


def test_first_save_killed(tmp_path):
    folder = tmp_path / "new" / "model"
    folder.mkdir(parents=True)
    with snapshots(folder, tmp_path / "killed") as killed:
        save(folder, "A", MANY)
    for one in killed:
        try:
            assert which(one) == ("A", "A")
        except ValueError as error:
            assert "has no config.json" in str(error)
            save(one, "A")
            assert sorted(os.listdir(one)) == ["config.json", "model.safetensors"]
    assert which(killed[-1]) == ("A", "A")


KILLED = """
import sys; sys.path[:0] = {paths!r}
import test_folder_replacement as t
print("ready", flush=True)
while True:
    for name, size in (("B", t.MANY), ("A", t.ONE), ("B", t.MORE), ("A", t.MANY)):
        t.save({folder!r}, name, size)
"""


@pytest.mark.slow
def test_killed_by_the_system(tmp_path):
    """SIGKILL at random moments, between and within system calls."""
    folder, rng = tmp_path / "model", np.random.default_rng(0)
    save(folder, "A")
    paths = [str(pathlib.Path(__file__).parents[2]), str(pathlib.Path(__file__).parents[1]), str(folder.parent)]
    shutil.copy(__file__, folder.parent)
    seen = set()
    for _ in range(12):
        code = KILLED.format(paths=paths, folder=str(folder))
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.05, 0.4))
            process.send_signal(signal.SIGKILL)
        name, config = which(folder)
        assert name == config
        seen.add(name)
    assert seen == {"A", "B"}
    save(folder, "A")
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


# --- failing ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [0, 2])
def test_full_disk(tmp_path, monkeypatch, number):
    """Whichever file does not fit: nothing is left of the save, and the error says what is needed."""
    save(tmp_path, "A", MANY)
    before, calls = listing(tmp_path), []

    def write(tensors, path, metadata):
        calls.append(path)
        pathlib.Path(path).write_bytes(b"half")
        if len(calls) > number:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", write)
    with pytest.raises(
        OSError, match=r"can not save into .* No space left on device.*takes \d+ bytes.*Free space"
    ) as e:
        save(tmp_path, "B", MORE)
    assert e.value.errno == errno.ENOSPC and str(tmp_path) in str(e.value)
    assert listing(tmp_path) == before and which(tmp_path) == ("A", "A")
    assert len(os.listdir(tmp_path)) == len(before)


def test_no_room_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, "A")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(checkpoint, "save_file", None)
    with pytest.raises(OSError, match=r"No space left on device.*; 1000 are free. Free space"):
        save(tmp_path, "B")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"] and which(tmp_path) == ("A", "A")


def test_the_kernel_refuses_a_write(tmp_path):
    """A limit on the size of files, which the writer of safetensors meets in the middle of one."""
    folder = tmp_path / "new" / "model"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(
            OSError, match=r"File too large.*Free space, or save into a folder on another disk"
        ) as error:
            save(folder, "A")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    assert not (tmp_path / "new").exists()


def test_read_only_folder(tmp_path, monkeypatch):
    save(tmp_path, "A")

    mkdir = os.mkdir

    def refuse(path, mode=0o777):
        if ".saving-checkpoint" in str(path):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"can not save into .*Permission denied.*may write to"):
        save(tmp_path, "B")
    assert which(tmp_path) == ("A", "A")


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(OSError, match=r"can not save into .*model': File exists"):
        save(tmp_path / "model", "A")
    assert (tmp_path / "model").read_text() == "mine"


def test_moves_that_fail_lose_nothing(tmp_path, monkeypatch):
    save(tmp_path, "A", MANY)
    replace, calls = os.replace, []

    def refuse(*paths):
        calls.append(paths)
        if len(calls) == 3:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        with pytest.raises(PermissionError, match=rf"is saved in .*{SAVED}', but its files could not be moved"):
            save(tmp_path, "B", MORE)
    assert which(tmp_path) == ("B", "B") and foreign(tmp_path) is None
    save(tmp_path, "A")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_interrupts_and_others_errors_pass(tmp_path, monkeypatch, error):
    save(tmp_path / "model", "A")

    def write(*args, **kwargs):
        raise error("mine")

    monkeypatch.setattr(checkpoint, "save_file", write)
    with pytest.raises(error, match="mine"):
        save(tmp_path / "model", "B")
    with pytest.raises(error, match="mine"):
        save(tmp_path / "new", "B")
    assert os.listdir(tmp_path) == ["model"] and which(tmp_path / "model") == ("A", "A")
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("extra", [{"a": float("nan")}, {"a": {1, 2}}])
def test_extra_that_json_can_not_say(tmp_path, extra):
    with pytest.raises(ValueError, match=r"extra can not be written to config.json"):
        save_checkpoint(tmp_path / "model", A, params("A"), extra=extra)
    assert not (tmp_path / "model").exists()


# --- what else a folder is and holds ---------------------------------------------------------------------------------
def test_other_files_stay(tmp_path):
    others = {"tokenizer.json": "{}", "README.md": "# mine", "runs/events": "e", "model.safetensors.bak": "old"}
    for name, text in others.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    save(tmp_path, "A", MANY)
    save(tmp_path, "B")
    assert {name: (tmp_path / name).read_text() for name in others} == others
    assert set(os.listdir(tmp_path)) == {"config.json", "model.safetensors", "runs", *others} - {"runs/events"}


def test_links(tmp_path):
    """A folder behind a link is used as it is. A linked file is replaced, not what it points to (the hub's cache)."""
    save(tmp_path / "real", "A")
    (tmp_path / "link").symlink_to("real")
    os.rename(tmp_path / "real" / "model.safetensors", tmp_path / "blob")
    (tmp_path / "real" / "model.safetensors").symlink_to("../blob")
    blob = (tmp_path / "blob").read_bytes()
    assert which(tmp_path / "link") == ("A", "A")
    save(tmp_path / "link", "B")
    assert (tmp_path / "link").is_symlink() and which(tmp_path / "real") == ("B", "B")
    assert (tmp_path / "blob").read_bytes() == blob


def test_whoever_reads_the_config_reads_the_weights(tmp_path):
    save(tmp_path, "A", MANY)
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1
    (tmp_path / "other").write_text("")
    assert (tmp_path / "other").stat().st_mode in modes


def test_files_are_on_the_disk_before_the_step(tmp_path, monkeypatch):
    save(tmp_path, "A")
    events, fsync, replace = [], os.fsync, os.replace

    def note_fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(source, target):
        events.append("to " + os.path.basename(target))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    save(tmp_path, "B", MANY)
    step = events.index("to " + SAVED)
    shards = [name for name in os.listdir(tmp_path) if name.startswith("model-")]
    written, (staging,) = set(events[: step - 1]), events[step - 1 : step]
    assert written == {"config.json", "model.safetensors.index.json", *shards} and staging.startswith(".saving")
    assert events[step + 1] == tmp_path.name == events[-1] and events[-2].startswith("to ")


# --- at once ---------------------------------------------------------------------------------------------------------
def test_saves_and_loads_at_once(tmp_path):
    """Every reader finds one of the checkpoints whole; the last save wins, and nothing else is left."""
    save(tmp_path, "A", MANY)
    failures, running = [], [True]

    def guard(work):
        try:
            work()
        except BaseException as error:
            failures.append(error)

    def read():
        while running[0]:
            name, config = which(tmp_path)
            assert name == config

    def write(name):
        for size in (ONE, MANY, MORE):
            save(tmp_path, name, size)

    reader = threading.Thread(target=guard, args=(read,))
    writers = [threading.Thread(target=guard, args=(functools.partial(write, name),)) for name in "AB"]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    running[0] = False
    reader.join()
    assert not failures
    assert which(tmp_path)[0] == which(tmp_path)[1]
    files = {name for name in os.listdir(tmp_path) if not name.startswith("model-")}
    assert files == {"config.json", "model.safetensors.index.json"}


def test_a_running_save_is_not_cleaned_away(tmp_path):
    save(tmp_path, "A")
    with folder_replacement.replace_checkpoint(str(tmp_path), 1) as staging:
        save(tmp_path, "B")
        assert os.path.isdir(staging)
        shutil.copy(tmp_path / "config.json", staging)
        shutil.copy(tmp_path / "model.safetensors", staging)
    dead = tmp_path / ".saving-checkpoint-0123"
    dead.mkdir()
    (dead / "model.safetensors").write_bytes(b"half")
    save(tmp_path, "A")
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


def test_open_files_stay_what_they_were(tmp_path):
    """A reader that has opened a folder reads the old weights after a save has replaced them."""
    save(tmp_path, "A", MANY)
    stored = open_folder(str(tmp_path))
    save(tmp_path, "B", MANY)
    np.testing.assert_array_equal(
        stored["model.embed_tokens.weight"].read({"F32": np.float32}), params("A")["embed_tokens"]
    )


def test_a_read_that_meets_a_save_begins_again(tmp_path):
    """Whether it failed, or returned what may be parts of both."""
    save(tmp_path, "A")
    calls = []

    def read():
        calls.append(len(calls))
        if len(calls) < 3:
            save(tmp_path, "AB"[len(calls) % 2], MANY)
        if len(calls) == 1:
            raise ValueError("half of it is gone")
        return calls[-1]

    assert weight_files.read_unchanged(str(tmp_path), read) == 2


def test_a_folder_that_never_rests(tmp_path, monkeypatch):
    """Loading ends even if every look finds the folder changed."""
    save(tmp_path, "A")
    monkeypatch.setattr(weight_files, "_PAUSE", 0)
    monkeypatch.setattr(weight_files, "_identify", lambda folder: [object()])
    with pytest.raises(OSError, match="is being replaced again and again"):
        load_checkpoint(tmp_path)
