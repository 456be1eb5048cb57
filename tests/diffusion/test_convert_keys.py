"""Our map of names against diffusers' converters, and against names of published checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_controlnet_checkpoint,
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from torch import Tensor

from featinv_diffusion.diffusion.convert.config import sd15_config
from featinv_diffusion.diffusion.convert.weights import original_names, to_original
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.errors import InputError
from tests.diffusion.original import CROSS, PLAIN, make_parts

SHAPES = {
    "as Stable Diffusion 1.x": ((CROSS, CROSS, CROSS, PLAIN), 2),
    "one layer, attention below": ((PLAIN, CROSS, CROSS), 1),
    "three layers, attention above": ((CROSS, PLAIN), 3),
}


def assert_equal(converted: dict[str, Tensor], model: torch.nn.Module) -> None:
    state = model.state_dict()
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], state[key]) for key in state)


@pytest.mark.parametrize(("levels", "n_layers"), SHAPES.values(), ids=SHAPES.keys())
def test_diffusers_reads_back_what_we_name(levels, n_layers):
    parts = make_parts(levels, layers_per_block=n_layers)
    tensors, _ = to_original(parts)
    assert_equal(convert_ldm_unet_checkpoint(dict(tensors), dict(parts.unet.config)), parts.unet)
    assert_equal(convert_ldm_vae_checkpoint(dict(tensors), dict(parts.vae.config)), parts.vae)
    text = {
        key.removeprefix("text_model."): value
        for key, value in convert_ldm_clip_checkpoint(dict(tensors)).items()
    }
    assert_equal(text, parts.text_encoder)
    hint = {key: value for key, value in tensors.items() if ".input_hint_block." in key}
    rest = {key: value for key, value in tensors.items() if key not in hint}
    control = convert_controlnet_checkpoint(rest, dict(parts.controlnet.config))
    own = {k: v for k, v in parts.controlnet.state_dict().items() if "feature_encoder" in k}
    assert_equal(control | own, parts.controlnet)
    for conv, index in ((1, 1), (2, 3), (3, 5)):  # the published hint block
        for kind in ("weight", "bias"):
            stored = hint[f"control_model.input_hint_block.block.{index}.{kind}"]
            assert torch.equal(stored, own[f"feature_encoder.conv{conv}.{kind}"])
    assert len(hint) == 6


def test_names_at_full_size():
    config = sd15_config()
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(config.unet)
        vae: Any = AutoencoderKL.from_config(config.vae)
        controlnet = FeatureControlNet.from_unet(unet, 1024, load_weights_from_unet=False)
    names = {
        name
        for component, model in (("unet", unet), ("vae", vae), ("controlnet", controlnet))
        for name in original_names(component, model).values()
    }
    # As listed in published SD 1.x and ControlNet checkpoints.
    assert names >= {
        "model.diffusion_model.time_embed.2.bias",
        "model.diffusion_model.input_blocks.3.0.op.weight",
        "model.diffusion_model.input_blocks.4.0.skip_connection.weight",
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.input_blocks.11.0.out_layers.3.weight",
        "model.diffusion_model.middle_block.1.proj_out.weight",
        "model.diffusion_model.output_blocks.2.1.conv.weight",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "model.diffusion_model.output_blocks.8.2.conv.bias",
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.ff.net.0.proj.weight",
        "model.diffusion_model.out.2.weight",
        "first_stage_model.encoder.down.2.downsample.conv.weight",
        "first_stage_model.encoder.mid.attn_1.proj_out.weight",
        "first_stage_model.decoder.up.3.upsample.conv.weight",
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight",
        "first_stage_model.post_quant_conv.bias",
        "control_model.zero_convs.0.0.weight",
        "control_model.zero_convs.11.0.bias",
        "control_model.middle_block_out.0.weight",
        "control_model.input_hint_block.block.5.bias",
    }
    absent = {
        "first_stage_model.encoder.down.3.downsample.conv.weight",
        "first_stage_model.decoder.up.0.upsample.conv.weight",
        "model.diffusion_model.output_blocks.11.2.conv.weight",
        "control_model.zero_convs.12.0.weight",
    }
    assert not names & absent
    assert len(names) == 686 + 248 + 330  # no two parameters share a name


def test_a_parameter_without_a_place_is_refused():
    unet = UNet2DConditionModel(
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=32,
        class_embed_type="timestep",
    )
    with pytest.raises(
        InputError, match=r"'class_embedding\.linear_1\.weight' of the unet has none"
    ):
        original_names("unet", unet)
