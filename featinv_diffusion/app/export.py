"""What makes the pictures of a state again: a command, lines of Python, and files."""

from __future__ import annotations

import shlex
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from featinv_diffusion.app.edits import Scale, concepts_of, needs_second
from featinv_diffusion.app.members import has_places
from featinv_diffusion.app.studio import Rendered
from featinv_diffusion.features.maps import write_maps
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board, write_figure
from featinv_diffusion.runs.record import MANIFEST, to_json
from featinv_diffusion.runs.samples import GRID
from featinv_diffusion.runs.scope import scope_line
from featinv_diffusion.settings import DIFFUSION

FEATURES, SCRIPT, COMMAND, FIGURE, STATE = (
    "features.safetensors",
    "again.py",
    "command.txt",
    "figure.pdf",
    "state.json",
)
SECOND_FOLDER, MADE = "second", "pictures"


def to_command(rendered: Rendered) -> str:
    """Returns the command that makes the very pictures, of files of the download's folder.

    A map that was edited is read from `features.safetensors`.
    """
    settings = rendered.samples.settings
    assert settings is not None
    if rendered.edits:
        parts = ["featinv", "decode", FEATURES]
    else:
        parts = ["featinv", "sample", rendered.picture.name]
    if settings.inverter == DIFFUSION:
        parts += ["--pipeline", rendered.member.inverter, "--quality", rendered.state.quality]
        parts += ["--n-samples", str(settings.n_samples), "--seed", str(settings.seed)]
    else:
        parts += ["--inverter", rendered.member.inverter]
        stage = rendered.member.stage
        parts += ["--stage", stage] if stage is not None else []
    return shlex.join([*parts, "--output", "out"])


def to_python(rendered: Rendered) -> str:
    """Returns lines of Python that make the very pictures from the picture files."""
    state, edits = rendered.state, rendered.edits
    is_diffusion = not rendered.samples.settings or (
        rendered.samples.settings.inverter == DIFFUSION
    )
    arguments = [repr(rendered.member.inverter)]
    arguments += [f"stage={rendered.member.stage!r}"] if rendered.member.stage else []
    arguments += [f"quality={state.quality!r}"] if is_diffusion else []
    lines = ["import featinv_diffusion as fi"]
    if any(not isinstance(edit, Scale) for edit in edits):
        lines = ["import torch", *lines, "from featinv_diffusion.features import paste, scale_part"]
    elif edits:
        lines += ["from featinv_diffusion.features import scale_part"]
    lines += ["", f"inverter = fi.load_inverter({', '.join(arguments)})"]
    name = rendered.picture.name
    if not edits:
        lines += [f"features = inverter.encode({name!r})"]
    else:  # row by row as in files, for the layout of maps decides the last bits
        lines += [f"first = features = inverter.encode({name!r}).contiguous()"]
        if needs_second(edits):
            lines += [f"second = inverter.encode({second_path(rendered)!r}).contiguous()"]
        loaded = None
        for edit in edits:
            for concepts in concepts_of([edit]):
                lines += [f"concepts = fi.load_concepts({concepts!r})"] * (concepts != loaded)
                loaded = concepts
            lines += edit.to_lines(rendered.first)
    given = ["inverter", "features.contiguous()" if edits else "features"]
    given += [f"n_samples={state.n_samples}"] if is_diffusion else []
    given += [f"seed={state.seed}"] if is_diffusion else []
    given += [f"names=[{name!r}]"] if edits else []
    lines += [f"samples = fi.sample({', '.join(given)})", 'samples.save("out")']
    return "\n".join(lines) + "\n"


def second_path(rendered: Rendered) -> str:
    """Returns where the second picture lies in the download's folder."""
    assert rendered.second is not None
    name = rendered.second.name
    return name if name != rendered.picture.name else f"{SECOND_FOLDER}/{name}"


def draw_pictures(rendered: Rendered) -> Figure:
    """Draws the picture beside its samples, with the cosine under each."""
    samples = rendered.samples
    (done,) = samples.reconstructions
    of_pipeline = samples.settings is None or samples.settings.inverter == DIFFUSION
    board = Board(
        n_rows=1,
        n_columns=max(4, 1 + len(done.samples)),
        title=f"From {rendered.member.family} features at {rendered.spec.layer} back to pictures",
        notes=[
            to_command(rendered).replace("$", r"\$"),
            *([f"The map was edited by {len(rendered.edits)} edits."] if rendered.edits else []),
            samples.summary(),
            scope_line(done.scope_p_value, samples.scope_basis, of_pipeline=of_pipeline),
            *([rendered.certainty.summary()] if rendered.certainty else []),
            *([rendered.second_eye] if rendered.second_eye else []),
        ],
    )
    figure = board.make()
    if done.original is not None:
        axes = board.tile_axes(figure, 0, 0)
        figures.show_picture(axes, done.original)
        figures.label(axes, "original")
        figures.caption(axes, figures.short_name(rendered.picture.name))
    for i, (picture, cosine) in enumerate(zip(done.samples, done.cosine, strict=True)):
        axes = board.tile_axes(figure, 0, i + 1)
        figures.show_picture(axes, picture)
        figures.label(axes, f"sample {i + 1}")
        figures.caption(axes, f"cosine {cosine:.2f}")
    return figure


