"""Encoders compared by how well their features are turned back into images.

Source: "Image Reconstruction as a Tool for Feature Analysis", section 4. What differs from its
code: images are central squares, as in configs/inverters/siglip.yaml and siglip2.yaml, where it
trains on whole images squashed to squares and evaluates on DINOv2's central crops; similarity is
measured in colour, and in grey only on request, where it always turns grey without saying so; its
scorers are CLIP ViT-L/14 and SigLIP2-L, of which the latter is of the family of what it ranks.
Here pixels and colours are measured too, and each figure has its interval.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.analysis.encoders_scoring import Scorer, resize
from featinv_diffusion.analysis.encoders_settings import Encoder
from featinv_diffusion.evaluation.dataset import ImageSet
from featinv_diffusion.evaluation.evaluator import find_partners
from featinv_diffusion.evaluation.selection import Item
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.metrics.colour import delta_e_2000
from featinv_diffusion.metrics.pixels import psnr, ssim
from featinv_diffusion.reconstruction import batched
from featinv_diffusion.types import Images

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
