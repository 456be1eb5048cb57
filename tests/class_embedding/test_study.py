"""All measures over a folder, beside each of them on all images at once; masks; figures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from featinv_diffusion.backbones import wrap_model
from featinv_diffusion.class_embedding.anatomy import read_anatomy
from featinv_diffusion.class_embedding.images import TokenImages, to_input
from featinv_diffusion.class_embedding.measures import identifiability_rate
from featinv_diffusion.class_embedding.pictures import (
    NO_INVERTER,
    TokenPicture,
    draw_blocks,
    draw_identifiability,
    draw_removal,
    match_inverters,
    show_overlay,
    shown_blocks,
)
from featinv_diffusion.class_embedding.reading import read_images
from featinv_diffusion.class_embedding.settings import TokenMeasures
from featinv_diffusion.class_embedding.study import measure_tokens, read_tokens
from featinv_diffusion.errors import InputError
from featinv_diffusion.figures.board import plain_figure, write_figure
from featinv_diffusion.images import to_pil
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.chain import MapChain
from featinv_diffusion.types import FeatureMaps, FeatureSpec, Source
from tests.class_embedding.vits import make_vit, weights_of
from tests.inverters import small


def make_pictures(n: int = 5) -> TokenImages:
    pixels = torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    pictures = to_pil(pixels)
    labels = [i % 3 for i in range(n)]
    return TokenImages([f"{i}.png" for i in range(n)], labels, "number", pictures.__getitem__)


def half(_index: int) -> torch.Tensor:
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[:, :2] = True
    return mask


@pytest.fixture(scope="module")
def measured():
    anatomy, images = make_vit("token"), make_pictures()
    before = weights_of(anatomy)
    settings = TokenMeasures(batch_size=2, ablations=True, null=True, perturbation=True, n_points=4)
    advanced: list[int] = []
    tally, metrics = measure_tokens(anatomy, images, settings, half, advanced.append)
    assert all(torch.equal(a, b) for a, b in zip(before, weights_of(anatomy), strict=True))
    assert advanced == [2, 2, 1]
    return anatomy, images, tally, metrics


def test_figures_of_batches_are_those_of_all_images(measured):
    anatomy, images, _, metrics = measured
    pixels = to_input([images.read(i) for i in range(5)], anatomy.backbone)
    reading = read_images(anatomy, pixels, torch.tensor(images.labels))
    assert reading.states is not None
    rate = identifiability_rate(reading.states.rank, 1)
    assert metrics["n_images"] == 5
    assert metrics["identifiability_rate"] == pytest.approx(rate.mean().item())
    expected = (1 - reading.states.rank[:, 1:, 1:] / 7).mean(dim=(0, 2))
    assert metrics["identifiability_by_block"] == pytest.approx(expected.tolist(), abs=1e-6)
    correct = (reading.logits.argmax(dim=1) == reading.labels).float()
    assert metrics["accuracy"] == pytest.approx(correct.mean().item())


def test_every_measure_is_there_and_is_json(measured):
    metrics = measured[3]
    json.dumps(metrics, allow_nan=False)
    assert set(metrics["ablations"]) == {"self_only", "no_cls"}
    assert set(metrics["residual_composition"]) == {"previous", "attention", "mlp", "composition"}
    for layer in ("attention", "mlp"):
        assert len(metrics["key_value_agreement"][layer]) == 2
        assert len(metrics["class_value_agreement"][layer]["p_value"]) == 2
        assert len(metrics["layer_change_rate"][layer]["cls"]) == 2
    assert metrics["random_model"]["identifiability_rate"] <= 1
    assert metrics["perturbation"]["n_kept"] == [1, 6, 11, 16]
    random = metrics["perturbation"]["random"]["area"]["value"]
    gradient = metrics["perturbation"]["gradient/negative"]
    assert gradient["area_minus_random"]["value"] == pytest.approx(
        gradient["area"]["value"] - random
    )
    assert metrics["context"]["n_images"] == 5
    assert len(metrics["context"]["identifiability_difference_by_block"]) == 2
    assert {"class_tokens/alone", "context_tokens/in_whole_image"} < set(metrics["context"])


def test_without_labels_the_predicted_class_is_read_and_there_is_no_accuracy():
    anatomy, images = make_vit("token"), make_pictures(2)
    unlabelled = TokenImages(images.ids, None, "predicted", images.read)
    tally, metrics = measure_tokens(anatomy, unlabelled, TokenMeasures())
    assert metrics["accuracy"] is None
    assert torch.equal(tally.column("label"), tally.column("predicted"))
    assert metrics["random_model"] is metrics["perturbation"] is metrics["context"] is None


def test_masks_that_fit_no_image_leave_the_context_out():
    images, anatomy = make_pictures(2), make_vit("token")
    _, metrics = measure_tokens(anatomy, images, TokenMeasures(), lambda _index: None)
    assert metrics["context"] == {"n_images": 0}
    full = torch.ones(4, 4, dtype=torch.bool)
    _, metrics = measure_tokens(anatomy, images, TokenMeasures(), lambda _index: full)
    assert metrics["context"]["n_images"] == 2
    assert metrics["context"]["identifiability_difference_by_block"] is None


def test_a_mean_pooled_model_has_no_class_token():
    _, metrics = measure_tokens(make_vit("gap"), make_pictures(2), TokenMeasures(ablations=True))
    assert metrics["identifiability_by_block_cls"] is None
    assert set(metrics["ablations"]) == {"self_only"}
    assert set(metrics["layer_change_rate"]["mlp"]) == {"image"}


# ---- figures -----------------------------------------------------------------------------------


class Inverts(Inverter):
    """An inverter that paints the mean of the features; `backbone` names the model it reads."""

    def __init__(self, layer: str, backbone: str = "token", channels: int = 32):
        self._spec = FeatureSpec(backbone, layer, channels, (4, 4))

    @property
    def spec(self):
        return self._spec

    @property
    def backbone(self):
        model = make_vit("token").backbone.model
        return wrap_model(model, name="token", layer=self.spec.layer, input_size=32)

    @property
    def networks(self):
        return {}

    def _invert(self, features, generator):
        assert features.shape[1:] == (32, 4, 4)
        return features.mean(dim=(1, 2, 3))[:, None, None, None].expand(-1, 3, 8, 8).sigmoid()


def test_inverters_find_their_blocks_and_see_their_patches():
    anatomy = make_vit("token")
    found = match_inverters(anatomy, [Inverts("blocks.0"), Inverts("last")])
    assert list(found) == [1, 2]
    pixels = to_input([make_pictures().read(0)], anatomy.backbone)
    shown = found[1].reconstruct(pixels, "a.png")
    model = anatomy.backbone.model
    states = model.blocks[0](
        model._pos_embed(model.patch_embed(anatomy.backbone.preprocess(pixels)))
    )
    expected = (states[0, 1:].mean().sigmoid() * 255).round() / 255
    torch.testing.assert_close(shown, expected.expand(3, 8, 8))


def test_modular_inverters_find_their_blocks():
    path = small.make_vit_path()
    inverses = small.make_vit_inverses(path)
    anatomy = read_anatomy(wrap_model(path.model, name="small/vit"))
    chains = [MapChain(inverses.chain(stage, path)) for stage in ("blocks.1", "last")]
    found = match_inverters(anatomy, chains)
    assert list(found) == [2, 3]
    pixels = torch.rand(1, 3, small.SIDE, small.SIDE)
    embedding = path.embeddings(pixels, ["blocks.1"])["blocks.1"]
    expected = inverses.chain("blocks.1", path).invert(embedding)
    expected = (expected * 255).round() / 255
    torch.testing.assert_close(found[2].reconstruct(pixels, "a.png"), expected[0])
    with pytest.raises(InputError, match="must read a block"):
        match_inverters(anatomy, [MapChain(inverses.chain("patches", path))])


@pytest.mark.parametrize(
    ("inverters", "message"),
    [
        ([Inverts("last", "convnext")], "trained on this backbone"),
        ([Inverts("blocks.0.mlp")], "must read a block"),
        ([Inverts("last"), Inverts("blocks.1")], "one inverter per block"),
        ([Inverts("blocks.0", channels=31)], "The inverter reads a"),
    ],
)
def test_inverters_that_do_not_fit(inverters, message):
    with pytest.raises(InputError, match=message):
        match_inverters(make_vit("token"), inverters)


def test_shown_blocks_hold_the_last_and_the_inverted():
    assert shown_blocks(6, []) == [1, 2, 3, 4, 5, 6]
    assert shown_blocks(24, [3])[-1] == 24
    assert 3 in shown_blocks(24, [3])
    assert len(shown_blocks(24, [])) == 8


def test_relevance_is_drawn_around_zero_whatever_its_range():
    """White for 0, red above and blue below, also where no value is negative."""
    values = torch.zeros(2, 2)
    values[0] = torch.tensor([0.5, -0.5])
    axes = plain_figure(1, 1)[1]
    image = show_overlay(axes, Image.new("RGB", (4, 4)), values, 0.5)
    assert image.get_clim() == (-0.5, 0.5)
    red, white, blue = (image.to_rgba(value)[:3] for value in (0.5, 0.0, -0.5))
    assert min(white) > 0.95
    assert red[0] > red[2]
    assert blue[2] > blue[0]
    shown = image.get_array()
    assert (shown[0, 0], shown[0, -1]) == (0.5, -0.5)


@pytest.mark.parametrize("with_inverter", [True, False])
def test_the_figure_has_a_row_of_reconstructions_or_says_why_not(tmp_path, with_inverter):
    anatomy, images = make_vit("token"), make_pictures()
    pixels = to_input([images.read(0)], anatomy.backbone)
    reading = read_images(anatomy, pixels, torch.tensor([1]))
    shown = {2: torch.rand(3, 8, 8)} if with_inverter else {}
    item = TokenPicture(images.read(0), "a/b.png", "tench", "goldfish", reading, shown)
    write_figure(draw_blocks(anatomy, item), tmp_path / "f.svg")
    words = (tmp_path / "f.svg").read_text()
    assert "block 2" in words
    assert "tench" in words
    assert "goldfish" in words
    assert ("shows" in words) == with_inverter
    assert (NO_INVERTER.split(":")[0] in words) != with_inverter


def test_curves_are_drawn(measured, tmp_path):
    anatomy, _, tally, metrics = measured
    curves = {
        kind: metrics["intervals"][f"identifiability_by_block/{kind}"] for kind in ("image", "cls")
    }
    figure = draw_identifiability(anatomy, tally.token_identifiability / 5, curves, 5)
    write_figure(figure, tmp_path / "i.png")
    write_figure(draw_removal(metrics["perturbation"], 5), tmp_path / "p.png")
    for name in ("i.png", "p.png"):
        assert Image.open(tmp_path / name).width > 500


# ---- read_tokens -------------------------------------------------------------------------------


def test_pictures_of_any_kind_read_the_same(tmp_path):
    backbone, picture = make_vit("token").backbone, make_pictures().read(0)
    path = tmp_path / "a.png"
    picture.save(path)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
    source = Source("a.png", str(path))
    maps = FeatureMaps.of(torch.zeros(1, 1, 1, 1), [source])
    found = [
        read_tokens(backbone, given)
        for given in (path, [str(path)], picture, [pixels], pixels[None], maps, [source])
    ]
    rows = [reading.rows() for reading in found]
    assert [row[0].pop("id") for row in rows] == [
        *("a.png", "a.png", "picture-0.png", "picture-0.png", "picture-0.png", "a.png", "a.png")
    ]
    assert all(row == rows[0] for row in rows)
    assert found[0].metrics == found[3].metrics


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        ([], "at least one picture"),
        ([3], "got int"),
        ([Source("a.png")], "without its picture"),
        ("nowhere.png", "nothing at nowhere.png"),
    ],
)
def test_what_is_no_picture_is_told(pictures, message):
    with pytest.raises(InputError, match=message):
        read_tokens(make_vit("token").backbone, pictures)


def test_a_reading_saves_what_it_holds_and_shows_its_first_picture(tmp_path):
    pictures = [make_pictures().read(i) for i in range(3)]
    inverters = [Inverts("blocks.0")]
    reading = read_tokens(make_vit("token").backbone, pictures, target=2, inverters=inverters)
    assert reading.arguments["target"] == 2
    assert reading.numbers()["label_source"] == "target"
    assert "closest to the target class" in reading.summary()
    assert reading.summary() in repr(reading)
    assert reading._repr_png_().startswith(b"\x89PNG")
    folder = reading.save(tmp_path / "out")
    written = {path.name for path in Path(folder).iterdir()}
    names = [f"{i:02d}-picture-{i}.png" for i in range(3)]
    assert written == {*names, "identifiability.png", "metrics.json", "per_image.parquet"}
    assert json.loads((folder / "metrics.json").read_text())["figures"] == names
    assert parquet.read_table(folder / "per_image.parquet").to_pylist() == reading.rows()
    assert [row["label"] for row in reading.rows()] == [2, 2, 2]


def test_an_inverter_of_the_block_changes_the_figure():
    backbone, picture = make_vit("token").backbone, make_pictures().read(0)
    plain = read_tokens(backbone, picture, inverters=())
    shown = read_tokens(backbone, picture, inverters=[Inverts("last")])
    assert len(shown.figure().axes) > len(plain.figure().axes)
    assert plain.perturbation_figure() is None