# ---- Downloads -----------------------------------------------------------------------------------


def _features(rendered: Rendered, folder: Path) -> Path:
    write_maps(folder / FEATURES, rendered.maps, rendered.spec)
    return folder / FEATURES


def _figure(rendered: Rendered, folder: Path) -> Path:
    write_figure(draw_pictures(rendered), folder / FIGURE)
    return folder / FIGURE


def _manifest(rendered: Rendered, folder: Path) -> Path:
    path = folder / MANIFEST
    path.write_text(to_json(rendered.samples.manifest.content()), encoding="utf-8")
    return path


def _grid(rendered: Rendered, folder: Path) -> Path:
    rendered.samples.figure().save(folder / GRID)
    return folder / GRID


def _picture(rendered: Rendered, folder: Path) -> Path:
    path = folder / rendered.picture.name
    path.write_bytes(rendered.picture.content)
    return path


def _everything(rendered: Rendered, folder: Path) -> Path:
    inside = folder / "all"
    rendered.samples.save(inside / MADE)
    (inside / rendered.picture.name).write_bytes(rendered.picture.content)
    if rendered.second is not None:
        path = inside / second_path(rendered)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rendered.second.content)
    _features(rendered, inside)
    _figure(rendered, inside)
    for name, text in (
        (COMMAND, to_command(rendered) + "\n"),
        (SCRIPT, to_python(rendered)),
        (STATE, to_json(rendered.state.to_content())),
    ):
        (inside / name).write_text(text, encoding="utf-8")
    target = folder / "featinv.zip"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(inside.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                file.write(path, path.relative_to(inside).as_posix())
    return target


DOWNLOADS: dict[str, tuple[str, Callable[[Rendered, Path], Path]]] = {
    "png": ("image/png", _grid),
    "pdf": ("application/pdf", _figure),
    "safetensors": ("application/octet-stream", _features),
    "manifest": ("application/json", _manifest),
    "picture": ("application/octet-stream", _picture),
    "zip": ("application/zip", _everything),
}
"""By what a link calls them: the kind of file, and what writes it."""


def to_download(rendered: Rendered, what: str) -> tuple[str, bytes]:
    """Returns the name and the content of a download; it is made in a folder that is removed."""
    with tempfile.TemporaryDirectory(prefix="featinv-app-") as folder:
        path = DOWNLOADS[what][1](rendered, Path(folder))
        return path.name, path.read_bytes()


def to_shown(rendered: Rendered, to_url: Callable[[Any], str]) -> dict[str, Any]:
    """Returns what the page shows of the pictures, as plain values.

    Args:
        to_url: from a picture to what an `img` shows.
    """
    samples = rendered.samples
    (done,) = samples.reconstructions
    settings = samples.settings
    of_pipeline = settings is None or settings.inverter == DIFFUSION
    return {
        "member": rendered.member.name,
        "family": rendered.member.family,
        "layer": rendered.member.layer,
        "grid": list(rendered.maps.shape[2:]),
        "has_places": has_places(rendered.spec),
        "original": None if done.original is None else to_url(done.original),
        "pictures": [to_url(picture) for picture in done.samples],
        "cosine": done.cosine,
        "shuffled": done.cosine_shuffled,
        "top1": done.top1_match,
        "top5": done.top5_match,
        "class": rendered.class_name,
        "scope": scope_line(done.scope_p_value, samples.scope_basis, of_pipeline=of_pipeline),
        "certainty": None if rendered.certainty is None else rendered.certainty.summary(),
        "determined": (
            None
            if rendered.certainty is None
            else rendered.certainty.determined("cell_features").tolist()
        ),
        "second_eye": rendered.second_eye,
        "cells": rendered.cell_cosine.tolist(),
        "notes": rendered.notes,
        "quality": None if settings is None or settings.is_deterministic else settings.quality,
        "seconds": rendered.seconds,
        "command": to_command(rendered),
        "python": to_python(rendered),
    }
