"""What the studies of the papers share: what they are given, what they find, how it is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from featinv_diffusion import __version__
from featinv_diffusion.data.selection import Item as Selected
from featinv_diffusion.data.selection import digest, select_items
from featinv_diffusion.data.sets import ImageSet, open_images
from featinv_diffusion.devices import find_device
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import builtin_photo, center_square, read_image, to_tensor
from featinv_diffusion.metrics.statistics import Interval
from featinv_diffusion.papers.items import Item
from featinv_diffusion.papers.settings import PaperSettings
from featinv_diffusion.runs.record import RunFolder, read_environment
from featinv_diffusion.settings import Selection, to_flat
from featinv_diffusion.studies.stages import PictureSet, load_pictures
from featinv_diffusion.studies.study import METRICS

N_CROPS = 8
"""Crops of each of the two photos."""
TABLE = "table.md"
Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Answer:
    """What a study says of one item.

    Args:
        ours: our figures, in words.
        holds: whether what is published holds in them.
    """

    ours: str
    holds: bool


@dataclass(frozen=True, eq=False)
class Finding:
    """What a study found.

    Args:
        answers: by the name of each item that the study speaks of.
        tables: (title, names of the columns, rows); ours beside the published where there is one.
        figures: by file name.
        metrics: everything that was measured.
        ids: of the images.
    """

    answers: Mapping[str, Answer]
    tables: Sequence[tuple[str, Sequence[str], Rows]]
    figures: Mapping[str, Figure]
    metrics: Mapping[str, Any]
    ids: Sequence[str]
    notes: Sequence[str] = field(default_factory=tuple)

    def save(self, folder: Path, item: Item, settings: PaperSettings, command: str) -> Path:
        """Writes figures, `table.md` (ours beside the published) and, last, `manifest.json`."""
        run = RunFolder(folder)
        answer = self.answers[item.name]
        for name, figure in self.figures.items():
            run.figure(name, figure)
        run.text(TABLE, to_page(item, answer, self))
        run.numbers(METRICS, self.metrics)
        run.complete(
            {
                "version": __version__,
                "command": command,
                "item": item.name,
                "title": item.title,
                "published": item.published,
                "ours": answer.ours,
                "holds": answer.holds,
                "study": item.study,
                "answers": {name: asdict(one) for name, one in self.answers.items()},
                "settings": to_flat(settings),
                "n_images": len(self.ids),
                "images_sha256": digest(self.ids),
                "files": [*self.figures, TABLE, METRICS],
                "environment": read_environment(settings.device),
            }
        )
        return run.folder


def to_page(item: Item, answer: Answer, found: Finding) -> str:
    """Returns our tables beside what is published, in Markdown."""
    verdict = "holds in these images" if answer.holds else "does not hold in these images"
    lines = [
        f"# {item.title}",
        f"Published: {item.published}",
        f"Here, {len(found.ids)} images: {answer.ours}. It {verdict}.",
    ]
    for title, header, rows in found.tables:
        lines.append(f"## {title}")
        cells = [list(header), ["---"] * len(header), *rows]
        lines.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
    return "\n\n".join([*lines, *found.notes]) + "\n"


def cell(value: Interval | float, digits: int = 3) -> str:
    """Returns `value [low, high]`, or a number."""
    if isinstance(value, Interval):
        return f"{value.value:.{digits}f} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    return f"{value:.{digits}f}"


def percent(value: Interval) -> str:
    """Returns a share in percent with its interval."""
    return f"{100 * value.value:.1f} % [{100 * value.low:.1f}, {100 * value.high:.1f}]"


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of one size that were drawn from the data.

    Args:
        images: 8-bit values in [0, 1].
        labels: None where there are no classes.
        seeds: of the noise of each.
    """

    ids: list[str]
    images: Float[Tensor, "b 3 side side"]
    labels: list[int] | None
    class_names: Sequence[str] | None
    seeds: list[int]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, eq=False)
class Request:
    """What a study is asked to do.

    Args:
        settings: the model, the images, the seed.
        output: the folder of the run, whose pictures are no data.
    """

    settings: PaperSettings
    output: Path | None = None

    @cached_property
    def device(self) -> torch.device:
        """The device to compute on."""
        return find_device(self.settings.device)

    def image_set(self) -> ImageSet:
        """Returns all images of the data, or the crops of the two photos."""
        choice = self.settings.images
        if choice.data is None:
            return crops_of_photos()
        return open_images(choice.data, choice.split, choice.classes, exclude=self.output)

    def select(self, n_default: int) -> tuple[ImageSet, list[Selected]]:
        """Returns the data, and the images of it that are drawn evenly over the classes."""
        images = self.image_set()
        wanted = self.settings.n_images or min(n_default, len(images))
        selection = Selection(
            n_images=wanted, held_back_per_class=self.settings.held_back_per_class
        )
        return images, select_items(images, selection, self.settings.seed)

    def pictures(self, n_default: int, side: int) -> Pictures:
        """Reads the central squares of the images that are drawn, at `side` pixels."""
        images, items = self.select(n_default)
        squares = [center_square(images.read(item.index), side) for item in items]
        labels = None if images.labels is None else [item.label or 0 for item in items]
        return Pictures(
            [item.id for item in items],
            to_tensor(squares),
            labels,
            images.class_names,
            [item.seed for item in items],
        )

    def staged(self, size: tuple[int, int], *, boxed: bool = False) -> PictureSet:
        """Reads pictures as the studies of stages do, with their boxes where there are any.

        Raises:
            InputError: `boxed`, and the data have no boxes.
        """
        choice = self.settings.images
        if choice.data is None:
            found = self.pictures(2 * N_CROPS, max(size))
            inside = torch.ones(len(found), *size, dtype=torch.bool)
            pictures = PictureSet(found.ids, found.images, None, inside)
        else:
            pictures = load_pictures(self.settings.pictures(self.settings.n_images), size)
        if boxed and pictures.objects is None:
            raise InputError(
                "This item needs images with boxes, and these have none. Name a folder of COCO or "
                "Tiny-ImageNet-200: --data FOLDER --split train --classes FILE "
                "--held-back-per-class 10."
            )
        return pictures


def crops_of_photos() -> ImageSet:
    """Returns square crops of the two photos that come with scikit-learn; they have no classes."""
    found: list[Any] = []
    ids: list[str] = []
    for path in (builtin_photo(), builtin_photo("china.jpg")):
        photo = read_image(path)
        side = photo.height // 2
        for i in range(N_CROPS):
            x = i * (photo.width - side) // (N_CROPS - 1)
            y = (i % 2) * (photo.height - side)
            found.append(photo.crop((x, y, x + side, y + side)))
            ids.append(f"{path.stem}-{i}.png")
    return ImageSet(ids, None, None, found.__getitem__)


Study = Callable[[Request], Finding]
