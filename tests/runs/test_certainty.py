"""Who is judged, by what, and what is said where nothing is calibrated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from featinv_diffusion.data.selection import select_items
from featinv_diffusion.data.sets import ImageSet
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import to_pil
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.runs.certainty import (
    CertaintyCalibration,
    digest_of,
    fit_certainty,
    open_certainty,
)
from featinv_diffusion.runs.samples import sample
from featinv_diffusion.runs.scope import sampling_of
from featinv_diffusion.settings import Selection
from featinv_diffusion.studies.variability import variability
from tests import tiny
from tests.studies.painting import PaintingInverter

N = 40


@pytest.fixture(scope="module")
def backbone():
    return DiffusionInverter(tiny.make_pipeline()).require_backbone()


@pytest.fixture(scope="module")
def inverter(backbone) -> PaintingInverter:
    return PaintingInverter(backbone, noise=0.3)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    pictures = to_pil(tiny.make_images(N))
    return ImageSet([f"{i}.png" for i in range(N)], None, None, read=pictures.__getitem__)


@pytest.fixture(scope="module")
def calibration(inverter, images) -> CertaintyCalibration:
    done: list[int] = []
    items = select_items(images, Selection(n_images=N))
    found = fit_certainty(inverter, images, items, n_samples=3, batch_size=7, advance=done.append)
    assert sum(done) == N
    return found


def test_it_is_of_these_samples(calibration, inverter):
    models = calibration.of(sampling_of(inverter))
    assert [model.n_samples for model in models] == [2, 3]
    assert {model.n_images for model in models} == {N}
    assert calibration.weights_sha256 == digest_of(inverter)
    assert calibration.of({"steps": 5}) == ()


class Half(PaintingInverter):
    """Makes pictures of half the size that its backbone reads."""

    def _invert(self, features, generator):
        return F.avg_pool2d(super()._invert(features, generator), 2)


def test_samples_may_have_another_size_than_the_backbone_reads(backbone, images):
    inverter = Half(backbone, noise=0.3)
    found = fit_certainty(inverter, images, select_items(images, Selection(n_images=N)), 2)
    features = inverter.encode(to_pil(tiny.make_images(1)))
    drawn = sample(inverter, features, n_samples=2, certainty=found)
    assert drawn.certainty is not None
    assert drawn.certainty[0].determined("chroma").shape == (32, 32)
    assert drawn.certainty[0].determined("cell_chroma").shape == (8, 8)


def test_a_file_keeps_it(calibration, inverter, tmp_path: Path):
    calibration.save(tmp_path / "certainty.safetensors")
    again = CertaintyCalibration.load(tmp_path / "certainty.safetensors")
    features = inverter.encode(to_pil(tiny.make_images(1)))
    one, two = (
        sample(inverter, features, n_samples=3, certainty=each).certainty
        for each in (calibration, again)
    )
    assert one is not None
    assert two is not None
    assert one[0].numbers() == two[0].numbers()


def test_settings_of_a_later_calibration_replace_those_of_the_same_kind(calibration):
    other = replace(calibration, models=(({"steps": 9}, calibration.models[0][1]),))
    both = calibration.with_models_of(other)
    assert [settings for settings, _ in both.models] == [{"steps": 9}, {}, {}]
    assert len(both.with_models_of(both).models) == 3


def test_studies_judge_the_first_samples_alike(calibration, inverter, tmp_path: Path):
    features = inverter.encode(to_pil(tiny.make_images(1)))
    drawn = sample(inverter, features, n_samples=5, certainty=calibration)
    found = variability(inverter, features, n_samples=5, batch_size=2, calibration=calibration)
    assert drawn.certainty is not None
    assert found.certainty is not None
    assert found.certainty.n_samples == 3
    assert found.certainty.numbers() == drawn.certainty[0].numbers()
    assert found.numbers()["certainty"] == found.certainty.numbers()
    assert drawn.manifest.content()["images"][0]["certainty"] == found.certainty.numbers()
    row = found.rows()[64 * 3 + 5]
    assert row["determined_chroma"] == found.certainty.determined("chroma")[3, 5].item()
    assert row["radius95_luminance"] == found.certainty.radii["luminance"][0.95][3, 5].item()
    assert "held-out pictures" in found.summary()
    assert "Determined" in drawn.summary()
    words = {text.get_text() for text in found.figure().findobj(lambda a: hasattr(a, "get_text"))}
    assert {"light of pixels", "colour of cells"} <= words
    wide, narrow = drawn.figure(), sample(inverter, features, n_samples=5).figure()
    assert wide.width > narrow.width


def test_what_is_not_calibrated_is_said_in_a_sentence(calibration, inverter, backbone):
    features = inverter.encode(to_pil(tiny.make_images(1)))
    foreign = replace(calibration, weights_sha256="0" * 64)
    other = replace(calibration, models=tuple(({"steps": 9}, m) for _, m in calibration.models))
    for given, words in (
        (None, "only pipelines of the diffusion inverter hold one"),
        (foreign, "other weights"),
        (other, "other settings of the sampler"),
    ):
        note = open_certainty(inverter, given).note(4)
        assert note.startswith("Certainty: uncalibrated, since ")
        assert words in note
        assert variability(inverter, features, n_samples=4, calibration=given).certainty is None
        with pytest.raises(InputError, match=words):
            sample(inverter, features, n_samples=4, certainty=given or True)
    with pytest.raises(InputError, match="at least 2 samples"):
        sample(inverter, features, n_samples=1, certainty=calibration)
    painting = PaintingInverter(backbone, noise=None)
    assert "no spread" in variability(painting, features).certainty_note
    assert "no spread" in variability(painting, features).summary()


def test_what_cannot_be_calibrated(inverter, backbone, images):
    items = select_items(images, Selection(n_images=N))
    with pytest.raises(InputError, match="at least 40 held-out pictures"):
        fit_certainty(inverter, images, items[:39])
    with pytest.raises(InputError, match="2 samples"):
        fit_certainty(inverter, images, items, n_samples=1)
    with pytest.raises(InputError, match="deterministic"):
        fit_certainty(PaintingInverter(backbone, noise=None), images, items)


def test_a_pipeline_takes_its_calibration_along(calibration, tmp_path: Path):
    path = tmp_path / "certainty.safetensors"
    calibration.save(path)
    pipeline = tiny.make_pipeline()
    pipeline.certainty_file = path
    pipeline.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/certainty.safetensors").read_bytes() == path.read_bytes()
    path.unlink()
    with pytest.raises(ValueError, match="the calibration of certainty, must still be there"):
        pipeline.save_pretrained(tmp_path / "again")
    assert torch.equal(
        CertaintyCalibration.load(tmp_path / "saved/certainty.safetensors").models[0][1].scale,
        calibration.models[0][1].scale,
    )
