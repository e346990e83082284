"""Which test modules a fault is shown to: the operator's own first, then those that use it. Modules go by name."""

from __future__ import annotations

import pathlib

from mutation.sites import Site

# By stem of the broken file: names of test modules without `test_` and `.py`. "cache" also means test_cache_*.py.
_BY_STEM = {
    # ops
    "attention": "attention window mla compressed_attention",
    "cache": "cache window interchange mla",
    "compressor": "compressor compressed_attention v4_model",
    "fp8": "fp8 cache mla norm_rope",
    "hyper_connections": "hyper_connections v4_model",
    "indexer": "indexer mla lowering_attention",
    "norm_rope": "norm_rope mla compressed_attention",
    "output_projection": "output_projection compressed_attention",
    "ragged": "ragged window metadata attention",
    "rope": "rope norm_rope mla compressed_attention",
    "router": "router mla v4_model",
    "topk": "topk lowering_topk mla",
    "window": "window compressed_attention",
    "chunks": "topk indexer norm_rope attention",
    "dispatch": "operators targets topk norm_rope fp8 plans",
    "check": "ragged window topk cache indexer compressor",
    "slot_parts": "cache window interchange mla",
    # layers
    "mla": "mla model cdna_kernels",
    "compressed_attention": "compressed_attention v4_model",
    "moe": "mla v4_model model",
    "moe_v4": "v4_model mla",
    "norm": "mla model hyper_connections",
    "projections": "mla compressed_attention output_projection",
    # models
    "shapes": "config model v4_model",
    "fields": "config",
    "json_fields": "config families",
    "registry": "config family",
    "published": "config",
    "tensor_table": "checkpoint checkpoint_v4",
    "weight_files": "checkpoint tensor_forms folder_replacement checkpoint_fuzz",
    "quantized_weights": "tensor_forms checkpoint checkpoint_v4",
    "tensor_forms": "tensor_forms checkpoint checkpoint_v4",
    "foreign_names": "tensor_forms",
    "folder_replacement": "folder_replacement",
    "folder": "folder_replacement checkpoint",
    "config": "config checkpoint checkpoint_v4 model v4_model",
    "checkpoint": "checkpoint checkpoint_v4 model",
    "published_v32": "checkpoint model",
    "checkpoint_v32": "checkpoint model",
    "published_v4": "checkpoint_v4 v4_model",
    "checkpoint_v4": "checkpoint_v4 v4_model",
    "v4_params": "checkpoint_v4 v4_model",
    "params_v4": "checkpoint_v4 v4_model",
    "params_v32": "checkpoint model",
    "params_mla": "checkpoint model mla_families",
    "deepseek_v32": "model checkpoint engine",
    "deepseek_v4": "v4_model v4_engine readme",
    "family": "engine v4_engine cli model v4_model",
    "step_ends": "model v4_model engine",
    "steps": "model v4_model engine",
    "common": "model v4_model engine",
    # serving
    "scheduler": "scheduler balance engine v4_engine",
    "balance": "balance engine_on_mesh",
    "packing": "engine v4_engine",
    "pages": "pages scheduler balance engine",
    "sampling": "sampling engine",
    "engine": "engine v4_engine cli",
    "scoring": "engine cli",
    "model_step": "engine v4_engine",
    "step": "engine v4_engine",
    "requests": "requests engine",
    "sizes": "engine cli",
    "memory": "engine",
    "generation": "generation cli",
    # kernels
    "cache_write": "cache norm_rope compressor plans",
    "cache_parts": "cache norm_rope compressor plans",
    "rounding": "cache norm_rope compressor",
    "compress": "compressor plans",
    "fp8_bits": "fp8_bits fp8 cache attention indexer",
    "indexer_logits": "indexer plans",
    "merge_splits": "attention plans",
    "online_softmax": "attention",
    "call": "topk cache indexer attention cdna_kernels cdna_compile lowering_attention",
    "primitives": "topk cache indexer attention cdna_kernels cdna_compile",
    "targets": "targets cache topk cdna_compile lowering_attention lowering_topk plans",
    "tiles": "topk attention indexer output_projection",
}
_ATTENTION = "attention plans window"
_BY_ROOM = {
    "ops": "mla compressed_attention",
    "layers": "mla compressed_attention model v4_model",
    "metadata": "metadata model v4_model engine",
    "models": "config checkpoint checkpoint_v4 model v4_model engine",
    "serving": "scheduler engine v4_engine",
    "kernels": _ATTENTION,
}
# What is run first: kernels as machine code, since interpret mode takes several times as long and checks less;
# elsewhere the bodies that run on a CPU anyway. The rest follows for faults that got through.
_OTHERS = "triton or gfx950 or interpret"
_FIRST = {"kernels": f"not (reference or xla or {_OTHERS})"}


def selections(site: Site) -> list[str]:
    """Values of pytest's -k, one run each; together they select every test once."""
    first = _FIRST.get(site.room, f"not ({_OTHERS})")
    return [first, f"not ({first})"]


def _names(site: Site) -> list[str]:
    """Names of test modules, the likeliest first, without repeats."""
    stem = pathlib.PurePath(site.path).stem.strip("_")
    room = _BY_ROOM[site.room].split()
    if "sparse_attention" in site.path or stem == "attention_source":
        return list(dict.fromkeys([*_ATTENTION.split(), *room]))
    # topk_row is tested with topk, and a family's config before its model.
    family = max((key for key in _BY_STEM if stem == key or stem.startswith(key + "_")), key=len, default=stem)
    known = ["config"] if "/families/" in site.path else [stem, family]
    return list(dict.fromkeys([*known, *_BY_STEM.get(family, "").split(), *room]))


def modules(tree: pathlib.Path, site: Site) -> list[str]:
    """Paths of the test modules of a tree that a fault is shown to, in this order."""
    files = {path.stem: path for path in sorted((tree / "tests").rglob("test_*.py"))}
    found = []
    for name in _names(site):
        own = [stem for stem in files if stem == f"test_{name}" or stem.startswith(f"test_{name}_")]
        found += [files[stem].relative_to(tree).as_posix() for stem in sorted(own)]
    return list(dict.fromkeys(found))
