"""Stages, states within them, colour and λ, on small random models."""

from __future__ import annotations

import colorsys
import json
from itertools import combinations

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from featinv_diffusion.cli.analyze import NAMES
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.modular import ModularInverter
from featinv_diffusion.studies.settings import ImageChoice, PictureChoice
from featinv_diffusion.studies.stages import (
    AVERAGE,
    COMPARED,
    FILTERS,
    STUDIES,
    detection_scores,
    invert_patch_embedding,
    invert_states,
    load_pictures,
    matching_states,
    open_modular,
    pairwise_mse,
    read_weight,
    recolour,
    reconstruct_stages,
    stage_mse,
)
from tests.inverters import small
from tests.tiny import make_images


@pytest.fixture(scope="module")
def detr() -> ModularInverter:
    path = small.make_detr_path()
    return ModularInverter(small.make_detr_inverses(path).eval(), path)


@pytest.fixture(scope="module")
def vit() -> ModularInverter:
    path = small.make_vit_path()
    return ModularInverter(small.make_vit_inverses(path).eval(), path)


@pytest.fixture
def boxes(tmp_path):
    """Two pictures with boxes, laid out as Tiny-ImageNet's."""
    folder = tmp_path / "data/train/n01/images"
    folder.mkdir(parents=True)
    for i, colour in enumerate(((200, 40, 40), (40, 200, 40))):
        Image.new("RGB", (64, 64), colour).save(folder / f"n01_{i}.png")
    lines = "n01_0.png 0 0 31 63\nn01_1.png 16 16 47 47\n"
    (folder.parent / "n01_boxes.txt").write_text(lines)
    return tmp_path / "data"


def test_stage_mse_is_that_of_each_image_and_the_average_is_the_best_constant() -> None:
    images = make_images(4)
    found = stage_mse({"same": images, "grey": torch.full_like(images, 0.5)}, images)
    assert found["same"].eq(0).all()
    assert torch.allclose(found["grey"], (images - 0.5).square().mean((1, 2, 3)))
    spread = images.var(0, correction=0).mean()
    assert float(found[AVERAGE].mean()) == pytest.approx(float(spread), rel=1e-5)


def test_stages_are_reconstructed_by_their_chains(detr: ModularInverter) -> None:
    images = make_images(3)
    found = reconstruct_stages(detr, images, ["backbone", "decoder"], batch_size=2)
    embedding = detr.path.embeddings(images, ["decoder"])["decoder"]
    assert torch.allclose(found["decoder"], detr.chain("decoder").invert(embedding), atol=1e-5)


def test_the_patch_embedding_is_undone_in_closed_form(vit: ModularInverter) -> None:
    found = invert_patch_embedding(vit.path, make_images(2))
    weight = vit.path.model.patch_embed.proj.weight.double().flatten(1)
    assert found["condition_number"] == pytest.approx(float(torch.linalg.cond(weight)), rel=1e-6)
    # pixels are normalised in float32 before, so they come back to that precision times κ at most
    assert found["max_error"] < 1e-7 * found["condition_number"]
    assert next(vit.path.model.parameters()).dtype == torch.float32


def test_states_that_fit_an_inverse_are_those_of_its_shape_each_once(
    detr: ModularInverter, vit: ModularInverter
) -> None:
    """`encoder.0` is `backbone`; `encoder.2`, `decoder.3` and `blocks.2` are the last states."""
    assert matching_states(detr, "encoder") == ["backbone", "encoder.1", "encoder"]
    assert matching_states(detr, "decoder") == [f"decoder.{i}" for i in range(3)] + ["decoder"]
    blocks = [f"blocks.{i}{part}" for i in range(3) for part in (".attention", "")]
    assert matching_states(vit, "encoder") == ["patches", *blocks[:-1], "encoder"]
    assert matching_states(vit, "blocks.2") == ["patches", *blocks]
    assert matching_states(vit, "last") == ["last"]


@torch.no_grad()
def test_no_two_states_are_the_same(detr: ModularInverter, vit: ModularInverter) -> None:
    for inverter, stage in ((detr, "encoder"), (detr, "decoder"), (vit, "encoder")):
        names = matching_states(inverter, stage)
        states = inverter.path.embeddings(make_images(1), names)
        assert not any(torch.equal(states[a], states[b]) for a, b in combinations(names, 2))


def test_the_zeros_where_the_decoder_starts_give_one_picture_for_all(detr: ModularInverter) -> None:
    found = invert_states(detr, make_images(2), "decoder", ["decoder.0", "decoder"])
    assert torch.equal(found["decoder.0"][0], found["decoder.0"][1])
    assert not torch.equal(found["decoder"][0], found["decoder"][1])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("red", lambda h: 0.0),
        ("green", lambda h: 1 / 3),
        ("blue", lambda h: 2 / 3),
        ("+120", lambda h: (h + 1 / 3) % 1),
        ("+240", lambda h: (h + 2 / 3) % 1),
    ],
)
def test_filters_change_the_hue_inside_alone(name: str, change) -> None:
    images = make_images(1)
    inside = torch.zeros(1, 64, 64, dtype=torch.bool)
    inside[0, 10:20, 5:50] = True
    found = recolour(images, inside, name)
    h, s, v = colorsys.rgb_to_hsv(*images[0, :, 12, 30].tolist())
    expected = torch.tensor(colorsys.hsv_to_rgb(change(h), s, v))
    assert torch.allclose(found[0, :, 12, 30], expected, atol=0.6 / 255)
    outside = ~inside[:, None].expand_as(images)
    assert torch.allclose(found[outside], images[outside], atol=0.6 / 255)


