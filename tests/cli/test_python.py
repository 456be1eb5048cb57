"""The public verbs: they are listed, they take what a notebook has, and give what commands give."""

from __future__ import annotations

import inspect
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

import featinv_diffusion as fi
from featinv_diffusion.images import read_image
from tests.cli.conftest import Featinv

VERBS = (
    "load_inverter",
    "sample",
    "interpolate",
    "compose",
    "variability",
    "find_concepts",
    "show_concept",
    "read_tokens",
    "evaluate",
    "fit_operator",
    "load_backbone",
    "load_pipeline",
    "list_backbones",
    "list_inverters",
)


def contents(folder: str | Path) -> dict[str, bytes]:
    """Files by name; a manifest without the environment."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            found[path.relative_to(folder).as_posix()] = path.read_bytes()
    manifest = json.loads(found["manifest.json"])
    return {**found, "manifest.json": json.dumps(manifest, sort_keys=True).encode()}


def test_every_verb_and_class_is_listed_and_says_what_it_takes() -> None:
    assert set(VERBS) <= set(dir(fi))
    assert dir(fi) == sorted(dir(fi), key=lambda name: fi.__all__.index(name))
    for name in dir(fi):
        assert inspect.getdoc(getattr(fi, name)) or name == "__version__"
    for name in VERBS:
        assert inspect.signature(getattr(fi, name)).return_annotation


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        _ = fi.smaple


def test_a_script_writes_the_files_of_the_command(featinv: Featinv, photos: Path) -> None:
    a, b = photos / "a.png", photos / "b.jpg"
    inverter = fi.load_inverter("tiny/convnext")
    features = inverter.encode([a, str(b)])
    assert featinv("sample", a, b, "--n-samples", 2, "--seed", 3, "-o", "told").code == 0
    samples = fi.sample(inverter, features, n_samples=2, seed=3)
    samples.save("typed")
    assert contents("typed") == contents("told")
    assert samples.images.shape == (2, 2, 3, 64, 64)
    assert samples.cosine.shape == (2, 2)
    assert samples.features.shape == (2, 2, *features.shape[1:])
    assert len(samples.rows()) == 4
    assert samples._repr_png_().startswith(b"\x89PNG")
    assert "4 samples of 2 pictures" in repr(samples)


def test_features_do_not_depend_on_what_stands_beside_them(featinv: Featinv, photos: Path) -> None:
    inverter = fi.load_inverter("tiny/convnext")
    together = inverter.encode([photos / "a.png", photos / "b.jpg", photos / "more/c.png"])
    alone = [inverter.encode(photos / name) for name in ("a.png", "b.jpg", "more/c.png")]
    assert torch.equal(together, torch.cat(alone))
    assert featinv("interpolate", photos / "a.png", photos / "b.jpg", "-o", "told").code == 0
    fi.interpolate(inverter, together[:1], together[1:2]).save("typed")
    assert contents("typed") == contents("told")


def test_maps_of_any_kind_are_sampled(featinv: Featinv, photos: Path) -> None:
    inverter = fi.load_inverter("tiny/convnext")
    features = inverter.encode(photos / "a.png")
    wanted = fi.sample(inverter, features, n_samples=1)
    picture = read_image(photos / "a.png")
    same = [
        fi.sample(inverter, [photos / "a.png"], n_samples=1),
        fi.sample(inverter, features.numpy(), names=["a.png"], n_samples=1),
        fi.sample(inverter, torch.tensor(features.tolist())[0], names=["a.png"], n_samples=1),
        fi.sample(inverter, [picture], names=["a.png"], n_samples=1),
    ]
    for other in same:
        assert torch.equal(other.images, wanted.images)
    unnamed = fi.sample(inverter, features.numpy(), n_samples=1)
    assert not torch.equal(unnamed.images, wanted.images)
    assert torch.equal(fi.sample(inverter, features * 1.0, n_samples=1).images, wanted.images)


@pytest.mark.parametrize(
    ("features", "words"),
    [
        (np.zeros((1, 5, 2, 2), np.float32), "Pictures must be arrays"),
        (torch.zeros(1, 5, 2, 2), r"got the shape \[1, 5, 2, 2\]"),
        ([], "at least one picture"),
        ("none.png", "none.png"),
    ],
)
def test_what_is_neither_map_nor_picture(featinv: Featinv, features, words: str) -> None:
    inverter = fi.load_inverter("tiny/convnext")
    with pytest.raises(fi.InputError, match=words):
        fi.sample(inverter, features)


def test_names_must_be_as_many_as_maps(featinv: Featinv, photos: Path) -> None:
    inverter = fi.load_inverter("tiny/convnext")
    with pytest.raises(fi.InputError, match="one name per map, got 2 names and 1 maps"):
        fi.sample(inverter, photos / "a.png", names=["a", "b"])


def test_a_progress_bar_is_shown_only_when_asked_for(
    featinv: Featinv, photos: Path, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        fi.sample(fi.load_inverter("tiny/convnext"), photos / "a.png", n_samples=1)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
