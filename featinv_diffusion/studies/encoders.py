"""Encoders compared by how well their features are turned back into images.

Source: "Image Reconstruction as a Tool for Feature Analysis", section 4. What differs from its
code: images are central squares, as in configs/inverters/siglip.yaml and siglip2.yaml, where it
trains on whole images squashed to squares and evaluates on DINOv2's central crops; similarity is
measured in colour, and in grey only on request, where it always turns grey without saying so; its
scorers are CLIP ViT-L/14 and SigLIP2-L, of which the latter is of the family of what it ranks.
Here pixels and colours are measured too, and each figure has its interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import PurePath
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones import Backbone, load_backbone
from featinv_diffusion.backbones.names import canonical_name
from featinv_diffusion.backbones.timm import TimmBackbone
from featinv_diffusion.backbones.transformers import TransformersBackbone
from featinv_diffusion.data.crops import to_images
from featinv_diffusion.data.selection import Item, Selection
from featinv_diffusion.data.sets import ImageSet
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.evaluator import find_partners, noise_of
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.features.pixel_operations import to_grey
from featinv_diffusion.files import expand_path
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.open import open_chosen
from featinv_diffusion.metrics.colour import delta_e_2000
from featinv_diffusion.metrics.features import psnr, ssim
from featinv_diffusion.runs.sampling import batched, finite_rows, to_pixels
from featinv_diffusion.settings import SampleSettings
from featinv_diffusion.types import Images

# ---- Similarity of a reconstruction to its original as an encoder that made neither sees it ----

BUNDLED_SCORERS = ("tiny/convnext", "tiny/resnet", "tiny/swin", "tiny/vit")


@dataclass(frozen=True, eq=False)
class Scorer:
    """An encoder that compares.

    Args:
        grey: whether it sees images without colour, as in the code of "Image Reconstruction as a
            Tool for Feature Analysis"; the paper does not say so.
    """

    backbone: Backbone
    grey: bool = False

    @property
    def column(self) -> str:
        """The name of the figure."""
        return f"{'grey_' if self.grey else ''}similarity_{self.backbone.name}"

    @torch.no_grad()
    def embed(self, images: Images) -> Float[Tensor, "b c"]:
        """One unit vector per image."""
        if self.grey:
            size = self.backbone.input_size
            images = to_grey(resize(images, size))
        return F.normalize(pooled_embedding(self.backbone, images).float(), dim=1)


def pooled_embedding(backbone: Backbone, images: Images) -> Float[Tensor, "b c"]:
    """What the model pools its features to: before the head of a timm model, or pooler_output.

    For a tower of transformers that pools nothing, the mean of its patches. CLIP's is before its
    projection, which towers do not hold; SigLIP's is the embedding that is contrasted.
    """
    if isinstance(backbone, TimmBackbone):
        model: Any = backbone.model
        features = model.forward_features(backbone.preprocess(images))
        return model.forward_head(features, pre_logits=True).flatten(1)
    if not isinstance(backbone, TransformersBackbone):
        return backbone.features(images).mean(dim=(2, 3))
    outputs: list[Any] = []
    handle = backbone.tower.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    try:
        features = backbone.features(images)
    finally:
        handle.remove()
    pooled = getattr(outputs[0], "pooler_output", None)
    return features.mean(dim=(2, 3)) if pooled is None else pooled


def resize(images: Images, size: tuple[int, int]) -> Float[Tensor, "b 3 _ _"]:
    """Bilinear with antialiasing; images of this size are returned as they are."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def open_scorers(names: Sequence[str], compared: Collection[str], grey: bool) -> list[Scorer]:
    """Loads the scorers, each in colour and, with `grey`, without it too.

    Args:
        names: none takes the first of the bundled classifiers that is not compared.
        compared: the backbones whose reconstructions are scored.

    Raises:
        InputError: a scorer that is compared itself, is named twice, or cannot be loaded.
    """
    taken = {canonical_name(name) for name in compared}
    free = [name for name in BUNDLED_SCORERS if canonical_name(name) not in taken]
    if not names and not free:
        raise InputError("All bundled classifiers are compared: name another one with --scorers.")
    names = names or free[:1]
    if len({canonical_name(name) for name in names}) < len(names):
        raise InputError(f"--scorers names a backbone twice: {', '.join(names)}")
    for name in names:
        if canonical_name(name) in taken:
            raise InputError(
                f"A scorer must be none of the compared encoders, but {name!r} is. Name another "
                "one, or leave --scorers out."
            )
    backbones = [load_backbone(name) for name in names]
    colours = (False, True) if grey else (False,)
    return [Scorer(backbone, colour) for colour in colours for backbone in backbones]


# ---- Which encoders are compared, on which images, and the inverters that turn them back ---------


