"""The indexer kernels where Python integers are int64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import indexer_logits
from pallas_kernels.plans.indexer import IndexerPlan


@pytest.mark.parametrize(("page_size", "key_steps"), [(8, 1), (32, 2)])
def test_paged_under_x64(page_size, key_steps):
    rng = np.random.default_rng(0)
    q, weights = rng.standard_normal((2, 3, 16)).astype(np.float32), rng.standard_normal((2, 3)).astype(np.float32)
    keys = rng.standard_normal((64 // page_size, page_size, 16)).astype(np.float32)
    pages, lengths = rng.permutation(len(keys)).astype(np.int32)[None], np.array([64, 40], np.int32)
    plan = IndexerPlan(key_block=16, key_steps=key_steps, head_block=16, keys_first=True)
    with jax.enable_x64(True):
        arrays = map(jnp.asarray, (q, keys, weights, pages, np.zeros(2, np.int32), lengths))
        q_in, keys_in, *others = arrays
        got = indexer_logits.paged(q_in, keys_in, jnp.dtype("float32"), None, *others, max_length=64, plan=plan)
    products = np.maximum(np.einsum("thd,nd->thn", q, keys[pages[0]].reshape(64, 16)), 0)
    want = np.where(np.arange(64) < lengths[:, None], np.einsum("th,thn->tn", weights, products), -np.inf)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
