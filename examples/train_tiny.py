"""Trains a byte-level model of DeepSeek-V3.2's architecture on the Python standard library's own sources.

Everything of the architecture is there: latent attention with a query latent and one shared rotary key, the lightning
indexer, sigmoid routing over expert groups with a bias that balances load without a loss, a shared expert. The model
is in `tiny_model.py`; text, steps and files are in `tiny_training.py`. Training follows DSA's authors
(arXiv:2512.02556): first dense attention, the indexer learning by the KL divergence to the main attention's
distribution, summed over heads; then (the last `1 - --switch` of the run) every query attends only to the indexer's
`index_topk` best keys, the language-model loss trains the main model alone and the KL over the selected keys trains the
indexer alone.

    python examples/train_tiny.py --pack out/corpus.npz                 # this interpreter's text, to train elsewhere
    python examples/train_tiny.py --minutes 9 --out out/run             # the whole schedule in 9 minutes of wall clock
    python examples/train_tiny.py --minutes 9 --until 0.5 --out out/a   # or in two halves
    python examples/train_tiny.py --minutes 9 --resume out/a/*.npz --out out/b
    python examples/train_tiny.py --export out/b/params.npz examples/tiny_python

--minutes counts from the start of the program, compilation included; the evaluation (about a minute with its
compilation on a GPU) comes after it. Learning rate, the switch to sparse attention and the load balancing are functions
of progress (0 to 1), and progress is a function of time, so a slow machine makes fewer steps of the same schedule.
Writes to --out: params.npz (float32), moments.npz (AdamW, bfloat16), model.safetensors and config.json (published
names, loadable by this package and by transformers), log.jsonl. The last line on stdout is JSON: held-out bits per byte
of the bfloat16-rounded weights, dense and sparse. Needs optax (pip install 'sparse-mla-jax[train]').
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tiny_training import (
    Corpus,
    Options,
    Schedule,
    State,
    evaluate,
    export,
    held_out_windows,
    load_corpus,
    load_state,
    make_corpus,
    new_state,
    rounded,
    save_corpus,
    save_state,
    train_call,
)

from sparse_mla_jax._check import require
from sparse_mla_jax.config import DeepseekV32Config, config_from_json

START = time.monotonic()

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v32",
    "vocab_size": 256,
    "hidden_size": 192,
    "intermediate_size": 384,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 128,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 40.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def say(text: str) -> None:
    """A line with the seconds since the start."""
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


class Trainer:
    """Compiled programs over a corpus that lies on the device."""

    def __init__(self, config: DeepseekV32Config, options: Options, corpus: Corpus, seed: int):
        pairs = (config.rope_interleave, config.indexer_rope_interleave, config.rope.attention_factor)
        require(
            pairs == (True, False, 1.0),
            f"config has rope_interleave, indexer_rope_interleave and attention_factor {pairs}; this example trains"
            " with True, False and 1.0 only.",
        )
        require(
            len(corpus.train) > options.context + 1,
            f"the training text has {len(corpus.train)} bytes; at least context + 2 are needed.",
        )
        if options.dtype == "auto":
            options = options._replace(dtype="bfloat16" if jax.default_backend() == "gpu" else "float32")
        self.config, self.options, self.seed = config, options, seed
        self.corpus, self.boundary = jnp.asarray(corpus.train), jnp.int32(corpus.boundary)
        self.windows = held_out_windows(corpus, options.context)
        self.key = jax.random.key(seed)
        self.programs: dict[bool, Any] = {}

    def program(self, sparse: bool) -> Any:
        """The compiled call of a phase."""
        if sparse not in self.programs:
            began = time.monotonic()
            call = functools.partial(train_call, config=self.config, options=self.options, sparse=sparse)
            state = jax.eval_shape(functools.partial(new_state, self.config, self.seed))
            schedule = Schedule(*[jax.ShapeDtypeStruct((), jnp.float32)] * 4)
            lowered = jax.jit(call, donate_argnums=0).lower(state, self.corpus, self.boundary, schedule, self.key)
            self.programs[sparse] = lowered.compile()
            say(f"{'sparse' if sparse else 'dense'} phase compiled in {time.monotonic() - began:.0f} s")
        return self.programs[sparse]

    def call(self, state: State, sparse: bool, schedule: Schedule) -> tuple[State, dict[str, float]]:
        """Some steps of a phase; waits for the device."""
        values = Schedule(*map(jnp.float32, schedule))
        state, report = self.program(sparse)(state, self.corpus, self.boundary, values, self.key)
        return state, {name: float(value) for name, value in report.items()}

    def bits(self, state: State, sparse: bool, most: int | None = None) -> float:
        """Held-out bits per byte of the weights as exported; `most` windows, spread over the modules."""
        windows = self.windows
        if most is not None and most < len(windows):
            windows = windows[np.linspace(0, len(windows) - 1, most).astype(int)]
        return evaluate(rounded(state.params, self.config), windows, self.config, sparse)


class Plan(NamedTuple):
    """What a run does with its time."""

    lr: float
    deadline: float  # time.monotonic() at which training ends
    start: float = 0.0  # progress at the beginning
    until: float = 1.0
    switch: float = 0.65
    max_steps: int | None = None
    save_every: float = 120.0
    evaluate_every: float = 60.0


class Clock:
    """Progress of a run: the share of its time that is over, or of its steps where their number is given."""

    def __init__(self, plan: Plan, steps_per_call: int):
        self.plan, self.steps_per_call = plan, steps_per_call
        self.began = self.call_began = time.monotonic()
        self.budget = max(plan.deadline - self.began, 1e-3)
        self.calls, self.progress = 0, plan.start
        self.seconds: dict[bool, float] = {}  # of the last call of each phase

    def begin_call(self, sparse: bool) -> float:
        """Progress that each step of the call will make."""
        plan, share = self.plan, self.seconds.get(sparse, 0.0) / self.budget
        if plan.max_steps is not None:
            share = self.steps_per_call / plan.max_steps
        self.call_began = time.monotonic()
        return min((plan.until - plan.start) * share, plan.until - self.progress) / self.steps_per_call

    def end_call(self, sparse: bool) -> None:
        """Counts a call that is over."""
        plan, now = self.plan, time.monotonic()
        self.calls, self.seconds[sparse] = self.calls + 1, now - self.call_began
        done = (now - self.began) / self.budget
        if plan.max_steps is not None:
            done = self.calls * self.steps_per_call / plan.max_steps
        self.progress = min(plan.until, plan.start + (plan.until - plan.start) * done)

    def is_over(self) -> bool:
        """Whether the run has made all of its progress."""
        if self.plan.max_steps is None and time.monotonic() >= self.plan.deadline:
            self.progress = self.plan.until
        return self.progress >= self.plan.until


def train(
    trainer: Trainer, state: State, plan: Plan, config_json: dict[str, Any], out: pathlib.Path | None
) -> tuple[State, float, float]:
    """Trains until the deadline: (state, progress, seconds of training)."""
    options, first = trainer.options, int(state.step)
    tokens_per_call = options.batch * options.context * options.steps_per_call
    for sparse, wanted in ((False, plan.start < plan.switch), (True, plan.until > plan.switch)):
        if wanted:
            trainer.program(sparse)
        if plan.evaluate_every < math.inf:
            trainer.bits(state, sparse, 8)
    clock = Clock(plan, options.steps_per_call)
    saved = evaluated = spoken = clock.began
    while not clock.is_over() or clock.calls == 0:
        sparse, progress = clock.progress >= plan.switch, clock.progress
        state, report = trainer.call(state, sparse, Schedule(plan.lr, progress, clock.begin_call(sparse), first))
        clock.end_call(sparse)
        now = time.monotonic()
        if now - spoken > 5 or clock.calls == 1 or clock.progress >= plan.until:
            spoken, speed = now, tokens_per_call / clock.seconds[sparse]
            tell(report | {"step": int(state.step), "progress": clock.progress, "tokens_per_s": speed}, sparse, out)
        if now - evaluated > plan.evaluate_every:
            bits = trainer.bits(state, sparse, 24)
            evaluated = time.monotonic()
            say(f"held-out bits per byte (24 windows, {'sparse' if sparse else 'dense'}): {bits:.4f}")
        if out is not None and now - saved > plan.save_every:
            save_state(state, clock.progress, config_json, out)
            saved = time.monotonic()
    return state, clock.progress, time.monotonic() - clock.began


def tell(report: dict[str, float], sparse: bool, out: pathlib.Path | None) -> None:
    """One line for people, one for programs."""
    say(
        f"{'sparse' if sparse else 'dense '} step {report['step']:6d} progress {report['progress']:.3f} "
        f"train bpb {report['ce'] / math.log(2):.4f} "
        f"kl {report['kl']:.4f} mass {report['mass']:.4f} zeros {report['zeros']:.3f} "
        f"norm {report['norm']:.2f} peak load {report.get('peak_load', 1.0):.2f} "
        f"{report['tokens_per_s'] / 1e3:.0f}k tokens/s"
    )
    if not math.isfinite(report["ce"]):
        raise SystemExit("the loss is not finite: lower --lr")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(report | {"sparse": sparse, "seconds": time.monotonic() - START}) + "\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="wall clock until training ends")
    parser.add_argument("--steps", type=int, help="number of steps instead of --minutes")
    parser.add_argument("--out", type=pathlib.Path, help="folder for checkpoint, weights and log")
    parser.add_argument("--resume", nargs="+", metavar="FILE", help="params.npz and moments.npz of an earlier run")
    parser.add_argument("--start", type=float, help="progress to begin at (default: 0, or where the resumed run ended)")
    parser.add_argument("--until", type=float, default=1.0, help="progress to end at")
    parser.add_argument("--switch", type=float, default=0.65, help="progress at which attention becomes sparse")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak rate")
    parser.add_argument("--corpus", help="file of --pack; default: this interpreter's library")
    parser.add_argument("--pack", metavar="FILE", help="only write this interpreter's corpus to FILE")
    parser.add_argument("--export", nargs=2, metavar=("PARAMS", "FOLDER"), help="only write a model folder")
    parser.add_argument("--config", help="config.json of another model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-every", type=float, default=60.0, help="seconds between held-out figures; 0: never")
    choices = {"attention": ["xla", "cudnn"], "dtype": ["auto", "bfloat16", "float32"]}
    for name, default in Options()._asdict().items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default, choices=choices.get(name))
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> dict[str, float]:
    """Trains, saves, evaluates; returns the figures."""
    config_json = json.loads(pathlib.Path(arguments.config).read_text()) if arguments.config else CONFIG
    state, progress = None, 0.0
    if arguments.resume:
        state, progress, config_json = load_state(arguments.resume)
    config = config_from_json(config_json)
    corpus = load_corpus(arguments.corpus) if arguments.corpus else make_corpus()
    trainer = Trainer(
        config, Options(**{name: getattr(arguments, name) for name in Options._fields}), corpus, arguments.seed
    )
    state = state or new_state(config, arguments.seed)
    size, first = sum(leaf.size for leaf in jax.tree.leaves(state.params)), int(state.step)
    say(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {size / 1e6:.3f} M parameters")
    held_out = sum(len(text) for _, text in corpus.held_out)
    say(f"{len(corpus.train) / 1e6:.1f} MB to train on, {held_out / 1e3:.0f} kB held out")
    plan = Plan(
        lr=arguments.lr,
        deadline=START + 60 * arguments.minutes,
        start=progress if arguments.start is None else arguments.start,
        until=arguments.until,
        switch=arguments.switch,
        max_steps=arguments.steps,
        evaluate_every=arguments.evaluate_every or math.inf,
    )
    wanted = f"{arguments.steps} steps" if arguments.steps else f"{arguments.minutes:g} minutes, as many steps as fit"
    say(f"training for {wanted}, {trainer.options.steps_per_call} steps a call")
    state, progress, seconds = train(trainer, state, plan, config_json, arguments.out)
    if arguments.out is not None:
        save_state(state, progress, config_json, arguments.out)
        say(f"saved to {arguments.out}: weights {export(state.params, config_json, arguments.out) / 1e6:.2f} MB")
    steps = int(state.step) - first
    say(f"{steps} steps made in {seconds:.0f} s")
    result = {
        "lr": arguments.lr,
        "dense_bpb": trainer.bits(state, False),
        "sparse_bpb": trainer.bits(state, True),
        "steps": steps,
        "tokens": steps * trainer.options.batch * trainer.options.context,
        "seconds": round(seconds, 1),
        "progress": progress,
        "windows": len(trainer.windows),
    }
    print(json.dumps(result), flush=True)
    return result


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """The command line; returns the figures of a run."""
    parsed = parse(arguments)
    if parsed.pack:
        save_corpus(make_corpus(), parsed.pack)
        return {}
    if parsed.export:
        state, _, config_json = load_state([parsed.export[0]])
        size = export(state.params, config_json, pathlib.Path(parsed.export[1]))
        print(f"{parsed.export[1]}: config.json and model.safetensors, {size} bytes")
        return {}
    return run(parsed)


if __name__ == "__main__":
    main()
