"""The top-k kernel lowers for cuda and rocm from a CPU host: in registers, by groups, by counting."""

import jax
import jax.numpy as jnp
import pytest
from support.lowering import CUSTOM_CALL, TARGETS, lower
from support.marks import slow

from sparse_mla_jax.ops.topk import top_k, top_k_decode

shape = jax.ShapeDtypeStruct
NVIDIA, *AMD = TARGETS
ROWS = [(64, 131072, 2048), (8, 2048, 128), (33, 20001, 1000), (2, 20000, 5000), (1, 1, 1), (3, 50, 5000)]


# AMD's targets differ in nothing that a row sees: three rows with each.
@pytest.mark.parametrize(
    ("target", "rows", "columns", "k"),
    [
        *[(NVIDIA, *row) for row in ROWS],
        *[(AMD[n % 2], *row) for n, row in enumerate(ROWS)],
        *[slow(AMD[1 - n % 2], *row) for n, row in enumerate(ROWS)],
    ],
)
def test_top_k(target, rows, columns, k):
    scores, row = shape((rows, columns), jnp.float32), shape((rows,), jnp.int32)
    text = lower(target, lambda s, n, a: top_k(s, k, n, row_starts=a, implementation="triton"), scores, row, row)
    assert text.count(CUSTOM_CALL) == 1


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t[0])
def test_top_k_decode_with_scores(target):
    scores, seq_lens = shape((16, 4097), jnp.bfloat16), shape((8,), jnp.int32)
    text = lower(
        target, lambda s, n: top_k_decode(s, 64, seq_lens=n, next_n=2, implementation="triton"), scores, seq_lens
    )
    assert text.count(CUSTOM_CALL) == 1
