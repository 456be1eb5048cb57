"""What a manifest sums up, and that it can be read again."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from featinv_diffusion.runs.record import RunFolder
from featinv_diffusion.runs.samples import Manifest, read_manifest, to_jobs
from featinv_diffusion.runs.sampling import Job, Reconstruction
from featinv_diffusion.settings import SampleSettings


def make_done(cosine: list[float], match: list[bool | None]) -> Reconstruction:
    picture = Image.new("RGB", (4, 4))
    job = Job("/photos/a.png", ("a_0.png", "a_1.png"), (2**62 + 1, 5))
    features = torch.zeros(2, 3, 1, 1)
    return Reconstruction(job, picture, [picture] * 2, features, cosine, [0.1, 0.2], match, match)


def test_means_are_over_all_samples_that_have_a_value():
    manifest = Manifest(SampleSettings())
    manifest.add(make_done([0.5, 0.7], [None, None]))
    assert manifest.mean("top1_match") is None
    manifest.add(make_done([0.1, 0.3], [True, False]))
    assert manifest.mean("cosine") == pytest.approx(0.4)
    assert manifest.mean("top1_match") == 0.5


def test_what_is_written_is_read_again(tmp_path):
    manifest = Manifest(SampleSettings(seed=4, strength=0.5, device="cpu"), environment={"a": "b"})
    manifest.add(make_done([0.5, 0.7], [True, False]))
    manifest.fail(Job("/photos/b.png", (), ()), "is broken")
    RunFolder(tmp_path).complete(manifest.content())
    assert read_manifest(tmp_path) == read_manifest(tmp_path / "manifest.json") == manifest
    (job,) = to_jobs(manifest)
    assert job == Job("/photos/a.png", ("a_0.png", "a_1.png"), (2**62 + 1, 5))
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert content["failures"] == [{"input": "/photos/b.png", "error": "is broken"}]


def test_nan_never_gets_into_a_manifest(tmp_path):
    manifest = Manifest(SampleSettings())
    manifest.add(make_done([float("nan"), 0.7], [True, False]))
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunFolder(tmp_path).complete(manifest.content())
    assert not list(tmp_path.iterdir())
