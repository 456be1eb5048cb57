"""Settings of `featinv paper`; light to import, so that its options are built from them."""

from __future__ import annotations

from dataclasses import dataclass

from featinv_diffusion.settings import MAX_BATCH, MAX_IMAGES, Seed, check, nested, option
from featinv_diffusion.studies.settings import ImageChoice, PictureChoice


@dataclass(frozen=True)
class PaperSettings:
    """Which model and images an item of the papers is run on.

    Args:
        model: None takes the bundled models that the study names.
        images: None of data takes crops of the two photos that come with scikit-learn, which show
            what an item looks like and measure nothing.
        n_images: None takes the study's own number, or all if there are fewer.
    """

    model: str | None = option(
        None,
        "Inverter, or several as A,B: a bundled name, a folder or a Hub repository.",
        metavar="NAME_OR_FOLDER",
        shown="the bundled ones of the item",
    )
    images: ImageChoice = nested(ImageChoice)
    held_back_per_class: int = option(
        0,
        "Only the last K images of each class, which training holds back.",
        least=0,
        most=MAX_IMAGES,
    )
    n_images: int | None = option(
        None,
        "Number of images, drawn evenly over the classes.",
        shown="the item's own",
        least=1,
        most=MAX_IMAGES,
    )
    seed: Seed = option(0, "Random seed of the noise, of draws and of the bootstrap.")
    batch_size: int = option(16, "Images per batch.", least=1, most=MAX_BATCH)
    device: str = option("auto", "Device to compute on: auto, cpu, cuda, cuda:1, mps …")

    def __post_init__(self) -> None:
        check(self)

    def pictures(self, n_images: int | None) -> PictureChoice:
        """Returns the choice of pictures as the studies of stages take it."""
        return PictureChoice(self.images, self.held_back_per_class, n_images)

    def models(self, *default: str) -> tuple[str, ...]:
        """Returns the models that were asked for, or else the default ones."""
        if self.model is None:
            return default
        return tuple(name.strip() for name in self.model.split(",") if name.strip())
