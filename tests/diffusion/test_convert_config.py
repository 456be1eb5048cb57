"""Sizes of the original YAML: the published one is Stable Diffusion 1.x, and back again."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from featinv_diffusion.diffusion.convert.config import (
    parse_original_config,
    read_original_config,
    sd15_config,
    to_original_config,
)
from featinv_diffusion.diffusion.convert.weights import original_config_of, schedule_buffers
from featinv_diffusion.errors import InputError
from featinv_diffusion.schema import dump_yaml
from tests.diffusion.original import CROSS, PLAIN, make_parts

SIZES = {
    "in_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
    "context_dim": 768,
}
# The facts of the published configuration.
PUBLISHED = {
    "model": {
        "target": "cldm.cldm.ControlLDM",
        "params": {
            "linear_start": 0.00085,
            "linear_end": 0.0120,
            "timesteps": 1000,
            "scale_factor": 0.18215,
            "control_stage_config": {
                "target": "cldm.cldm.ControlNet",
                "params": {"hint_channels": 1024, **SIZES},
            },
            "unet_config": {
                "target": "cldm.cldm.ControlledUnetModel",
                "params": {"out_channels": 4, **SIZES},
            },
            "first_stage_config": {
                "target": "ldm.models.autoencoder.AutoencoderKL",
                "params": {
                    "embed_dim": 4,
                    "ddconfig": {
                        "double_z": True,
                        "z_channels": 4,
                        "resolution": 256,
                        "in_channels": 3,
                        "out_ch": 3,
                        "ch": 128,
                        "ch_mult": [1, 2, 4, 4],
                        "num_res_blocks": 2,
                        "attn_resolutions": [],
                        "dropout": 0.0,
                    },
                },
            },
            "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"},
        },
    }
}


def build(model_class: Any, config: Any) -> Any:
    return model_class.from_config(config)


def changed(path: str, value: object, both: bool = False) -> dict:
    """The published tree with one value replaced; `both` for the sizes of UNet and ControlNet."""
    tree = deepcopy(PUBLISHED)
    paths = [path, path.replace("unet_config", "control_stage_config")] if both else [path]
    for dotted in paths:
        node = tree["model"]["params"]
        *parents, last = dotted.split(".")
        for parent in parents:
            node = node[parent]
        node[last] = value
    return tree


def test_the_published_yaml_is_stable_diffusion_1(tmp_path):
    (tmp_path / "cldm.yaml").write_text(dump_yaml(PUBLISHED))
    config, base = read_original_config(tmp_path / "cldm.yaml"), sd15_config()
    assert config.unet == base.unet
    assert config.vae == base.vae
    assert config.scheduler == base.scheduler
    assert config.hint_channels == 1024


def test_stable_diffusion_1_has_the_published_sizes():
    config = sd15_config()
    with torch.device("meta"):
        unet = build(UNet2DConditionModel, config.unet)
        vae = build(AutoencoderKL, config.vae)
    # Parameter counts of the published models; 32 is 256 pixels at 8 pixels per latent.
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert config.unet["sample_size"] == 32
    scheduler = build(DDIMScheduler, config.scheduler)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(981, 0, -20))
    assert scheduler.final_alpha_cumprod == scheduler.alphas_cumprod[0]


def test_channels_per_head_become_heads_per_level():
    tree = changed("unet_config.params.num_head_channels", 64, both=True)
    for part in ("unet_config", "control_stage_config"):
        del tree["model"]["params"][part]["params"]["num_heads"]
    config = parse_original_config(tree)
    assert config.unet["attention_head_dim"] == [5, 10, 20, 20]
    again = to_original_config(config)["model"]["params"]["unet_config"]["params"]
    assert again["num_head_channels"] == 64
    assert "num_heads" not in again


def test_attention_where_the_yaml_says():
    config = parse_original_config(
        changed("unet_config.params.attention_resolutions", [8, 2], both=True)
    )
    kinds = ["", "CrossAttn", "", "CrossAttn"]
    assert config.unet["down_block_types"] == [f"{kind}DownBlock2D" for kind in kinds]
    assert config.unet["up_block_types"] == [f"{kind}UpBlock2D" for kind in reversed(kinds)]


def test_sizes_survive_the_way_there_and_back():
    for levels in ((CROSS, CROSS, CROSS, PLAIN), (PLAIN, CROSS)):
        parts = make_parts(levels, attention_head_dim=(4, 8, 8, 8)[: len(levels)])
        config = original_config_of(parts)
        back = parse_original_config(to_original_config(config))
        with torch.device("meta"):
            unet = build(UNet2DConditionModel, back.unet)
            vae = build(AutoencoderKL, back.vae)
        for here, there in ((parts.unet, unet), (parts.vae, vae)):
            assert as_lists(here.config) == as_lists(there.config)
        assert back.extras == config.extras


def as_lists(config) -> dict:
    items = {key: value for key, value in config.items() if not key.startswith("_")}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in items.items()}


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        ("unet_config.params.resblock_updown", True, "unet_config.resblock_updown must be False"),
        ("unet_config.params.num_classes", 1000, "num_classes must be None"),
        ("unet_config.params.num_res_blocks", [2, 2, 1, 2], "must be the same for all levels"),
        ("unet_config.params.channel_mult", [1, 2], "channel_mult is"),
        ("unet_config.params.model_channels", "wide", "wrong kind"),
        ("first_stage_config.params.ddconfig.attn_resolutions", [32], "attn_resolutions must be"),
        ("first_stage_config.params.embed_dim", 3, "embed_dim equal to z_channels"),
        ("first_stage_config.params.ddconfig", None, "wrong kind"),
        ("parameterization", "v", "parameterization must be 'eps'"),
        ("only_mid_control", True, "only_mid_control must be False"),
        (
            "cond_stage_config.target",
            "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
            "must be FrozenCLIPEmbedder",
        ),
        ("cond_stage_config.params", {"layer": "hidden"}, "with layer 'hidden'"),
    ],
)
def test_what_diffusers_cannot_hold_is_refused(tmp_path, path, value, sentence):
    both = not sentence.startswith("channel_mult")  # there the two parts contradict each other
    (tmp_path / "cldm.yaml").write_text(dump_yaml(changed(path, value, both)))
    with pytest.raises(InputError, match=sentence):
        read_original_config(tmp_path / "cldm.yaml")


def test_unreadable_yaml(tmp_path):
    path = tmp_path / "cldm.yaml"
    with pytest.raises(InputError, match="must be a file"):
        read_original_config(path)
    for text, sentence in (
        ("a: [1", "must hold YAML"),
        ("- 1\n- 2\n", "at its top level"),
        ("model: {params: {}}\n", "'unet_config' is missing in it"),
        ("other: 1\n", "'model' is missing in it"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=sentence):
            read_original_config(path)


def test_schedule_buffers_follow_their_definitions():
    scheduler = {"num_train_timesteps": 3, "beta_start": 0.01, "beta_end": 0.09}
    buffers = schedule_buffers(scheduler)
    # √β = 0.1, 0.2, 0.3; ᾱ = 0.99, 0.99·0.96, 0.99·0.96·0.91
    bar = [0.99, 0.9504, 0.864864]
    expected = {
        "betas": [0.01, 0.04, 0.09],
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": [1.0, 0.99, 0.9504],
        "sqrt_alphas_cumprod": [a**0.5 for a in bar],
        "sqrt_one_minus_alphas_cumprod": [(1 - a) ** 0.5 for a in bar],
        "sqrt_recip_alphas_cumprod": [a**-0.5 for a in bar],
        "sqrt_recipm1_alphas_cumprod": [(1 / a - 1) ** 0.5 for a in bar],
        "posterior_variance": [0.0, 0.04 * 0.01 / 0.0496, 0.09 * 0.0496 / 0.135136],
        "posterior_mean_coef1": [1.0, 0.04 * 0.99**0.5 / 0.0496, 0.09 * 0.9504**0.5 / 0.135136],
        "posterior_mean_coef2": [0.0, 0.01 * 0.96**0.5 / 0.0496, 0.0496 * 0.91**0.5 / 0.135136],
        "logvar": [0.0, 0.0, 0.0],
    }
    for name, values in expected.items():
        torch.testing.assert_close(buffers[name], torch.tensor(values))
    others = {"log_one_minus_alphas_cumprod", "posterior_log_variance_clipped"}
    assert buffers.keys() == expected.keys() | others
    logs = torch.tensor([1 - a for a in bar]).log()
    torch.testing.assert_close(buffers["log_one_minus_alphas_cumprod"], logs)
    floor = buffers["posterior_log_variance_clipped"][0].exp().item()
    assert floor == pytest.approx(1e-20, rel=1e-4)


def test_schedule_buffers_are_the_schedule_of_sampling():
    scheduler = build(DDIMScheduler, sd15_config().scheduler)
    buffers = schedule_buffers(scheduler.config)
    torch.testing.assert_close(buffers["betas"], scheduler.betas)
    torch.testing.assert_close(buffers["alphas_cumprod"], scheduler.alphas_cumprod)
