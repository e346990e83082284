"""What a training run of the tiny model is made of: text, weights and their files, AdamW, steps, evaluation."""

from __future__ import annotations

import functools
import json
import math
import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jax import lax
from tiny_model import Mode, Params, cross_entropy, forward, loss_fn
from tqdm import tqdm

from sparse_mla_jax._check import require
from sparse_mla_jax.config import DeepseekV32Config, config_from_json
from sparse_mla_jax.models import deepseek_v32
from sparse_mla_jax.models.checkpoint import save_checkpoint
from sparse_mla_jax.tools.text import stdlib_sources

SEPARATOR = b"\0"


class Options(NamedTuple):
    """What a compiled step depends on, besides the config."""

    batch: int = 16
    context: int = 2048
    steps_per_call: int = 20
    query_rows: int = 256  # rows of each sequence whose KL trains the indexer
    chunk: int = 512  # query rows whose attention is computed together
    attention: str = "xla"  # of the dense phase; cudnn needs an NVIDIA GPU and bfloat16
    dtype: str = "auto"  # bfloat16 on a GPU, else float32
    library_share: float = 0.6  # windows from the library; the others from its tests
    weight_decay: float = 0.05


# --- the text


class Corpus(NamedTuple):
    """Training bytes, library first, then its tests from `boundary` on; held-out files by name."""

    train: np.ndarray
    boundary: int
    held_out: list[tuple[str, np.ndarray]]


def make_corpus() -> Corpus:
    """The corpus of the running interpreter."""
    library: list[bytes] = []
    tests: list[bytes] = []
    for name, text in stdlib_sources(held_out=False):
        is_test = {"test", "tests", "idle_test"} & set(name.split("/"))
        (tests if is_test else library).append(text + SEPARATOR)
    head, tail = b"".join(library), b"".join(tests)
    held_out = [(name, np.frombuffer(text, np.uint8)) for name, text in stdlib_sources(held_out=True)]
    return Corpus(np.frombuffer(head + tail, np.uint8), len(head), held_out)


def save_corpus(corpus: Corpus, path: str) -> None:
    """Writes a file that `load_corpus` reads."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    held_out = {f"held_out/{name}": text for name, text in corpus.held_out}
    np.savez_compressed(path, train=corpus.train, boundary=np.int64(corpus.boundary), **held_out)  # type: ignore[arg-type]


def load_corpus(path: str) -> Corpus:
    """The corpus of a file of `save_corpus`."""
    with np.load(path) as file:
        held_out = [(n.removeprefix("held_out/"), file[n]) for n in file.files if n.startswith("held_out/")]
        return Corpus(file["train"], int(file["boundary"]), held_out)


def held_out_windows(corpus: Corpus, length: int) -> np.ndarray:
    """int32[N, length]: every whole window of every held-out file, without overlap."""
    windows = [t[i : i + length] for _, t in corpus.held_out for i in range(0, len(t) - length + 1, length)]
    require(len(windows) > 0, f"the held-out modules have no window of {length} bytes; give a shorter context.")
    return np.stack(windows).astype(np.int32)


def sample(key: jax.Array, corpus: jax.Array, boundary: jax.Array, options: Options) -> jax.Array:
    """uint8[batch, context + 1]: windows at random places of the library or of its tests."""
    length = options.context + 1
    which, where = jax.random.split(key)
    library = jax.random.uniform(which, (options.batch,)) < options.library_share
    last = corpus.shape[0] - length
    split = jnp.clip(boundary, 0, last)
    low = jnp.where(library | (split >= last), 0, split)
    high = jnp.where(library, jnp.maximum(jnp.minimum(boundary - length, last), 0), last)
    starts = jnp.clip(jax.random.randint(where, (options.batch,), low, high + 1), 0, last)
    return jax.vmap(lambda start: lax.dynamic_slice(corpus, (start,), (length,)))(starts)


# --- the weights and their files


class State(NamedTuple):
    """Parameters as the library has them, what optax remembers, steps made."""

    params: Params
    moments: Any
    step: jax.Array


def name_of(path: Any) -> str:
    """Keys of a pytree joined by dots: layers.1.mlp.gate.weight."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def init_params(config: DeepseekV32Config, seed: int) -> Params:
    """Unit variance through every matrix, the writers to the residual stream scaled down by depth."""
    depth = (2 * config.num_hidden_layers) ** -0.5
    factors = {"embed_tokens": 0.5 * config.hidden_size**0.5, "lm_head": 0.5, "o_proj": depth, "down_proj": depth}

    def scale(path: Any, value: jax.Array) -> jax.Array:
        name = name_of(path)
        return value * (0.5 if name.endswith("gate.weight") else factors.get(name.rsplit(".", 1)[-1], 1.0))

    return jax.tree_util.tree_map_with_path(scale, deepseek_v32.init_params(jax.random.key(seed), config))


