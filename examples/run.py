"""Run the notebooks of this folder, and keep what they print and draw.

    python examples/run.py             all of them
    python examples/run.py 1 5         some

Pictures are kept at a width of at most 720 pixels, so that the repository stays small.
"""

from __future__ import annotations

import base64
import os
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parent
WIDTH = 720
WIDGET = "application/vnd.jupyter.widget-view+json"


def main() -> None:
    wanted = sys.argv[1:]
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not wanted or path.name.split("_")[0] in wanted:
            with tempfile.TemporaryDirectory() as folder:
                notebook = run(nbformat.read(path, 4), Path(folder))
                tidy(notebook, folder)
            nbformat.write(notebook, path)
            print(f"Ran {path.name}.", flush=True)


def run(notebook: Any, folder: Path) -> Any:
    """Returns a notebook with its outputs, run in a folder by this Python and this checkout.

    Raises:
        CellExecutionError: a cell failed.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(FOLDER.parent),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HF_HUB_OFFLINE": "1",
    }
    client = NotebookClient(
        notebook, timeout=3600, record_timing=False, resources={"metadata": {"path": str(folder)}}
    )
    return client.execute(env=environment)


def tidy(notebook: Any, folder: str) -> None:
    """Leaves out progress bars, widgets, notes of libraries and the folder; shrinks pictures."""
    for cell in notebook.cells:
        kept = [
            output
            for output in cell.get("outputs", ())
            if output.get("name") != "stderr"
            and not (output.output_type == "display_data" and "image/png" not in output.data)
            and WIDGET not in output.get("data", {})
        ]
        for output in kept:
            if "text" in output:
                output.text = output.text.replace(f"{folder}/", "")
            for kind, value in output.get("data", {}).items():
                if kind == "image/png":
                    output.data[kind] = shrink(value)
                elif isinstance(value, str):
                    output.data[kind] = value.replace(f"{folder}/", "")
        if "outputs" in cell:
            cell.outputs = kept


def shrink(encoded: str) -> str:
    """Makes a wide picture smaller."""
    picture = Image.open(BytesIO(base64.b64decode(encoded))).convert("RGB")
    picture.thumbnail((WIDTH, picture.height))
    file = BytesIO()
    picture.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    main()
