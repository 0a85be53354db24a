"""The notebooks under examples/ run from the first cell to the last, and print what they tell."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb"))
SAID = {
    "health_and_harm": (
        "Sick: weak sparsity penalty", "Healthy:", "Sick: encoder bias off", "not told apart",
        "(harmful: True)",
    )
}  # fmt: skip


def printed(notebook) -> str:
    """Return what the cells print, but for warnings and progress."""
    outputs = [one for cell in notebook.cells for one in cell.get("outputs", ())]
    return "".join(one.text for one in outputs if one.get("name") == "stdout")


@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_its_text_says(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    found = printed(notebook)
    assert [words for words in SAID[path.stem] if words not in found] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_lies_here_with_what_it_prints(path):
    notebook = nbformat.read(path, as_version=4)
    found = printed(notebook)
    assert [words for words in SAID[path.stem] if words not in found] == []
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(one.get("name") != "stderr" for cell in code for one in cell.outputs)
