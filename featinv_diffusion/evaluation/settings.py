"""What decides the figures of an evaluation."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, fields

from featinv_diffusion.data.selection import SELECTIONS, Selection
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.inverters.open import SampleSettings

FID_CONVENTIONS = ("torch-fidelity", "clean", "adm")
LPIPS_NETS = ("alex", "vgg", "squeeze")
MAX_SHARD_SIZE = 512
CHOICES: dict[str, Collection[str]] = {
    "selection": SELECTIONS,
    "fid": FID_CONVENTIONS,
    "lpips": LPIPS_NETS,
}


@dataclass(frozen=True)
class EvaluationSettings:
    """Everything that decides the figures; `metrics.json` records it.

    Args:
        data: parquet file, folder of pictures or of parquet files, or Hub name.
        split: of a Hub data set; of a folder, the folder or the parquet files of that name, where
            it has splits.
        classes: text file with one class folder and perhaps its name per line: only these, in
            this order.
        held_back_per_class: only the last k images of each class, which training holds back.
        n_images: drawn evenly over classes; None takes all.
        per_class: at most so many of each class.
        selection: `random` draws by a hash of the image's id, whatever `seed` is; `first` takes
            the first of each class in the order of ids.
        n_null_images: images, spread evenly, for the nulls that cost a sample each.
        evaluated_by: other backbones that look at the reconstructions; the own one is left out.
        lpips: a network of LPIPS; None leaves it out.
        lpips_weights: file for `lpips`; None looks in the cache of torchvision.
        fid: a convention of the Fréchet inception distance; None leaves it out.
        inception_weights: file for `fid`; None looks in the cache of torch-fidelity.
        fd_dinov2: model for the Fréchet distance of DINOv2; None leaves it out.
        reference: folder or npz that distances are to; None takes the evaluated originals.
        shard_size: images that one process does at a time; batches do not cross shards. What all
            backbones see in the originals and in the reconstructions of a shard is held in memory.
        save_images: keep the reconstructions as PNGs.

    The others are those of `SampleSettings`.
    """

    data: str | None = None
    split: str = "validation"
    classes: str | None = None
    held_back_per_class: int = 0
    n_images: int | None = None
    per_class: int | None = None
    selection: str = "random"
    inverter: str = "diffusion"
    stage: str | None = None
    backbone: str | None = None
    pipeline: str | None = None
    layer: str | None = None
    seed: int = 0
    steps: int | None = None
    scheduler: str | None = None
    guidance_scale: float | None = None
    guidance: str | None = None
    strength: float = 1.0
    batch_size: int = 8
    attention: str = "native"
    device: str = "auto"
    dtype: str = "float32"
    n_null_images: int = 256
    evaluated_by: tuple[str, ...] = ()
    lpips: str | None = None
    lpips_weights: str | None = None
    fid: str | None = None
    inception_weights: str | None = None
    fd_dinov2: str | None = None
    reference: str | None = None
    shard_size: int = 64
    save_images: bool = False

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} must be at least {least}, but {value} came.")
        if self.shard_size > MAX_SHARD_SIZE:
            raise InputError(
                f"shard_size must be at most {MAX_SHARD_SIZE}, for a shard is held in memory, but "
                f"{self.shard_size} came."
            )
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                hint = choices_hint(value, list(choices))
                raise InputError(f"No {name} is named {value!r}; {hint}")
        if len(set(self.evaluated_by)) < len(self.evaluated_by):
            raise InputError(f"evaluated_by names a backbone twice: {', '.join(self.evaluated_by)}")
        for name, needed in _NEEDS.items():
            if getattr(self, name) is not None and not any(getattr(self, n) for n in needed):
                options = " or ".join(_option(n) for n in needed)
                raise InputError(
                    f"{_option(name)} does nothing without {options}; give both or neither."
                )
        _ = self.sampling

    @property
    def chosen(self) -> Selection:
        """Which images are evaluated."""
        return Selection(**{f.name: getattr(self, f.name) for f in fields(Selection)})

    @property
    def sampling(self) -> SampleSettings:
        """How one sample per image is drawn."""
        return SampleSettings(n_samples=1, **{name: getattr(self, name) for name in _SAMPLING})

    def identity(self) -> dict[str, object]:
        """What a run that is taken up again must share.

        The index of a GPU differs by process, and the reference is read when all is measured: a
        finished run can be summarised anew with another one.
        """
        decided = {**asdict(self), "device": self.device.partition(":")[0]}
        del decided["reference"]
        return decided


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


_LEAST = {"n_images": 1, "per_class": 1, "held_back_per_class": 0, "n_null_images": 0}
_LEAST |= {"shard_size": 2}
_NEEDS = {
    "inception_weights": ("fid",),
    "lpips_weights": ("lpips",),
    "reference": ("fid", "fd_dinov2"),
}
_SAMPLING = {f.name for f in fields(SampleSettings)} & {f.name for f in fields(EvaluationSettings)}
