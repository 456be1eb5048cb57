"""Edits of maps, in words and as functions, beside edits that mean nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from featinv_diffusion.backbones import wrap_model
from featinv_diffusion.errors import InputError
from featinv_diffusion.features.edits import random_like
from featinv_diffusion.studies.edit import edit
from featinv_diffusion.studies.patching import patch_tokens
from tests import tiny
from tests.studies.painting import PaintingInverter


@pytest.fixture
def painting(pipeline):
    from featinv_diffusion.inverters import DiffusionInverter

    return PaintingInverter(DiffusionInverter(pipeline, num_inference_steps=2).backbone)


def a_map(value: float = 0.5) -> torch.Tensor:
    return torch.full((1, 32, 8, 8), value)


def edited_map(inverter, given, tmp_path=None, **named) -> torch.Tensor:
    seen = []
    found = edit(inverter, a_map(), [given, lambda f: seen.append(f.clone()) or f], **named)
    assert found.rows()
    return seen[0]


def test_words_do_what_they_say(painting, tmp_path: Path):
    picture = tiny.make_images(1)
    np.save(tmp_path / "v.npy", np.arange(32, dtype="float32"))
    expected = a_map()
    expected[:, [3, 17]] = 0
    assert torch.equal(edited_map(painting, "ablate-channels 3,17"), expected)
    expected = a_map()
    expected[:, :, :4, :4] = 0
    assert torch.equal(edited_map(painting, "ablate-box 0,0,.5,.5"), expected)
    assert torch.equal(edited_map(painting, "scale 3"), a_map(1.5))
    steered = a_map() + 2 * torch.arange(32.0)[:, None, None]
    assert torch.equal(edited_map(painting, f"steer {tmp_path / 'v.npy'}:2"), steered)
    (tmp_path / "mine.py").write_text("def fn(features):\n    return features + 1\n")
    assert torch.equal(edited_map(painting, f"function {tmp_path / 'mine.py'}:fn"), a_map(1.5))
    from featinv_diffusion.images import to_pil

    to_pil(picture)[0].save(tmp_path / "b.png")
    other = painting.encode(tmp_path / "b.png").as_subclass(torch.Tensor)
    assert torch.equal(edited_map(painting, f"replace-from {tmp_path / 'b.png'}"), other)


def test_edits_are_composed_in_order_and_kept_in_the_box(painting):
    found = edit(painting, a_map(), ["scale 2", lambda f: f - 0.5], n_null=1)
    assert found.size == 0
    found = edit(painting, a_map(), "scale 0", box=(0, 0, 0.5, 1), n_null=1)
    assert found.size == pytest.approx(0.5**0.5)
    assert "scale 0 changes the map by 71%" in found.summary()


def test_null_is_as_large_as_the_edit_and_draws_from_the_span():
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(1, 6, 2, 2, generator=generator)
    frame = torch.eye(6)[:, :2] * torch.tensor([1.0, 3.0])
    null = random_like(change, frame, generator)
    torch.testing.assert_close(null.norm(dim=1), change.norm(dim=1))
    assert null[:, 2:].abs().max() < 1e-6


def test_effect_by_hand(painting):
    """The painting inverter paints two channels' sum: from 0.5 to 0.75 everywhere."""
    found = edit(painting, a_map(0.25), lambda f: f * 1.5, n_null=2, seeds=[1, 2])
    assert found.effect.rgb == pytest.approx([0.25] * 2, abs=1 / 255)
    assert len(found.nulls) == 2
    assert found.main_figures()["n_null_above"]["rgb"] in (0, 1, 2)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "At least one edit"),
        ("blur 3", "must be one of"),
        ("scale", "must be one of"),
        ("scale x", "takes a finite number"),
        ("scale nan", "takes a finite number"),
        ("ablate-channels 3,x", "channel numbers"),
        ("ablate-channels 99", "numbered from 0 to 31"),
        ("ablate-box 1,2", "four fractions"),
        ("steer nothing", "FILE:FACTOR"),
        ("steer none.npy:2", "Arrays must be in"),
        ("function none.py:fn", "file that exists"),
        (lambda f: f[:, 1:], "must return a map of the shape"),
        (lambda f: f * float("nan"), "must be finite"),
    ],
)
def test_bad_edits_are_refused(painting, given, words):
    with pytest.raises(InputError, match=words):
        edit(painting, a_map(), given)


# ---- At an earlier layer -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit_painting():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=10)
    return PaintingInverter(wrap_model(model, name="vit", input_size=64), noise=None)


def test_edit_of_an_earlier_layer_keeps_prefix_tokens(vit_painting):
    picture = tiny.make_images(1)
    backbone = vit_painting.backbone
    tokens = []

    def keep(output: torch.Tensor) -> torch.Tensor:
        tokens.append(output.clone())
        return output

    with backbone.intervene({"blocks.0": keep}):
        backbone.features(picture)
    by_hand = tokens[0].clone()
    by_hand[:, 1:] *= 0.5
    with backbone.intervene({"blocks.0": lambda _: by_hand}):
        expected = backbone.features(picture)
    seen = []
    edit(vit_painting, picture, lambda f: 0.5 * f, at="blocks.0", n_null=1)
    with backbone.intervene({"blocks.0": keep}):
        pass
    found = edit(vit_painting, picture, "scale .5", at="blocks.0", n_null=1)
    before = backbone.features(picture)
    assert found.size == pytest.approx(((expected - before).norm() / before.norm()).item())
    assert not seen
    with pytest.raises(InputError, match="needs the picture itself"):
        edit(vit_painting, vit_painting.encode(picture), "scale .5", at="blocks.0")


def test_patching_a_picture_with_itself_changes_nothing(vit_painting):
    a = tiny.make_images(1)
    found = patch_tokens(vit_painting, a, a, at="blocks.0")
    assert found.effect.abs().max() == 0
    assert torch.equal(found.before, found.after)
    assert found.effect.shape == (4, 4)
    with pytest.raises(InputError, match="n_samples must be 1, got 4"):
        patch_tokens(vit_painting, a, a, at="blocks.0", n_samples=4)


def test_patching_one_cell_by_hand(vit_painting):
    a, b = tiny.make_images(2).split(1)
    backbone = vit_painting.backbone
    found = patch_tokens(vit_painting, a, b, at="blocks.0")
    seen = []

    def keep(output: torch.Tensor) -> torch.Tensor:
        seen.append(output.clone())
        return output

    with backbone.intervene({"blocks.0": keep}):
        _, scores = backbone.features_and_logits(a)
        backbone.features(b)
    mixed = seen[0].clone()
    mixed[:, 1 + 5] = seen[1][:, 1 + 5]
    with backbone.intervene({"blocks.0": lambda _: mixed}):
        _, patched = backbone.features_and_logits(a)
    k = scores.argmax()
    change = patched.softmax(1)[0, k] - scores.softmax(1)[0, k]
    assert found.class_effect[1, 1].item() == pytest.approx(change.item(), abs=1e-5)
    assert found.rows()[5]["x"] == 1
    assert found.figure() is not None
