"""DeepSeek Sparse Attention for JAX: exact top-k selection and sparse latent attention over paged FP8 caches.

    import sparse_mla_jax as sm

    selected = sm.lightning_indexer(...)
    out = sm.sparse_mla(...)

Public names are imported at their first use: importing the package imports neither jax nor a backend. Each name can
also be imported from the module that defines it; `_MODULES` lists the modules.
"""

from __future__ import annotations

import importlib

from sparse_mla_jax._interrupts import leave_if_program
from sparse_mla_jax._plugin_message import hide_plugin_message

# First of all: only what comes before this line can be interrupted with a traceback.
leave_if_program()
hide_plugin_message()

# For type checkers, which know the name: `typing` takes longer to import than this package.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from sparse_mla_jax import config as config
    from sparse_mla_jax import interchange as interchange
    from sparse_mla_jax import layers as layers
    from sparse_mla_jax import metadata as metadata
    from sparse_mla_jax import models as models
    from sparse_mla_jax import ops as ops
    from sparse_mla_jax import parallel as parallel
    from sparse_mla_jax import reference as reference
    from sparse_mla_jax import serving as serving
    from sparse_mla_jax.config import DeepseekV4Config as DeepseekV4Config
    from sparse_mla_jax.config import DeepseekV32Config as DeepseekV32Config
    from sparse_mla_jax.config import MlaConfig as MlaConfig
    from sparse_mla_jax.config import RopeConfig as RopeConfig
    from sparse_mla_jax.config import config_from_json as config_from_json
    from sparse_mla_jax.config import default_config as default_config
    from sparse_mla_jax.config import from_hf as from_hf
    from sparse_mla_jax.config import load_config as load_config
    from sparse_mla_jax.export import kernel_checks as kernel_checks
    from sparse_mla_jax.export import lower_for as lower_for
    from sparse_mla_jax.interchange import index_from_planar_blocks as index_from_planar_blocks
    from sparse_mla_jax.interchange import index_to_planar_blocks as index_to_planar_blocks
    from sparse_mla_jax.interchange import kv_from_v4_blocks as kv_from_v4_blocks
    from sparse_mla_jax.interchange import kv_from_v32_rows as kv_from_v32_rows
    from sparse_mla_jax.interchange import kv_to_v4_blocks as kv_to_v4_blocks
    from sparse_mla_jax.interchange import kv_to_v32_rows as kv_to_v32_rows
    from sparse_mla_jax.layers.compressed_attention import LayerCaches as LayerCaches
    from sparse_mla_jax.layers.compressed_attention import compressed_attention_step as compressed_attention_step
    from sparse_mla_jax.layers.compressed_attention import select_entries as select_entries
    from sparse_mla_jax.layers.hyper_connections import join_streams as join_streams
    from sparse_mla_jax.layers.hyper_connections import merge_streams as merge_streams
    from sparse_mla_jax.layers.hyper_connections import split_streams as split_streams
    from sparse_mla_jax.layers.mla import attention_step as attention_step
    from sparse_mla_jax.layers.mla import select_positions as select_positions
    from sparse_mla_jax.metadata import StepMetadata as StepMetadata
    from sparse_mla_jax.metadata import bucket_for as bucket_for
    from sparse_mla_jax.metadata import buckets as buckets
    from sparse_mla_jax.metadata import build_metadata as build_metadata
    from sparse_mla_jax.metadata import decode_metadata as decode_metadata
    from sparse_mla_jax.models.checkpoint import load_checkpoint as load_checkpoint
    from sparse_mla_jax.models.checkpoint import save_checkpoint as save_checkpoint
    from sparse_mla_jax.models.sharded_checkpoint import shard_checkpoint as shard_checkpoint
    from sparse_mla_jax.ops.attention import apply_sinks as apply_sinks
    from sparse_mla_jax.ops.attention import merge as merge
    from sparse_mla_jax.ops.attention import sparse_mla as sparse_mla
    from sparse_mla_jax.ops.cache import PagedIndexCache as PagedIndexCache
    from sparse_mla_jax.ops.cache import PagedKVCache as PagedKVCache
    from sparse_mla_jax.ops.cache import gather as gather
    from sparse_mla_jax.ops.cache import gather_index as gather_index
    from sparse_mla_jax.ops.cache import reinterpret_cache as reinterpret_cache
    from sparse_mla_jax.ops.cache import write as write
    from sparse_mla_jax.ops.cache import write_index as write_index
    from sparse_mla_jax.ops.cache import write_token as write_token
    from sparse_mla_jax.ops.compressor import CompressorState as CompressorState
    from sparse_mla_jax.ops.compressor import CompressorWeights as CompressorWeights
    from sparse_mla_jax.ops.compressor import compress as compress
    from sparse_mla_jax.ops.compressor import entry_pages as entry_pages
    from sparse_mla_jax.ops.compressor import num_entries as num_entries
    from sparse_mla_jax.ops.fp8 import dequantize as dequantize
    from sparse_mla_jax.ops.fp8 import quantize as quantize
    from sparse_mla_jax.ops.fp8 import reinterpret as reinterpret
    from sparse_mla_jax.ops.indexer import indexer_scores as indexer_scores
    from sparse_mla_jax.ops.indexer import lightning_indexer as lightning_indexer
    from sparse_mla_jax.ops.indexer import paged_indexer_scores as paged_indexer_scores
    from sparse_mla_jax.ops.merge_across import merge_across as merge_across
    from sparse_mla_jax.ops.norm_rope import norm_rope as norm_rope
    from sparse_mla_jax.ops.output_projection import rotated_projection as rotated_projection
    from sparse_mla_jax.ops.plans import plan_for as plan_for
    from sparse_mla_jax.ops.plans import plans_for as plans_for
    from sparse_mla_jax.ops.ragged import DenseRows as DenseRows
    from sparse_mla_jax.ops.ragged import Ragged as Ragged
    from sparse_mla_jax.ops.ragged import combine_with_window as combine_with_window
    from sparse_mla_jax.ops.ragged import indptr_from_lengths as indptr_from_lengths
    from sparse_mla_jax.ops.ragged import pack_rows as pack_rows
    from sparse_mla_jax.ops.ragged import select_to_ragged as select_to_ragged
    from sparse_mla_jax.ops.ragged import slots_from_positions as slots_from_positions
    from sparse_mla_jax.ops.rope import rope_frequencies as rope_frequencies
    from sparse_mla_jax.ops.rope import rotate as rotate
    from sparse_mla_jax.ops.router import biased_grouped_topk as biased_grouped_topk
    from sparse_mla_jax.ops.router import hash_route as hash_route
    from sparse_mla_jax.ops.router import softmax_grouped_topk as softmax_grouped_topk
    from sparse_mla_jax.ops.router import sqrt_softplus_topk as sqrt_softplus_topk
    from sparse_mla_jax.ops.topk import top_k as top_k
    from sparse_mla_jax.ops.topk import top_k_decode as top_k_decode
    from sparse_mla_jax.ops.topk import top_k_prefill as top_k_prefill
    from sparse_mla_jax.ops.topk_merge import top_k_merge as top_k_merge
    from sparse_mla_jax.ops.topk_merge import top_k_share as top_k_share
    from sparse_mla_jax.ops.window import WindowCache as WindowCache
    from sparse_mla_jax.ops.window import ring_size as ring_size
    from sparse_mla_jax.ops.window import ring_slots as ring_slots
    from sparse_mla_jax.ops.window import window_slots as window_slots
    from sparse_mla_jax.parallel.axes import Parallel as Parallel
    from sparse_mla_jax.parallel.axes import make_mesh as make_mesh
    from sparse_mla_jax.parallel.caches import partition_caches as partition_caches
    from sparse_mla_jax.parallel.partition import partition_params as partition_params
    from sparse_mla_jax.serving.engine import Engine as Engine
    from sparse_mla_jax.serving.scoring import score as score

