"""Every model module offers the same functions with the same arguments, and the config chooses among them."""

import inspect

import pytest
from small_models import SMALL

from sparse_mla_jax.config import DEEPSEEK_V4_FLASH
from sparse_mla_jax.families.registry import published_family
from sparse_mla_jax.models import deepseek_v4, deepseek_v32
from sparse_mla_jax.models.common import Family
from sparse_mla_jax.models.family import family_of


@pytest.mark.parametrize("name", Family._fields)
def test_signatures_are_alike(name):
    functions = [getattr(module.FAMILY, name) for module in (deepseek_v32, deepseek_v4)]
    assert list(inspect.signature(functions[0]).parameters) == list(inspect.signature(functions[1]).parameters)
    assert all(getattr(module, name) is function for module, function in zip((deepseek_v32, deepseek_v4), functions))


def test_the_config_chooses():
    assert family_of(SMALL) is deepseek_v32.FAMILY and family_of(DEEPSEEK_V4_FLASH) is deepseek_v4.FAMILY
    assert published_family(DEEPSEEK_V4_FLASH).model_types == ("deepseek_v4",)
    for choose in (family_of, published_family):
        with pytest.raises(ValueError, match="config is a dict; expected is one of MlaConfig, DeepseekV4Config"):
            choose({})
