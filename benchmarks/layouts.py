"""What models cost on 8 and on 64 GPUs, by layout, as docs/many-devices.md has it: computed, not measured.

    python benchmarks/layouts.py             prints the three tables
    python benchmarks/layouts.py traffic     prints one of them: memory, traffic or purposes

Weights are bfloat16 and caches FP8. The model's shapes, how they lie on a mesh, and the formulas of
`sparse_mla_jax.parallel.traffic` decide all numbers.
"""

import argparse
from collections.abc import Iterator, Sequence

from pallas_kernels.targets import TARGETS, Link
from sparse_mla_jax.models.family import family_of
from sparse_mla_jax.parallel.axes import Parallel, parse_parallel
from sparse_mla_jax.parallel.traffic import (
    Exchange,
    StepSize,
    layer_traffic,
    rest_traffic,
    seconds,
    step_traffic,
    sum_by_axes,
)
from sparse_mla_jax.tools.layout import Load, cache_cost, published_model, room, weight_bytes

MODELS = {
    "DeepSeek-V3.2": "deepseek_v32",
    "GLM-5": "glm_moe_dsa",
    "DeepSeek-V4-Flash": "deepseek_v4",
    "DeepSeek-V4-Pro": "deepseek_v4_pro",
    "Hy4": "hy_v4_vl",
    "Hy4-preview": "hy_v4",
    "A.X-K2": "axk2",
    "Mistral Large 4": "mistral_large4",
    "dots3": "dots3_note",
}
MESHES = ("tensor=8", "data=2,tensor=4", "data=8", "context=2,tensor=4,experts=context+tensor")
LARGE = ("data=8,tensor=8", "data=8,context=2,tensor=4,experts=data+context+tensor", "data=64")
# The table of memory has those without "context", which leaves room for as many tokens as "data" does.
OWN_PAGES = (*MESHES[:3], LARGE[0])
# A decode step of 8 requests for each GPU.
REQUESTS, CONTEXT, DTYPE = 8, 131072, "bfloat16"
CACHES = "float8_e4m3fnuz"
MACHINES = tuple(one for one in TARGETS if one.link is not None)


def load(sizes: str) -> Load:
    """The requests of a group: 8 for each of its GPUs."""
    parallel = parse_parallel(sizes)
    return Load(REQUESTS * parallel.num_devices // parallel.data, CONTEXT, DTYPE, CACHES)


def step(name: str, sizes: str) -> StepSize:
    """The step of such requests."""
    config = published_model(name)
    return StepSize(load(sizes).batch, CONTEXT, family_of(config).default_page_size(config))


def count(number: int) -> str:
    """Tokens as a reader compares them; a dash for none."""
    return f"{number / 1e6:.2f} M" if number >= 10_000 else "-"


def markdown(header: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    """A Markdown table."""
    body = [f"| {' | '.join(line)} |" for line in (header, *rows)]
    return "\n".join([body[0], "|---" * len(header) + "|", *body[1:]])


def memory(models: Sequence[str] = tuple(MODELS)) -> str:
    """Weights and cache bytes per token of a GPU, and the tokens that fit on all of them, of every model."""
    header = ["model", "mesh", "weights, GB", "cache, bytes"]
    header += [f"{one.product}, {_size(one.memory)}" for one in MACHINES]

    def rows() -> Iterator[Sequence[str]]:
        for title in models:
            config = published_model(MODELS[title])
            for sizes in OWN_PAGES:
                parallel = parse_parallel(sizes)
                weights = weight_bytes(config, parallel, DTYPE)
                cost = cache_cost(config, parallel, CACHES)
                fits = [room(one.memory, weights, cost, parallel, load(sizes)).tokens for one in MACHINES]
                yield [title, f"`{sizes}`", f"{weights / 1e9:.1f}", f"{cost.per_token:,.0f}", *map(count, fits)]

    return markdown(header, rows())


def _size(number: int) -> str:
    return f"{number >> 30} GiB" if number % (1 << 30) == 0 else f"{number // 10**9} GB"


def traffic(models: Sequence[str] = ("DeepSeek-V3.2", "DeepSeek-V4-Flash")) -> str:
    """What a step sends by axes, and the time that links make of it."""
    header = ["model", "mesh", "axis", "bytes per token and layer", "collectives"]
    header += [f"{one.product}, ms: launches + bytes" for one in MACHINES]

    def rows() -> Iterator[Sequence[str]]:
        for title in models:
            config = published_model(MODELS[title])
            for sizes in (*MESHES, *LARGE):
                parallel, size = parse_parallel(sizes), step(MODELS[title], sizes)
                found = step_traffic(config, parallel, size)
                for axes, (launches, sent) in sum_by_axes(found).items():
                    mean = sent / size.tokens / config.num_hidden_layers
                    own = [one for one in found if "+".join(one.axes) == axes]
                    times = [_times(own, parallel, one.link) for one in MACHINES]
                    yield [title, f"`{sizes}`", axes, f"{mean:,.0f}", f"{launches:,}", *times]

    return markdown(header, rows())


def _times(found: Sequence[Exchange], parallel: Parallel, link: Link) -> str:
    """Milliseconds of launches and of bytes."""
    launches = seconds([one._replace(sent=0) for one in found], parallel, link)
    return f"{1e3 * launches:.1f} + {1e3 * (seconds(found, parallel, link) - launches):.2f}"


def purposes(name: str = "deepseek_v32", layer: int = 10) -> str:
    """What each collective is for: one layer with experts, then what a step has besides its layers."""
    header = ["mesh", "purpose", "axis", "kind", "launches", "bytes per token"]

    def rows() -> Iterator[Sequence[str]]:
        config = published_model(name)
        for sizes in (*MESHES, LARGE[0]):
            parallel, size = parse_parallel(sizes), step(name, sizes)
            rest = [one._replace(what=f"{one.what} (a step)") for one in rest_traffic(config, parallel, size)]
            for one in (*layer_traffic(config, layer, parallel, size), *rest):
                mean = one.sent / size.tokens
                yield [f"`{sizes}`", one.what, "+".join(one.axes), one.kind, str(one.launches), f"{mean:,.0f}"]

    return markdown(header, rows())


TABLES = {"memory": memory, "traffic": traffic, "purposes": purposes}


def main() -> int:
    """Prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=TABLES, help="which; all by default")
    chosen = parser.parse_args().table
    print("\n\n".join(make() for name, make in TABLES.items() if chosen in (None, name)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
