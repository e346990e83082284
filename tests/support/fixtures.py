"""The folder of checkpoints that tests compare with: small files from tests/fixtures, weights from their seeds."""

import os
import pathlib
import shutil

import pytest

from support.seeded import write_model

FIXTURES = pathlib.Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="session")
def fixtures(tmp_path_factory):
    """A folder like tests/fixtures in which every model has its model.safetensors; made once for all workers."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "published"
    if not shared.exists():
        own = tmp_path_factory.mktemp("published") / "folder"
        shutil.copytree(FIXTURES, own, ignore=shutil.ignore_patterns("*_tiny"))
        for folder in FIXTURES.glob("*_tiny"):
            write_model(folder, own / folder.name)
        try:
            own.rename(shared)
        except OSError:  # another worker was first
            assert shared.exists()
    return shared
