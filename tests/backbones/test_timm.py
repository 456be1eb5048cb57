from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from transformers import TimmWrapperModel

from featinv_diffusion.backbones import load_backbone, wrap_model
from featinv_diffusion.backbones.names import PUBLISHED
from featinv_diffusion.errors import InputError
from tests import tiny
from tests.backbones import zoo


@pytest.mark.parametrize(
    ("name", "channels", "grid", "size"),
    [
        ("resnet", 2048, (7, 7), (224, 224)),
        ("convnext", 1024, (9, 9), (288, 288)),
        ("swin", 1024, (12, 12), (384, 384)),
        ("vit", 768, (14, 14), (224, 224)),
    ],
)
def test_the_models_of_the_paper_at_full_size(name, channels, grid, size):
    with torch.device("meta"):
        backbone = load_backbone(PUBLISHED[name], pretrained=False)
    assert (backbone.spec.channels, backbone.spec.grid) == (channels, grid)
    assert backbone.input_size == size
    assert backbone.head_reads_map == (name != "vit")
    assert backbone.labels is not None
    assert len(backbone.labels) == 1000
    assert backbone.labels[207].startswith("golden retriever")


def test_weights_and_preprocessing_of_the_paper():
    ids = ("resnet50.tv_in1k", "convnext_base.fb_in22k_ft_in1k")
    assert ids == (PUBLISHED["resnet"], PUBLISHED["convnext"])
    with torch.device("meta"):
        resnet, convnext = (load_backbone(timm_id, pretrained=False) for timm_id in ids)
    for backbone, timm_id in zip((resnet, convnext), ids, strict=True):
        config = timm.get_pretrained_cfg(timm_id)
        assert config is not None
        assert backbone.preprocessing.mean == config.mean == (0.485, 0.456, 0.406)
        assert backbone.preprocessing.std == config.std == (0.229, 0.224, 0.225)
        assert backbone.preprocessing.interpolation == config.interpolation
    assert resnet.preprocessing.interpolation == "bilinear"
    assert convnext.preprocessing.interpolation == "bicubic"


@pytest.mark.parametrize(
    "name", ["convnext", "swin", "vit", "vit_small_patch16_224", "deit_tiny_distilled_patch16_224"]
)
def test_last_is_what_the_model_itself_extracts(name):
    """timm's own way to a map in NCHW, which drops prefix tokens and applies the final norm."""
    backbone, images = zoo.make(name), zoo.make_images()
    maps = backbone.model.forward_intermediates(  # pyright: ignore[reportCallIssue]
        backbone.preprocess(images),
        indices=1,
        norm=True,
        output_fmt="NCHW",
        intermediates_only=True,
    )
    assert torch.equal(backbone.features(images), maps[-1])


def test_prefix_tokens_are_the_class_token_and_the_registers():
    """Four registers and one class token: the map starts at token 5."""
    backbone, images = zoo.make("vit_small_patch16_224"), zoo.make_images(1)
    tokens = backbone.model.forward_features(backbone.preprocess(images))  # pyright: ignore
    assert tokens.shape == (1, 5 + 16, 32)
    features = backbone.features(images)
    assert torch.equal(features[0, :, 0, 0], tokens[0, 5])
    assert torch.equal(features[0, :, 0, 1], tokens[0, 6])
    assert torch.equal(features[0, :, 1, 0], tokens[0, 9])


def test_convnext_ends_before_the_norm_of_its_head():
    backbone, images = zoo.make("convnext"), zoo.make_images()
    head: Any = backbone.model.head
    pooled = backbone.features(images).mean(dim=(2, 3))
    normed = nn.functional.layer_norm(
        pooled, pooled.shape[1:], head.norm.weight, head.norm.bias, head.norm.eps
    )
    assert torch.allclose(head.fc(normed), backbone.classify(images), atol=1e-5)


def test_swin_is_turned_from_channels_last():
    backbone, images = zoo.make("swin"), zoo.make_images()
    native = backbone.model.forward_features(backbone.preprocess(images))  # pyright: ignore
    assert native.shape == (2, 8, 8, 32)
    assert torch.equal(backbone.features(images)[:, :, 3, 5], native[:, 3, 5])


