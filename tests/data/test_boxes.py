"""Boxes of Tiny-ImageNet and COCO, and what crops do to them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featinv_diffusion.data.boxes import Box, BoxDataset, crop_boxes, open_boxed_images, targets_of
from featinv_diffusion.data.crops import Crop, DataConfig
from featinv_diffusion.errors import InputError


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    for number, name in enumerate(("n01", "n02")):
        folder = tmp_path / "train" / name / "images"
        folder.mkdir(parents=True)
        lines = []
        for i in range(2):
            Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(folder / f"{name}_{i}.JPEG")
            lines.append(f"{name}_{i}.JPEG\t8\t16\t39\t47\n")
        (folder.parent / f"{name}_boxes.txt").write_text("".join(lines))
    return tmp_path


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    (tmp_path / "val2017").mkdir()
    (tmp_path / "annotations").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "val2017" / "7.png")
    Image.new("RGB", (40, 20)).save(tmp_path / "val2017" / "3.png")
    square = [10, 5, 20, 5, 20, 15, 10, 15]
    content = {
        "images": [
            {"id": 7, "file_name": "7.png", "height": 20, "width": 40},
            {"id": 3, "file_name": "3.png", "height": 20, "width": 40},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 3, "name": "car"}],
        "annotations": [
            {"image_id": 7, "category_id": 3, "bbox": [10, 5, 10, 10], "segmentation": [square]},
            {"image_id": 7, "category_id": 1, "bbox": [0, 0, 40, 20], "iscrowd": 1},
        ],
    }
    (tmp_path / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    return tmp_path


def test_tiny_imagenets_edges_are_inclusive(tiny_imagenet: Path) -> None:
    images = open_boxed_images(DataConfig(root=str(tiny_imagenet), in_memory=True))
    assert images.class_names == ["n01", "n02"]
    assert images.boxes(3) == [Box(8, 16, 40, 48, 1)]


def test_an_image_without_a_box_is_refused(tiny_imagenet: Path) -> None:
    (tiny_imagenet / "train/n02/n02_boxes.txt").write_text("other.JPEG 0 0 1 1\n")
    with pytest.raises(InputError, match="must have a box"):
        open_boxed_images(DataConfig(root=str(tiny_imagenet)))


def test_a_broken_box_file_is_named(tiny_imagenet: Path) -> None:
    (tiny_imagenet / "train/n02/n02_boxes.txt").write_text("n02_0.JPEG 0 0\n")
    with pytest.raises(InputError, match=r"n02_boxes.txt must hold lines"):
        open_boxed_images(DataConfig(root=str(tiny_imagenet)))


def test_coco_classes_are_category_ids_and_crowds_are_left_out(coco: Path) -> None:
    images = open_boxed_images(DataConfig(root=str(coco), split="val2017"))
    assert images.class_names == ["unused 0", "person", "unused 2", "car"]
    assert images.ids == ["3.png", "7.png"]
    assert images.boxes(0) == []
    assert images.boxes(1) == [Box(10, 5, 20, 15, 3)]
    assert images.read(1).size == (40, 20)


def test_coco_masks_fill_their_polygons(coco: Path) -> None:
    pytest.importorskip("pycocotools")
    images = open_boxed_images(DataConfig(root=str(coco), split="val2017"))
    assert images.masks is not None
    mask = images.masks(1)
    expected = np.zeros((1, 20, 40), bool)
    expected[0, 5:15, 10:20] = True
    assert (mask != expected).sum() <= 20  # the rasteriser may differ along the outline


def test_masks_without_pycocotools_say_what_to_install(coco: Path, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    images = open_boxed_images(DataConfig(root=str(coco), split="val2017"))
    assert images.masks is not None
    with pytest.raises(InputError, match=r"pip install 'featinv-diffusion\[coco\]'"):
        images.masks(1)


def test_a_crop_moves_cuts_and_drops_boxes() -> None:
    boxes = [Box(10, 10, 30, 30, 4), Box(0, 0, 12, 12, 5), Box(18, 0, 26, 60, 6)]
    crop = Crop((10, 10, 20, 40), hflip=False, vflip=False)  # rows 10–30, columns 10–50
    first, third = crop_boxes(boxes, crop)  # of the second 4 of 144 square pixels are left
    assert first == ((0.25, 0.5, 0.5, 1.0), 4)
    assert third == (pytest.approx((12 / 40, 0.5, 8 / 40, 1.0)), 6)


def test_flips_mirror_the_centre() -> None:
    crop = Crop((0, 0, 10, 10), hflip=True, vflip=True)
    assert crop_boxes([Box(0, 0, 4, 2, 1)], crop) == [(pytest.approx((0.8, 0.9, 0.4, 0.2)), 1)]


def test_items_agree_with_the_pixels_they_come_with(tmp_path: Path) -> None:
    """A white box on black must be where the target says, whatever the crop and flip."""
    folder = tmp_path / "train/n01/images"
    folder.mkdir(parents=True)
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[16:48, 8:40] = 255
    Image.fromarray(picture).save(folder / "a.png")
    (folder.parent / "n01_boxes.txt").write_text("a.png 8 16 39 47\n")
    config = DataConfig(root=str(tmp_path), size=64, scale=(0.3, 1.0), hflip=True, vflip=True)
    dataset = BoxDataset(open_boxed_images(config), [0], config, seed=3, max_boxes=2)
    for epoch in range(12):
        dataset.set_epoch(epoch)
        item = dataset[0]
        assert item["box_labels"].tolist()[1] == -1
        if item["box_labels"][0] < 0:
            continue
        x, y, width, height = item["boxes"][0] * 64
        white = item["pixels"][0] > 127
        rows, columns = white.any(1).nonzero(), white.any(0).nonzero()
        edges = [columns.min(), columns.max() + 1, rows.min(), rows.max() + 1]
        wanted = [x - width / 2, x + width / 2, y - height / 2, y + height / 2]
        assert np.allclose([float(e) for e in edges], [float(w) for w in wanted], atol=1.5)


def test_targets_leave_the_filling_out() -> None:
    boxes, labels = torch.rand(2, 3, 4), torch.tensor([[5, 2, -1], [-1, -1, -1]])
    first, second = targets_of(boxes, labels)
    assert first["class_labels"].tolist() == [5, 2]
    assert torch.equal(first["boxes"], boxes[0, :2])
    assert len(second["boxes"]) == 0


def test_squash_takes_the_whole_image() -> None:
    from featinv_diffusion.data.crops import draw_crop

    config = DataConfig(crop="squash", hflip=False)
    crop = draw_crop(config, 40, 20, torch.Generator().manual_seed(0))
    assert crop == Crop((0, 0, 20, 40), False, False)
    assert crop.apply(Image.new("RGB", (40, 20)), 32).size == (32, 32)
