"""The notebooks: they run, what they name exists, and what they show came from their own code."""

from __future__ import annotations

import ast
import json
import tempfile
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def _trees(path: Path) -> list[ast.Module]:
    """Parses the cells, without the lines that are IPython's."""
    cells = [c["source"] for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    return [ast.parse("".join(x for x in cell if not x.startswith(("!", "%")))) for cell in cells]


def test_there_are_six_notebooks() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == list("123456")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_names_exists(path: Path) -> None:
    fi = import_module("featinv_diffusion")
    named = 0
    for node in (node for tree in _trees(path) for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "fi":
                named += 1
                assert hasattr(fi, node.attr), f"fi.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(fi.__name__):
            for name in node.names:
                assert hasattr(import_module(node.module or ""), name.name), name.name
    assert named


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_from_top_to_bottom(path: Path) -> None:
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output["output_type"] == "error" for output in outputs)
    for output in outputs:
        output.get("data", {}).pop("image/png", None)  # base64 has slashes of its own
    text = json.dumps(cells, ensure_ascii=False)
    for folder in (ROOT, Path.home(), Path(tempfile.gettempdir())):
        assert f"{folder}/" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat", reason="the extra docs is not installed")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("STEPS", "4")  # a shorter training than a reader would run
    import_module("run").run(nbformat.read(path, 4), tmp_path)
