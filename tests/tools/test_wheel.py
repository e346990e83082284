"""What a wheel holds besides code: the small trained model, where the demo looks for it."""

import pathlib
import tomllib

from sparse_mla_jax.tools import demo

ROOT = next(p for p in pathlib.Path(__file__).parents if (p / "pyproject.toml").exists())


def test_the_small_model_ships_where_the_demo_looks():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert set(wheel["include"]) == {"/sparse_mla_jax", "/pallas_kernels", "/examples/tiny_python"}
    ((source, target),) = wheel["sources"].items()
    assert (ROOT / target, ROOT / source) == demo.MODELS
    assert {path.name for path in (ROOT / source).iterdir()} == {"config.json", "model.safetensors"}
    assert str(ROOT / source) == str(demo.DEFAULT_MODEL)
