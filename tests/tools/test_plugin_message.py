"""jax's message about its ROCm plugin is hidden where it says nothing, and nothing else is."""

import logging
import os
import pathlib
import subprocess
import sys

import pytest

from sparse_mla_jax import _plugin_message

ROOT = pathlib.Path(__file__).parents[2]
NO_GPU = "No AMD GPUs were found, skipping ROCm plugin initialization"


@pytest.fixture
def shown(monkeypatch):
    """Records that the logger of jax lets pass."""
    logger, records = logging.getLogger(_plugin_message.LOGGER), []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", records.append)
    logger.addHandler(handler)
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(_plugin_message, "DRIVERS", ())
    yield records
    logger.removeHandler(handler)


def log(error):
    """What jax's discovery of plugins does with an exception of a plugin."""
    try:
        raise error
    except type(error):
        logging.getLogger(_plugin_message.LOGGER).exception("Jax plugin configuration error: %s", "x.initialize()")


def test_only_this_message_is_hidden(shown):
    log(ValueError(NO_GPU))
    assert shown == []
    log(ValueError("No NVIDIA GPUs were found"))
    log(RuntimeError("the driver is too old"))
    logging.getLogger(_plugin_message.LOGGER).warning(NO_GPU)
    assert len(shown) == 3


def test_where_a_driver_is_the_message_says_what_is_wrong(shown, monkeypatch, tmp_path):
    monkeypatch.setattr(_plugin_message, "DRIVERS", (str(tmp_path),))
    log(ValueError(NO_GPU))
    assert len(shown) == 1


def test_a_second_import_adds_nothing():
    logger = logging.getLogger(_plugin_message.LOGGER)
    before = list(logger.filters)
    _plugin_message.hide_plugin_message()
    assert logger.filters == before and before.count(_plugin_message.passes) == 1


@pytest.mark.skipif(any(map(os.path.exists, _plugin_message.DRIVERS)), reason="there may be a GPU")
def test_a_library_user_is_not_greeted_by_it():
    code = "import sparse_mla_jax, jax, logging; print(jax.devices()[0].platform, jax.config.jax_platforms);"
    code += "assert not logging.getLogger().handlers and logging.getLogger('jax').level == logging.NOTSET"
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0 and "configuration error" not in process.stderr and "AMD" not in process.stderr
    # No platform was chosen.
    assert process.stdout.split()[1] == "None"
