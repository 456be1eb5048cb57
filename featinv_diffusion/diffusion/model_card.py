"""What a model card says of where a pipeline comes from; `FeatInvPipeline` knows the rest."""

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
    """Returns license and base models that the card of a folder declares, where it has one."""
    path = folder / "README.md"
    if not path.is_file():
        return CardInfo(command)
    data: Any = ModelCard.load(path, ignore_metadata_errors=True).data
    models = data.base_model or []
    models = [models] if isinstance(models, str) else list(models)
    license = None if data.license in (None, "other") else str(data.license)
    return CardInfo(command, license, models)
