"""The end-of-sequence ids that a folder names: two files, numbers and lists, and everything that is neither."""

import json

import pytest

from sparse_mla_jax.models.generation import load_generation_defaults

ABSENT = object()


def write(folder, config=ABSENT, generation=ABSENT):
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        if value is not ABSENT:
            (folder / name).write_text(json.dumps({"eos_token_id": value, "temperature": 0.6}))
    return folder


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        (1, ABSENT, (1,)),
        ([1, 2, 1], ABSENT, (1, 2)),
        (1, 7, (7,)),
        (1, [7, 8], (7, 8)),
        (1, [], ()),
        (1, None, (1,)),
        (None, ABSENT, ()),
        (ABSENT, 0, (0,)),
        (ABSENT, ABSENT, ()),
        # What generation_config.json replaces is not read.
        ("nonsense", 7, (7,)),
    ],
)
def test_generation_config_takes_precedence(tmp_path, config, generation, ids):
    assert load_generation_defaults(write(tmp_path, config, generation)).eos_token_ids == ids


def test_a_file_without_the_field_names_none(tmp_path):
    write(tmp_path, config=5)
    (tmp_path / "generation_config.json").write_text("{}")
    assert load_generation_defaults(tmp_path).eos_token_ids == (5,)
    (tmp_path / "config.json").write_text("{}")
    assert load_generation_defaults(tmp_path).eos_token_ids == ()


@pytest.mark.parametrize("value", ["1", True, 1.0, float("nan"), -1, [1, "2"], [[1]], {"id": 1}, [None]], ids=str)
def test_bad_ids(tmp_path, value):
    with pytest.raises(ValueError, match="eos_token_id in .*generation_config.json is .* Mend the file"):
        load_generation_defaults(write(tmp_path, config=1, generation=value))


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"eos_token_id": ' + "9" * 5000 + "}", "\ufeff{}"])
def test_bad_files(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match="generation_config.json"):
        load_generation_defaults(tmp_path)


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "config.json").write_bytes(b'{"eos_token_id": "\xff"}')
    with pytest.raises(ValueError, match="not valid JSON"):
        load_generation_defaults(tmp_path)
