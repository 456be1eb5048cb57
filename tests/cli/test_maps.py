"""`featinv encode` and `decode`: the pictures of `featinv sample`, by way of a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.conftest import Featinv
from tests.studies.painting import save_pictures


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "photos"
    folder.mkdir()
    return save_pictures(folder, 2)


@pytest.mark.parametrize("suffix", ["safetensors", "npy", "parquet"])
def test_decoded_maps_are_the_samples_bit_for_bit(featinv: Featinv, photos, suffix):
    assert (
        featinv("encode", *photos, "--inverter", "tiny/convnext", "-o", f"maps.{suffix}").code == 0
    )
    done = featinv("decode", f"maps.{suffix}", "--n-samples", 2, "--film", "-o", "decoded")
    assert done.code == 0, done.err
    assert featinv("sample", *photos, "--n-samples", 2, "-o", "sampled").code == 0
    for path in Path("sampled").glob("?_?.png"):
        assert path.read_bytes() == (Path("decoded") / path.name).read_bytes()
    images = json.loads(Path("decoded/manifest.json").read_text())["images"]
    sampled = json.loads(Path("sampled/manifest.json").read_text())["images"]
    assert [one["cosine"] for one in images] == [one["cosine"] for one in sampled]
    assert Image.open("decoded/strip.png").size == (128, 64)
    assert Image.open("decoded/film.gif").n_frames == 2
    assert featinv("sample", f"maps.{suffix}", "--n-samples", 2, "-o", "again").code == 0
    assert Path("again/a_1.png").read_bytes() == Path("sampled/a_1.png").read_bytes()


def test_maps_of_another_layer_are_refused(featinv: Featinv, photos):
    assert featinv("encode", *photos, "--layer", "stages.1", "-o", "maps.npy").code == 0
    done = featinv("decode", "maps.npy", "--pipeline", "tiny/convnext", "-o", "decoded")
    assert done.code == 2
    assert "stages.1" in done.err
    assert not Path("decoded").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("encode", "-o", "maps.txt"), "ends in .safetensors"),
        (("encode", "--backbone", "os:system", "-o", "maps.npy"), "--trust-code"),
        (("decode", "nothing.npy"), "none is at nothing.npy"),
        (("decode", "photo.jpg"), "must be a file of feature maps"),
        (("edit", "x.png"), "At least one edit"),
        (("compare", "convnext", "resnet"), "Pictures must be given"),
    ],
)
def test_bad_arguments_are_refused(featinv: Featinv, arguments, words):
    done = featinv(*arguments)
    assert done.code == 2
    assert words in done.err
    assert not list(Path().rglob("*.png"))


def test_a_file_beside_the_folder_of_its_name(featinv: Featinv, photos):
    Path("walk").mkdir()
    shutil.copy(photos[0], "walk")
    done = featinv("encode", "walk", "-o", "walk.npy")
    assert done.code == 0, done.err
    assert len(np.load("walk.npy")) == 1
