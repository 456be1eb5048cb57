"""Encoders by reconstruction: figures 1, 2, 4, 9, 10, tables 1, 4 and 5, conditions A.2, time.

Source: "Image Reconstruction as a Tool for Feature Analysis".
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones.objectives import find_objectives
from featinv_diffusion.data.selection import digest
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.operator_methods import solve
from featinv_diffusion.features.pixel_operations import make_operation
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board
from featinv_diffusion.inverters.open import load_inverter
from featinv_diffusion.metrics.statistics import bootstrap_difference, bootstrap_mean
from featinv_diffusion.papers.base import Answer, Finding, Request, cell
from featinv_diffusion.papers.operators import encode, halve, invert, moments_of, open_encoder
from featinv_diffusion.papers.operators import place as measure_place
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.studies.encoders import compare_encoders
from featinv_diffusion.studies.settings import EncoderSettings, ImageChoice, PictureChoice
from featinv_diffusion.studies.study import to_dicts
from featinv_diffusion.types import Features, Images

N_CHANNELS, N_DEFAULT = 15, 200


# ---- Figure 2: what single channels show ---------------------------------------------------------


def measure_channels(request: Request) -> Finding:
    """Draws single channels, and measures how well the colours of the image explain each."""
    inverter, size = open_encoder(request), request.settings.batch_size
    pictures = request.pictures(N_DEFAULT, max(inverter.require_backbone().picture_size))
    features = encode(inverter, pictures.images, size)
    grid = inverter.spec.grid
    small = F.interpolate(pictures.images, grid, mode="area")
    own = channels_explained(features, small)
    other = channels_explained(features, small.roll(max(1, len(small) // 2), 0))
    figures_of = {"own": bootstrap_mean(own.mean(1)), "other": bootstrap_mean(other.mean(1))}
    gain = bootstrap_difference(own.mean(1), other.mean(1))
    per_channel = own.mean(0) > torch.quantile(other.mean(0), 0.95)
    share = float(per_channel.float().mean())
    answers = {
        "siglip-figure-2": Answer(
            f"share of a channel's variance that RGB of the cells explains: "
            f"{cell(figures_of['own'], 2)}, of another image {cell(figures_of['other'], 2)}; "
            f"{100 * share:.0f} % of the channels above chance",
            gain.low > 0 and share > 0.9,
        )
    }
    tables = [
        (
            "Variance of channels that RGB explains",
            ("picture", "share"),
            [[name, cell(value)] for name, value in figures_of.items()],
        )
    ]
    drawn = {"channels.png": _draw_channels(pictures.images[0], features[0])}
    metrics = {"explained": to_dicts(figures_of), "share_above_chance": share}
    return Finding(answers, tables, drawn, metrics, pictures.ids)


def channels_explained(
    features: Features, colours: Float[Tensor, "b 3 h w"]
) -> Float[Tensor, "b c"]:
    """Returns R² of each channel over the cells of each image, from R, G, B and a constant."""
    cells = features.flatten(2).double()
    ones = torch.ones(len(colours), 1, *colours.shape[2:])
    x = torch.cat([colours, ones], 1).flatten(2).transpose(1, 2).double()
    q = torch.linalg.qr(x).Q
    centred = cells - cells.mean(2, keepdim=True)
    fitted = (q @ (q.transpose(1, 2) @ centred.transpose(1, 2))).transpose(1, 2)
    left = (centred - fitted).square().sum(2)
    return (1 - left / centred.square().sum(2).clamp_min(1e-12)).clamp(0, 1).float()


def _draw_channels(
    image: Float[Tensor, "3 height width"], features: Float[Tensor, "c h w"]
) -> Figure:
    generator = make_generator(0, "channels")
    chosen = sorted(torch.randperm(len(features), generator=generator)[:N_CHANNELS].tolist())
    note = f"{len(chosen)} of {len(features)} channels, each in its own range."
    board = Board(2, 8, "Channels of the feature map", [note], tile=0.8, caption=0.05)
    figure = board.make()
    axes = board.tile_axes(figure, 0, 0)
    figures.show_picture(axes, image)
    figures.label(axes, "picture")
    for place, k in enumerate(chosen, start=1):
        axes = board.tile_axes(figure, place // 8, place % 8)
        values = features[k].float()
        figures.show_map(axes, values, float(values.min()), float(values.max()))
        figures.label(axes, f"channel {k}")
    return figure


# ---- A.2: what the swap presumes -----------------------------------------------------------------


def measure_conditions(request: Request) -> Finding:
    """Checks the two conditions: small distortions, and operators on images that are new."""
    inverter, size = open_encoder(request), request.settings.batch_size
    pictures = request.pictures(N_DEFAULT, max(inverter.require_backbone().picture_size))
    halves = halve(inverter, pictures, make_operation("swap"), size)
    n = len(pictures) // 2
    ids = {"fit": set(pictures.ids[:n]), "held": set(pictures.ids[n:])}
    shared = len(ids["fit"] & ids["held"])
    operator = solve(
        moments_of(halves, inverter.spec.channels), inverter.spec, "swap", "linear", ridge=1e-3
    )
    found = measure_place(inverter, halves, {"linear": operator.edit(spec=inverter.spec)}, size)
    held = pictures.images[n:]
    residual = invert(inverter, halves.before["held"], size) - held
    lengths = {
        "distortion": bootstrap_mean(correlation_length(residual)),
        "picture": bootstrap_mean(correlation_length(held)),
    }
    height = held.shape[-1]
    answers = {
        "siglip-conditions": Answer(
            f"size of distortions {cell(lengths['distortion'], 1)} of {height} pixels, of what is "
            f"in the pictures {cell(lengths['picture'], 1)}; images in fit and test: {shared} "
            f"shared; position {cell(found['linear']['position'], 2)}",
            lengths["distortion"].high < lengths["picture"].low and shared == 0,
        )
    }
    tables = [
        (
            "Correlation lengths, pixels",
            ("of", "length"),
            [[name, cell(value, 1)] for name, value in lengths.items()],
        )
    ]
    columns: dict[str, Images] = {"original": held, "R(f)": (residual + held).clamp(0, 1)}
    columns["difference"] = (residual / 2 + 0.5).clamp(0, 1)
    drawn = {"distortions.png": figures.draw_grid(columns, "What the reconstructor leaves", [])}
    metrics = {
        "correlation_length": to_dicts(lengths),
        "fitted_on_sha256": digest(pictures.ids[:n]),
        "n_shared": shared,
    }
    return Finding(answers, tables, drawn, metrics, pictures.ids)


def correlation_length(images: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
    """Returns the distance in pixels at which the autocorrelation of each image falls below 1/e.

    Mean over rows and columns, of the mean of the channels, between whole pixels linearly.
    """
    values = images.mean(1)
    values = values - values.mean(dim=(1, 2), keepdim=True)
    height, width = values.shape[-2:]
    limit = min(height, width) // 2
    power = torch.fft.rfft2(values, s=(2 * height, 2 * width)).abs().square()
    auto = torch.fft.irfft2(power, s=(2 * height, 2 * width))
    distances = torch.arange(limit)
    across = auto[:, 0, :limit] * width / (width - distances)
    down = auto[:, :limit, 0] * height / (height - distances)
    curve = (across + down) / (auto[:, 0, :1] * 2).clamp_min(1e-12)
    level = 1 / torch.e
    below = curve < level
    first = torch.where(below.any(1), below.float().argmax(1), torch.tensor(limit - 1)).clamp_min(1)
    rows = torch.arange(len(curve))
    high, low = curve[rows, first - 1], curve[rows, first]
    share = ((high - level) / (high - low).clamp_min(1e-9)).clamp(0, 1)
    return (first - 1).float() + share


# ---- Time ----------------------------------------------------------------------------------------

TIMED = ("siglip2", "vit", "tiny/convnext")
N_TIMED = 4


def measure_time(request: Request) -> Finding:
    """Measures the time of a picture by each kind of inverter, one picture at a time."""
    names = request.settings.models(*TIMED)
    pictures = request.pictures(N_TIMED, 64)
    seconds: dict[str, list[float]] = {}
    made: dict[str, Images] = {"original": pictures.images}
    for name in names:
        inverter = load_inverter(name, device=request.settings.device)
        features = inverter.encode(list(pictures.images)).as_subclass(Tensor)
        generator = [torch.Generator().manual_seed(seed) for seed in pictures.seeds]
        inverter.invert(features[:1], generator=generator[:1])  # what is done once
        seconds[name], parts = [], []
        for i in range(len(features)):
            begin = time.perf_counter()
            parts.append(inverter.invert(features[i : i + 1], generator=generator[i : i + 1]))
            seconds[name].append(time.perf_counter() - begin)
        made[name] = torch.cat(parts).cpu()
    medians = {name: float(torch.tensor(values).median()) for name, values in seconds.items()}
    listed = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in medians.items())
    answers = {
        "siglip-time": Answer(f"median time of a picture: {listed}", medians[names[0]] < 0.1)
    }
    rows = [[name, f"{1000 * value:.1f}"] for name, value in medians.items()]
    drawn = {"pictures.png": figures.draw_grid(made, "Pictures whose time was taken", [])}
    metrics = {"median_seconds": medians, "threads": torch.get_num_threads()}
    return Finding(
        answers, [("Time of a picture", ("inverter", "ms"), rows)], drawn, metrics, pictures.ids
    )


# ---- Scores of encoders --------------------------------------------------------------------------


def measure_encoders_of_paper(request: Request) -> Finding:
    """Compares encoders by reconstruction, with paired tests and their training objectives."""
    choice: ImageChoice = request.settings.images
    if choice.data is None:
        raise InputError("This item compares encoders on a data set. Name it with --data.")
    settings = EncoderSettings(
        inverters=request.settings.models("siglip", "siglip2"),
        pictures=PictureChoice(
            choice, request.settings.held_back_per_class, request.settings.n_images
        ),
        seed=request.settings.seed,
        batch_size=request.settings.batch_size,
        device=request.settings.device,
    )
    if request.settings.n_images is None:
        settings = replace(settings, pictures=PictureChoice(choice, 0, N_DEFAULT))
    found = compare_encoders(settings, exclude=request.output)
    similarity = next(name for name in found.metrics["ranking"] if name.startswith("similarity"))
    by_label: dict[str, Any] = {one["label"]: one for one in found.metrics["encoders"]}
    pairs = found.metrics["pairs"]
    scores = ", ".join(
        f"{label} {one['figures'][similarity]['value']:.3f}" for label, one in by_label.items()
    )
    tests = [_p_values(one) for one in pairs[similarity]]
    best = found.metrics["ranking"][similarity][0]
    rows = [
        [
            label,
            ", ".join(find_objectives(one["backbone"])) or "–",
            *(_figure(one["figures"][name]) for name in found.metrics["ranking"]),
        ]
        for label, one in by_label.items()
    ]
    listed = "; ".join(
        f"{p['pair']}: Wilcoxon {p['wilcoxon']:.1e}, bootstrap {p['bootstrap']:.1e}" for p in tests
    )
    second = "siglip2" in best
    answers = {
        "siglip-figure-4": Answer(f"similarity: {scores}", second),
        "siglip-table-1": Answer(
            listed, all(max(p["wilcoxon"], p["bootstrap"]) < 0.05 for p in tests)
        ),
        "siglip-figure-9": Answer(f"similarity: {scores}", second),
        "siglip-figure-10": Answer(f"similarity: {scores}", second),
        "siglip-tables-4-5": Answer(
            f"objectives recorded of {sum(row[1] != '–' for row in rows)} of {len(rows)} encoders; "
            f"best: {best}",
            second,
        ),
    }
    header = ("encoder", "objectives", *found.metrics["ranking"])
    tables = [("Encoders", header, rows)]
    ids = [row["id"] for row in found.rows()]
    return Finding(answers, tables, found.figures, found.metrics, ids)


def _p_values(one: dict[str, Any]) -> dict[str, Any]:
    return {
        "pair": f"{one['a']} − {one['b']}",
        "wilcoxon": float(one["wilcoxon"]["p_value"]),
        "bootstrap": float(one["bootstrap"]["p_value"]),
    }


def _figure(values: dict[str, float]) -> str:
    return f"{values['value']:.3f} [{values['low']:.3f}, {values['high']:.3f}]"