def rounded(params: Params, config: DeepseekV32Config) -> Params:
    """The weights that the exported folder holds, as float32."""
    specs = deepseek_v32.param_specs(config, jnp.bfloat16)
    return jax.tree.map(lambda value, spec: value.astype(spec.dtype).astype(jnp.float32), params, specs)


def make_optimizer(weight_decay: float) -> optax.GradientTransformation:
    """AdamW at rate 1 for model and indexer, whose gradients are clipped apart; others than finite change nothing."""

    def part(params: Params) -> Params:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "indexer" if "indexer" in name_of(path) else "model", params
        )

    def matrices(params: Params) -> Params:
        return jax.tree.map(lambda value: value.ndim > 1, params)

    adamw = optax.adamw(1.0, b1=0.9, b2=0.95, weight_decay=weight_decay, mask=matrices)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adamw)
    return optax.apply_if_finite(optax.partition({"model": clipped, "indexer": clipped}, part), 2**31 - 1)


def new_state(config: DeepseekV32Config, seed: int) -> State:
    """The state before the first step."""
    params = init_params(config, seed)
    return State(params, make_optimizer(0.0).init(params), jnp.int32(0))


def save_state(state: State, progress: float, config_json: dict[str, Any], folder: pathlib.Path) -> None:
    """params.npz (float32, with the config and the progress) and moments.npz (bfloat16 bits), whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)

    def pack(value: jax.Array) -> np.ndarray:
        array = np.asarray(value)
        return array.astype(ml_dtypes.bfloat16).view(np.uint16) if array.dtype == np.float32 else array

    meta = {"step": np.int64(state.step), "progress": np.float64(progress), "config": np.array(json.dumps(config_json))}
    params = {f"params/{name_of(path)}": value for path, value in jax.tree_util.tree_leaves_with_path(state.params)}
    moments = {name_of(path): pack(value) for path, value in jax.tree_util.tree_leaves_with_path(state.moments)}
    for name, arrays in (("params", params | meta), ("moments", moments)):
        partial = folder / f"{name}.partial.npz"
        np.savez(partial, **arrays)  # type: ignore[arg-type]
        os.replace(partial, folder / f"{name}.npz")


def load_state(paths: list[str]) -> tuple[State, float, dict[str, Any]]:
    """(state, progress, config.json's fields) from params.npz and, if given, moments.npz, in any order."""
    arrays: dict[str, np.ndarray] = {}
    for path in paths:
        with np.load(path) as file:
            arrays |= {name: file[name] for name in file.files}
    require("step" in arrays, f"--resume got {paths}; params.npz is needed (moments.npz may be added).")
    config_json = json.loads(str(arrays["config"]))
    fresh = new_state(config_from_json(config_json), 0)

    def unpack(path: Any, value: jax.Array) -> jax.Array:
        stored = arrays.get(name_of(path))
        if stored is None:
            return value
        return jnp.asarray(stored.view(ml_dtypes.bfloat16) if value.dtype == jnp.float32 else stored, value.dtype)

    params = jax.tree_util.tree_map_with_path(lambda p, _: jnp.asarray(arrays[f"params/{name_of(p)}"]), fresh.params)
    moments = jax.tree_util.tree_map_with_path(unpack, fresh.moments)
    return State(params, moments, jnp.int32(arrays["step"])), float(arrays["progress"]), config_json


def export(params: Params, config_json: dict[str, Any], folder: pathlib.Path) -> int:
    """Writes config.json and model.safetensors (bfloat16); returns the weights' size in bytes."""
    tokens = {name: config_json[name] for name in ("bos_token_id", "eos_token_id") if name in config_json}
    save_checkpoint(folder, config_from_json(config_json), params, dtype="bfloat16", extra=tokens)
    return (folder / "model.safetensors").stat().st_size


# --- the training


def balance(params: Params, load: jax.Array, speed: jax.Array, config: DeepseekV32Config) -> Params:
    """Moves every expert's bias against its load (arXiv:2408.15664); load[MoE layers, E]."""
    moves, layers = iter(speed * jnp.sign(load.mean(-1, keepdims=True) - load)), []
    for number, layer in enumerate(params["layers"]):
        if config.is_moe_layer(number):
            gate = layer["mlp"]["gate"]
            moved = gate | {"e_score_correction_bias": gate["e_score_correction_bias"] + next(moves)}
            layer = layer | {"mlp": layer["mlp"] | {"gate": moved}}
        layers.append(layer)
    return params | {"layers": layers}


def learning_rate(progress: jax.Array) -> jax.Array:
    """Share of the peak rate: level, then linear to zero over the last 70 %."""
    return jnp.clip((1 - progress) / 0.7, 0.0, 1.0)


class Schedule(NamedTuple):
    """Of one call, float32: peak rate, progress at its begin, progress per step, step at which warming up began."""

    peak: Any
    progress: Any
    pace: Any
    warm: Any


def train_call(
    state: State,
    corpus: jax.Array,
    boundary: jax.Array,
    schedule: Schedule,
    key: jax.Array,
    *,
    config: DeepseekV32Config,
    options: Options,
    sparse: bool,
) -> tuple[State, dict[str, jax.Array]]:
    """`steps_per_call` steps: (state, means of what is reported)."""
    mode = Mode(sparse, jnp.dtype(options.dtype), options.chunk, options.attention)
    optimizer = make_optimizer(options.weight_decay)

    def one(state: State, i: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        place, query = jax.random.split(jax.random.fold_in(key, state.step))
        tokens = sample(place, corpus, boundary, options).astype(jnp.int32)
        rows = jax.random.permutation(query, options.context)[: options.query_rows]
        (_, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, tokens, rows, config, mode)
        now = schedule.progress + schedule.pace * i
        rate = schedule.peak * learning_rate(now) * jnp.clip((state.step + 1 - schedule.warm) / 100.0, 0.01, 1.0)
        updates, moments = optimizer.update(grads, state.moments, state.params)
        params = optax.apply_updates(state.params, jax.tree.map(lambda update: rate * update, updates))
        report = {name: aux[name].mean() for name in ("ce", "kl", "mass", "zeros")} | {"norm": optax.tree.norm(grads)}
        if "load" in aux:
            params = balance(params, aux["load"], 1e-3 * jnp.clip((1 - now) / 0.2, 0.0, 1.0), config)
            report["peak_load"] = (aux["load"].max(-1) / aux["load"].mean(-1)).max()
        return State(params, moments, state.step + 1), report

    state, reports = lax.scan(one, state, jnp.arange(options.steps_per_call, dtype=jnp.float32))
    return state, jax.tree.map(jnp.mean, reports)


@functools.partial(jax.jit, static_argnames=("config", "sparse"))
def window_loss(params: Params, tokens: jax.Array, *, config: DeepseekV32Config, sparse: bool) -> jax.Array:
    """Mean cross entropy (nats per byte) of each window [B, S] given its own beginning, in float32, selection exact."""
    with jax.default_matmul_precision("highest"):
        logits, _ = forward(params, tokens, None, config, Mode(sparse, jnp.float32, 512, exact=True))
    return cross_entropy(logits[:, :-1], tokens[:, 1:]).mean(-1)


def evaluate(params: Params, windows: np.ndarray, config: DeepseekV32Config, sparse: bool, batch: int = 8) -> float:
    """Mean bits per byte over windows[N, S]."""
    total = 0.0
    # disable=None: no bar where the output is no terminal.
    for i in tqdm(range(0, len(windows), batch), desc="evaluating", unit="batch", leave=False, disable=None):
        part = windows[i : i + batch]
        padded = np.concatenate([part, np.zeros((batch - len(part), part.shape[1]), np.int32)])
        total += float(np.asarray(window_loss(params, padded, config=config, sparse=sparse))[: len(part)].sum())
    return total / len(windows) / math.log(2)
