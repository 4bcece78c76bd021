"""Every notebook runs from top to bottom without a red line, says what was found, and is committed without outputs."""

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def kernel():
    """One for all notebooks: most of what a small one takes is the start of another."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    client.stop_channels()
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, kernel, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    fresh = f"%reset -f\n%cd -q {tmp_path}"  # names of another notebook's do not serve this one
    notebook.cells.insert(0, nbformat.v4.new_code_cell(fresh))
    NotebookClient(notebook, km=kernel, timeout=300).execute()
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "application/vnd.plotly.v1+json" in output.get("data", {})
    ]
    assert figures or path.stem == "06_your_own_model"
    red = [
        output["text"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream" and output["name"] == "stderr"
    ]
    if find_spec("ipywidgets") is None:  # of the extra [notebook]: without it tqdm warns
        red = [text for text in red if "IProgress not found" not in text]
    assert not red
    found = notebook.cells[-1].outputs[-1]["data"]["text/markdown"]
    assert re.search(r"\d", found) and "nan" not in found


def test_the_first_look_is_six_lines_at_most():
    """Two models loaded, attributed, patched and drawn."""
    first = next(cell for cell in json.loads(NOTEBOOKS[0].read_text())["cells"] if cell["cell_type"] == "code")
    source = "".join(first["source"])
    assert len([line for line in source.splitlines() if line.strip()]) <= 6
    for word in ("explain", "activation_patching", "tiny-noLN", ".plot()"):
        assert word in source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_ends_with_what_was_found_as_the_cell_computes_it(path):
    *_, heading, last = json.loads(path.read_text())["cells"]
    assert "".join(heading["source"]).startswith("## What was found")
    assert "Markdown(" in "".join(last["source"]) and not re.search(
        r"\d\.\d", "".join(last["source"]).replace(".2%", "")
    )


def test_there_are_nine():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06", "07", "08", "09"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stripped_and_public(path):
    notebook = json.loads(path.read_text())
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            private = [
                line for line in source.splitlines() if "import" in line and "lnfree_interp" in line and " _" in line
            ]
            assert not private
    kinds = [cell["cell_type"] for cell in notebook["cells"]]
    assert kinds[0] == "markdown" and kinds.count("markdown") >= 4