def hooked(model: nn.Module, layer: str, pixels: Tensor) -> Tensor:
    outputs: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda _m, _i, output: outputs.append(output.clone())
    )
    model(pixels)
    handle.remove()
    return outputs[0]


@pytest.mark.parametrize(
    ("name", "layer", "order"),
    [
        ("resnet", "layer3", (0, 1, 2, 3)),
        ("resnet", "layer3.0.bn2", (0, 1, 2, 3)),  # the activation after it works in place
        ("convnext", "stages.1.blocks.0", (0, 1, 2, 3)),
        ("convnext", "stages.2.blocks.1.norm", (0, 3, 1, 2)),
        ("convnext", "stages.2.blocks.1.mlp.act", (0, 3, 1, 2)),
        ("swin", "layers.0", (0, 3, 1, 2)),
        ("swin", "patch_embed.proj", (0, 1, 2, 3)),
        ("swin", "layers.1.blocks.0.norm1", (0, 3, 1, 2)),
    ],
)
def test_layers_by_name(name, layer, order):
    backbone, images = zoo.make(name), zoo.make_images()
    inner = zoo.at(backbone, layer)
    expected = hooked(backbone.model, layer, backbone.preprocess(images)).permute(*order)
    assert torch.equal(inner.features(images), expected)
    assert torch.equal(inner.features_and_logits(images)[0], expected)


def test_layers_of_tokens_by_name():
    backbone, images = zoo.make("vit"), zoo.make_images()
    tokens = hooked(backbone.model, "blocks.0.attn", backbone.preprocess(images))
    features = zoo.at(backbone, "blocks.0.attn").features(images)
    assert torch.equal(features.flatten(2).transpose(1, 2), tokens[:, 1:])


def test_the_listing_names_stages_and_leaves_out_what_is_no_map():
    paths = {spec.layer for spec in zoo.make("resnet").layers()}
    assert {"last", "conv1", "maxpool", "layer1", "layer4.0", "layer4.0.act2"} <= paths
    assert not {"fc", "global_pool", "global_pool.pool", "layer1.0.drop_path"} & paths
    paths = {spec.layer for spec in zoo.make("vit").layers()}
    assert {"blocks.0", "blocks.1.mlp.fc1", "norm", "patch_embed.proj"} <= paths
    assert not {"head", "fc_norm", "blocks.0.attn.q_norm", "patch_embed"} & paths


@pytest.mark.parametrize(
    ("overrides", "reads"),
    [
        ({"global_pool": "token"}, False),
        ({"global_pool": "avg"}, True),
        ({"global_pool": "avg", "fc_norm": False}, True),
        ({"global_pool": "max"}, True),
        ({"global_pool": "avgmax", "reg_tokens": 2}, True),
        ({"global_pool": "avg", "pool_include_prefix": True}, False),
        ({"global_pool": "avg", "class_token": False, "pool_include_prefix": True}, True),
        ({"global_pool": "map"}, False),
        ({"global_pool": "map", "class_token": False}, False),
    ],
)
def test_the_head_of_a_vit_reads_the_map_where_it_pools_patches_only(overrides, reads):
    model = zoo.make_timm("vit_tiny_patch16_224", **zoo.VIT, **overrides)
    backbone, images = wrap_model(model, name="vit"), zoo.make_images()
    assert backbone.has_head
    assert backbone.head_reads_map is reads
    if reads:
        scores = backbone.logits(backbone.features(images))
        assert torch.allclose(scores, backbone.classify(images), atol=1e-5)


def test_a_convolutional_model_with_an_attention_pool_classifies_only():
    with torch.device("meta"):
        attention, average = (
            load_backbone(name, pretrained=False, num_classes=5)
            for name in ("resnet50_clip", "resnet50_clip_gap")
        )
    assert attention.has_head
    assert not attention.head_reads_map
    assert average.head_reads_map


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("test_resnet", {"global_pool": "", "num_classes": 0}),
        ("test_resnet", {"num_classes": 0}),
        ("test_vit", {"global_pool": "", "num_classes": 5}),  # scores for each token
    ],
)
def test_what_gives_no_scores_for_the_image_has_no_head(name, overrides):
    backbone = wrap_model(zoo.make_timm(name, **overrides), name=name)
    assert not backbone.has_head
    assert not backbone.head_reads_map
    assert backbone.labels is None


