from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
)

from featinv_diffusion.backbones import load_backbone, wrap_model
from featinv_diffusion.backbones import transformers as load_transformers
from featinv_diffusion.errors import InputError
from tests.backbones import zoo

PROCESSOR = {
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.5, 0.6, 0.7],
    "resample": 2,
    "size": {"height": 48, "width": 32},
}


@pytest.mark.parametrize("name", zoo.TOKEN_TOWERS)
def test_last_is_the_last_hidden_state_without_prefix_tokens(name):
    """Cell (i, j) of the 4×4 grid is token n_prefix + 4i + j."""
    model, n_prefix = zoo.make_tower(name), zoo.TOWERS[name][2]
    backbone, images = wrap_model(model, name=name), zoo.make_images()
    states = model(backbone.preprocess(images), output_hidden_states=True).hidden_states[-1]
    tower: Any = backbone.tower
    tokens = tower(backbone.preprocess(images)).last_hidden_state
    assert tokens.shape[:2] == states.shape[:2] == (2, n_prefix + 16)
    features = backbone.features(images)
    assert torch.equal(features[:, :, 0, 0], tokens[:, n_prefix])
    assert torch.equal(features[:, :, 2, 3], tokens[:, n_prefix + 11])


@pytest.mark.parametrize("name", [name for name in zoo.TOWERS if name.endswith("classes")])
def test_class_scores_are_the_models_own(name):
    model = zoo.make_tower(name)
    backbone, images = wrap_model(model, name=name), zoo.make_images()
    assert torch.equal(backbone.classify(images), model(backbone.preprocess(images)).logits)
    assert backbone.head_reads_map == (name in ("clip-classes", "ijepa-classes", "siglip-classes"))
    assert backbone.labels is None  # LABEL_0 … are numbers, not names


def test_class_names():
    model = zoo.make_tower("vit-classes")
    model.config.id2label = {i: f"kind {i}" for i in range(5)}
    assert wrap_model(model, name="vit").labels == tuple(f"kind {i}" for i in range(5))


@pytest.mark.parametrize("name", ["clip", "dinov2", "siglip", "vit-classes", "dinov3", "internvit"])
def test_layers_by_name_follow_the_hidden_states(name):
    model, n_prefix = zoo.make_tower(name), zoo.TOWERS[name][2]
    backbone, images = wrap_model(model, name=name), zoo.make_images()
    pixels = backbone.preprocess(images)
    blocks = [
        path
        for path, module in backbone.model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == 2
    ]
    features = wrap_model(model, name=name, layer=f"{blocks[0]}.0").features(images)
    tower: Any = backbone.tower
    tokens = tower(pixels, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(features.flatten(2).transpose(1, 2), tokens[:, n_prefix:], atol=1e-6)


@pytest.mark.parametrize("name", zoo.TOKEN_TOWERS)
def test_other_input_sizes_resample_the_positions(name):
    backbone = wrap_model(zoo.make_tower(name), name=name, input_size=(96, 48))
    assert backbone.spec.grid == (6, 3)
    assert backbone.features(zoo.make_images()).shape == (2, 32, 6, 3)


@pytest.mark.parametrize(
    ("model", "inner"),
    [
        (CLIPModel(CLIPConfig(vision_config=zoo.ViT)), "clip"),
        (SiglipModel(SiglipConfig(vision_config=zoo.ViT)), "siglip"),
    ],
)
def test_of_a_model_of_image_and_text_the_vision_tower_is_used(model, inner):
    backbone, images = wrap_model(model, name=inner), zoo.make_images()
    assert backbone.model is model.vision_model
    direct = wrap_model(model.vision_model, name=inner)
    assert torch.equal(backbone.features(images), direct.features(images))


def test_other_kinds_are_refused():
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1]))
    with pytest.raises(InputError, match=r"one of the types clip_vision_model.*got a ResNetModel"):
        wrap_model(model, name="resnet")
    with pytest.raises(InputError, match="got a Linear"):
        wrap_model(nn.Linear(2, 2), name="linear")


