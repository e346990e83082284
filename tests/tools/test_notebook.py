"""The notebooks of examples/: in step with their jupytext pairs, and every cell runs."""

import pathlib

import jupytext
import nbformat
import pytest
from cdna_support import require_cdna
from nbclient import NotebookClient

# The longest test: a group goes first, so that no worker waits for it at the end.
pytestmark = pytest.mark.xdist_group("notebook")
EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"


def code_cells(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("name", ["decode_step", "cdna_kernels", "deepseek_v4"])
def test_pair_is_in_step(name):
    paired = jupytext.read(EXAMPLES / f"{name}.py")
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    assert code_cells(notebook) == code_cells(paired), "run: make notebook"


def printed(name):
    """What the cells of a notebook print."""
    notebook = jupytext.read(EXAMPLES / f"{name}.py")
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(EXAMPLES)}}
    ).execute()
    return "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )


# pyzmq and the kernel's event loop warn about things that no notebook of ours decides.
@pytest.mark.filterwarnings("ignore")
def test_every_cell_runs():
    text = printed("decode_step")
    assert "same numbers after reinterpret: True" in text
    assert "unchanged: True" in text
    assert text.count("True") >= 6 and "False" not in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_deepseek_v4():
    text = printed("deepseek_v4")
    assert "3845 bytes a token over 43 layers" in text
    assert "token 9 sees [4, 5, 6, 7, 8, 9]" in text
    assert text.count("True") == 2 and "False" not in text


@pytest.mark.filterwarnings("ignore")
def test_kernels_as_machine_code():
    require_cdna("triton")
    require_cdna("xla")
    text = printed("cdna_kernels")
    assert text.count("error 1.6") == 4 and "1 waves: 19490 wave-instructions" in text
