"""Weights of the small published models in tests/fixtures from a seed: weights.json -> model.safetensors.

The rule, for a tensor of n elements (row-major), by its published name; seed, offset and scale stand in weights.json:

    crc   = zlib.crc32(name in UTF-8)
    words = Philox4x64-10, key words [seed, 0], counter words [j, crc, 0, 0] for blocks j = 1, 2, ...: n 64-bit outputs
    u     = (word >> 40) * 2^-23 - 1, in [-1, 1), exact in float32
    value = float32(offset) + float32(scale) * u, product and sum rounded to float32

A tensor with "values" (an integer table) holds them literally. sha256 is over the little-endian bytes of all tensors in
the listed order, so that weights that another NumPy made otherwise are refused.
"""

import hashlib
import json
import math
import shutil
import zlib

import numpy as np
from safetensors.numpy import save_file

INTEGERS = {"I64": "<i8", "I32": "<i4"}


def draw_tensor(seed, name, spec):
    """The array of one entry of weights.json."""
    if "values" in spec:
        return np.array(spec["values"], INTEGERS[spec["dtype"]]).reshape(spec["shape"])
    key, counter = np.array([seed, 0], np.uint64), np.array([0, zlib.crc32(name.encode()), 0, 0], np.uint64)
    words = np.random.Philox(key=key, counter=counter).random_raw(math.prod(spec["shape"]))
    u = (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return (np.float32(spec["offset"]) + np.float32(spec["scale"]) * u).reshape(spec["shape"])


def read_tensors(folder):
    """{published name: array} of a fixture folder."""
    weights = json.loads((folder / "weights.json").read_text())
    tensors = {name: draw_tensor(weights["seed"], name, spec) for name, spec in weights["tensors"].items()}
    digest = hashlib.sha256()
    for value in tensors.values():
        digest.update(value.astype(value.dtype.newbyteorder("<")).tobytes())
    assert digest.hexdigest() == weights["sha256"], f"{folder}: weights differ from the recorded ones"
    return tensors


def write_model(folder, out):
    """The fixture folder as a Hugging Face folder: its other files, and model.safetensors in place of weights.json."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("weights.json"))
    save_file(read_tensors(folder), out / "model.safetensors", metadata={"format": "pt"})
