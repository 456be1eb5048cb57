"""The measures of the papers' studies against hand-worked cases, and some runs at a few images."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from featinv_diffusion.backbones import load_backbone
from featinv_diffusion.features.operator_methods import PairMoments
from featinv_diffusion.images import to_pil
from featinv_diffusion.metrics.detection import average_precision_by_class
from featinv_diffusion.papers.base import Request
from featinv_diffusion.papers.colourisation import reduce_rank
from featinv_diffusion.papers.domains import other_domains, sketch, texture
from featinv_diffusion.papers.encoders import channels_explained, correlation_length
from featinv_diffusion.papers.families import module_configs, open_classifier
from featinv_diffusion.papers.grey import heads_on_grey
from featinv_diffusion.papers.items import find_item, list_items
from featinv_diffusion.papers.layers import linear_cka
from featinv_diffusion.papers.operators import reflect
from featinv_diffusion.papers.prototypes import leave_one_out, read_linearly
from featinv_diffusion.papers.run import find_study, run_item
from featinv_diffusion.papers.settings import PaperSettings
from featinv_diffusion.papers.spatial import passed_on, replace_patches, share_inside
from featinv_diffusion.studies.settings import ImageChoice
from featinv_diffusion.studies.stages import PictureSet, open_modular
from tests.tiny import make_images


def test_cka_is_one_of_rotated_features_and_zero_of_unrelated_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    assert linear_cka(a, 3 * a @ rotation + 1) == pytest.approx(1)
    assert linear_cka(a, torch.randn(4000, 5, generator=generator, dtype=torch.float64)) < 0.01


def test_the_change_of_a_patch_lies_inside_it() -> None:
    images = make_images(3)
    patched, where = replace_patches(images, 1 - images, seed=0)
    assert torch.allclose(where.mean(dim=(1, 2, 3)), torch.tensor(1 / 64))
    assert torch.allclose(share_inside(patched - images, where), torch.ones(3))
    flat = torch.ones_like(images)
    assert torch.allclose(share_inside(flat, where), torch.tensor(1 / 64))


def test_colour_that_comes_back_by_half_is_passed_on_by_half() -> None:
    given = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    light = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found = passed_on(0.5 * given + light, given)
    assert torch.allclose(found["xy"] / found["xx"], torch.tensor(0.5), atol=1e-5)


def test_the_mean_of_the_others_leaves_the_own_out() -> None:
    values = torch.tensor([[1.0, 0.0], [3.0, 0.0], [8.0, 6.0]])
    found = leave_one_out(values, torch.tensor([0, 0, 1]))
    assert found.tolist() == [[3, 0], [1, 0], [2, 0]]


def test_a_planted_reflection_is_found_by_as_many_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    turned = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q[:, :2]
    planted = torch.eye(6, dtype=torch.float64) - 2 * turned @ turned.T
    assert torch.allclose(reflect(x.T @ (x @ planted), 2), planted, atol=0.1)


def test_all_but_the_first_directions_are_turned_round() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    xy = basis @ torch.diag(torch.tensor([-3.0, -2, -1, 1, 2, 3]).double()) @ basis.T
    turned = basis[:, 2:3]
    expected = torch.eye(6, dtype=torch.float64) - 2 * turned @ turned.T
    assert torch.allclose(reflect(xy, 3, skipped=2), expected)


def test_a_chroma_that_is_in_the_states_is_read_and_one_that_is_not_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    fold = torch.arange(200) % 5
    y = x[:, :2] * 3 + 1
    assert read_linearly(x, y, fold).value > 0.99
    noise = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    assert read_linearly(x, noise, fold).high < 0.1


def test_heads_on_grey_see_only_what_is_left_without_colour() -> None:
    """Two classes that differ in colour alone are named in colour and not in grey."""
    n = 24
    labels = torch.arange(n) // 2 % 2
    colours = torch.tensor([[0.8, 0.2, 0.2], [0.2, 0.2, 0.8]])[labels]
    images = colours[:, :, None, None].expand(n, 3, 64, 64).contiguous()
    grey = torch.full_like(images, 0.4)
    objects = [
        {"class_labels": torch.tensor([int(k)]), "boxes": torch.tensor([[0.5, 0.5, 1, 1]])}
        for k in labels
    ]
    inside = torch.ones(n, 64, 64, dtype=torch.bool)
    pictures = PictureSet([str(i) for i in range(n)], images, objects, inside)
    versions = {"colour": images, "grey": grey}
    found = heads_on_grey(open_modular("detr"), pictures, versions, n)
    assert found["colour on colour"].mean() == 1
    assert found["grey on grey"].mean() == pytest.approx(0.5)


def test_families_get_inverses_that_fit_them() -> None:
    swin = module_configs(open_classifier("tiny/swin"))
    assert list(swin) == ["patches", "layers.0", "layers.1"]
    assert [one.writes for one in swin.values()] == ["image", "patches", "layers.0"]
    assert swin["patches"].strides == (2, 2)
    assert (swin["layers.1"].n_heads, swin["layers.1"].window) == (4, 4)
    vit = module_configs(open_classifier("tiny/vit"))
    assert list(vit) == ["patches", "blocks.2", "encoder"]
    assert vit["patches"].strides == (2, 2, 2)


def test_reduced_rank_keeps_a_map_of_that_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, 20, 20, generator=generator)
    x = x / x.norm(dim=1, keepdim=True)
    change = torch.outer(torch.eye(5)[0], torch.eye(5)[1])
    y = torch.einsum("bchw,cd->bdhw", x, torch.eye(5) + change)
    moments = PairMoments(5)
    moments.update(x, y)
    matrix = (torch.eye(5) + change).double()
    assert torch.allclose(reduce_rank(moments, matrix, 1), matrix, atol=1e-9)


def test_channels_that_are_colours_are_explained_by_them() -> None:
    colours = make_images(2)[..., ::8, ::8].contiguous()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 1, *colours.shape[2:], generator=generator)
    found = channels_explained(torch.cat([2 * colours[:, :1] + 1, noise], 1), colours)
    assert torch.allclose(found[:, 0], torch.ones(2), atol=1e-4)
    assert bool((found[:, 1] < 0.5).all())


def test_the_correlation_length_of_noise_is_below_that_of_waves() -> None:
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    wave = torch.sin(2 * math.pi * torch.arange(64) / 32)
    waves = (wave[:, None] * wave).expand(1, 3, -1, -1)
    assert float(correlation_length(noise)) < 1
    # cos(2πx/32) falls below 1/e at 6.1 pixels
    assert float(correlation_length(waves)) == pytest.approx(6.1, abs=0.5)


def test_other_domains_differ_from_photos_and_are_pictures() -> None:
    images = make_images(2)
    domains = other_domains(images)
    assert {"photos", "sketches", "textures", "digits"} <= domains.keys()
    assert all(x.shape == images.shape and x.min() >= 0 and x.max() <= 1 for x in domains.values())
    assert torch.equal(sketch(torch.full_like(images, 0.3)), torch.ones_like(images))
    flat = torch.full_like(images, 0.3)
    assert torch.allclose(texture(flat), flat, atol=1e-5)


def test_precision_by_class_is_one_where_only_that_class_is_found() -> None:
    box = torch.tensor([[0.5, 0.5, 0.5, 0.5]])
    targets = [{"class_labels": torch.tensor([k]), "boxes": box} for k in (0, 1)]
    scores = torch.full((2, 1, 3), -9.0)
    scores[:, :, 0] = 9.0  # both are taken for class 0
    found = average_precision_by_class(scores, box.expand(2, 1, 4), targets, (64, 64))
    assert found[0] > 0.99
    assert found[1] == 0


# ---- Runs at a few images ------------------------------------------------------------------------


@pytest.fixture
def boxes(tmp_path: Path) -> ImageChoice:
    """Four pictures of two classes with boxes, laid out as Tiny-ImageNet's."""
    colours = {"n01443537": (220, 120, 40), "n02132136": (90, 60, 40)}
    for wnid, colour in colours.items():
        folder = tmp_path / "data/train" / wnid / "images"
        folder.mkdir(parents=True)
        for i in range(2):
            picture = Image.effect_noise((64, 64), 80).convert("RGB")
            picture.paste(colour, (8, 8, 40 + i, 48))
            picture.save(folder / f"{wnid}_{i}.png")
        lines = "".join(f"{wnid}_{i}.png 8 8 {39 + i} 47\n" for i in range(2))
        (folder.parent / f"{wnid}_boxes.txt").write_text(lines)
    return ImageChoice(str(tmp_path / "data"), "train")


