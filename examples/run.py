"""Run the notebooks of this folder, and keep what they print and draw.

    python examples/run.py             all of them
    python examples/run.py 1 5         some

Pictures are kept at a width of at most 900 pixels, so that the repository stays small.
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
WIDTH = 900


def main() -> None:
    wanted = sys.argv[1:]
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not wanted or path.name.split("_")[0] in wanted:
            with tempfile.TemporaryDirectory() as folder:
                notebook = run(path, Path(folder))
            shrink(notebook)
            nbformat.write(notebook, path)
            print(f"Ran {path.name}.", flush=True)


def run(path: Path, folder: Path) -> Any:
    """Returns the notebook with its outputs, run in a folder by this Python and this checkout.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(path, 4)
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


def shrink(notebook: Any) -> None:
    """Makes wide pictures of the outputs smaller."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" not in data:
                continue
            picture = Image.open(BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
            if picture.width > WIDTH:
                picture.thumbnail((WIDTH, picture.height))
                file = BytesIO()
                picture.save(file, "PNG", optimize=True)
                data["image/png"] = base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    main()
