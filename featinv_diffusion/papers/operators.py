"""Operators on the features of SigLIP-like encoders: figures 3 and 5 to 7.

Source: "Image Reconstruction as a Tool for Feature Analysis", sections 4.2 and 5.2 to 5.4. Half of
the images fit each operator, the other half measures it, and the reconstructor sees neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from featinv_diffusion.errors import InputError
from featinv_diffusion.features.operator_methods import PairMoments, solve
from featinv_diffusion.features.operators import (
    Spectrum,
    apply_matrix,
    measure_spectrum,
)
from featinv_diffusion.features.pixel_operations import PixelOperation, make_operation
from featinv_diffusion.figures.board import draw_grid
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.open import load_inverter
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.metrics.colour import delta_e_2000, to_lab
from featinv_diffusion.metrics.statistics import Interval, bootstrap_mean, bootstrap_statistic
from featinv_diffusion.papers.base import Answer, Finding, Pictures, Request, cell
from featinv_diffusion.studies.operators import draw_spectra
from featinv_diffusion.studies.study import to_dicts
from featinv_diffusion.types import Features, Images

N_DEFAULT = 1000
RANKS = (2, 4, 8, 16)
"""How many directions the reflections of the swap may turn round."""
OTHERS = "reflection of all but 2"
"""Turns round what the whole rotation does beyond the one pair that is published."""


@dataclass(frozen=True, eq=False)
class Halves:
    """Features before and after an operation: `fit` is fitted on, `held` is measured on."""

    operation: PixelOperation
    before: dict[str, Features]
    after: dict[str, Features]
    wanted: Images


def open_encoder(request: Request) -> Inverter:
    """Opens the reconstructor that was asked for, or that of the second SigLIP."""
    return load_inverter(request.settings.models("siglip2")[0], device=request.settings.device)


@torch.no_grad()
def encode(inverter: Inverter, images: Images, batch_size: int) -> Features:
    """Returns the features of images, on the CPU."""
    backbone = inverter.require_backbone()
    return torch.cat(
        [backbone.features(x.to(backbone.device)).cpu() for x in images.split(batch_size)]
    )


def halve(
    inverter: Inverter, pictures: Pictures, operation: PixelOperation, batch_size: int
) -> Halves:
    """Encodes both halves of the pictures before and after an operation.

    Raises:
        InputError: fewer locations to fit on than channels.
    """
    n = len(pictures) // 2
    spec = inverter.spec
    if n * spec.grid[0] * spec.grid[1] < spec.channels:
        raise InputError(
            f"An operator on {spec.channels} channels needs more images than {len(pictures)}: half "
            "of them must have as many cells."
        )
    parts = {"fit": pictures.images[:n], "held": pictures.images[n:]}
    before = {k: encode(inverter, operation.source(x), batch_size) for k, x in parts.items()}
    after = {k: encode(inverter, operation.target(x), batch_size) for k, x in parts.items()}
    return Halves(operation, before, after, operation.target(parts["held"]))


def invert(inverter: Inverter, features: Features, batch_size: int) -> Images:
    """Returns pictures in [0, 1] on the CPU; the reconstructor takes no noise."""
    return torch.cat([inverter.invert(x).cpu() for x in features.split(batch_size)])


def moments_of(halves: Halves, channels: int, n: int | None = None) -> PairMoments:
    """Returns the moments of the first n images of the fitted half."""
    moments = PairMoments(channels)
    moments.update(halves.before["fit"][:n], halves.after["fit"][:n])
    return moments


Edit = Callable[[Features], Features]


def place(
    inverter: Inverter, halves: Halves, edits: Mapping[str, Edit], batch_size: int
) -> dict[str, dict[str, Interval]]:
    """Measures edits of the held-out features.

    Returns:
        For each edit `cosine` to the true features, `position` of ΔE2000 between the picture of
        the true features (0) and doing nothing (1), and `chroma`, the mean chroma of the picture
        by that of the picture of the true features.
    """
    before, after = halves.before["held"], halves.after["held"]
    floor_picture = invert(inverter, after, batch_size)
    floor = delta_e_2000(floor_picture, halves.wanted)
    ceiling = delta_e_2000(invert(inverter, before, batch_size), halves.wanted)
    full = _chroma(floor_picture)
    found = {}
    for name, edit in edits.items():
        edited = edit(before)
        picture = invert(inverter, edited, batch_size)
        columns = {
            "floor": floor,
            "own": delta_e_2000(picture, halves.wanted),
            "ceiling": ceiling,
        }
        found[name] = {
            "cosine": bootstrap_mean(feature_cosine(after, edited)),
            "position": bootstrap_statistic(columns, _position),
            "chroma": bootstrap_statistic(
                {"a": _chroma(picture), "b": full}, lambda m: m["a"] / max(m["b"], 1e-9)
            ),
        }
    return found


def _position(means: Mapping[str, float]) -> float:
    room = means["ceiling"] - means["floor"]
    return (means["own"] - means["floor"]) / room if abs(room) > 1e-9 else 1.0


def _chroma(images: Images) -> Float[Tensor, " b"]:
    return to_lab(images)[:, 1:].norm(dim=1).mean(dim=(1, 2))


def to_table(found: Mapping[str, Mapping[str, Interval]]) -> list[list[str]]:
    """Returns the rows of a table under `HEADER`."""
    return [
        [name, *(cell(one[k], 3 if k == "cosine" else 2) for k in ("cosine", "position", "chroma"))]
        for name, one in found.items()
    ]


HEADER = ("operator", "cosine", "position", "chroma")
NOTE = "Position: 0 is the picture of the true features, 1 is doing nothing. Chroma: by the true's."


# ---- The swap of red and blue, and its eigenvalues -----------------------------------------------


def measure_swap(request: Request) -> Finding:
    """Fits the swap by every method, and reflections of few directions, with their eigenvalues."""
    inverter, size = open_encoder(request), request.settings.batch_size
    pictures = request.pictures(N_DEFAULT, max(inverter.require_backbone().picture_size))
    halves = halve(inverter, pictures, make_operation("swap"), size)
    spec = inverter.spec
    moments = moments_of(halves, spec.channels)
    fitted = {
        name: solve(moments, spec, "swap", name)
        for name in ("orthogonal", "self-adjoint", "linear")
    }
    edits: dict[str, Edit] = {name: one.edit(spec=spec) for name, one in fitted.items()}
    reflections = {k: reflect(moments.xy, k) for k in RANKS if k < spec.channels}
    edits |= {f"reflection of {k}": by_matrix(q) for k, q in reflections.items()}
    n_turned = int((torch.linalg.eigvalsh((moments.xy + moments.xy.T) / 2) < 0).sum())
    edits[OTHERS] = by_matrix(reflect(moments.xy, n_turned, skipped=RANKS[0]))
    found = place(inverter, halves, edits, size)
    spectra = {name: measure_spectrum(one) for name, one in fitted.items()}
    energy = difference_energy(halves)
    counts = spectra["orthogonal"].figures()
    position = {name: one["position"] for name, one in found.items()}
    full = position["self-adjoint"].value
    few = ", ".join(f"{k}: {position[f'reflection of {k}'].value:.2f}" for k in reflections)
    near = ", ".join(f"{name} {v.value:.2f}" for name, v in position.items() if name in fitted)
    others = position[OTHERS].value
    pair = (
        f"{counts['n_near_plus_one']} near +1, {counts['n_near_minus_one']} near −1, "
        f"{counts['n_negative_real']} of {counts['n_eigenvalues']} with a negative real part"
    )
    reason = (
        f"position of a reflection of so many directions {few} (all {n_turned}: {full:.2f}; all "
        f"but the first two: {others:.2f}); two directions hold {100 * energy[1]:.0f} % of what "
        "the swap changes"
    )
    answers = {
        "siglip-figure-3": Answer(
            f"S² = I to {spectra['self-adjoint'].twice_from_identity:.0e}; position {near}",
            spectra["self-adjoint"].twice_from_identity < 1e-6,
        ),
        "siglip-figure-5": Answer(f"position {near}", position["orthogonal"].high < 0.5),
        "siglip-figures-11-14": Answer(f"position {near}", position["orthogonal"].high < 0.5),
        "siglip-figure-6": Answer(f"{pair}; {reason}", counts["n_negative_real"] <= 2),
    }
    tables: list[Any] = [
        ("The swap on held-out images", HEADER, to_table(found)),
        (
            "Share of what the swap changes in the first directions",
            ("directions", "share"),
            [[str(k), f"{energy[k - 1]:.3f}"] for k in (1, *RANKS, 32) if k <= len(energy)],
        ),
    ]
    drawn = {
        "eigenvalues.png": draw_spectra(list(spectra.values()), "Swap: " + ", ".join(spectra)),
        "pictures.png": draw_edits(inverter, halves, {n: edits[n] for n in fitted}, size, "swap"),
    }
    metrics = {
        "held_out": {name: to_dicts(one) for name, one in found.items()},
        "spectra": {name: one.figures() for name, one in spectra.items()},
        "energy_of_the_difference": energy,
    }
    return Finding(answers, tables, drawn, metrics, pictures.ids, [NOTE])


def reflect(xy: Float[Tensor, "c c"], k: int, skipped: int = 0) -> Float[Tensor, "c c"]:
    """Returns I − 2 W Wᵀ with the k directions that it pays most to turn round.

    They are the eigenvectors of the symmetric part of XᵀY with the least eigenvalues. The first
    `skipped` of them stay as they are.
    """
    _, vectors = torch.linalg.eigh((xy + xy.T) / 2)
    turned = vectors[:, skipped:k]
    return torch.eye(len(xy), dtype=xy.dtype) - 2 * turned @ turned.T


def difference_energy(halves: Halves) -> list[float]:
    """Returns which share of the squared differences lies in the first 1, 2 … directions."""
    difference = unit_rows(halves.after["held"]) - unit_rows(halves.before["held"])
    values = torch.linalg.eigvalsh(difference.T @ difference).flip(0).clamp_min(0)
    return (values.cumsum(0) / values.sum().clamp_min(1e-30)).tolist()


def unit_rows(features: Features) -> Float[Tensor, "n c"]:
    """Returns the vector of each location at unit norm, in float64."""
    rows = features.movedim(1, -1).flatten(0, 2).double()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-12)


def by_matrix(matrix: Float[Tensor, "c c"]) -> Edit:
    """Returns the edit that applies a matrix and keeps the norm of each location."""
    return lambda features: apply_matrix(features, matrix)


# ---- Suppression of a channel --------------------------------------------------------------------


def measure_suppression(request: Request) -> Finding:
    """Fits the suppression of blue, and measures powers of it and their eigenvalues."""
    inverter, size = open_encoder(request), request.settings.batch_size
    pictures = request.pictures(N_DEFAULT, max(inverter.require_backbone().picture_size))
    operation = make_operation("suppress")
    halves = halve(inverter, pictures, operation, size)
    spec = inverter.spec
    fitted = solve(moments_of(halves, spec.channels), spec, "suppress", "linear", ridge=1e-3)
    held, rows, positions = {}, [], {}
    spectra: list[Spectrum] = []
    originals = pictures.images[len(pictures) // 2 :]
    for power in (1, 4, 12):
        after = encode(inverter, operation.repeated(originals, power), size)
        of_power = Halves(
            operation,
            halves.before,
            {**halves.after, "held": after},
            operation.repeated(originals, power),
        )
        name = f"power {power}"
        edit = fitted.edit(power, spec=spec)
        held[name] = place(inverter, of_power, {name: edit}, size)[name]
        positions[power] = held[name]["position"]
        spectra.append(measure_spectrum(fitted, power))
        rows += to_table({name: held[name]})
    first = spectra[0].figures()
    moduli = first["modulus"]
    above = first["n_modulus_above_one"]
    listed = ", ".join(f"{n}: {v.value:.2f}" for n, v in positions.items())
    answers = {
        "siglip-figure-7": Answer(
            f"position by power {listed}", all(v.high < 0.5 for v in positions.values())
        ),
        "siglip-suppression-eigenvalues": Answer(
            f"moduli {moduli['min']:.3f} … {moduli['max']:.3f}, {above} of "
            f"{first['n_eigenvalues']} above 1",
            moduli["max"] <= 1.05,
        ),
    }
    drawn = {
        "eigenvalues.png": draw_spectra(spectra, "Suppression of blue, linear operator"),
        "pictures.png": draw_edits(
            inverter, halves, {"linear": fitted.edit(spec=spec)}, size, "suppression"
        ),
    }
    metrics = {
        "held_out": {name: to_dicts(one) for name, one in held.items()},
        "spectra": [one.figures() for one in spectra],
    }
    tables = [("Suppression on held-out images", HEADER, rows)]
    return Finding(answers, tables, drawn, metrics, pictures.ids, [NOTE])


def draw_edits(
    inverter: Inverter, halves: Halves, edits: Mapping[str, Edit], batch_size: int, what: str
) -> Figure:
    """Draws what is wanted, doing nothing, the edits and the true features of the first images."""
    few = {
        k: v[:6] for k, v in (("before", halves.before["held"]), ("after", halves.after["held"]))
    }
    columns: dict[str, Images] = {"wanted": halves.wanted[:6]}
    columns["R(f)"] = invert(inverter, few["before"], batch_size)
    for name, edit in edits.items():
        columns[name if len(name) < 16 else f"{name[:15]}…"] = invert(
            inverter, edit(few["before"]), batch_size
        )
    columns["R(true f)"] = invert(inverter, few["after"], batch_size)
    return draw_grid(columns, f"The {what} in the features of {inverter.spec.backbone}", [])
