"""Feature extractors: the conventions, each against what defines it."""

from __future__ import annotations

import pytest
import timm
import torch
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ViTConfig,
    ViTModel,
)

import featinv_diffusion.metrics.extractors as dinov2
from featinv_diffusion.backbones import wrap_model
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import to_pil
from featinv_diffusion.metrics import ClassifierFeatures
from featinv_diffusion.metrics.extractors import Dinov2Features, load_dinov2
from tests import tiny


def make_images(n: int = 2, size: tuple[int, int] = (64, 64), seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def make_dinov2() -> Dinov2Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=70, patch_size=14
        )
        return Dinov2Model(config).eval()


@pytest.fixture
def backbone():
    return wrap_model(tiny.make_backbone(), name="tiny/convnext")


def test_classifier_features_are_the_mean_over_cells(backbone):
    images = (make_images() * 255).round() / 255
    extractor = ClassifierFeatures(backbone)
    torch.testing.assert_close(extractor(images), backbone.features(images).mean(dim=(2, 3)))
    assert extractor.dim == tiny.CHANNELS
    assert extractor.distance_name == "frechet_distance_tiny/convnext"
    assert "64×64" in extractor.conventions["resize"]


def test_images_are_rounded_to_8_bits_first(backbone):
    extractor = ClassifierFeatures(backbone)
    images = make_images()
    eight_bits = (images * 255).round() / 255
    assert torch.equal(extractor(images), extractor(eight_bits))
    assert torch.equal(extractor(images * 2), extractor((images * 2).clamp(0, 1)))


def test_an_extractor_is_frozen_and_keeps_no_graph(backbone):
    extractor = ClassifierFeatures(backbone).train()
    assert not extractor.training
    assert not any(p.requires_grad for p in extractor.parameters())
    assert not extractor(make_images().requires_grad_()).requires_grad


def test_dinov2_is_the_normed_class_token_of_pillow_s_resize():
    model = make_dinov2()
    extractor = Dinov2Features(model, "random")
    images = make_images(2, (96, 80))
    resized = [image.resize((224, 224), 3) for image in to_pil(images)]  # 3 is bicubic
    pixels = torch.stack(
        [torch.tensor(list(image.tobytes())).reshape(224, 224, 3) for image in resized]
    )
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs = ((pixels / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model(pixel_values=inputs).pooler_output  # the class token after the norm
    torch.testing.assert_close(extractor(images), expected, atol=1e-4, rtol=0)
    assert (extractor.dim, extractor.distance_name) == (32, "fd_dinov2")


def test_dinov2_from_a_folder_of_transformers(tmp_path):
    make_dinov2().save_pretrained(tmp_path / "bare")
    classifier = Dinov2ForImageClassification(make_dinov2().config)
    classifier.dinov2.load_state_dict(make_dinov2().state_dict())
    classifier.save_pretrained(tmp_path / "classifier")
    expected = Dinov2Features(make_dinov2(), "random")(make_images())
    for name in ("bare", "classifier"):
        extractor = load_dinov2(f"hf/{tmp_path / name}")
        torch.testing.assert_close(extractor(make_images()), expected)
        assert extractor.conventions["weights"] == f"hf/{tmp_path / name}"


def test_dinov2_of_timm():
    name = "vit_small_patch14_dinov2"
    extractor = load_dinov2(f"timm/{name}", pretrained=False, depth=1, embed_dim=24, num_heads=2)
    got = extractor(make_images())
    assert got.shape == (2, 24)
    assert extractor.dim == 24
    # After the norm, which has no scale or shift yet.
    torch.testing.assert_close(got.mean(dim=1), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.var(dim=1, correction=0), torch.ones(2), atol=1e-2, rtol=0)


def test_timm_and_transformers_agree_on_one_dinov2():
    """Random weights in both, copied over; at 224 pixels, where no positions are resampled."""
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=224
    )
    config.patch_size = 14
    theirs = Dinov2Model(config).eval()
    ours = timm.create_model(
        "vit_small_patch14_dinov2", depth=1, embed_dim=24, num_heads=2, img_size=224
    ).eval()
    ours.load_state_dict(_to_timm(theirs.state_dict()), strict=True)
    images = make_images()
    torch.testing.assert_close(
        Dinov2Features(ours, "timm")(images),
        Dinov2Features(theirs, "transformers")(images),
        atol=1e-4,
        rtol=0,
    )


def _to_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    layer = "encoder.layer.0."
    qkv = f"{layer}attention."
    renamed = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "blocks.0.ls1.gamma": state[f"{layer}layer_scale1.lambda1"],
        "blocks.0.ls2.gamma": state[f"{layer}layer_scale2.lambda1"],
    }
    for kind in ("weight", "bias"):
        parts = [state[f"{qkv}{name}_proj.{kind}"] for name in "qkv"]
        renamed[f"blocks.0.attn.qkv.{kind}"] = torch.cat(parts)
        for mine, other in {
            "patch_embed.proj": "embeddings.patch_embeddings.projection",
            "blocks.0.norm1": f"{layer}norm1",
            "blocks.0.attn.proj": f"{layer}attention.o_proj",
            "blocks.0.norm2": f"{layer}norm2",
            "blocks.0.mlp.fc1": f"{layer}mlp.fc1",
            "blocks.0.mlp.fc2": f"{layer}mlp.fc2",
            "norm": "layernorm",
        }.items():
            renamed[f"{mine}.{kind}"] = state[f"{other}.{kind}"]
    return renamed


def test_what_is_no_dinov2(tmp_path, monkeypatch):
    monkeypatch.setattr(dinov2, "Dinov2Features", None)  # nothing is to be built
    with pytest.raises(InputError, match="'resnet18' is none"):
        load_dinov2("resnet18")
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    with pytest.raises(InputError, match="is none"):
        load_dinov2(f"hf/{tmp_path / 'vit'}")
    with pytest.raises(InputError, match="loading it failed"):
        load_dinov2(f"hf/{tmp_path / 'nowhere'}")
    with pytest.raises(InputError, match="vit_small_patch14_dinov2"):
        load_dinov2("vit_smal_patch14_dinov2")
