"""Which class an image is read for: by name, number, WordNet id, or the predicted one."""

from __future__ import annotations

import timm
import torch
from PIL import Image

from featinv_diffusion.backbones import wrap_model
from featinv_diffusion.class_embedding.images import class_name, open_token_images, to_input
from featinv_diffusion.class_embedding.settings import ImageChoice
from tests.class_embedding.vits import SMALL, make_vit


def write(folder, *names):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (40 * i, 10, 200)).save(path)
    return str(folder)


def test_folders_are_classes_by_number_where_there_are_as_many(tmp_path):
    names = [f"{c}/{i}.png" for c in range(7) for i in range(2)]
    images = open_token_images(
        write(tmp_path, *names), make_vit().backbone, ImageChoice(per_class=1)
    )
    assert images.label_source == "number"
    assert sorted(images.labels or []) == list(range(7))
    assert [int(image_id[0]) for image_id in images.ids] == images.labels
    assert images.read(0).size == (40, 30)


def test_pictures_without_classes_are_read_for_the_predicted_one(tmp_path):
    images = open_token_images(write(tmp_path, "a.png", "b.png"), make_vit().backbone)
    assert images.labels is None
    assert images.label_source == "predicted"
    single = open_token_images(str(tmp_path / "a.png"), make_vit().backbone)
    assert single.ids == ["a.png"]
    assert single.labels is None


def test_classes_that_do_not_match_are_told(tmp_path):
    images = open_token_images(write(tmp_path, "cat/a.png", "dog/b.png"), make_vit().backbone)
    assert images.labels is None
    assert images.label_source == "predicted"
    assert "cannot be matched" in images.notes[-1]


def test_some_folders_of_imagenet_by_their_wordnet_ids(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **(SMALL | {"num_classes": 1000}))
    backbone = wrap_model(model, name="vit", input_size=32)
    folder = write(tmp_path, "n01443537/a.png", "n01440764/b.png")  # goldfish 1, tench 0
    images = open_token_images(folder, backbone)
    assert images.label_source == "wordnet"
    assert dict(zip(images.ids, images.labels or [], strict=True)) == {
        "n01440764/b.png": 0,
        "n01443537/a.png": 1,
    }
    assert class_name(backbone, 1) == "goldfish"
    assert class_name(make_vit().backbone, 6) == "class 6"


def test_whole_pictures_are_squashed():
    backbone = make_vit().backbone
    picture = Image.new("RGB", (64, 16), "white")
    picture.paste("black", (0, 0, 32, 16))
    images = to_input([picture], backbone)
    assert images.shape == (1, 3, 32, 32)
    assert images[..., :12].max() < 0.01
    assert images[..., 20:].min() > 0.99
    assert torch.equal(backbone.classify(images), backbone.classify(images.clone()))