@pytest.mark.parametrize(
    ("name", "mean", "std", "interpolation"),
    [
        ("clip", 0.48145466, 0.26862954, "bicubic"),
        ("siglip", 0.5, 0.5, "bicubic"),
        ("dinov2", 0.485, 0.229, "bicubic"),
        ("vit-classes", 0.5, 0.5, "bilinear"),
    ],
)
def test_preprocessing_without_a_processor_is_the_model_types(name, mean, std, interpolation):
    preprocessing = wrap_model(zoo.make_tower(name), name=name).preprocessing
    assert preprocessing.size == (64, 64)
    assert (preprocessing.mean[0], preprocessing.std[0]) == (mean, std)
    assert preprocessing.interpolation == interpolation


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (48, 32)),
        ({"size": 80}, (80, 80)),
        ({"size": [80, 48]}, (80, 48)),
        ({"size": {"shortest_edge": 80}}, (80, 80)),
        ({"size": {"longest_edge": 80}}, (64, 64)),  # says nothing: the size of the model
        ({"crop_size": {"height": 64, "width": 48}, "do_center_crop": True}, (64, 48)),
        ({"crop_size": {"height": 64, "width": 48}, "do_center_crop": False}, (48, 32)),
    ],
)
def test_preprocessing_of_a_processor(changes, size):
    backbone = wrap_model(zoo.make_tower("clip"), name="clip", processor=PROCESSOR | changes)
    preprocessing = backbone.preprocessing
    assert preprocessing.size == size
    assert (preprocessing.mean, preprocessing.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert preprocessing.interpolation == "bilinear"


def test_preprocessing_without_normalisation():
    processor = PROCESSOR | {"do_normalize": False}
    backbone = wrap_model(zoo.make_tower("siglip"), name="siglip", processor=processor)
    images = zoo.make_images(1, (48, 32))
    assert torch.equal(backbone.preprocess(images), images)


@pytest.mark.parametrize("name", ["dinov2", "siglip-classes"])
def test_a_folder_loads_with_its_weights_and_processor(name, tmp_path):
    model = zoo.save_tower(name, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    backbone = load_backbone(f"hf/{tmp_path}")
    reference = wrap_model(model, name=name, processor=PROCESSOR)
    assert type(backbone.model) is type(model)
    assert backbone.preprocessing == reference.preprocessing
    images = zoo.make_images()
    assert torch.equal(backbone.features(images), reference.features(images))
    random = load_backbone(f"hf/{tmp_path}", pretrained=False)
    assert not torch.allclose(random.features(images), reference.features(images), atol=1e-2)


def test_half_precision_on_disk_is_loaded_as_float32(tmp_path):
    zoo.make_tower("dinov2").to(torch.float16).save_pretrained(tmp_path)
    assert load_backbone(f"hf/{tmp_path}").dtype == torch.float32
    assert load_backbone(f"hf/{tmp_path}", dtype=torch.bfloat16).dtype == torch.bfloat16


def test_of_a_folder_of_image_and_text_only_the_vision_tower_is_loaded(tmp_path):
    model = CLIPModel(CLIPConfig(vision_config=zoo.ViT, text_config={"num_hidden_layers": 1}))
    model.save_pretrained(tmp_path)
    backbone, images = load_backbone(f"hf/{tmp_path}"), zoo.make_images()
    assert type(backbone.model) is CLIPVisionModel
    reference = wrap_model(model.vision_model, name="clip")
    assert torch.equal(backbone.features(images), reference.features(images))
    built = load_backbone(f"hf/{tmp_path}", pretrained=False)
    assert built.spec.grid == reference.spec.grid


def test_a_folder_of_a_timm_wrapper(timm_wrapper, tmp_path):
    timm_wrapper.save_pretrained(tmp_path)
    backbone, images = load_backbone(f"hf/{tmp_path}"), zoo.make_images()
    reference = wrap_model(timm_wrapper, name="convnext")
    assert torch.equal(backbone.features(images), reference.features(images))
    assert backbone.labels == reference.labels
    assert load_backbone(f"hf/{tmp_path}", input_size=32).spec.grid == (4, 4)
    built = load_backbone(f"hf/{tmp_path}", pretrained=False)
    assert built.spec.grid == reference.spec.grid


def test_a_broken_or_missing_folder_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="must be a folder or Hub repository"):
        load_backbone(f"hf/{tmp_path / 'nothing'}")
    with pytest.raises(InputError, match="must be a folder or Hub repository"):
        load_backbone(f"hf/{tmp_path}")
    zoo.save_tower("dinov2", tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match="loading it failed"):
        load_backbone(f"hf/{tmp_path}")
    assert isinstance(load_backbone(f"hf/{tmp_path}", pretrained=False).model, Dinov2Model)


def lose(folder: Path, *prefixes: str) -> None:
    """Takes weights out of a saved model."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    kept = {key: value for key, value in weights.items() if not key.startswith(prefixes)}
    assert len(kept) < len(weights)
    save_file(kept, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("siglip", "encoder.layers.1"),
        ("dinov2", "embeddings.cls_token"),
        ("vit-classes", "vit.layernorm"),
        ("vit-classes", "classifier"),
        ("clip-classes", "classifier"),
    ],
)
def test_missing_weights_are_refused_instead_of_left_random(tmp_path, name: str, prefix: str):
    zoo.save_tower(name, tmp_path)
    lose(tmp_path, prefix)
    with pytest.raises(InputError, match=rf"are missing, {prefix}.* among them"):
        load_backbone(f"hf/{tmp_path}")


@pytest.mark.parametrize(
    ("name", "prefix"), [("siglip", "head."), ("dinov2", "embeddings.mask_token")]
)
def test_weights_that_nothing_reads_may_be_missing(tmp_path, name: str, prefix: str):
    zoo.save_tower(name, tmp_path)
    images = zoo.make_images()
    wanted = load_backbone(f"hf/{tmp_path}").features(images)
    lose(tmp_path, prefix)
    assert torch.equal(load_backbone(f"hf/{tmp_path}").features(images), wanted)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", [], r"config\.json of .* must be a JSON object, but is a list"),
        ("preprocessor_config.json", [1], r"preprocessor_config\.json of .* but is a list"),
        ("processor_config.json", {"image_processor": 3}, "image_processor in .* but is a int"),
        ("preprocessor_config.json", {"image_mean": 3}, "image_mean .* three numbers, got 3"),
        ("preprocessor_config.json", {"image_std": ["a"] * 3}, "image_std .* three numbers"),
        ("preprocessor_config.json", {"size": [1]}, r"size in pixels .* got \[1\]"),
        ("preprocessor_config.json", {"size": {"height": 8}}, r"size in pixels .* \(8, None\)"),
        ("preprocessor_config.json", {"resample": [1]}, "Images are resized with one of"),
    ],
)
def test_damaged_settings_are_refused(tmp_path, file: str, content, words: str):
    zoo.save_tower("dinov2", tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(InputError, match=words):
        load_backbone(f"hf/{tmp_path}")


def test_a_repository_that_cannot_be_reached_is_an_input_error():
    with pytest.raises(InputError, match=r"'google/siglip.*' must be a folder or Hub"):
        load_backbone("hf/google/siglip-base-patch16-224")


def cache(repo: str, name: str) -> Path:
    """Puts a model into the Hub's cache as a download does; returns its snapshot."""
    folder = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / "abc123"
    zoo.save_tower(name, snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc123")
    return snapshot


def test_a_repository_in_the_cache_loads_offline_with_its_processor():
    snapshot = cache("someone/dinov2", "dinov2")
    (snapshot / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    backbone = load_backbone("hf/someone/dinov2")
    assert backbone.input_size == (48, 32)
    assert backbone.preprocessing.mean == (0.1, 0.2, 0.3)


def test_a_repository_that_has_no_processor_gets_that_of_its_type():
    """The Hub's client notes in the cache which files a repository lacks."""
    snapshot = cache("someone/vit", "vit-classes")
    with pytest.raises(InputError, match="loading it failed"):
        load_backbone("hf/someone/vit")  # not known: nobody has asked
    absent = snapshot.parents[1] / ".no_exist" / "abc123"
    absent.mkdir(parents=True)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (absent / name).touch()
    assert load_backbone("hf/someone/vit").preprocessing.mean == (0.5, 0.5, 0.5)


def test_a_repository_that_says_it_has_no_processor(monkeypatch):
    def download(*_args: object) -> str:
        raise EntryNotFoundError("404")

    cache("someone/siglip", "siglip")
    monkeypatch.setattr(load_transformers, "hf_hub_download", download)
    assert load_backbone("hf/someone/siglip").input_size == (64, 64)