def test_turning_twice_by_120_is_turning_by_240() -> None:
    images, everywhere = make_images(2), torch.ones(2, 64, 64, dtype=torch.bool)
    twice = recolour(recolour(images, everywhere, "+120"), everywhere, "+120")
    assert torch.allclose(twice, recolour(images, everywhere, "+240"), atol=3 / 255)


def test_all_versions_have_8_bits_and_grey_has_no_colour() -> None:
    images, everywhere = make_images(1), torch.ones(1, 64, 64, dtype=torch.bool)
    for name in FILTERS:
        levels = recolour(images, everywhere, name) * 255
        assert torch.allclose(levels, levels.round(), atol=1e-4)
    grey = recolour(images, ~everywhere, "grey")
    assert torch.equal(grey[:, 0], grey[:, 2])
    with pytest.raises(InputError, match="did you mean 'green'"):
        recolour(images, everywhere, "gren")


def test_pairwise_mse_averages_over_all_pairs() -> None:
    versions = {str(v): torch.full((2, 3, 4, 4), v) for v in (0.0, 1.0, 3.0)}
    assert torch.allclose(pairwise_mse(versions), torch.full((2,), (1 + 9 + 4) / 3))
    assert len(COMPARED) * (len(COMPARED) - 1) / 2 == 15


def test_pictures_come_with_objects_where_the_data_have_boxes(boxes) -> None:
    found = load_pictures(PictureChoice(ImageChoice(str(boxes), "train"), n_images=2), (64, 64))
    assert found.images.shape == (2, 3, 64, 64)
    assert found.objects is not None
    assert torch.allclose(found.objects[0]["boxes"], torch.tensor([[0.25, 0.5, 0.5, 1.0]]))
    assert found.inside[0, :, :32].all()
    assert not found.inside[0, :, 32:].any()
    assert found.inside[1].sum() == 32 * 32


def test_pictures_without_boxes_are_inside_everywhere(tmp_path) -> None:
    Image.new("RGB", (90, 64)).save(tmp_path / "a.png")
    images = ImageChoice(str(tmp_path))
    found = load_pictures(PictureChoice(images, n_images=1), (64, 64))
    assert found.objects is None
    assert found.inside.all()
    assert len(load_pictures(PictureChoice(images), (64, 64))) == 1
    with pytest.raises(InputError, match="1 images to choose from, got 2"):
        load_pictures(PictureChoice(images, n_images=2), (64, 64))


def test_detection_needs_boxes(detr: ModularInverter, tmp_path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    pictures = load_pictures(PictureChoice(ImageChoice(str(tmp_path))), (64, 64))
    with pytest.raises(InputError, match="pictures with boxes"):
        detection_scores(detr, pictures, pictures.images)


def test_lambda_is_read_beside_the_inverter(tmp_path) -> None:
    assert read_weight(str(tmp_path / "inverter")) is None
    (tmp_path / "tuning.json").write_text('{"reconstruction_weight": 0.25}')
    assert read_weight(str(tmp_path / "inverter")) == 0.25


@pytest.fixture(scope="module")
def saved(detr: ModularInverter, tmp_path_factory):
    """A folder of an inverter with its detector beside it."""
    folder = tmp_path_factory.mktemp("saved")
    detr.path.model.save_pretrained(folder / "detector")
    detr.inverses.save_pretrained(folder / "inverter")
    return folder / "inverter"


@pytest.mark.parametrize(
    ("name", "key", "figure"),
    [
        ("stages", "stage_mse", "stage_mse.png"),
        ("layers", "layer_mse", "layers-encoder.png"),
        ("colour", "pairwise_mse", "pairwise_mse.png"),
        ("tradeoff", "tradeoff", "tradeoff.png"),
    ],
)
def test_analyze_writes_figures_and_metrics(saved, boxes, tmp_path, name, key, figure) -> None:
    pytest.importorskip("pycocotools")
    from featinv_diffusion.cli import app

    arguments = ["analyze", name, "--inverter", str(saved), "--data", str(boxes)]
    arguments += ["--split", "train", "--n-images", "2", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics[key]
    assert (tmp_path / "out" / figure).stat().st_size > 1000


@pytest.mark.parametrize("name", ["tiny/convnext", "siglip", "nothing"])
def test_stages_need_a_modular_inverter(name: str) -> None:
    with pytest.raises(InputError, match=r"modular inverter|An inverter must be a name"):
        open_modular(name)


def test_the_command_line_knows_every_analysis() -> None:
    assert (*STUDIES, "encoders") == NAMES
