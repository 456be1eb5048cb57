"""Who looks at the pictures: backbones, and metrics of pixels; each gives one value per image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.data import to_images
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.metrics import feature_cosine, top_k_match
from featinv_diffusion.metrics.pixels import psnr, ssim
from featinv_diffusion.types import Features, Images

Pixels = UInt8[Tensor, "b 3 height width"]
Columns = dict[str, Tensor]
"""One value per image under each name."""

OWN = ""
"""The name of the inverter's own backbone among those that look."""

PREDICTED = "predicted_class"
"""The column with the top-1 class that the own backbone sees in the reconstruction."""


@dataclass(frozen=True, eq=False)
class View:
    """What a backbone sees; `logits` is None where it has no head."""

    features: Features
    logits: Tensor | None

    @property
    def is_finite(self) -> Bool[Tensor, " b"]:
        """Whether features and class scores of each picture are finite."""
        finite = finite_rows(self.features)
        return finite if self.logits is None else finite & finite_rows(self.logits)


Views = dict[str, View]


@dataclass(frozen=True, eq=False)
class Observers:
    """All that look at the pictures.

    Args:
        backbones: by name; `OWN` is the inverter's.
        lpips: distance of each pair of images; None where it is left out.
    """

    backbones: Mapping[str, Backbone]
    lpips: Callable[[Images, Images], Tensor] | None = None

    @property
    def own(self) -> Backbone:
        return self.backbones[OWN]

    @torch.no_grad()
    def view_originals(self, pictures: Sequence[Image.Image]) -> Views:
        """Shows each backbone the centre squares at the size that it takes."""
        return {
            name: View(*backbone.features_and_logits(self._squares(backbone, pictures)))
            for name, backbone in self.backbones.items()
        }

    @torch.no_grad()
    def view_pixels(self, pixels: Pixels) -> Views:
        """Shows the pictures to each backbone."""
        return {
            name: View(*backbone.features_and_logits(to_images(pixels.to(backbone.device))))
            for name, backbone in self.backbones.items()
        }

    @torch.no_grad()
    def compare_views(self, originals: Views, seen: Views) -> Columns:
        """Compares what the backbones saw; NaN where one of the two views holds such values."""
        columns: Columns = {}
        for name in self.backbones:
            prefix = f"evaluated_by_{name}_" if name != OWN else ""
            for metric, values in _agreement(originals[name], seen[name]).items():
                columns[prefix + metric] = values
        return columns

    @torch.no_grad()
    def compare_pixels(self, originals: Pixels, pixels: Pixels) -> Columns:
        """Compares pictures of one size."""
        device = self.own.device
        a, b = to_images(originals.to(device)), to_images(pixels.to(device))
        columns = {"psnr": psnr(b, a), "ssim": ssim(b, a)}
        if self.lpips is not None:
            columns["lpips"] = self.lpips(b, a)
        return {name: values.cpu() for name, values in columns.items()}

    def _squares(self, backbone: Backbone, pictures: Sequence[Image.Image]) -> Images:
        side = max(backbone.input_size)
        return to_tensor([center_square(p, side) for p in pictures]).to(backbone.device)


def to_pixels(images: Images) -> Pixels:
    """Rounds to 8 bits, as a PNG does; values beyond [0, 1] are clamped, NaN become 0.

    So look at `finite_rows` first: a sample of NaN is no black picture.
    """
    return (images.float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def finite_rows(values: Tensor) -> Bool[Tensor, " b"]:
    """Whether each row of a batch holds neither NaN nor infinite values; on the CPU."""
    return values.flatten(1).isfinite().all(dim=1).cpu()


def join_views(parts: Sequence[Views]) -> Views:
    """Joins the views of batches."""
    return {name: _join([part[name] for part in parts]) for name in parts[0]}


def take_views(views: Views, rows: Sequence[int]) -> Views:
    """Returns the views of some images."""
    index = list(rows)
    return {
        name: View(v.features[index], None if v.logits is None else v.logits[index])
        for name, v in views.items()
    }


def _agreement(original: View, seen: View) -> Columns:
    columns = {"cosine": feature_cosine(original.features, seen.features)}
    if original.logits is not None and seen.logits is not None:
        n_classes = seen.logits.shape[1]
        for k in (1, 5):
            match = top_k_match(original.logits, seen.logits, min(k, n_classes))
            columns[f"top{k}_match"] = match.float()
    finite = original.is_finite & seen.is_finite
    return {
        name: values.float().cpu().masked_fill(~finite, torch.nan)
        for name, values in columns.items()
    }


def _join(views: Sequence[View]) -> View:
    logits = [view.logits for view in views if view.logits is not None]
    return View(torch.cat([v.features for v in views]), torch.cat(logits) if logits else None)
