"""examples/decode_step.ipynb: in step with its jupytext pair, and every cell runs."""

import pathlib

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def code_cells(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_pair_is_in_step():
    paired = jupytext.read(EXAMPLES / "decode_step.py")
    notebook = nbformat.read(EXAMPLES / "decode_step.ipynb", as_version=4)
    assert code_cells(notebook) == code_cells(paired), "run: make notebook"


# pyzmq and the kernel's event loop warn about things that no notebook of ours decides.
@pytest.mark.filterwarnings("ignore")
def test_every_cell_runs():
    notebook = jupytext.read(EXAMPLES / "decode_step.py")
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(EXAMPLES)}}
    ).execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert "same numbers after reinterpret: True" in text
    assert "unchanged: True" in text
    assert text.count("True") >= 6 and "False" not in text
