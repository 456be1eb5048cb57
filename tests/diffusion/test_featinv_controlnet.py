"""FeatureControlNet is a diffusers ControlNet in every respect; its condition is a feature map."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import ControlNetModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from torch.nn import functional as F

from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from tests import tiny


def make_inputs(n: int = 2) -> dict:
    generator = torch.Generator().manual_seed(7)
    return {
        "sample": torch.randn(n, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([11, 800][:n]),
        "encoder_hidden_states": torch.randn(n, 77, 32, generator=generator),
        "controlnet_cond": tiny.make_features(n),
    }


def residuals(controlnet: FeatureControlNet, **inputs) -> list[torch.Tensor]:
    down, mid = controlnet(**inputs, return_dict=False)
    return [*down, mid]


def assert_equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_from_unet_copies_the_encoder_half(unet):
    controlnet = FeatureControlNet.from_unet(unet, feature_channels=tiny.CHANNELS)
    copied = {k: v for k, v in controlnet.state_dict().items() if k in unet.state_dict()}
    assert any(k.startswith("mid_block.") for k in copied)
    assert all(torch.equal(v, unet.state_dict()[k]) for k, v in copied.items())
    own = {k.split(".")[0] for k in controlnet.state_dict().keys() - copied.keys()}
    assert own == {"controlnet_down_blocks", "controlnet_mid_block", "feature_encoder"}


def test_output_is_zero_at_initialisation(unet):
    controlnet = tiny.make_controlnet(unet, zero=True)
    assert all(not r.any() for r in residuals(controlnet, **make_inputs()))


def test_encoder_follows_the_equation(controlnet):
    features, encoder = tiny.make_features(), controlnet.feature_encoder
    mean, std = encoder.feature_mean.view(1, -1, 1, 1), encoder.feature_std.view(1, -1, 1, 1)
    hidden = F.interpolate((features - mean) / std, scale_factor=2, mode="bilinear")
    for conv in (encoder.conv1, encoder.conv2):
        hidden = F.silu(F.conv2d(hidden, conv.weight, conv.bias, padding=1))
    expected = F.conv2d(hidden, encoder.conv3.weight, encoder.conv3.bias, padding=1)
    torch.testing.assert_close(controlnet.encode_condition(features, (16, 16)), expected)


def test_a_projection_is_one_larger_convolution(unet, tmp_path):
    """A 1×1 convolution, bilinear upsampling and a 3×3 one are linear: one 3×3 kernel has both."""
    controlnet = tiny.make_controlnet(unet, feature_projection_channels=5)
    projected, features = controlnet.feature_encoder, tiny.make_features()
    assert projected.conv1.weight.shape == (16, 5, 3, 3)
    whole = tiny.make_controlnet(unet).feature_encoder
    kernel = torch.einsum(
        "opij,pc->ocij", projected.conv1.weight, projected.project.weight[..., 0, 0]
    )
    weights = {k: v for k, v in projected.state_dict().items() if k != "project.weight"}
    whole.load_state_dict(weights | {"conv1.weight": kernel})
    expected = whole(features, (16, 16))
    torch.testing.assert_close(controlnet.encode_condition(features, (16, 16)), expected)
    hidden = torch.tensor([True, False])
    torch.testing.assert_close(
        projected(features, (16, 16), hidden), whole(features, (16, 16), hidden)
    )
    controlnet.save_pretrained(tmp_path)
    loaded = FeatureControlNet.from_pretrained(tmp_path)
    assert torch.equal(
        loaded.encode_condition(features, (16, 16)), controlnet.encode_condition(features, (16, 16))
    )


def test_encoded_once_is_encoded_each_time(controlnet):
    inputs = make_inputs()
    expected = residuals(controlnet, **inputs)
    features = inputs.pop("controlnet_cond")
    encoded = controlnet.encode_condition(features, (8, 8))
    assert_equal(residuals(controlnet, **inputs, encoded_cond=encoded), expected)


def test_a_condition_is_required(controlnet):
    inputs = make_inputs()
    del inputs["controlnet_cond"]
    with pytest.raises(ValueError, match="controlnet_cond"):
        controlnet(**inputs)


def test_keep_mask_drops_one_map_and_leaves_the_other(controlnet):
    features = tiny.make_features(2)
    keep = torch.tensor([True, False])
    masked = controlnet.encode_condition(features, (8, 8), keep)
    kept = controlnet.encode_condition(features, (8, 8))
    assert torch.equal(masked[0], kept[0])
    # Dropped is the mean map: it standardises to zero.
    mean_map = controlnet.feature_encoder.feature_mean.view(1, -1, 1, 1).expand(2, -1, 8, 8)
    torch.testing.assert_close(masked[1:], controlnet.encode_condition(mean_map, (8, 8))[1:])
    assert not torch.allclose(masked[1], kept[1])


def test_pooled_sees_only_the_mean_of_the_map():
    pooled = tiny.make_controlnet(feature_pooled=True)
    features = tiny.make_features(1)
    shuffled = features.flatten(2)[..., torch.randperm(64)].view_as(features)
    a, b = (pooled.encode_condition(f, (8, 8)) for f in (features, shuffled))
    torch.testing.assert_close(a, b)
    spatial = tiny.make_controlnet()
    a, b = (spatial.encode_condition(f, (8, 8)) for f in (features, shuffled))
    assert not torch.allclose(a, b, atol=1e-2)


@pytest.mark.parametrize("pooled", [False, True])
def test_round_trip_loses_nothing(tmp_path, pooled):
    controlnet = tiny.make_controlnet(feature_pooled=pooled)
    controlnet.save_pretrained(tmp_path)
    loaded, info = FeatureControlNet.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    state = loaded.state_dict()
    assert state.keys() == controlnet.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in controlnet.state_dict().items())
    assert not (loaded.feature_encoder.feature_mean == 0).any()
    assert not (loaded.feature_encoder.feature_std == 1).any()
    saved = {k: v for k, v in controlnet.config.items() if not k.startswith("_")}
    read = {k: v for k, v in loaded.config.items() if not k.startswith("_")}
    assert json.loads(json.dumps(saved)) == json.loads(json.dumps(read))
    assert_equal(residuals(loaded, **make_inputs()), residuals(controlnet, **make_inputs()))


def test_weights_are_safetensors(tmp_path, controlnet):
    controlnet.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    stored = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert torch.equal(
        stored["feature_encoder.feature_std"], controlnet.feature_encoder.feature_std
    )


def test_loads_in_half_precision(tmp_path, controlnet):
    controlnet.save_pretrained(tmp_path)
    half = FeatureControlNet.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    inputs = make_inputs()
    cast = {k: v if k == "timestep" else v.to(torch.bfloat16) for k, v in inputs.items()}
    for a, b in zip(residuals(half, **cast), residuals(controlnet, **inputs), strict=True):
        assert F.cosine_similarity(a.float().flatten(), b.flatten(), dim=0) > 0.999


def gradients(controlnet: FeatureControlNet) -> dict[str, torch.Tensor]:
    controlnet.zero_grad()
    sum(r.square().mean() for r in residuals(controlnet, **make_inputs())).backward()
    return {name: p.grad.clone() for name, p in controlnet.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients(controlnet):
    controlnet.train()
    plain = gradients(controlnet)
    controlnet.enable_gradient_checkpointing()
    assert controlnet.is_gradient_checkpointing
    checkpointed = gradients(controlnet)
    assert plain.keys() == checkpointed.keys() == dict(controlnet.named_parameters()).keys()
    assert all(torch.equal(plain[k], checkpointed[k]) for k in plain)
    assert all(g.any() for g in plain.values())


def test_attention_processors(controlnet):
    expected = residuals(controlnet, **make_inputs())
    assert len(controlnet.attn_processors) > 0
    controlnet.set_attn_processor(AttnProcessor())
    assert {type(p) for p in controlnet.attn_processors.values()} == {AttnProcessor}
    for a, b in zip(residuals(controlnet, **make_inputs()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    controlnet.set_default_attn_processor()
    controlnet.set_attention_backend("native")
    for a, b in zip(residuals(controlnet, **make_inputs()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiles_without_a_graph_break(controlnet):
    expected = residuals(controlnet, **make_inputs())
    compiled = torch.compile(controlnet, backend="eager", fullgraph=True)
    with torch.no_grad():
        actual = residuals(compiled, **make_inputs())
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_is_a_diffusers_controlnet(controlnet):
    assert isinstance(controlnet, ControlNetModel)
    assert controlnet._repeated_blocks == ["BasicTransformerBlock"]
    controlnet.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert len(residuals(controlnet, **make_inputs())) == len(controlnet.controlnet_down_blocks) + 1
