"""Tests that take five seconds or more and repeat, over another size, type or machine, what a quicker one shows.

They are slow tests: `make test-all` and the slices of CI run them. What is left by default has each kind of input, each
implementation and each machine of its module. Seconds are those of a 2-core machine with nothing compiled before.
"""

import re

import pytest

# Path below tests/, test, and the beginning of the variant; what still shows the same by default.
LONG = (
    # The notebook as a whole (51 s): its kernels are those of test_cdna_counts.
    r"tools/test_notebook.py::test_kernels_as_machine_code",
    # Training in both phases (85 s): each loss has a test of its own.
    r"models/test_train_tiny.py::test_(training_learns_in_both_phases_and_resumes|checkpoints_keep_everything)",
    r"models/test_train_tiny.py::test_each_part_learns_from_its_own_loss\[False",
    # The V4 model as a whole (95 s): its fixture by chunks stays; layers run as machine code.
    r"models/test_v4_model.py::test_fixture\[(prefill|decode)",
    r"models/test_v4_model.py::test_implementations_agree\[gfx950",
    r"models/test_v4_model.py::test_other_shapes",
    r"models/test_v4_model.py::test_prefill_and_decode_functions",
    r"models/test_v4_model.py::test_bfloat16_model",
    # The V3.2 model (130 s): a prompt and then steps, one shape beside awkward families, XLA stays; machine code
    # is in test_cdna_kernels, types of caches in test_engine.
    r"models/test_model.py::test_fixture_by_implementation\[(reference|gfx9)",
    r"models/test_model.py::test_fixture\[(decode|chunks)",
    r"models/test_model.py::test_cache_types",
    r"models/test_model.py::test_other_shapes\[(dense layers|plain rope|no shared)",
    r"models/test_model.py::test_init_params\[bfloat16",
    r"models/test_model.py::test_caches_are_updated_in_place\[bfloat16",
    r"models/test_checkpoint.py::test_round_trip\[float32-dense only",
    r"models/test_checkpoint_v4.py::test_round_trip\[float32-no shared",
    # Interpret mode of three kernels with another plan (25 s): other operators, and plans in test_attention_plans.
    r"kernels/test_plans.py::test_a_config_replaces_the_plan\[(compress|top_k|norm_rope)",
    r"kernels/test_attention_plans.py::test_numbers_that_are_nan_to_the_units\[v4-1",
    # Layers (34 s): one config of each type and implementation stays.
    r"layers/test_compressed_attention.py::test_fused_projections_change_nothing\[1-config(1|3|4)",
    r"layers/test_mla.py::test_quantised_index_queries_select_by_rounded_scores\[float8_e4m3fn-xla",
    # Compressors (25 s): other chunkings, and XLA:ROCm once for each machine.
    r"ops/test_compressor.py::test_any_chunking_gives_the_same_bits\[xla-(4-overlap|8-alone)",
    r"ops/test_compressor.py::test_published_sizes_give_the_same_bits\[xla-128",
    # Every plan of the kernel (30 s): each is right by test_compressor.
    r"ops/test_compressor_programs.py::test_blocks_change_no_bit",
    r"ops/test_compressor_programs.py::test_one_launch_in_place_by_xla_rocm\[(float32|float8_e4m3fnuz-4-False)",
    # The command around what test_the_step_at_published_sizes measures (16 s).
    r"tools/test_inspection.py::test_step_command",
    # A V4 layer with its experts left out (16 s): a V3.2 step and layer stay.
    r"tools/test_inspection.py::test_launches_of_a_v4_layer",
    # 43 layers of V4 in one program (15 s): V3.2's step stays.
    r"tools/test_bench.py::test_a_shrunk_case_is_right\[step-v4-b128-43-layers",
)
_LONG = re.compile("|".join(LONG))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks the long tests, before shards and `-m` ask for the mark."""
    for item in items:
        if _LONG.search(item.nodeid):
            item.add_marker(pytest.mark.slow)
