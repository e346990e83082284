"""The README's ten lines do what they say."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from cdna_support import require_cdna
from small_models import SMALL

from sparse_mla_jax.models import deepseek_v32

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_layer_called_from_a_users_own_jit():
    code = CODE[0]
    assert len(code.strip().splitlines()) <= 12
    names = {}
    exec(code, names)
    params = deepseek_v32.init_params(jax.random.key(0), SMALL)["layers"][0]["self_attn"]
    (cache, index_cache), _ = deepseek_v32.create_caches(SMALL, 4, 8)
    given = cache.latent
    hidden = jax.random.normal(jax.random.key(1), (3, SMALL.hidden_size))
    lengths = np.array([5, 0, 3]), np.array([2, 0, 1])  # a chunk of two tokens, a padded request, a decode token
    table = jnp.array([[2, -1], [-1, -1], [0, -1]])
    out, cache, index_cache = names["decode"](params, hidden, cache, index_cache, *lengths, table, config=SMALL)
    assert out.shape == hidden.shape and bool(jnp.isfinite(out).all())
    assert given.is_deleted(), "the cache was copied, not donated"
    written = np.flatnonzero(np.asarray(cache.scale).reshape(-1))
    np.testing.assert_array_equal(written, [2, 2 * 8 + 3, 2 * 8 + 4])


def test_a_kernel_as_machine_code(capsys):
    require_cdna("triton")
    names = {}
    exec(CODE[1], names)
    scores = np.sin(np.arange(500, dtype=np.float32))
    np.testing.assert_array_equal(names["positions"][0], np.sort(np.argsort(-scores, kind="stable")[:8]))
    assert "vgprs" in capsys.readouterr().out
    assert len(CODE) == 2