def test_input_size_resamples_the_positions():
    backbone = load_backbone(PUBLISHED["vit"], pretrained=False, input_size=(32, 96), **zoo.VIT)
    assert backbone.input_size == (32, 96)
    assert backbone.spec.grid == (2, 6)
    images = zoo.make_images(1, (40, 40))
    assert backbone.features(images).shape == (1, 32, 2, 6)


def test_a_model_of_one_size_says_its_size_whatever_its_configuration_says():
    model = zoo.make_timm("vit_tiny_patch16_224", **zoo.VIT)
    assert model.pretrained_cfg["input_size"] == (3, 224, 224)
    assert wrap_model(model, name="vit").input_size == (64, 64)


def test_a_size_that_the_model_refuses_is_an_input_error():
    model = zoo.make_timm("vit_tiny_patch16_224", **zoo.VIT)
    with pytest.raises(InputError, match="must accept images of 96×96 pixels"):
        wrap_model(model, name="vit", input_size=96)


def test_wrapper_of_transformers(timm_wrapper):
    backbone = wrap_model(timm_wrapper, name="convnext", layer="stages.1")
    images = tiny.make_images()
    assert backbone.spec.layer == "stages.1"  # a path inside the timm model
    assert backbone.labels == tuple(f"class {i}" for i in range(tiny.CLASSES))
    assert backbone.input_size == (tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
    pixels = backbone.preprocess(images)
    assert torch.equal(backbone.classify(images), timm_wrapper(pixels).logits)
    last = wrap_model(timm_wrapper, name="convnext")
    assert torch.equal(last.features(images), timm_wrapper.timm_model.forward_features(pixels))


def test_wrapper_without_a_head(timm_wrapper):
    wrapper = TimmWrapperModel(timm_wrapper.config)
    backbone = wrap_model(wrapper, name="convnext")
    assert not backbone.has_head
    assert backbone.labels is None


def test_labels_are_imagenets_by_their_number_and_unknown_otherwise():
    model = zoo.make_timm("test_resnet", num_classes=7)
    assert wrap_model(model, name="r", input_size=64).labels is None
    labels = wrap_model(zoo.make_timm("test_resnet"), name="r", input_size=64).labels
    assert labels == tuple(ImageNetInfo("imagenet-1k").label_descriptions())


def test_models_that_hold_no_map_in_their_last_layer_extract_it():
    """CoaT puts class tokens in each scale without saying how many; it extracts the map itself."""
    backbone, images = zoo.make("coat_lite_tiny"), zoo.make_images()
    tokens = backbone.model.forward_features(backbone.preprocess(images))  # pyright: ignore
    grid = backbone.spec.grid
    expected = tokens[:, 1:].transpose(1, 2).unflatten(2, grid)
    assert backbone.features(images).shape == expected.shape
    assert not backbone.head_reads_map


def test_a_list_of_maps_is_refused():
    model = zoo.make_timm("test_resnet", features_only=True)
    with pytest.raises(InputError, match="vision tower"):
        wrap_model(model, name="r")


def test_half_of_a_timm_model_is_refused():
    class Half(nn.Module):
        def forward_features(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(InputError, match="forward_features and forward_head"):
        wrap_model(Half(), name="half")


@pytest.mark.parametrize("name", ["cait_xxs24_224", "convit_tiny"])
def test_layers_hold_no_matrices_of_tokens(name):
    with torch.device("meta"):
        backbone = load_backbone(name, pretrained=False)
    assert {spec.grid for spec in backbone.layers()} == {(14, 14)}


def test_a_model_of_one_channel_is_refused():
    with pytest.raises(InputError, match="3 channels, but its first layer reads 1"):
        load_backbone("resnet18", pretrained=False, in_chans=1)
