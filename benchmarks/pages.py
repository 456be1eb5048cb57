"""What the scripts that measure a page share: commands that run once, and tables."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from featinv_diffusion.images import builtin_photo, read_image


def run(done: Path, arguments: Sequence[str]) -> None:
    """Runs a command of `featinv` unless its last file is there.

    Args:
        done: `metrics.json` in the folder that the command writes, or the one file that it writes.
            Beside it the command is kept: what another command made must be removed first.
    """
    record = done.with_suffix(".command")
    command = shlex.join(["featinv", *arguments])
    if record.exists():
        if record.read_text() != command:
            sys.exit(f"Error: {done} was made by another command. Remove it and start again.")
        return
    output = done.parent if done.name == "metrics.json" else done
    print("+", command, file=sys.stderr)
    whole = [sys.executable, "-m", "featinv_diffusion", *arguments, "--output", str(output)]
    subprocess.run(whole, check=True)
    record.write_text(command)


def crops(columns: int, rows: int = 1) -> Iterator[tuple[str, Image.Image]]:
    """Yields `columns` × `rows` named crops of 64 pixels from each of scikit-learn's two photos.

    Pictures that may be shown: data sets forbid it, these two are CC BY 2.0.
    """
    for path in (builtin_photo(), builtin_photo("china.jpg")):
        photo = read_image(path)
        side = photo.height // 2
        for i in range(columns):
            for j in range(rows):
                x = i * (photo.width - side) // max(columns - 1, 1)
                y = j * (photo.height - side) // (rows - 1) if rows > 1 else 0
                crop = photo.crop((x, y, x + side, y + side)).resize((64, 64))
                yield f"{path.stem}-{j}{i}", crop


def table(header: str, rows: Sequence[Sequence[str]]) -> str:
    """Returns a table in Markdown; the names of its columns are joined by `|`."""
    names = header.split("|")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def interval(figure: Mapping[str, float] | None, digits: int) -> str:
    """Returns `value [low, high]`, or a dash."""
    if figure is None:
        return "–"
    value, low, high = (f"{figure[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
