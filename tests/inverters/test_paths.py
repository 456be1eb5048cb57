"""The stages of DETR, ViT, DeiT and Swin compose to the model's own forward pass."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import DetrConfig, DetrForObjectDetection

from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.detr import DetrPath, load_detr, make_detr
from featinv_diffusion.inverters.swin import SwinPath
from featinv_diffusion.inverters.vit import VitPath
from tests.inverters import small
from tests.tiny import make_backbone, make_images


@pytest.fixture(scope="module")
def detr() -> DetrPath:
    return small.make_detr_path()


@pytest.fixture(scope="module")
def vit() -> VitPath:
    return small.make_vit_path()


@torch.no_grad()
def test_stages_of_detr_equal_its_own_forward(detr: DetrPath) -> None:
    images = make_images(3)
    found = detr.embeddings(images, detr.specs)
    own = detr.model(detr.preprocess(images), output_hidden_states=True)
    scores, boxes = detr.split(found["prediction"])
    tokens = {k: found[k].flatten(2).transpose(1, 2) for k in ("encoder.0", "encoder.1", "encoder")}
    assert torch.allclose(scores, own.logits, atol=1e-6)
    assert torch.allclose(boxes, own.pred_boxes, atol=1e-6)
    assert torch.allclose(tokens["encoder"], own.encoder_last_hidden_state, atol=1e-6)
    assert torch.allclose(tokens["encoder.1"], own.encoder_hidden_states[1], atol=1e-6)
    assert torch.allclose(tokens["encoder.0"], own.encoder_hidden_states[0], atol=1e-6)
    assert torch.allclose(found["decoder"], own.last_hidden_state, atol=1e-6)
    norm = detr.model.model.decoder.layernorm
    for i in (1, 2):
        assert torch.allclose(found[f"decoder.{i}"], norm(own.decoder_hidden_states[i]), atol=1e-6)
    assert found["decoder.0"].eq(0).all()
    assert scores.std() > 0.05, "weights so small that all layers look alike prove nothing"


@torch.no_grad()
def test_stages_compose_from_any_main_stage_on(detr: DetrPath) -> None:
    found = detr.embeddings(make_images(2))
    for before, stage in zip(detr.main_stages, detr.main_stages[1:], strict=False):
        assert torch.equal(detr.advance(stage, found[before])[stage], found[stage])


@torch.no_grad()
def test_models_with_auxiliary_loss_are_followed_too() -> None:
    path = small.make_detr_path(auxiliary_loss=True)
    images = make_images(2)
    own = path.model(path.preprocess(images))
    scores, _ = path.split(path.embeddings(images)["prediction"])
    assert torch.allclose(scores, own.logits, atol=1e-6)


@torch.no_grad()
def test_detection_is_the_one_hot_code_of_the_highest_score(detr: DetrPath) -> None:
    found = detr.embeddings(make_images(2), ["prediction", "detection"])
    scores, boxes = detr.split(found["prediction"])
    one_hot, same_boxes = detr.split(found["detection"])
    assert one_hot.shape[-1] == small.CLASSES + 1
    assert torch.equal(one_hot.argmax(-1), scores.argmax(-1))
    assert torch.equal(one_hot.sum(-1), torch.ones(2, 5))
    assert torch.equal(boxes, same_boxes)


@torch.no_grad()
def test_detr_stands_on_the_stages_of_the_classifier(detr: DetrPath) -> None:
    wrapper = small.make_resnet()
    pixels = detr.preprocess(make_images(2))
    mine = detr.model.model.backbone.model(pixels)[-1]
    assert torch.allclose(mine, wrapper.timm_model.forward_features(pixels), atol=1e-5)


def test_a_classifier_whose_stages_are_renamed_is_refused() -> None:
    with pytest.raises(InputError, match="keep their names"):
        make_detr(make_backbone(), ["a"], d_model=16)


def test_detr_comes_back_from_a_folder_with_its_backbone(detr: DetrPath, tmp_path) -> None:
    detr.model.save_pretrained(tmp_path)
    again = load_detr(str(tmp_path))
    assert small.state_of(detr.model).keys() == again.state_dict().keys()
    for key, value in again.state_dict().items():
        assert torch.equal(value, detr.model.state_dict()[key]), key


def test_a_folder_without_detr_is_an_input_error(tmp_path) -> None:
    with pytest.raises(InputError, match="could not be loaded"):
        load_detr(str(tmp_path))


def test_the_published_detr_has_the_papers_shapes() -> None:
    with torch.device("meta"):
        model = DetrForObjectDetection(DetrConfig(num_labels=91))
    specs = DetrPath(model, name="facebook/detr-resnet-50").specs
    assert (specs["encoder"].channels, specs["encoder"].grid) == (256, (15, 20))
    assert (specs["decoder"].channels, specs["decoder"].grid) == (256, (100, 1))
    assert specs["detection"].channels == 91 + 1 + 4
    assert "encoder.6" in specs
    assert "decoder.6" in specs


@torch.no_grad()
def test_stages_of_vit_equal_its_own_forward(vit: VitPath) -> None:
    images = make_images(3)
    found = vit.embeddings(images, vit.specs)
    pixels = vit.preprocess(images)
    features = vit.model.forward_features(pixels)
    assert torch.equal(vit.logits(found["encoder"]), vit.model(pixels))
    assert torch.equal(found["last"].flatten(2).transpose(1, 2), features[:, 1:])
    assert torch.equal(found["blocks.2"], found["encoder"])
    seen: list[torch.Tensor] = []
    handle = vit.model.blocks[1].norm2.register_forward_pre_hook(lambda _m, x: seen.append(x[0]))
    vit.model(pixels)
    handle.remove()
    assert torch.equal(found["blocks.1.attention"], seen[0])


@torch.no_grad()
def test_vit_logits_skip_no_final_norm(vit: VitPath) -> None:
    tokens = vit.embeddings(make_images(2), ["encoder"])["encoder"]
    head, norm = vit.model.head, vit.model.norm
    by_hand = F.linear(F.layer_norm(tokens[:, 0], (192,), norm.weight, norm.bias, norm.eps),
                       head.weight, head.bias)  # fmt: skip
    assert torch.allclose(vit.logits(tokens), by_hand, atol=1e-6)


@torch.no_grad()
def test_stages_of_deit_equal_its_own_forward_with_both_of_its_heads() -> None:
    deit, images = small.make_deit_path(), make_images(3)
    found = deit.embeddings(images, deit.specs)
    own = deit.model(deit.preprocess(images))
    tokens = deit.model.norm(found["encoder"])
    by_hand = (deit.model.head(tokens[:, 0]) + deit.model.head_dist(tokens[:, 1])) / 2
    assert torch.equal(deit.logits(found["encoder"]), own)
    assert torch.allclose(by_hand, own, atol=1e-6)
    assert str(deit.spec("patches")) == "tokens of small/deit at layer 'patches', 66×192"
    assert torch.equal(found["last"].flatten(2).transpose(1, 2), tokens[:, 2:])
    assert torch.equal(deit.positions()[2:], deit.model.pos_embed[0, 2:])


@torch.no_grad()
@pytest.mark.parametrize(
    "architecture", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"]
)
def test_stages_of_swin_equal_its_own_forward(architecture: str) -> None:
    swin, images = small.make_swin_path(architecture), make_images(3)
    found = swin.embeddings(images, swin.specs)
    pixels = swin.preprocess(images)
    last, own = swin.model.forward_intermediates(pixels, norm=False)
    assert torch.equal(swin.logits(found["encoder"]), swin.model(pixels))
    assert torch.equal(found["last"], last.permute(0, 3, 1, 2))
    for i, state in enumerate(own):
        assert torch.equal(found[f"layers.{i}"], state)
    assert torch.equal(found["encoder"], found["layers.2"])
    by_hand = swin.model.layers[1].downsample(own[0].permute(0, 2, 3, 1))
    assert torch.equal(found["layers.1.merged"], by_hand.permute(0, 3, 1, 2))
    assert swin.spec("layers.1").grid == (8, 8)
    assert "layers.0.merged" not in swin.specs


def test_other_models_are_refused(vit: VitPath) -> None:
    with pytest.raises(InputError, match="pre-norm blocks"):
        VitPath(small.make_resnet().timm_model, name="x", preprocessing=vit.preprocessing)
    with pytest.raises(InputError, match="must be a timm SwinTransformer"):
        SwinPath(vit.model, name="x", preprocessing=vit.preprocessing)


def test_specs_tell_kind_and_shape(detr: DetrPath, vit: VitPath) -> None:
    assert str(detr.spec("decoder")) == "queries of small/detr at layer 'decoder', 5×16"
    assert detr.spec("encoder").grid == (8, 8)
    assert str(vit.spec("patches")) == "tokens of small/vit at layer 'patches', 65×192"
    with pytest.raises(InputError, match="did you mean 'encoder'"):
        detr.spec("encodr")


def test_a_path_stays_frozen_and_in_evaluation_mode(detr: DetrPath) -> None:
    detr.train()
    assert not any(module.training for module in detr.modules())
    assert not any(parameter.requires_grad for parameter in detr.parameters())
