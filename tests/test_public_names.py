"""`import sparse_mla_jax as sm`: public names, where they come from, and that importing the package is cheap."""

import ast
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import sparse_mla_jax as sm

ROOT = pathlib.Path(__file__).parent.parent
# Names and arguments are a contract: other programs call them. (`self` of a class stands for its fields.)
CONTRACT = {
    "quantize": "x group_size dtype scale_dtype",
    "dequantize": "values scales group_size dtype",
    "reinterpret": "values scales dtype",
    "PagedKVCache.create": "num_pages page_size latent_dim rope_dim group_size dtype scale_dtype",
    "PagedIndexCache.create": "num_pages page_size dim dtype",
    "write": "cache latent rope slots",
    "write_index": "cache key slots",
    "gather": "cache slots dtype",
    "indptr_from_lengths": "lengths",
    "pack_rows": "indices lengths limit",
    "slots_from_positions": "positions request_ids page_table page_size",
    "select_to_ragged": "positions request_ids page_table page_size valid",
    "combine_with_window": "positions query_positions window",
    "top_k": "scores k row_lengths row_starts return_scores implementation",
    "top_k_prefill": "scores k row_starts row_ends",
    "top_k_decode": "scores k seq_lens next_n",
    "indexer_scores": "q keys key_scales weights row_starts row_lengths implementation",
    "paged_indexer_scores": "q weights cache page_table request_ids lengths max_length implementation",
    "lightning_indexer": "q weights cache page_table request_ids lengths k max_length memory_limit implementation",
    "sparse_mla": "q kv rows sm_scale value_dim sinks extra return_lse implementation",
    "merge": "outs lses",
    "apply_sinks": "out lse sinks",
    "biased_grouped_topk": "logits bias num_groups groups_kept k scale renormalize",
    "softmax_grouped_topk": "logits num_groups groups_kept k scale renormalize",
    "sqrt_softplus_topk": "logits bias k scale",
    "hash_route": "logits token_ids table scale",
    "build_metadata": "seq_lens query_lens page_table num_tokens page_size",
    "Ragged": "values indptr",
    "StepMetadata": "positions request_ids slots lengths valid",
    "attention_step": "params hidden cache index_cache metadata config",
    "compressed_attention_step": "params hidden caches metadata config",
    "load_checkpoint": "",
    "Engine": "",
    "score": "",
    "DeepseekV32Config": "",
    "DeepseekV4Config": "",
}


# Former names of what has another one now.
OLD_NAMES = {"DeepseekV32Config": "MlaConfig"}


@pytest.mark.parametrize("name", sm.__all__)
def test_names_resolve_to_those_of_their_module(name):
    value = getattr(sm, name)
    assert value.__name__ == OLD_NAMES.get(name, name) and value.__doc__
    assert value is getattr(importlib.import_module(f"sparse_mla_jax.{sm._MODULE_OF[name]}"), name)
    assert value.__module__.startswith(("sparse_mla_jax.", "pallas_kernels."))


@pytest.mark.parametrize(("name", "arguments"), CONTRACT.items())
def test_the_contract_is_kept(name, arguments):
    first, *rest = name.split(".")
    assert first in sm.__all__
    value = getattr(sm, first)
    for attribute in rest:
        value = getattr(value, attribute)
    parameters = list(inspect.signature(value).parameters)
    at = [parameters.index(argument) for argument in arguments.split()]
    assert at == sorted(at)


def test_importing_the_package_imports_no_jax():
    code = (
        "import sys, sparse_mla_jax as sm; assert 'sparse_mla' in dir(sm) and 'reference' in dir(sm);"
        "assert not {'jax', 'numpy', 'pallas_kernels'} & set(sys.modules), 'an import is not lazy';"
        "from sparse_mla_jax import top_k, metadata; assert metadata.build_metadata is sm.build_metadata;"
        "from jax._src import xla_bridge; assert not xla_bridge._backends, 'import started a backend'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_submodules_are_not_shadowed():
    folder = ROOT / "sparse_mla_jax"
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & set(sm.__all__)
    assert set(sm._SUBMODULES) <= modules
    for name in sm._SUBMODULES:
        assert inspect.ismodule(getattr(sm, name))


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="'sparse_mla_jax' has no attribute 'sparse_mlp'"):
        _ = sm.sparse_mlp
    assert not hasattr(sm, "__wrapped__")


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "sparse_mla_jax" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.name: node.module for node in block.body for alias in node.names}
    names = {name: f"sparse_mla_jax.{module}" for name, module in sm._MODULE_OF.items()}
    assert typed == names | dict.fromkeys(sm._SUBMODULES, "sparse_mla_jax")


def test_the_docs_page_lists_them_all():
    page = (ROOT / "docs" / "api.md").read_text()
    assert re.findall(r"^- `(\w+)`: \S", page, re.MULTILINE) == sm.__all__
    assert re.findall(r"^## .*\(`sparse_mla_jax\.([\w.]+)`\)$", page, re.MULTILINE) == list(sm._MODULES)
