"""Model cards: what the `README.md` of a pipeline folder says of where the pipeline comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.files import write_text


@dataclass(frozen=True)
class CardInfo:
    """What a model card says beyond what the pipeline knows about itself.

    Args:
        command: the command that made the pipeline.
        license: identifier of the Hub; None where it is that of the base models.
        base_models: Hub names of the models this one was made of.
        notes: further sections, as Markdown.
    """

    command: str
    license: str | None = None
    base_models: list[str] = field(default_factory=list)
    notes: str = ""


def write_model_card(
    folder: Path, pipeline: FeatInvPipeline, info: CardInfo, title: str | None = None
) -> None:
    """Writes `README.md` into a folder that holds, or is part of, the saved pipeline."""
    card = pipeline.make_model_card(
        title or folder.name, info.command, info.license, info.base_models, info.notes
    )
    write_text(folder / "README.md", str(card))


def read_card_info(folder: Path, command: str) -> CardInfo:
    """Returns what the card of a folder says besides the command; nothing where it has none."""
    path = folder / "README.md"
    if not path.is_file():
        return CardInfo(command)
    card: Any = ModelCard.load(path, ignore_metadata_errors=True)
    models = card.data.base_model or []
    models = [models] if isinstance(models, str) else list(models)
    license = str(card.data.license) if card.data.license else None
    notes = card.text.partition("\nVersions: ")[2].partition("\n")[2]
    return CardInfo(command, license, models, notes.strip())
