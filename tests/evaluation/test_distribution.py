"""Distances from what units kept, and what is stated beside them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from featinv_diffusion.data.selection import Item
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation import storage as distribution
from featinv_diffusion.evaluation.evaluator import Measured
from featinv_diffusion.evaluation.storage import check_references, measure_distributions, write_unit
from featinv_diffusion.metrics.distribution import FeatureSample
from featinv_diffusion.metrics.extractors import ImageFeatures
from featinv_diffusion.runs.units import Unit, make_units

DIM = 3
ORIGINALS = {"name": "photos", "pixels_sha256": "abc"}


class Colour(ImageFeatures):
    """The mean colour."""

    def __init__(self, name: str):
        super().__init__(
            name=name, distance_name=f"distance_{name}", dim=DIM, conventions={"resize": "none"}
        )
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)

    def _describe(self, pixels):
        return self.scale * pixels.float().mean(dim=(2, 3)) / 255


def vectors(n: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=(n, DIM)) + shift).astype(np.float32)


def write(output: Path, made: np.ndarray, real: np.ndarray, names=("classifier",)):
    items = [Item(i, f"image{i}", None, i, False) for i in range(len(made))]
    units: list[Unit[Item]] = make_units(items, 16, output, {})
    for unit in units:
        rows = [item.index for item in unit.items]
        result = Measured(list(unit.items), [item.id for item in unit.items])
        for name in names:
            result.reconstructed[name], result.original[name] = made[rows], real[rows]
        write_unit(result, unit)
    return units


def measure(units, names=("classifier",), **options):
    extractors = {name: Colour(name) for name in names}
    return measure_distributions(units, extractors, ORIGINALS, size=8, batch_size=4, **options)


def test_a_shift_of_all_vectors_is_its_square(tmp_path: Path):
    units = write(tmp_path, vectors(40, 0.5), vectors(40))
    figure = measure(units)["distance_classifier"]
    assert figure["value"] == pytest.approx(DIM * 0.25, abs=1e-5)
    assert (figure["n"], figure["n_reference"], figure["dim"]) == (40, 40, DIM)
    assert figure["reference"] == ORIGINALS
    assert figure["conventions"] == {"images": "rounded to 8 bits", "resize": "none"}
    assert figure["rank_deficient"] is False
    json.dumps(figure, allow_nan=False)


def test_inception_has_kid_precision_and_recall_besides(tmp_path: Path):
    names = ("classifier", "inception")
    units = write(tmp_path, vectors(40), vectors(40), names)
    figures = measure(units, names)
    assert set(figures) == {
        "distance_classifier",
        "distance_inception",
        "kid",
        "precision",
        "recall",
    }
    assert (figures["kid"]["subset_size"], figures["kid"]["n_subsets"]) == (40, 1)
    assert figures["kid"]["std"] is None  # there is one subset: the whole
    assert figures["precision"]["value"] == figures["recall"]["value"] == 1
    assert figures["precision"]["reference"] == ORIGINALS
    json.dumps(figures, allow_nan=False)


def test_a_folder_as_reference_serves_all_but_the_classifier(tmp_path: Path):
    photos = tmp_path / "photos"
    photos.mkdir()
    shades = [10, 60, 130, 200, 250]
    for shade in shades:
        Image.new("RGB", (20, 10), (shade, shade, shade)).save(photos / f"{shade}.png")
    names = ("classifier", "inception")
    units = write(tmp_path / "out", vectors(6), vectors(6), names)
    figures = measure(units, names, reference=str(photos))
    figure = figures["distance_inception"]
    assert (figure["n"], figure["n_reference"]) == (6, 5)
    assert figure["reference"]["name"] == str(photos)
    assert len(figure["reference"]["sha256"]) == 64
    assert "8×8" in figure["reference"]["preparation"]
    assert figures["distance_classifier"]["reference"] == ORIGINALS
    a, b = vectors(6).astype(np.float64), np.repeat(np.array(shades)[:, None] / 255, DIM, axis=1)
    means = np.square(a.mean(0) - b.mean(0)).sum()
    # b has one direction, u: the root of the product is that of uᵀ Σ_a u times b's variance.
    spread_a, spread_b = np.cov(a.T), b[:, 0].var(ddof=1)
    u = np.ones(DIM) / np.sqrt(DIM)
    root = np.sqrt(u @ spread_a @ u * DIM * spread_b)
    expected = means + np.trace(spread_a) + DIM * spread_b - 2 * root
    assert figure["value"] == pytest.approx(expected, abs=1e-4)


def test_one_image_has_no_distance(tmp_path: Path):
    assert measure(write(tmp_path, vectors(1), vectors(1))) == {}


def test_memory_does_not_grow_with_the_number_of_images():
    part = np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32)

    def peak(n_parts: int) -> int:
        parts = (([f"{i}/{j}" for j in range(100)], part + i) for i in range(n_parts))
        tracemalloc.start()
        distribution._fold(parts, 64)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    few = peak(300)  # 30,000 vectors, more than a sample holds at any time
    assert peak(900) < 1.1 * few


def test_the_spread_of_kid_is_given_where_subsets_differ_in_both_sets(monkeypatch):
    def kid(n: int, n_reference: int) -> dict:
        samples = []
        for size in (n, n_reference):
            samples.append(FeatureSample(DIM))
            samples[-1].update(torch.from_numpy(vectors(size)), [str(i) for i in range(size)])
        return distribution._of_vectors(*samples)["kid"]

    monkeypatch.setattr(distribution, "KID_SUBSET", 10)
    assert kid(12, 20)["std"] > 0
    assert (kid(12, 20)["subset_size"], kid(12, 20)["n_subsets"]) == (10, 100)
    assert (kid(10, 20)["std"], kid(10, 20)["n_subsets"]) == (None, 100)
    assert kid(6, 20)["std"] is None


def test_vectors_of_nan_are_left_out_and_n_says_so(tmp_path: Path):
    made = vectors(40)
    made[3, 1] = np.nan
    figure = measure(write(tmp_path / "a", made, vectors(40)))["distance_classifier"]
    assert (figure["n"], figure["n_reference"]) == (39, 40)
    assert figure["value"] < 0.1


class Moments(Colour):
    """Takes published moments."""

    def __init__(self, name: str):
        super().__init__(name)
        self.conventions["convention"] = "adm"


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("empty", "holds no picture"),
        ("single", "at least 2 images, but .* holds 1"),
        ("broken", "is not a picture"),
        ("none.npz", "a folder of images or an npz file"),
        ("text.npz", "must be an npz file"),
        ("long.npz", f"length {DIM}"),
        ("half.npz", "mu without sigma"),
        ("nan.npz", "must be finite"),
        ("floats.npz", "must be 8-bit images"),
        ("one.npz", "at least 2 images, but .* holds 1"),
    ],
)
def test_a_reference_that_cannot_serve_is_refused_before_sampling(tmp_path, reference, sentence):
    for name in ("empty", "single", "broken"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "single" / "a.png")
    for name in ("a.png", "b.png"):
        (tmp_path / "broken" / name).write_text("hello")
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "long.npz", mu=np.zeros(5), sigma=np.eye(5))
    np.savez(tmp_path / "half.npz", mu=np.zeros(DIM))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(DIM), sigma=np.full((DIM, DIM), np.nan))
    np.savez(tmp_path / "floats.npz", np.zeros((2, 8, 8, 3)))
    np.savez(tmp_path / "one.npz", np.zeros((1, 8, 8, 3), dtype=np.uint8))
    extractors = {"classifier": Colour("classifier"), "inception": Moments("inception")}
    with pytest.raises(InputError, match=sentence):
        check_references(str(tmp_path / reference), extractors)


def test_moments_do_not_serve_another_convention_but_images_do(tmp_path: Path):
    both = {"classifier": Colour("classifier"), "dinov2": Colour("dinov2")}
    np.savez(tmp_path / "moments.npz", mu=np.zeros(DIM), sigma=np.eye(DIM))
    with pytest.raises(InputError, match="under the same convention"):
        check_references(str(tmp_path / "moments.npz"), both)
    np.savez(tmp_path / "images.npz", np.zeros((2, 8, 8, 3), dtype=np.uint8))
    check_references(str(tmp_path / "images.npz"), both)
    check_references(str(tmp_path / "moments.npz"), {"inception": Moments("inception")})
    check_references(None, both)