@dataclass(frozen=True)
class EncoderSettings:
    """What is compared, on which images.

    Args:
        inverters: names or folders as of `--inverter`, each perhaps with a stage and a pipeline:
            NAME, NAME@STAGE, NAME:PIPELINE (see `parse_inverter`).
        scorers: backbones that measure similarity; none takes a bundled classifier.
        grey: measure similarity without colour too.
        seed: of the noise of diffusion inverters.
        n_images: None takes at most `picture_set.N_DEFAULT`.

    The others are those of `EvaluationSettings`; the same choice takes the same images.
    """

    inverters: tuple[str, ...] = ()
    data: str | None = None
    split: str = "validation"
    classes: str | None = None
    held_back_per_class: int = 0
    n_images: int | None = None
    scorers: tuple[str, ...] = ()
    grey: bool = False
    seed: int = 0
    batch_size: int = 32
    device: str = "auto"

    def __post_init__(self) -> None:
        _ = self.selection  # checks what they share

    @property
    def selection(self) -> Selection:
        """Which images are compared, chosen as an evaluation does."""
        shared = {f.name for f in fields(self)} & {f.name for f in fields(EvaluationSettings)}
        return EvaluationSettings(**{name: getattr(self, name) for name in shared}).chosen


@dataclass(frozen=True, eq=False)
class Encoder:
    """One that is compared.

    Args:
        label: what tables and figures call it.
        name: of its inverter, as it was given.
    """

    label: str
    name: str
    inverter: Inverter
    backbone: Backbone

    def describe(self) -> dict[str, Any]:
        spec = self.inverter.spec
        return {
            "label": self.label,
            "inverter": self.name,
            "backbone": spec.backbone,
            "layer": spec.layer,
            "channels": spec.channels,
            "grid": list(spec.grid),
            "input_size": list(self.backbone.input_size),
        }

    @torch.no_grad()
    def reconstruct(self, images: Images, items: Sequence[Item]) -> Float[Tensor, "b 3 _ _"]:
        """Returns what its features are turned back into, in 8-bit steps.

        Raises:
            InputError: features or samples that are not finite.
        """
        samples = self.inverter.invert(self.backbone.features(images), generator=noise_of(items))
        if not bool(finite_rows(samples).all()):
            raise InputError(f"The inverter {self.name!r} gave NaN values; use a full precision.")
        return to_images(to_pixels(samples)).to(images.device)


def open_encoders(settings: EncoderSettings) -> list[Encoder]:
    """Loads all inverters with their encoders.

    Raises:
        InputError: fewer than two inverters, one of them twice, unknown ones, or a device that is
            not there.
    """
    chosen = {name: parse_inverter(name) for name in settings.inverters}
    _check_different(settings.inverters, chosen.values())
    opened, resolved = [], []
    for name, source in chosen.items():
        inverter, complete = open_chosen(replace(source, device=settings.device))
        if inverter.backbone is None:
            raise InputError(f"The inverter {name!r} must know its backbone, but does not.")
        opened.append((name, inverter, inverter.backbone))
        resolved.append(complete)
    _check_different(settings.inverters, resolved)  # a default may be what another one names
    labels = make_labels([(inverter.spec.backbone, name) for name, inverter, _ in opened])
    return [Encoder(label, *one) for label, one in zip(labels, opened, strict=True)]


def parse_inverter(text: str) -> SampleSettings:
    """Reads NAME[@STAGE][:PIPELINE] or FOLDER[@STAGE]; a folder's name may hold such signs itself.

    Raises:
        InputError: a sign with nothing before or after it.
    """
    folder, _, stage = text.rpartition("@")
    pipeline = None
    if _is_folder(text):
        name, stage = text, None
    elif _is_folder(folder):
        name = folder
    else:
        name, *pipelines = text.split(":", maxsplit=1)
        name, *stages = name.split("@", maxsplit=1)
        pipeline, stage = (parts[0] if parts else None for parts in (pipelines, stages))
    if "" in (name, stage, pipeline):
        raise InputError(
            f"An inverter must be given as NAME, NAME@STAGE or NAME:PIPELINE, but {text!r} came."
        )
    return SampleSettings(inverter=name, stage=stage, pipeline=pipeline)


def _check_different(names: Sequence[str], sources: Iterable[SampleSettings]) -> None:
    if len({_resolve(source) for source in sources}) < max(2, len(names)):
        raise InputError(
            "A comparison needs at least two different inverters, e.g. --inverter siglip,siglip2, "
            f"but {', '.join(names) or 'none'} came."
        )


def _is_folder(text: str) -> bool:
    return text != "" and expand_path(text).is_dir()


def _resolve(source: SampleSettings) -> tuple[str | None, ...]:
    """Name, stage and pipeline; of a folder, where it really is."""
    names = (source.inverter, source.stage, source.pipeline)
    return tuple(
        str(expand_path(name).resolve()) if name and _is_folder(name) else name for name in names
    )