__version__ = "0.2.0"

# The public names of each module.
_MODULES = {
    "ops.fp8": ("quantize", "dequantize", "reinterpret"),
    "ops.cache": (
        "PagedKVCache",
        "PagedIndexCache",
        "write",
        "write_index",
        "write_token",
        "gather",
        "gather_index",
        "reinterpret_cache",
    ),
    "ops.indexer": ("lightning_indexer", "indexer_scores", "paged_indexer_scores"),
    "ops.topk": ("top_k", "top_k_prefill", "top_k_decode"),
    "ops.topk_merge": ("top_k_merge", "top_k_share"),
    "ops.ragged": (
        "Ragged",
        "DenseRows",
        "indptr_from_lengths",
        "pack_rows",
        "slots_from_positions",
        "select_to_ragged",
        "combine_with_window",
    ),
    "ops.window": ("WindowCache", "ring_size", "ring_slots", "window_slots"),
    "ops.attention": ("sparse_mla", "merge", "apply_sinks"),
    "ops.merge_across": ("merge_across",),
    "ops.compressor": ("CompressorState", "CompressorWeights", "compress", "entry_pages", "num_entries"),
    "ops.router": ("biased_grouped_topk", "softmax_grouped_topk", "sqrt_softplus_topk", "hash_route"),
    "ops.rope": ("rope_frequencies", "rotate"),
    "ops.norm_rope": ("norm_rope",),
    "ops.output_projection": ("rotated_projection",),
    "ops.plans": ("plan_for", "plans_for"),
    "metadata": ("StepMetadata", "build_metadata", "decode_metadata", "buckets", "bucket_for"),
    "layers.mla": ("attention_step", "select_positions"),
    "layers.compressed_attention": ("compressed_attention_step", "LayerCaches", "select_entries"),
    "layers.hyper_connections": ("split_streams", "join_streams", "merge_streams"),
    "config": (
        *("DeepseekV32Config", "DeepseekV4Config", "MlaConfig", "RopeConfig"),
        *("config_from_json", "default_config", "from_hf", "load_config"),
    ),
    "parallel.axes": ("Parallel", "make_mesh"),
    "parallel.partition": ("partition_params",),
    "parallel.caches": ("partition_caches",),
    "export": ("lower_for", "kernel_checks"),
    "models.checkpoint": ("load_checkpoint", "save_checkpoint"),
    "models.sharded_checkpoint": ("shard_checkpoint",),
    "serving.engine": ("Engine",),
    "serving.scoring": ("score",),
    "interchange": (
        "kv_to_v32_rows",
        "kv_from_v32_rows",
        "index_to_planar_blocks",
        "index_from_planar_blocks",
        "kv_to_v4_blocks",
        "kv_from_v4_blocks",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
_SUBMODULES = ("config", "interchange", "layers", "metadata", "models", "ops", "parallel", "reference", "serving")

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> object:
    """Imports a public name or a submodule at its first use."""
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Names that the module holds already, and names that it would import."""
    return sorted({*globals(), *__all__, *_SUBMODULES})
