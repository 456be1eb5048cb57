"""The engine: what fails is reported, what is measured is right, seeds are names and not places."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featinv_diffusion.data.sets import ImageSet, open_pictures
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import center_square, read_image, to_tensor, write_png
from featinv_diffusion.inverters import DiffusionInverter, Inverter
from featinv_diffusion.runs.sampling import Job, Reconstruction, make_jobs, reconstruct
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.settings import SampleSettings
from tests import tiny


class EchoInverter(Inverter):
    """Returns images that the test gives, whatever the features; remembers what it was asked."""

    spec = backbone = networks = None

    def __init__(self, images: list[torch.Tensor], backbone, settings=None):
        self.images, self.backbone, self.spec = iter(images), backbone, backbone.spec
        self.settings = settings
        self.features: list[torch.Tensor] = []
        self.seeds: list[int] = []

    def _invert(self, features, generator):
        self.features += list(features)
        self.seeds += [g.initial_seed() for g in generator]
        return torch.stack([next(self.images) for _ in features])


@pytest.fixture
def inverter(pipeline) -> DiffusionInverter:
    return DiffusionInverter(pipeline, num_inference_steps=2)


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, image in enumerate(tiny.make_images(5)):
        pixels = (image.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels).resize((80, 64)).save(folder / f"photo{i}.png")
    return folder


def run(inverter, jobs, batch_size=4) -> tuple[list[Reconstruction], dict[str, str]]:
    failures: dict[str, str] = {}
    done = reconstruct(
        inverter, jobs, batch_size, lambda job, error: failures.update({job.name: error})
    )
    return list(done), failures


def named(*ids: str) -> ImageSet:
    """Pictures that are never read."""
    return ImageSet(list(ids), None, None, lambda _i: Image.new("RGB", (1, 1)), locations=list(ids))


def pixels(done: Reconstruction) -> np.ndarray:
    return np.stack([np.asarray(sample, dtype=int) for sample in done.samples])


# ---- jobs --------------------------------------------------------------------------------------


def test_ids_are_relative_to_the_given_folder(tmp_path):
    for name in ["a/x.png", "a/b/x.png", "c/y.jpg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert open_pictures([tmp_path]).ids == ["a/b/x.png", "a/x.png", "c/y.jpg"]
    assert open_pictures([tmp_path / "a"]).ids == ["b/x.png", "x.png"]
    given = [tmp_path / "c/y.jpg", tmp_path / "a"]
    assert open_pictures(given).ids == ["y.jpg", "b/x.png", "x.png"]


def test_a_file_named_twice_is_taken_once_and_the_output_is_left_out(photos):
    again = [photos / "photo1.png", photos / "../photos/photo1.png"]
    assert len(open_pictures([photos, *again])) == 5
    (photos / "out").mkdir()
    (photos / "photo0.png").rename(photos / "out" / "photo0.png")
    assert len(open_pictures([photos], exclude=photos / "out")) == 4


def test_a_path_without_anything(photos):
    with pytest.raises(InputError, match=r"nothing is there"):
        open_pictures([photos, photos / "none.png"])


def test_accents_have_one_id_on_every_file_system(tmp_path):
    (tmp_path / unicodedata.normalize("NFD", "é.png")).touch()
    assert open_pictures([tmp_path]).ids[0] == unicodedata.normalize("NFC", "é.png")


def test_seeds_derive_from_seed_name_and_number():
    (job,) = make_jobs(named("cats/a.jpg"), seed=3, n_samples=2)
    assert job.seeds == (derive_seed(3, "a.jpg", 0), derive_seed(3, "a.jpg", 1))
    assert job.outputs[0] != job.outputs[1]
    (alone,) = make_jobs(named("a.jpg"), seed=3, n_samples=2)
    assert alone.seeds == job.seeds  # the same alone and in a folder
    assert job.outputs == ("cats/a_0.png", "cats/a_1.png")


def test_outputs_never_collide():
    ids = ["a.jpg", "a.png", "A.gif", "b.jpg", "b.jpg", "b.jpg-2.png", "c_0.png", "c.png"]
    jobs = make_jobs(named(*ids), seed=0, n_samples=11)
    names = [name.casefold() for job in jobs for name in job.outputs]
    assert len(set(names)) == len(names) == 8 * 11
    assert jobs[0].outputs[0] == "a.jpg_0.png"
    assert jobs[7].outputs[0] == "c_0.png"


# ---- metrics -----------------------------------------------------------------------------------


def test_a_perfect_reconstruction_is_measured_as_one(inverter, photos):
    paths = sorted(photos.iterdir())[:2]
    originals = [center_square(read_image(path), 64) for path in paths]
    echo = EchoInverter(list(to_tensor(originals)), inverter.backbone)
    done, failures = run(echo, make_jobs(open_pictures(paths), 0, 1))
    assert not failures
    for one, original in zip(done, originals, strict=True):
        assert one.cosine == pytest.approx([1], abs=1e-5)
        assert one.cosine_shuffled[0] < 0.99
        assert one.top1_match == [True]
        assert one.top5_match == [True]
        assert one.original.tobytes() == original.tobytes() == one.samples[0].tobytes()


def test_metrics_are_those_of_the_written_picture_by_an_own_formula(inverter, photos, tmp_path):
    jobs = make_jobs(open_pictures([photos]), 0, 2)
    done, _ = run(inverter, jobs)
    backbone = inverter.backbone
    for one in done:
        for name, picture in zip(one.job.outputs, one.samples, strict=True):
            write_png(picture, tmp_path / "out" / name)
        original = to_tensor(center_square(read_image(one.job.input), 64))
        f, scores = backbone.features(original)[0].double(), backbone.classify(original)[0]
        for j, name in enumerate(one.job.outputs):
            written = to_tensor(read_image(tmp_path / "out" / name))
            g, other = backbone.features(written)[0].double(), backbone.classify(written)[0]
            cells = (f * g).sum(0) / (f.norm(dim=0) * g.norm(dim=0))
            assert one.cosine[j] == pytest.approx(cells.mean().item(), abs=1e-4)
            rank = (other > other[scores.argmax()]).sum().item()
            assert one.top1_match[j] == (rank == 0)
            assert one.top5_match[j] == (rank < 5)


def test_without_a_head_the_matches_are_null(inverter, photos, monkeypatch):
    backbone = inverter.backbone
    monkeypatch.setattr(backbone, "features_and_logits", lambda x: (backbone.features(x), None))
    done, _ = run(inverter, make_jobs(open_pictures([photos]).pick(range(1)), 0, 2))
    assert done[0].top1_match == done[0].top5_match == [None, None]
    assert len(done[0].cosine) == 2


def test_a_head_of_three_classes_has_no_top_five(inverter, photos, monkeypatch):
    backbone = inverter.backbone
    plain = backbone.features_and_logits

    def three(x):
        features, logits = plain(x)
        return features, logits[:, :3]

    monkeypatch.setattr(backbone, "features_and_logits", three)
    done, _ = run(inverter, make_jobs(open_pictures([photos]).pick(range(1)), 0, 1))
    assert done[0].top5_match == [True]


# ---- order, seeds and batches ------------------------------------------------------------------


def test_samples_keep_their_order_and_seeds_across_batches(inverter, photos):
    jobs = make_jobs(open_pictures([photos]), 0, 3)
    shades = [torch.full((3, 64, 64), k / 255) for k in range(15)]
    echo = EchoInverter(shades, inverter.backbone)
    done, _ = run(echo, jobs, batch_size=4)
    assert [one.job for one in done] == jobs
    assert echo.seeds == [seed for job in jobs for seed in job.seeds]
    assert [int(pixels(one)[j].max()) for one in done for j in range(3)] == list(range(15))
    for i in range(5):
        a, b, c = echo.features[3 * i : 3 * i + 3]
        assert torch.equal(a, b)
        assert torch.equal(b, c)


def test_a_sample_depends_on_its_name_and_not_on_its_place(inverter, photos):
    images = open_pictures([photos])
    forward, _ = run(inverter, make_jobs(images, 0, 2))
    backward, _ = run(inverter, make_jobs(images.pick([4, 3, 2, 1, 0]), 0, 2))
    alone, _ = run(inverter, make_jobs(images.pick([4]), 0, 2))
    for one, other in [*zip(forward, backward[::-1], strict=True), (forward[4], alone[0])]:
        assert np.abs(pixels(one) - pixels(other)).max() <= 1
    other_seed, _ = run(inverter, make_jobs(images, 1, 2))
    assert np.abs(pixels(forward[0]) - pixels(other_seed[0])).max() > 8
    assert np.abs(pixels(forward[0])[0] - pixels(forward[0])[1]).max() > 8


def test_the_same_jobs_make_the_same_bits(inverter, photos):
    jobs = make_jobs(open_pictures([photos]), 0, 2)
    first, second = run(inverter, jobs)[0], run(inverter, jobs)[0]
    assert [s.tobytes() for o in first for s in o.samples] == [
        s.tobytes() for o in second for s in o.samples
    ]
    assert [o.cosine_shuffled for o in first] == [o.cosine_shuffled for o in second]


# ---- failures ----------------------------------------------------------------------------------


def test_a_broken_picture_is_reported_and_the_rest_is_finished(inverter, photos):
    (photos / "photo2.png").write_bytes(b"no picture")
    done, failures = run(inverter, make_jobs(open_pictures([photos]), 0, 2))
    assert [one.job.name for one in done] == [f"photo{i}.png" for i in (0, 1, 3, 4)]
    assert list(failures) == ["photo2.png"]
    assert "not a picture that can be read" in failures["photo2.png"]


def test_features_with_nan_fail_one_image_only(inverter, photos, monkeypatch):
    backbone = inverter.backbone
    plain, calls = backbone.features_and_logits, []

    def broken(x):
        features, logits = plain(x)
        if len(calls) == 1:  # pictures are encoded one at a time
            features[0, 0, 0, 0] = float("nan")
        calls.append(len(x))
        return features, logits

    monkeypatch.setattr(backbone, "features_and_logits", broken)
    done, failures = run(inverter, make_jobs(open_pictures([photos]), 0, 1))
    assert len(done) == 4
    assert list(failures) == ["photo1.png"]
    assert "NaN" in failures["photo1.png"]


def test_samples_with_nan_are_no_black_pictures(inverter, photos):
    images = [torch.rand(3, 64, 64) for _ in range(4)]
    images[2][0, 5, 5] = float("nan")
    jobs = make_jobs(open_pictures([photos]).pick(range(2)), 0, 2)
    for dtype, advice in (("float16", "Use --dtype float32"), ("float32", "Look for overflow")):
        echo = EchoInverter(images, inverter.backbone, SampleSettings(dtype=dtype))
        done, failures = run(echo, jobs)
        assert [one.job.name for one in done] == ["photo0.png"]
        assert advice in failures["photo1.png"]


def test_an_inverter_without_backbone_cannot_read_pictures(photos):
    bare = DiffusionInverter(tiny.make_pipeline(backbone=None))
    with pytest.raises(InputError, match="must have its backbone"):
        run(bare, make_jobs(open_pictures([photos]), 0, 1))


def test_originals_are_read_at_the_size_of_the_backbone(inverter, tmp_path):
    fine = np.zeros((640, 640, 3), dtype=np.uint8)
    fine[:, ::2] = 255  # a pattern that only antialiasing averages to grey
    Image.fromarray(fine).save(tmp_path / "a.png")
    job = Job(str(tmp_path / "a.png"), ("a_0.png",), (1,))
    done, _ = run(inverter, [job])
    assert done[0].original.size == (64, 64)
    grey = to_tensor(done[0].original)
    torch.testing.assert_close(grey, torch.full_like(grey, 0.5), rtol=0, atol=0.02)
