"""Images of kinds that training did not show: appendix B of FeatInv as a protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from featinv_diffusion.data.sets import open_images
from featinv_diffusion.figures import board as figures
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters.diffusion import DiffusionInverter
from featinv_diffusion.metrics import feature_cosine, top_k_match
from featinv_diffusion.metrics.statistics import bootstrap_difference, bootstrap_mean
from featinv_diffusion.papers.base import Answer, Finding, Request, cell, percent
from featinv_diffusion.papers.reconstruction import (
    draw_samples,
    features_of,
    open_pipeline,
    scores_of,
)
from featinv_diffusion.runs.scope import open_scope
from featinv_diffusion.studies.study import to_dicts
from featinv_diffusion.types import Images

N_FEW = 40


def measure_other_domains(request: Request) -> Finding:
    """Reconstructs sketches, textures, digits and other classes, beside their own nulls."""
    name = request.settings.models("tiny/convnext")[0]
    size = request.settings.batch_size
    inverter = open_pipeline(name, request.settings.device)
    backbone, scope = inverter.require_backbone(), open_scope(inverter)
    pictures = request.pictures(N_FEW, 64)
    domains = other_domains(pictures.images)
    if (others := _other_classes(request, len(pictures))) is not None:
        domains["other classes"] = others
    rows, metrics = [], {}
    beats, drawn = [], {}
    for kind, images in domains.items():
        features = features_of(backbone, images, size)
        seeds = [pictures.seeds[i % len(pictures)] for i in range(len(images))]
        made, cosine = draw_samples(inverter, features, seeds, size)
        seen = features_of(backbone, made, size)
        null = feature_cosine(features, seen.roll(max(1, len(seen) // 2), 0))
        trip = feature_cosine(
            features, features_of(backbone, _round_trip(inverter, images, size), size)
        )
        truth, scores = (scores_of(backbone, x, size) for x in (images, made))
        top5 = bootstrap_mean(top_k_match(truth, scores, 5).float())
        values = {
            "cosine": bootstrap_mean(cosine),
            "another image": bootstrap_mean(null),
            "autoencoder": bootstrap_mean(trip),
        }
        p_values = scope.p_values(features, cosine.tolist())
        outside = None if p_values is None else float(np.mean(np.array(p_values) < 0.05))
        beats.append(bootstrap_difference(cosine, null).low > 0)
        metrics[kind] = {**to_dicts(values), "top5": to_dicts({"m": top5})["m"], "outside": outside}
        rows.append(
            [
                kind,
                *(cell(v) for v in values.values()),
                percent(top5),
                "–" if outside is None else f"{100 * outside:.0f} %",
            ]
        )
        drawn[kind] = (images, made)
    listed = ", ".join(
        f"{kind} {one['cosine']['value']:.2f} ({one['another image']['value']:.2f})"
        for kind, one in metrics.items()
    )
    answers = {
        "featinv-b-other-domains": Answer(f"cosine (of another image): {listed}", all(beats))
    }
    header = ("images", "cosine", "another image", "autoencoder", "top-5 match", "p < 0.05")
    columns = {}
    for kind, (images, made) in drawn.items():
        columns[kind], columns[f"{kind}, R"] = images, made
    picture = {"domains.png": figures.draw_grid(columns, "Images of other kinds", [], n_rows=4)}
    return Finding(answers, [("Other kinds", header, rows)], picture, metrics, pictures.ids)


def _round_trip(inverter: DiffusionInverter, images: Images, batch_size: int) -> Images:
    return torch.cat([inverter.round_trip(x).cpu() for x in images.split(batch_size)])


def other_domains(images: Images) -> dict[str, Images]:
    """Returns the pictures themselves, and what is made of them or comes with scikit-learn.

    Sketches are the edges of a picture as dark lines on white. Textures have the picture's own
    power spectrum and random phases. Digits are handwritten, 8 × 8 pixels enlarged.
    """
    found = {"photos": images, "sketches": sketch(images), "textures": texture(images)}
    found["inverted"] = 1 - images
    found["digits"] = _digits(len(images), images.shape[-1])
    return {kind: (x.clamp(0, 1) * 255).round() / 255 for kind, x in found.items()}


def sketch(images: Images) -> Images:
    """Returns dark lines where the lightness changes, on white."""
    grey = images.mean(1, keepdim=True)
    across = torch.nn.functional.pad(grey.diff(dim=-1), (0, 1))
    down = torch.nn.functional.pad(grey.diff(dim=-2), (0, 0, 0, 1))
    edges = (across.square() + down.square()).sqrt()
    strong = edges / edges.amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
    return (1 - (3 * strong).clamp(0, 1)).expand_as(images).contiguous()


def texture(images: Images) -> Images:
    """Returns images of the same power spectrum with random phases, the same in R, G and B."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(images), 1, *images.shape[-2:], generator=generator)
    phase = torch.fft.fft2(noise).angle()
    spectrum = torch.fft.fft2(images)
    turned = torch.fft.ifft2(spectrum * torch.exp(1j * phase)).real
    mean = images.mean(dim=(2, 3), keepdim=True)
    return (turned - turned.mean(dim=(2, 3), keepdim=True) + mean).clamp(0, 1)


def _digits(n: int, side: int) -> Images:
    from sklearn.datasets import load_digits  # slow to import

    digits: Any = load_digits()
    values = torch.from_numpy(digits.images[:n] / 16).float()[:, None]
    enlarged = torch.nn.functional.interpolate(values, (side, side), mode="bilinear")
    return enlarged.clamp(0, 1).expand(-1, 3, -1, -1).contiguous()


def _other_classes(request: Request, n: int) -> Images | None:
    """Returns images of the data's classes that `--classes` does not list; None without such."""
    choice = request.settings.images
    if choice.data is None or choice.classes is None:
        return None
    listed = {
        line.split()[0]
        for line in Path(choice.classes).read_text("utf-8").splitlines()
        if line.strip() and not line.startswith("#")
    }
    images = open_images(choice.data, choice.split, None, exclude=request.output)
    rest = [i for i, name in enumerate(images.ids) if not listed & set(name.split("/"))]
    if len(rest) < n:
        return None
    rows = [rest[k] for k in torch.linspace(0, len(rest) - 1, n).long().tolist()]
    return to_tensor([center_square(images.read(i), 64) for i in rows])
