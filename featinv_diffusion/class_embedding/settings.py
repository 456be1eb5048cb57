"""Settings of `featinv classemb`; light to import, so that its options are built from them."""

from __future__ import annotations

from dataclasses import dataclass

from featinv_diffusion.settings import MAX_BATCH, MAX_IMAGES, Seed, check, nested, option

INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class ImageChoice:
    """Which images of a data set are read.

    Raises:
        InputError: fewer than one image.
    """

    split: str = option("validation", "Split to read, where the data set has several.")
    classes: str | None = option(
        None, "Text file with the class folders to read, one per line.", metavar="FILE"
    )
    per_class: int | None = option(
        None, "Number of images of each class.", shown="all", least=1, most=MAX_IMAGES
    )
    n_images: int | None = option(
        None,
        "Number of images, drawn evenly over the classes.",
        shown="all",
        least=1,
        most=MAX_IMAGES,
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class TokenMeasures:
    """What is measured beside the pass that every run makes.

    Args:
        ablations: attention ablations, two more passes.
        null: the same model with random weights, one more pass.
        perturbation: the perturbation test, many more passes.
        n_points: how many numbers of kept patches it tries; None tries all, as published.
        n_random: random orders of the patches in it.
        probes_per_class: fits linear probes on the last k images of each class, which are then
            measured nowhere else; None fits none.

    Raises:
        InputError: a number below 1.
    """

    batch_size: int = option(16, "Images per batch.", least=1, most=MAX_BATCH)
    ablations: bool = option(False, "Also read the tokens with attention ablated: two more passes.")
    null: bool = option(False, "Also read a model with random weights: one more pass.")
    perturbation: bool = option(False, "Also run the perturbation test: many more passes.")
    n_points: int | None = option(
        None,
        "How many numbers of kept patches the perturbation test tries.",
        shown="all",
        least=1,
        most=MAX_IMAGES,
    )
    n_random: int = option(
        3, "Random orders of the patches in the perturbation test.", least=1, most=1000
    )
    probes_per_class: int | None = option(
        None,
        "Also fit linear probes, on the last K images of each class, which are not measured.",
        shown="no probes",
        least=1,
        most=MAX_IMAGES,
    )
    seed: Seed = option(0, "Random seed of the reconstructions, random weights and random orders.")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class TokenSettings:
    """Everything that decides the figures; the `arguments` of `metrics.json` record it.

    Args:
        data: a picture, or what `data.sets.open_images` reads; None is the built-in photo.
        pipelines: diffusion pipelines that invert blocks of the backbone. Without pipelines and
            without a modular inverter, it is the one that the backbone is bundled with.
        stages: stages of the modular inverter, one block each.

    Raises:
        InputError: a value out of range.
    """

    data: str | None = None
    backbone: str = option(
        "tiny/vit", "Backbone: the bundled tiny/vit, any timm ViT, or hf/FOLDER_OR_REPOSITORY."
    )
    pipelines: tuple[str, ...] = ()
    inverter: str | None = option(
        None, "Modular inverter of the backbone's blocks.", metavar="NAME_OR_FOLDER"
    )
    stages: tuple[str, ...] = ()
    target: str | None = option(
        None,
        "Class to read in all images, an index or a name; there is no accuracy then.",
        metavar="CLASS",
        shown="each image's own",
    )
    masks: str | None = option(
        None,
        "Folder of object masks: PNGs with the same paths as their images.",
        metavar="FOLDER",
    )
    choice: ImageChoice = nested(ImageChoice)
    n_figures: int = option(4, "Number of images that get a figure.", least=0, most=MAX_IMAGES)
    interpolation: str | None = option(
        None,
        "How pictures are scaled to the input size; bilinear is the published way.",
        shown="the backbone's",
        choices=INTERPOLATIONS,
    )
    device: str = option("auto", "Device to compute on: auto, cpu, cuda, cuda:1, mps …")
    measures: TokenMeasures = nested(TokenMeasures)

    def __post_init__(self) -> None:
        check(self)