@pytest.mark.parametrize(
    "name",
    [
        "detr-figure-2",
        "detr-figure-8",
        "detr-grey",
        pytest.param("detr-figure-10", marks=pytest.mark.slow),
        pytest.param("detr-figure-11", marks=pytest.mark.slow),
    ],
)
def test_an_item_with_boxes_runs_and_writes_its_folder(name: str, boxes, tmp_path: Path) -> None:
    settings = PaperSettings(images=boxes, n_images=4)
    found, folder = run_item(find_item(name), settings, tmp_path / "out", "featinv paper …")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["item"], manifest["n_images"]) == (name, 4)
    assert manifest["ours"] == found.answers[name].ours
    assert all((folder / file).is_file() for file in manifest["files"])
    page = (folder / "table.md").read_text()
    assert find_item(name).published in page
    assert manifest["ours"] in page


@pytest.mark.parametrize(
    "name",
    [
        "vit-spatial",
        "siglip-figure-2",
        "siglip-figure-8",
        pytest.param("detr-figure-9", marks=pytest.mark.slow),
        pytest.param("siglip-figure-6", marks=pytest.mark.slow),
    ],
)
def test_an_item_runs_on_crops_of_two_photos(name: str) -> None:
    item = find_item(name)
    found = find_study(item)(Request(PaperSettings(n_images=8)))
    assert len(found.ids) == 8
    assert found.figures
    own = {one.name for one in list_items() if one.study == item.study}
    assert own <= found.answers.keys()
    assert json.loads(json.dumps(dict(found.metrics)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "featinv-figure-1",
        "featinv-figure-4",
        "featinv-figure-5",
        "featinv-a3-variability",
        "featinv-b-other-domains",
        "featinv-warm-start",
        "siglip-figure-7",
        "siglip-conditions",
        "siglip-layers",
        "siglip-time",
        "vit-cost",
        "vit-families",
    ],
)
def test_the_other_items_run_on_crops_of_two_photos(name: str) -> None:
    item = find_item(name)
    found = find_study(item)(Request(PaperSettings(n_images=8)))
    assert {one.name for one in list_items() if one.study == item.study} <= found.answers.keys()
    assert found.figures


@pytest.mark.parametrize(
    "name", ["tokens-models", pytest.param("tokens-probes", marks=pytest.mark.slow)]
)
def test_an_item_of_tokens_runs_on_pictures_in_class_folders(name: str, tmp_path: Path) -> None:
    labels = load_backbone("tiny/vit").labels or ()
    for k, images in zip((0, 1, 2), make_images(12).split(4), strict=True):
        folder = tmp_path / "data" / labels[k]
        folder.mkdir(parents=True)
        for i, image in enumerate(to_pil(images)):
            image.save(folder / f"{i}.png")
    settings = PaperSettings(images=ImageChoice(str(tmp_path / "data")), n_images=12)
    found, folder = run_item(find_item(name), settings, tmp_path / "out", "featinv paper …")
    assert json.loads((folder / "manifest.json").read_text())["ours"] == found.answers[name].ours
    assert len(found.ids) == (12 if name == "tokens-models" else 3)
