"""Operators on a backbone that shows patches of pixels, where swapping channels is a rotation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.nn import functional as F

from featinv_diffusion.backbones.base import Backbone, Preprocessing
from featinv_diffusion.data.sets import ImageSet
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.operator_methods import METHODS, solve
from featinv_diffusion.features.operators import Operator, measure_spectrum
from featinv_diffusion.features.pixel_operations import PixelOperation, make_operation
from featinv_diffusion.images import to_pil
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.studies import operators as operator_study
from featinv_diffusion.studies.operators import (
    Drawn,
    default_powers,
    draw_images,
    draw_measures,
    fit_operator,
    measure_held_out,
    measure_moments,
    measure_operator,
    operation_of,
    summarise_power,
    to_lines,
    to_symbol,
)
from featinv_diffusion.types import FeatureSpec

SIDE, PATCH = 8, 2
C = 3 * PATCH**2


class PatchBackbone(Backbone):
    """A location holds the pixels of a patch: those of R, then of G, then of B."""

    def __init__(self):
        preprocessing = Preprocessing((SIDE, SIDE), (0.0,) * 3, (1.0,) * 3)
        weights = nn.Linear(1, 1, bias=False)
        nn.init.ones_(weights.weight)
        super().__init__(weights, name="patches", preprocessing=preprocessing)
        self.spec = FeatureSpec("patches", "last", C, (SIDE // PATCH, SIDE // PATCH))

    @property
    def has_head(self) -> bool:
        return False

    def _features(self, images):
        return F.pixel_unshuffle(images, PATCH)

    def features_and_logits(self, images):
        return self.features(images), None

    def layers(self):
        return [self.spec]

    def _run(self, pixels):
        return pixels

    def _class_names(self):
        return None


class PatchInverter(Inverter):
    """Undoes `PatchBackbone`, with an error that is the same for all features."""

    def __init__(self, error: float = 0.0):
        self.backbone, self.networks = PatchBackbone(), {}
        self.spec, self.error, self.n_calls = self.backbone.spec, error, 0

    def _invert(self, features, generator):
        self.n_calls += 1
        return (F.pixel_shuffle(features, PATCH) + self.error).clamp(0, 1)


def make_image_set(n: int, first: int = 0) -> ImageSet:
    images = torch.stack(
        [
            torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(first + i))
            for i in range(n)
        ]
    )
    pictures = to_pil(0.1 + 0.8 * images)
    ids = [f"{first + i}.png" for i in range(n)]
    return ImageSet(ids, None, None, pictures.__getitem__)


def draw(n: int = 8, first: int = 0, **options) -> list[Drawn]:
    return list(draw_images(make_image_set(n, first), n, 0, SIDE, **options))


def fitted(name: str, method: str = "orthogonal", **parameters) -> Operator:
    operation = make_operation(name, **parameters)
    return fit_operator(PatchBackbone(), make_image_set(20), operation, method=method, n_images=20)


def permutation() -> torch.Tensor:
    """What a swap of R and B does to patches."""
    order = torch.arange(C).reshape(3, -1).flip(0).flatten()
    return torch.eye(C, dtype=torch.float64)[order]


# ---- which images ------------------------------------------------------------------------------


def test_images_of_the_fit_are_left_out_whatever_they_are_called():
    operator = fitted("swap")
    assert len(operator.record.image_digests) == 20
    both = make_image_set(25)
    renamed = replace(both, ids=[f"other/{i}" for i in range(25)])
    drawn = list(draw_images(renamed, 5, 3, SIDE, operator.record.image_digests))
    assert sorted(image.id for image in drawn) == [f"other/{i}" for i in range(20, 25)]
    with pytest.raises(InputError, match="6 images that the operator was not fitted on"):
        list(draw_images(renamed, 6, 3, SIDE, operator.record.image_digests))


def test_the_draw_is_that_of_the_seed():
    images = make_image_set(30)
    drawn = {seed: [d.id for d in draw_images(images, 10, seed, SIDE)] for seed in (0, 1)}
    assert drawn[0] == [d.id for d in draw_images(images, 10, 0, SIDE)]
    assert drawn[0] != drawn[1]
    assert drawn[0] != images.ids[:10]
    assert len(set(drawn[0])) == 10


@pytest.mark.parametrize(("n", "words"), [(0, "At least one"), (4, "there are 3 among 3")])
def test_what_cannot_be_drawn(n, words):
    with pytest.raises(InputError, match=words):
        list(draw_images(make_image_set(3), n, 0, SIDE))


# ---- fits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_swap_of_pixels_is_a_permutation_of_features(method):
    operator = fitted("swap", method)
    torch.testing.assert_close(operator.matrix, permutation(), atol=1e-5, rtol=0)
    assert operator.record.residual < 1e-9
    assert operator.record.residual_of_identity > 0.05


def test_suppression_is_linear_and_no_rotation():
    operator = fitted("suppress", "linear", alpha=0.5)
    rotation = fitted("suppress", alpha=0.5)
    assert operator.record.residual < 0.3 * rotation.record.residual
    assert rotation.record.residual < rotation.record.residual_of_identity


def test_batches_do_not_matter():
    images, operation = draw(7), make_operation("grey")
    whole, digests = measure_moments(PatchBackbone(), images, operation, batch_size=100)
    parts, same = measure_moments(PatchBackbone(), images, operation, batch_size=3)
    torch.testing.assert_close(whole.xy, parts.xy)
    assert digests == same == tuple(image.read()[2] for image in images)


def test_batches_of_no_image_are_refused():
    operator, operation = fitted("swap"), make_operation("swap")
    with pytest.raises(InputError, match="batch_size must be at least 1, got 0"):
        measure_moments(PatchBackbone(), draw(3), operation, batch_size=0)
    with pytest.raises(InputError, match="batch_size must be at least 1, got -1"):
        measure_held_out(operator, operation, PatchBackbone(), draw(3), batch_size=-1)


def test_any_function_can_be_fitted_and_is_named_in_the_record():
    rotate = PixelOperation("roll channels", lambda images: images.roll(1, 1))
    operator = fit_operator(PatchInverter(), make_image_set(20), rotate, n_images=20)
    expected = torch.eye(C, dtype=torch.float64).roll(PATCH**2, 1)
    torch.testing.assert_close(operator.matrix, expected, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="No pixel operation is named 'roll channels'"):
        operation_of(operator)


# ---- spectrum ----------------------------------------------------------------------------------


def test_the_eigenvalues_of_a_swap_are_one_and_minus_one():
    figures = measure_spectrum(fitted("swap")).figures()
    assert figures["n_near_minus_one"] == figures["n_negative_real"] == PATCH**2
    assert figures["n_near_plus_one"] == C - PATCH**2
    assert figures["twice_from_identity"] == pytest.approx(0, abs=1e-4)
    # PATCH² of C eigenvalues moved by 2: the root mean square is 2 √(1/3)
    assert figures["from_identity"] == pytest.approx(2 / 3**0.5, rel=1e-4)
    assert figures["from_symmetric"] == pytest.approx(0, abs=1e-4)
    assert figures["modulus"]["min"] == pytest.approx(1, abs=1e-5)
    assert figures["absolute_angle_degrees"]["max"] == pytest.approx(180, abs=1)


def test_moduli_of_powers_are_powers():
    matrix = torch.diag(torch.linspace(0.5, 1.05, C, dtype=torch.float64))
    operator = replace(fitted("swap"), matrix=matrix)
    for n in (1, 4, 12):
        modulus = measure_spectrum(operator, n).figures()["modulus"]
        assert modulus["min"] == pytest.approx(0.5**n)
        assert modulus["max"] == pytest.approx(1.05**n)
    assert measure_spectrum(operator).figures()["n_modulus_above_one"] == 1
    assert measure_spectrum(operator).figures()["from_orthogonal"] == pytest.approx(
        ((matrix.diag() ** 2 - 1) ** 2).mean().sqrt().item()
    )


@pytest.mark.parametrize(("power", "overflows"), [(300, 600), (900, 900)])
def test_powers_whose_square_overflows_are_refused(power, overflows):
    operator = replace(fitted("swap"), matrix=2.5 * torch.eye(C, dtype=torch.float64))
    with pytest.raises(InputError, match=f"to the power {overflows} must be finite"):
        measure_spectrum(operator, power)


def test_powers_are_checked_before_any_image_is_read():
    operator = replace(fitted("swap"), matrix=2.5 * torch.eye(C, dtype=torch.float64))

    def no_images(index):
        raise AssertionError("an image was read")

    images = ImageSet(["a", "b"], None, None, no_images)
    for powers, words in (
        ((1, 300), "must be finite"),
        ((1, 10**20), "0 … 1000"),
        ((0,), "from 1"),
    ):
        with pytest.raises(InputError, match=words):
            measure_operator(operator, PatchBackbone(), images, powers=powers, n_images=2)


# ---- held out ----------------------------------------------------------------------------------


def test_a_perfect_operator_is_at_the_floor(monkeypatch):
    monkeypatch.setattr(operator_study, "N_PICTURES", 5)
    operator, inverter = fitted("swap"), PatchInverter(error=0.05)
    operation = operation_of(operator)
    held = measure_held_out(
        operator,
        operation,
        inverter.backbone,
        draw(6, first=100),
        inverter=inverter,
        powers=(1, 2),
        batch_size=4,
    )
    assert held.ids[0].startswith("10")
    once, twice = summarise_power(held.columns[1]), summarise_power(held.columns[2])
    assert once["cosine"].value == pytest.approx(1, abs=1e-6)
    assert once["cosine_nothing"].value < 0.95
    assert once["cosine_gain"].value == pytest.approx(1 - once["cosine_nothing"].value, abs=1e-6)
    assert once["mse_floor"].value == pytest.approx((13 / 255) ** 2, rel=1e-3)  # 12.75 is rounded
    for metric in ("delta_e", "mse"):
        assert once[f"{metric}_ceiling"].value > 3 * once[f"{metric}_floor"].value
        assert once[f"{metric}_position"].value == pytest.approx(0, abs=1e-3)
        assert twice[f"{metric}_position"] is None  # twice is nothing: floor and ceiling agree
    assert twice["cosine_nothing"].value == pytest.approx(1)
    assert inverter.n_calls == 2 * (1 + 2 * 2)
    pictures = held.pictures
    assert len(pictures["given"]) == len(pictures["2× transformed"]) == 5
    torch.testing.assert_close(
        pictures["R(f Q)"][3], pictures["R(true f)"][3], atol=1.1 / 255, rtol=0
    )
    assert pictures["transformed"][0].equal(pictures["given"][0].flip(0))


def test_doing_nothing_is_at_the_ceiling():
    operator, inverter = fitted("swap"), PatchInverter()
    nothing = replace(operator, matrix=torch.eye(C))
    held = measure_held_out(
        nothing, operation_of(operator), inverter.backbone, draw(6, first=100), inverter=inverter
    )
    summary = summarise_power(held.columns[1])
    assert summary["delta_e_position"].value == pytest.approx(1, abs=1e-3)
    assert summary["cosine_gain"].value == pytest.approx(0, abs=1e-6)


def columns_of(floor: list[float], operator: list[float], ceiling: list[float]) -> dict:
    cosines = {"cosine": [0.9] * len(floor), "cosine_nothing": [0.8] * len(floor)}
    roles = {"floor": floor, "operator": operator, "ceiling": ceiling}
    return cosines | {f"{m}_{k}": v for m in ("delta_e", "mse") for k, v in roles.items()}


@pytest.mark.parametrize(
    ("floor", "found", "ceiling", "words"),
    [
        ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [4.0, 4.5, 5.0], "3 between 2 (floor) and 4.5"),
        ([1.0, 2.0, 3.0], [6.0, 6.0, 6.0], [4.0, 4.5, 5.0], "6, beside 2 (floor) and 4.5"),
        ([4.0, 4.5, 5.0], [2.0, 3.0, 4.0], [1.0, 2.0, 3.0], "the floor is above doing nothing"),
        ([1.0, 4.0, 1.0], [2.0, 2.0, 2.0], [2.0, 2.0, 2.0], "doing nothing do not differ"),
        ([2.0, 2.0, 2.0], [2.0, 2.0, 2.0], [2.0, 2.0, 2.0], "doing nothing do not differ"),
    ],
)
def test_a_position_needs_room_between_floor_and_doing_nothing(floor, found, ceiling, words):
    summary = summarise_power(columns_of(floor, found, ceiling))
    position, room = summary["delta_e_position"], summary["delta_e_room"]
    assert room is not None
    assert room.value == pytest.approx(sum(ceiling) / 3 - sum(floor) / 3)
    assert (position is None) == (room.low <= 0)
    held = {name: value and asdict(value) for name, value in summary.items()}
    fit = {"method": "orthogonal"}
    (line,) = to_lines({"spectrum": [], "held_out": {"1": held}, "operator": fit})
    assert words in line
    assert ("no position" in line) == (position is None)


def test_colourise_is_given_grey_and_measured_against_colour():
    operator, inverter = fitted("colourise", "linear"), PatchInverter()
    drawn = draw(6, first=100)
    held = measure_held_out(
        operator, operation_of(operator), inverter.backbone, drawn, inverter=inverter
    )
    given, wanted = held.pictures["given"][0], held.pictures["transformed"][0]
    assert given[0].equal(given[2])
    assert not wanted[0].equal(wanted[2])
    floor = summarise_power(held.columns[1])["mse_floor"]
    assert floor.value == pytest.approx(0, abs=1e-6)


def test_features_alone_need_no_inverter():
    operator = fitted("swap")
    held = measure_held_out(operator, operation_of(operator), PatchBackbone(), draw(3, first=50))
    assert not held.pictures
    assert set(held.columns[1]) == {"cosine", "cosine_nothing"}


@pytest.mark.parametrize("powers", [(), (0, 1), (2, 2)])
def test_powers_that_cannot_be_measured(powers):
    operator = fitted("swap")
    with pytest.raises(InputError, match="distinct whole numbers from 1"):
        measure_held_out(operator, operation_of(operator), PatchBackbone(), draw(2), powers=powers)


# ---- the study ---------------------------------------------------------------------------------


def test_the_study_writes_figures_and_numbers(tmp_path: Path):
    operator, inverter = fitted("suppress", "linear", alpha=0.8), PatchInverter(0.02)
    operation = operation_of(operator)
    assert default_powers(operation) == (1, 4, 8, 12)
    found = measure_operator(operator, inverter, make_image_set(4, 60), powers=(1, 4), n_images=4)
    metrics = found.metrics
    found.save(tmp_path, command="a test")
    names = {"eigenvalues.png", "measures.png", "pictures.png", "powers.png"}
    assert {path.name for path in tmp_path.iterdir()} == {*names, "metrics.json"}
    for name in names:
        assert Image.open(tmp_path / name).width > 300
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved == {"command": "a test", **json.loads(json.dumps(metrics))}
    rows = [row for row in found.rows() if row["name"] == "cosine"]
    assert [(row["power"], row["value"]) for row in rows] == [
        (n, metrics["held_out"][str(n)]["cosine"]["value"]) for n in (1, 4)
    ]
    assert (metrics["n_images"], metrics["seed"]) == (4, 0)
    ids = "\n".join(image.id for image in draw(4, first=60))
    assert metrics["ids_sha256"] == hashlib.sha256(ids.encode()).hexdigest()
    assert metrics["operator"]["n_images"] == 20
    assert metrics["operator"]["parameters"] == {"alpha": 0.8, "channel": "blue"}
    assert [s["power"] for s in metrics["spectrum"]] == [1, 4]
    assert set(metrics["held_out"]) == {"1", "4"}
    lines = found.summary().splitlines()
    assert len(lines) == 5
    assert "Eigenvalues are those of Q alone" in lines[-1]
    assert found._repr_png_().startswith(b"\x89PNG")


def test_one_power_is_drawn_in_both_figures_and_named(monkeypatch):
    grids: list[tuple] = []
    bars: list[tuple] = []

    def grid(columns, title, notes):
        grids.append((title, columns))
        return Figure()

    def measures(*given):
        bars.append(given)
        return Figure()

    monkeypatch.setattr(operator_study, "draw_grid", grid)
    monkeypatch.setattr(operator_study, "draw_measures", measures)
    operator, inverter = fitted("suppress", "linear", alpha=0.5), PatchInverter()
    images = make_image_set(4, 60)
    found = measure_operator(operator, inverter, images, powers=(4, 1), n_images=4)
    (title, columns), (_, of_powers) = grids
    assert title.endswith("linear operator, Q⁴")
    assert list(columns) == ["given", "4× transformed", "R(f)", "R(f Q⁴)", "R(true f)"]
    blue = columns["4× transformed"][:, 2]
    torch.testing.assert_close(blue, columns["given"][:, 2] * 0.5**4)
    ((summary, power, _),) = bars
    assert (summary["cosine"].value, power) == (
        found.metrics["held_out"]["4"]["cosine"]["value"],
        4,
    )
    assert list(of_powers)[2:] == [
        "4× transformed",
        "R(f Q⁴)",
        "transformed",
        "R(f Q)",
    ]
    assert to_symbol(12) == "Q¹²"


def test_measures_of_a_power_are_drawn(tmp_path: Path):
    summary = summarise_power(columns_of([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [4.0, 4.5, 5.0]))
    for power in (1, 12):
        draw_measures(summary, power, "suppress").savefig(tmp_path / f"{power}.png")
    assert Image.open(tmp_path / "12.png").width > 300
    assert (tmp_path / "1.png").read_bytes() != (tmp_path / "12.png").read_bytes()


def test_an_operator_of_other_features_or_weights_is_refused():
    operator = fitted("swap")
    other = replace(operator, spec=replace(operator.spec, layer="blocks.1"))
    changed = replace(operator, record=replace(operator.record, backbone_sha256="00"))
    for wrong, words in ((other, "acts on a map"), (changed, "on the weights of patches")):
        with pytest.raises(InputError, match=words):
            measure_operator(wrong, PatchBackbone(), make_image_set(2), n_images=2)


def test_pictures_may_be_a_list_and_the_operator_says_how_it_was_fitted(tmp_path: Path):
    images = make_image_set(20)
    pictures = [images.read(i) for i in range(20)]
    for i, picture in enumerate(pictures[:10]):
        picture.save(tmp_path / images.ids[i])
        pictures[i] = tmp_path / images.ids[i]
    operator = fit_operator(PatchBackbone(), pictures, "suppress", alpha=0.5, channel="red")
    wanted = fitted("suppress", alpha=0.5, channel="red")
    assert operator.matrix.equal(wanted.matrix)
    assert operator.record == wanted.record
    assert operator.summary().startswith("suppress (alpha 0.5, channel red) on patches, orthogonal")
    assert repr(operator) == f"Operator({operator.spec}): {operator.summary()}"
    with pytest.raises(InputError, match="has its own parameters, got alpha"):
        fit_operator(PatchBackbone(), pictures, make_operation("swap"), alpha=0.5)


def test_moments_serve_several_methods():
    moments, _ = measure_moments(PatchBackbone(), draw(20), make_operation("swap"))
    for method in METHODS:
        found = solve(moments, PatchBackbone().spec, "swap", method)
        torch.testing.assert_close(found.matrix, permutation(), atol=1e-5, rtol=0)