def make_labels(named: Sequence[tuple[str, str]]) -> list[str]:
    """Labels of (backbone, inverter): the backbone where that is one's alone, else the inverter.

    Of a folder as many of its last parts, at least two, as tell it from the others. No two labels
    are the same.

    Raises:
        InputError: an inverter that is named twice.
    """
    candidates = [_label_candidates(*one) for one in named]
    while True:
        labels = [names[0] for names in candidates]
        counts = Counter(labels)
        shared = [names for names in candidates if counts[names[0]] > 1]
        if not shared:
            return labels
        longer = [names for names in shared if len(names) > 1]
        if not longer:
            raise InputError(f"Each inverter must be named once, but {shared[0][0]!r} came twice.")
        for names in longer:
            names.pop(0)


def _label_candidates(backbone: str, name: str) -> list[str]:
    """From the shortest on; the last is the whole name."""
    path = PurePath(name)
    return [backbone, *("/".join(path.parts[-n:]) for n in range(2, len(path.parts))), str(path)]


N_EXAMPLES = 8
NULL = "null_"
"""Before a similarity: that of the reconstruction of another image, of another class if it can."""

PIXEL_METRICS = {"psnr": psnr, "ssim": ssim, "delta_e_2000": delta_e_2000}


@dataclass(eq=False)
class Comparison:
    """Figures of each image by encoder and metric, row i of all of them of image `ids[i]`.

    Args:
        size: side in pixels at which pixels are compared, the largest input of the encoders.
        examples: the first originals, and their reconstructions by label.
        original: the first originals.
    """

    encoders: list[Encoder]
    size: int
    ids: list[str] = field(default_factory=list)
    columns: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    original: Images = field(default_factory=lambda: torch.empty(0, 3, 0, 0))
    examples: dict[str, Images] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """The names of the figures that rank; nulls are left out."""
        names = next(iter(self.columns.values()))
        return [name for name in names if not name.startswith(NULL)]


def compare_encoders(
    encoders: Sequence[Encoder],
    scorers: Sequence[Scorer],
    images: ImageSet,
    items: Sequence[Item],
    batch_size: int,
    on_progress: Callable[[float], None] | None = None,
) -> Comparison:
    """Reconstructs every image from every encoder; originals are decoded once.

    Raises:
        InputError: an image that cannot be read.
    """
    device = encoders[0].backbone.device
    for scorer in scorers:
        scorer.backbone.to(device)
    side = max(max(encoder.backbone.input_size) for encoder in encoders)
    result = Comparison(list(encoders), side, [item.id for item in items])
    seen = {scorer.column: [] for scorer in scorers}
    parts: dict[str, list[dict[str, Tensor]]] = {encoder.label: [] for encoder in encoders}
    for batch in batched(items, batch_size):
        squares = [center_square(images.read(item.index), side) for item in batch]
        originals = to_tensor(squares).to(device)
        for scorer in scorers:
            seen[scorer.column].append(scorer.embed(originals).cpu())
        for encoder in encoders:
            samples = encoder.reconstruct(originals, batch)
            parts[encoder.label].append(_measure(originals, samples, scorers))
            _keep_examples(result, encoder.label, samples)
            if on_progress is not None:
                on_progress(len(batch))
        if len(result.original) < N_EXAMPLES:
            kept = [*result.original, *originals.cpu()][:N_EXAMPLES]
            result.original = torch.stack(kept)
    embeddings = {name: torch.cat(vectors) for name, vectors in seen.items()}
    partners = find_partners([item.label for item in items])
    for label, measured in parts.items():
        joined = {name: torch.cat([part[name] for part in measured]) for name in measured[0]}
        result.columns[label] = _compare_embeddings(joined, embeddings, partners)
    return result


def _measure(
    originals: Images, samples: Float[Tensor, "b 3 _ _"], scorers: Sequence[Scorer]
) -> dict[str, Tensor]:
    """Pixel metrics, and the embeddings of the samples under the names of the scorers."""
    size = (originals.shape[-2], originals.shape[-1])
    resized = resize(samples, size).clamp(0, 1)
    measured = {name: metric(resized, originals) for name, metric in PIXEL_METRICS.items()}
    measured |= {scorer.column: scorer.embed(samples) for scorer in scorers}
    return {name: values.cpu() for name, values in measured.items()}


def _compare_embeddings(
    measured: dict[str, Tensor], embeddings: dict[str, Tensor], partners: Sequence[int]
) -> dict[str, Tensor]:
    """Replaces embeddings by their cosine with the original's, and adds that of the partner.

    Args:
        partners: another image of each; none leaves that out.
    """
    cosine = partial(F.cosine_similarity, dim=1)
    columns = {name: values for name, values in measured.items() if name not in embeddings}
    for name, originals in embeddings.items():
        columns[name] = cosine(originals, measured[name])
        if partners:
            columns[NULL + name] = cosine(originals, measured[name][list(partners)])
    return columns


def _keep_examples(result: Comparison, label: str, samples: Images) -> None:
    kept = result.examples.get(label)
    if kept is None or len(kept) < N_EXAMPLES:
        joined = samples.cpu() if kept is None else torch.cat([kept, samples.cpu()])
        result.examples[label] = joined[:N_EXAMPLES]
