"""What decides the figures of an evaluation; light to import, as options are built from it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from featinv_diffusion.errors import InputError
from featinv_diffusion.settings import (
    MAX_IMAGES,
    SampleSettings,
    Selection,
    check,
    nested,
    option,
    to_flat,
)


@dataclass(frozen=True)
class EvaluationSettings:
    """Everything that decides the figures; `metrics.json` records it.

    Args:
        data: what `open_images` takes: a folder, a parquet file or a Hub name.
        split: part of a Hub data set; of a folder, the folder or the parquet files of that name,
            where it has splits.
        classes: text file with one class folder and perhaps its name per line: only these, in
            this order.
        selected: which of the images.
        evaluated_by: other backbones that look at the reconstructions; the own one is left out.
        lpips_weights, inception_weights: weight files; None looks in the caches of torchvision and
            torch-fidelity.
        n_gallery_images: the next ones of the selection, at most all.
        baselines_from: what `open_images` takes, of a folder or Hub data set the split `train`.
        n_baseline_images: at most; the ridges are fitted on the first 2,000 of them.
        n_optimised_images: spread evenly over those that are evaluated.
        reference: folder or npz that distances are measured to; None takes the evaluated originals.
        shard_size: images that one process does at a time; batches do not cross shards. What all
            backbones see in the originals and in the reconstructions of a shard is held in memory.
        sampling: which inverter makes the one sample of each image, and how.

    Raises:
        InputError: a value out of range, or one that has no effect without another.
    """

    data: str | None = option(
        None,
        "Images to evaluate on: a folder, a parquet file with `image` and `label`, or a Hub name.",
        metavar="PATH_OR_NAME",
    )
    split: str = option("validation", "Split of the data, where they have any.")
    selected: Selection = nested(Selection)
    classes: str | None = option(
        None, "Text file with the class folders to use, one a line, in this order.", metavar="FILE"
    )
    evaluated_by: tuple[str, ...] = option(
        (), "Other backbones that look at the reconstructions.", metavar="A,B"
    )
    sampling: SampleSettings = nested(SampleSettings)
    lpips: str | None = option(
        None, "Add LPIPS of this network.", choices=("alex", "vgg", "squeeze")
    )
    lpips_weights: str | None = option(
        None, "Weights for --lpips, where they are not cached.", metavar="FILE"
    )
    fid: str | None = option(
        None,
        "Add FID, KID, precision and recall by this convention.",
        choices=("torch-fidelity", "clean", "adm"),
    )
    inception_weights: str | None = option(
        None, "Weights for --fid, where they are not cached.", metavar="FILE"
    )
    fd_dinov2: str | None = option(
        None, "Add the Fréchet distance of this DINOv2 model.", metavar="NAME"
    )
    reference: str | None = option(
        None,
        "Images to measure distances to.",
        metavar="FOLDER_OR_NPZ",
        shown="the evaluated originals",
    )
    n_gallery_images: int = option(
        0,
        "More images of the data, encoded only, among which reconstructions look for their own.",
        least=0,
        most=MAX_IMAGES,
    )
    baselines_from: str | None = option(
        None,
        "Training images, for what needs no inverter: the nearest of them, and ridge regressions "
        "from features to latents and pixels. None of those that are evaluated.",
        metavar="PATH_OR_NAME",
    )
    n_baseline_images: int = option(
        10_000,
        "Training images to read for the baselines, evenly over classes.",
        least=10,
        most=MAX_IMAGES,
    )
    n_optimised_images: int = option(
        0,
        "Images that the inverter without training makes too, by gradients: seconds each.",
        least=0,
        most=MAX_IMAGES,
    )
    shard_size: int = option(
        64, "Images that one process does at a time, 2 to 512.", least=2, most=512
    )
    save_images: bool = option(False, "Keep the reconstructions as PNGs.")

    def __post_init__(self) -> None:
        check(self)
        if len(set(self.evaluated_by)) < len(self.evaluated_by):
            raise InputError(f"evaluated_by names a backbone twice: {', '.join(self.evaluated_by)}")
        for name, needed in _NEEDS.items():
            if getattr(self, name) is not None and not any(getattr(self, n) for n in needed):
                options = " or ".join(_option(n) for n in needed)
                raise InputError(
                    f"{_option(name)} does nothing without {options}; give both or neither."
                )
        n_samples = self.sampling.n_samples
        if n_samples not in (1, _N_SAMPLES):
            raise InputError(f"An evaluation takes one sample of each image, got {n_samples}.")
        object.__setattr__(self, "sampling", replace(self.sampling, n_samples=1))

    @property
    def seed(self) -> int:
        """The random seed of the samples and of the permutations of cells."""
        return self.sampling.seed

    def content(self) -> dict[str, Any]:
        """Returns all values by name, as files record them."""
        values = {**to_flat(self), "evaluated_by": list(self.evaluated_by)}
        del values["n_samples"]
        return values

    def identity(self) -> dict[str, Any]:
        """Returns what a run that is taken up again must share.

        The index of a GPU differs by process, and the reference and the gallery are read when all
        is measured: a finished run can be summarised anew with others.
        """
        decided = {**self.content(), "device": self.sampling.device.partition(":")[0]}
        del decided["reference"], decided["n_gallery_images"]
        return decided


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


_N_SAMPLES = next(f.default for f in fields(SampleSettings) if f.name == "n_samples")
_NEEDS = {
    "inception_weights": ("fid",),
    "lpips_weights": ("lpips",),
    "reference": ("fid", "fd_dinov2"),
}
