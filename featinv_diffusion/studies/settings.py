"""Settings of the studies of many images; light to import, so that options are built from them."""

from __future__ import annotations

from dataclasses import dataclass

from featinv_diffusion.settings import (
    MAX_BATCH,
    MAX_IMAGES,
    MAX_SAMPLES,
    QUALITIES,
    SampleSettings,
    Seed,
    check,
    nested,
    option,
)

DATA = "Images: a folder, parquet file or Hub name."


@dataclass(frozen=True)
class ImageChoice:
    """Which images a study reads.

    Args:
        data: folder of pictures, parquet file or Hub name.
        split: of a Hub data set, or of a folder that has splits.
        classes: text file with one class folder per line: only these.
    """

    data: str | None = option(None, DATA, metavar="PATH_OR_NAME")
    split: str = option("validation", "Split of the data, if they have any.")
    classes: str | None = option(
        None, "Text file of class folders, one per line: only these.", metavar="FILE"
    )


@dataclass(frozen=True)
class FitSettings:
    """How an operator is fitted; see `studies.operators.fit_operator`."""

    alpha: float | None = option(None, "For suppress: factor on the channel.", shown="0.9")
    channel: str | None = option(
        None, "For suppress: the channel.", metavar="red|green|blue", shown="blue"
    )
    method: str = option(
        "orthogonal",
        "Kind of matrix to fit.",
        metavar="orthogonal|self-adjoint|self-adjoint-direct|linear",
    )
    ridge: float = option(
        1e-6,
        "For linear: pull towards the identity, as a share of the mean eigenvalue of XᵀX.",
        least=0,
    )
    images: ImageChoice = nested(ImageChoice)
    n_images: int = option(
        1024, "Images to draw at random from the data.", least=1, most=MAX_IMAGES
    )
    seed: Seed = option(0, "Random seed of the draw.")
    batch_size: int = option(32, "Images per batch.", least=1, most=MAX_BATCH)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class OperatorStudySettings:
    """How `featinv operator analyze` measures an operator."""

    sampling: SampleSettings = nested(SampleSettings)
    images: ImageChoice = nested(ImageChoice)
    n_images: int = option(
        256,
        "Images to draw from those that were not in the fit, at least 2.",
        least=2,
        most=MAX_IMAGES,
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class SteerabilitySettings:
    """How much of a dictionary is tested, and on which pictures; see `studies.steerability`."""

    sampling: SampleSettings = nested(SampleSettings)
    images: ImageChoice = nested(ImageChoice)
    held_back_per_class: int = option(
        0, "Only the last K images of each class, which training holds back.", least=0
    )
    n_images: int = option(
        250, "Pictures in which activations are read, drawn as in `evaluate`.", least=2
    )
    n_latents: int = option(30, "Latents to test, drawn from those that are ever active.", least=1)
    n_pictures: int = option(
        4, "Pictures to set each latent in, half of them where it is active.", least=2
    )
    n_directions: int = option(
        9, "Random directions that each latent is compared with: chance is 1 in one more.", least=1
    )
    dose: float = option(1.0, "Factor on the typical high value that each latent is set to.")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ScopeSettings:
    """How the statistics of natural feature maps are fitted; see `runs.scope_fit`."""

    images: ImageChoice = nested(ImageChoice)
    held_back_per_class: int = option(
        0,
        "Calibrate on the last K images of each class; 0 takes a fifth of all images.",
        least=0,
        most=MAX_IMAGES,
    )
    n_images: int = option(10_000, "Largest number of images to fit on.", least=1, most=MAX_IMAGES)
    n_reconstructions: int = option(
        256,
        "Held-out images to sample once each, which shows how well they come back.",
        least=0,
        most=MAX_IMAGES,
    )
    batch_size: int = option(8, "Samples per batch.", least=1, most=MAX_BATCH)
    device: str = option("auto", "Device to compute on: auto, cpu, cuda, cuda:1, mps …")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class CertaintySettings:
    """How certainty is calibrated; see `runs.certainty`."""

    images: ImageChoice = nested(ImageChoice)
    held_back_per_class: int = option(
        0,
        "Only the last K images of each class, which training holds back.",
        least=0,
        most=MAX_IMAGES,
    )
    n_images: int = option(
        200, "Held-out images to sample, drawn evenly over classes.", least=1, most=MAX_IMAGES
    )
    n_samples: int = option(
        8, "Samples of each; 2, 4 … up to so many are calibrated.", least=2, most=MAX_SAMPLES
    )
    quality: str = option(
        "standard", "Quality of the samples; each has its own calibration.", choices=QUALITIES
    )
    batch_size: int = option(8, "Samples per batch.", least=1, most=MAX_BATCH)
    device: str = option("auto", "Device to compute on: auto, cpu, cuda, cuda:1, mps …")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class PictureChoice:
    """Which pictures an analysis reads.

    Args:
        images: `data` may also be a folder of COCO or Tiny-ImageNet-200, whose boxes are read.
        held_back_per_class: only the last k images of each class, which training holds back; for
            the stages of a model, only of images with boxes.
        n_images: None takes `studies.study.N_DEFAULT`, or all if there are fewer.
    """

    images: ImageChoice = nested(ImageChoice)
    held_back_per_class: int = option(
        0,
        "Only the last K images of each class; for encoders, or for images with boxes.",
        least=0,
        most=MAX_IMAGES,
    )
    n_images: int | None = option(
        None,
        "Number of images, spread evenly over the data; for encoders drawn as in `evaluate`.",
        shown="250, or all",
        least=1,
        most=MAX_IMAGES,
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class EncoderSettings:
    """Which encoders are compared, and on which images.

    Args:
        inverters: inverters as NAME, NAME@STAGE or NAME:PIPELINE, see
            `studies.encoders.parse_inverter`.
        scorers: backbones that measure similarity; none takes a bundled classifier.
        seed: random seed of the noise of diffusion inverters and of the bootstrap.
    """

    inverters: tuple[str, ...] = ()
    pictures: PictureChoice = nested(PictureChoice)
    scorers: tuple[str, ...] = option(
        (),
        "For encoders: backbones that measure similarity.",
        metavar="A,B",
        shown="a bundled classifier",
    )
    grey: bool = option(False, "For encoders: measure similarity without colour too.")
    seed: Seed = option(0, "For encoders: random seed of the noise and the bootstrap.")
    batch_size: int = option(32, "For encoders: images per batch.", least=1, most=MAX_BATCH)
    device: str = option("auto", "For encoders: device to compute on: auto, cpu, cuda …")

    def __post_init__(self) -> None:
        check(self)
