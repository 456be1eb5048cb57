"""Original checkpoints to pipelines and back: bit for bit, and bad ones refused in a sentence."""

from __future__ import annotations

import json
import logging
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

from featinv_diffusion.diffusion.convert.config import (
    OriginalConfig,
    parse_original_config,
    to_original_config,
)
from featinv_diffusion.diffusion.convert.folder import load_tokenizer, read_original, write_original
from featinv_diffusion.diffusion.convert.weights import Parts, from_original, to_original
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.hub import load_pipeline
from featinv_diffusion.errors import InputError
from featinv_diffusion.types import FeatureSpec
from tests import tiny
from tests.diffusion.original import SPEC, assert_same_weights, make_parts


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts()


@pytest.fixture(scope="module")
def original(parts) -> tuple[dict[str, Tensor], OriginalConfig]:
    """The original checkpoint of `parts`, and its sizes, through the original YAML."""
    tensors, config = to_original(parts)
    return tensors, parse_original_config(to_original_config(config))


@pytest.fixture
def tensors(original) -> dict[str, Tensor]:
    """The tensors of `original`, in a dict of the test's own."""
    return dict(original[0])


@pytest.fixture
def config(original) -> OriginalConfig:
    """The sizes of `original`, of the test's own."""
    return deepcopy(original[1])


@pytest.fixture
def tokenizer_folder(tmp_path) -> Path:
    tiny.make_tokenizer().save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def make_pipeline(parts: Parts, **settings) -> FeatInvPipeline:
    pipeline = FeatInvPipeline(**vars(parts), tokenizer=tiny.make_tokenizer(), **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: FeatInvPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    features = torch.randn(1, 64, 10, 10, generator=torch.Generator().manual_seed(3))
    output: Any = pipeline(
        features=features,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    return output.images


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_round_trip_is_bit_exact(parts, tmp_path, tokenizer_folder, suffix):
    before = make_pipeline(parts, default_guidance_scale=3.5, default_num_inference_steps=7)
    config_path = write_original(before, tmp_path / f"control{suffix}")
    assert config_path == tmp_path / "control.yaml"
    after = read_original(
        tmp_path / f"control{suffix}",
        config_path,
        tokenizer=str(tokenizer_folder),
        with_backbone=False,
    )
    after.save_pretrained(tmp_path / "pipeline")
    loaded = load_pipeline(tmp_path / "pipeline")
    assert_same_weights(before, loaded)
    for name in ("default_guidance_scale", "default_num_inference_steps", "feature_layer"):
        assert loaded.config[name] == before.config[name]
    declared = loaded.controlnet.config["feature_spec"]
    assert {**declared, "grid": list(declared["grid"])} == SPEC
    assert torch.equal(sample(before), sample(loaded))
    write_original(loaded, tmp_path / "again.safetensors")
    first, second = (to_original(pipeline)[0] for pipeline in (before, loaded))
    assert first.keys() == second.keys() == load_file(tmp_path / "again.safetensors").keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_read_off_the_tensors(tensors, config):
    # As where the YAML is not one of ours, which names the heads.
    config.text_encoder.update({"hidden_size": 768, "num_attention_heads": 12})
    read = from_original(tensors, config)
    assert read.controlnet.config["feature_channels"] == 64
    assert read.controlnet.config["feature_hidden_channels"] == 24
    text = read.text_encoder.config
    assert (text.vocab_size, text.hidden_size, text.intermediate_size) == (514, 128, 160)
    assert (text.num_hidden_layers, text.num_attention_heads) == (2, 2)


def test_the_converted_text_encoder_computes_the_same(parts, tensors, config):
    ids = torch.randint(0, 514, (2, 77), generator=torch.Generator().manual_seed(0))
    read = from_original(tensors, config).text_encoder
    assert torch.equal(read(ids).last_hidden_state, parts.text_encoder(ids).last_hidden_state)


def test_names_of_any_transformers_version_are_read(parts, tensors, config):
    outer = "cond_stage_model.transformer."
    flat = {name.replace(f"{outer}text_model.", outer): t for name, t in tensors.items()}
    assert flat.keys() != tensors.keys()
    flat[f"{outer}embeddings.position_ids"] = torch.arange(77)[None]
    assert_same_weights(from_original(flat, config), parts)


def test_what_belongs_to_training_is_passed_over(parts, tensors, config):
    extra = {
        "model_ema.decay": torch.tensor(0.9999),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    assert_same_weights(from_original(tensors | extra, config), parts)


def test_types_are_kept_and_mixed_ones_become_float32(parts, tensors, config):
    unet = "model.diffusion_model."
    halved = (unet, "control_model.")
    half = {name: t.half() if name.startswith(halved) else t for name, t in tensors.items()}
    read = from_original(half, config)
    assert {t.dtype for t in read.unet.state_dict().values()} == {torch.float16}
    assert {t.dtype for t in read.controlnet.state_dict().values()} == {torch.float16}
    assert {t.dtype for t in read.vae.state_dict().values()} == {torch.float32}
    name = f"{unet}input_blocks.0.0.weight"
    read = from_original(tensors | {name: tensors[name].half()}, config)
    assert {p.dtype for p in read.unet.parameters()} == {torch.float32}
    assert torch.equal(read.unet.conv_in.weight, tensors[name].half().float())


def test_the_condition_is_that_of_the_original_hint_block(tensors, config):
    """Bilinear upsampling, three convolutions with SiLU between: the published hint block."""
    block = "control_model.input_hint_block.block"
    features = torch.randn(2, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    hidden = nn.Upsample(size=(8, 8), mode="bilinear")(features)
    for index in (1, 3, 5):
        weight, bias = tensors[f"{block}.{index}.weight"], tensors[f"{block}.{index}.bias"]
        hidden = nn.functional.conv2d(hidden, weight, bias, padding=1)
        hidden = nn.functional.silu(hidden) if index < 5 else hidden
    encoded = from_original(tensors, config).controlnet.encode_condition(features, (8, 8))
    torch.testing.assert_close(encoded, hidden)


def without(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


@pytest.mark.parametrize(
    ("prefix", "sentence"),
    [
        ("control_model.", r"the ControlNet \(control_model\.\*\) is missing.* train a ControlNet"),
        ("model.diffusion_model.", r"the UNet \(model\.diffusion_model\.\*\) is missing"),
        ("first_stage_model.", r"the autoencoder \(first_stage_model\.\*\) is missing"),
        ("cond_stage_model.", r"the text encoder \(cond_stage_model\.\*\) is missing"),
    ],
)
def test_a_missing_part_is_named(tensors, config, prefix, sentence):
    with pytest.raises(InputError, match=sentence):
        from_original(without(prefix, tensors), config)


def test_files_of_other_kinds_are_refused(tensors, config):
    with pytest.raises(InputError, match=r"first tensor is 'layer1\.0\.weight': .* another kind"):
        from_original({"layer1.0.weight": torch.zeros(1)}, config)
    image_hint = without("control_model.input_hint_block.", tensors)
    image_hint["control_model.input_hint_block.0.weight"] = torch.zeros(16, 3, 3, 3)
    with pytest.raises(InputError, match=r"must hold 'control_model\.input_hint_block\.block\.1"):
        from_original(image_hint, config)


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("model.diffusion_model.output_blocks.7.0.in_layers.2.weight", "unet"),
        ("control_model.zero_convs.3.0.bias", "controlnet"),
        ("first_stage_model.decoder.mid.attn_1.q.weight", "vae"),
        ("cond_stage_model.transformer.text_model.final_layer_norm.bias", "text_encoder"),
    ],
)
def test_a_missing_or_misshapen_tensor_is_named(tensors, config, name, component):
    full = tensors[name]
    tensors[name] = full[:1]
    with pytest.raises(InputError, match=rf"'{name}' must have shape .*--original-config"):
        from_original(tensors, config)
    tensors[name] = full.long()
    with pytest.raises(InputError, match=rf"'{name}' must hold floating-point numbers"):
        from_original(tensors, config)
    del tensors[name]
    with pytest.raises(InputError, match=rf"tensors of the {component}, but 1 are missing.*{name}"):
        from_original(tensors, config)


def test_a_checkpoint_of_another_size_names_the_option(tmp_path, tensors):
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(InputError, match="pass the YAML it was trained with as --original-config"):
        read_original(tmp_path / "m.safetensors", tokenizer=None, backbone="test_vit")


def test_a_tensor_without_a_place_is_named(tensors, config):
    tensors["model.diffusion_model.input_blocks.99.0.in_layers.0.weight"] = torch.zeros(3)
    with pytest.raises(InputError, match=r"1 tensors .* no place .*input_blocks\.99"):
        from_original(tensors, config)


def test_a_contradicting_noise_schedule_is_refused(tensors, config):
    tensors["betas"] = tensors["betas"] * 2
    with pytest.raises(InputError, match=r"1000 steps from β = 0\.0017 to 0\.024, but"):
        from_original(tensors, config)
    del tensors["betas"]
    from_original(tensors, config)


def test_features_of_another_shape_are_refused(tensors, config, tmp_path):
    other = FeatureSpec("resnet", "last", 2048, (7, 7))
    with pytest.raises(InputError, match="64 channels, but the features are a map of resnet"):
        from_original(tensors, config, other)
    with pytest.raises(InputError, match=r"64 channels, but the original config says .* 1024"):
        from_original(tensors, replace(config, hint_channels=1024))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"norm_num_groups": 16}, "norm_num_groups = 32 in the unet, but this pipeline has 16"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift = 'default'"),
        ({"attention_head_dim": (4, 4, 2, 4)}, "one number of heads, or one of channels per head"),
        ({"block_out_channels": (64, 96, 96, 96)}, "96 is no multiple of 64"),
    ],
)
def test_a_model_the_original_cannot_hold_is_refused(change, sentence):
    with pytest.raises(InputError, match=sentence):
        to_original(make_parts(**change))


def test_standardised_features_cannot_be_written(tmp_path):
    pipeline = make_pipeline(make_parts())
    pipeline.controlnet.feature_encoder.feature_std[0] = 2
    with pytest.raises(InputError, match="has no standardisation of the features"):
        write_original(pipeline, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_another_noise_schedule_cannot_be_written(parts, tmp_path):
    pipeline = make_pipeline(parts)
    pipeline.scheduler = type(parts.scheduler).from_config(
        parts.scheduler.config, prediction_type="v_prediction"
    )
    with pytest.raises(InputError, match="prediction_type = 'epsilon' in the scheduler"):
        write_original(pipeline, tmp_path / "m.safetensors")


def test_a_pipeline_without_its_text_encoder_cannot_be_written(parts, tmp_path):
    pipeline = make_pipeline(parts)
    pipeline.text_encoder = None
    with pytest.raises(InputError, match="must hold a text_encoder, but has none"):
        write_original(pipeline, tmp_path / "m.safetensors")


def test_checkpoint_and_yaml_are_written_both_or_none(parts, tmp_path, monkeypatch):
    pipeline = make_pipeline(parts)

    def fail(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("featinv_diffusion.diffusion.convert.folder.save_file", fail)
        with pytest.raises(InputError, match="No space left on device"):
            write_original(pipeline, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())
    (tmp_path / "m.yaml").write_text("mine")
    with pytest.raises(InputError, match=r"m\.yaml must not exist yet"):
        write_original(pipeline, tmp_path / "m.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["m.yaml"]


def test_sizes_that_the_original_code_has_fixed_are_told(parts, tmp_path, caplog):
    write_original(make_pipeline(parts), tmp_path / "m.safetensors")
    assert "a hint block of width 24, not 512, latents of width 8, not 32" in caplog.text


def test_the_backbone_comes_along(tmp_path):
    tiny.make_backbone().save_pretrained(tmp_path / "net")
    name = f"hf/{tmp_path / 'net'}"
    parts = make_parts()
    controlnet = tiny.make_controlnet(parts.unet, zero=True, feature_spec=None)
    tensors, config = to_original(Parts(**{**vars(parts), "controlnet": controlnet}))
    save_file(tensors, tmp_path / "m.safetensors")
    save_yaml(config, tmp_path / "m.yaml")
    pipeline = read_original(
        tmp_path / "m.safetensors", tmp_path / "m.yaml", tokenizer=None, backbone=name, pooled=True
    )
    assert pipeline.controlnet.config["feature_pooled"] is True
    assert pipeline.encode_features(tiny.make_images(1)).shape == (1, tiny.CHANNELS, *tiny.GRID)
    assert pipeline.controlnet.config["feature_spec"]["backbone"] == name


def save_yaml(config, path: Path) -> None:
    path.write_text(json.dumps(to_original_config(config)))  # JSON is YAML


def test_without_the_backbones_weights_a_note_says_so(parts, tmp_path, caplog):
    write_original(make_pipeline(parts), tmp_path / "m.safetensors")
    with caplog.at_level(logging.WARNING):
        pipeline = read_original(tmp_path / "m.safetensors", tmp_path / "m.yaml", tokenizer=None)
    assert pipeline.backbone is None
    assert pipeline.tokenizer is None
    assert "takes features only. The weights of 'test_vit' must be in" in caplog.text


def test_an_unknown_setting_in_our_part_of_the_yaml_is_refused(parts, tmp_path):
    tensors, config = to_original(parts)
    save_file(tensors, tmp_path / "m.safetensors")
    config.extras["pipeline"] = {"default_promt": "x"}
    save_yaml(config, tmp_path / "m.yaml")
    with pytest.raises(InputError, match="did you mean 'default_prompt'"):
        read_original(tmp_path / "m.safetensors", tmp_path / "m.yaml", tokenizer=None)
    config.extras["pipeline"], config.extras["feature_spec"] = {}, {"backbone": "resnet"}
    save_yaml(config, tmp_path / "m.yaml")
    with pytest.raises(InputError, match="missing required field `layer`"):
        read_original(tmp_path / "m.safetensors", tmp_path / "m.yaml", tokenizer=None)


def test_the_tokenizer_must_be_there_and_fit(parts, tmp_path, tokenizer_folder):
    text_encoder: CLIPTextModel = parts.text_encoder
    tokenizer = load_tokenizer(str(tokenizer_folder), text_encoder)
    assert tokenizer("a cat").input_ids == tiny.make_tokenizer()("a cat").input_ids
    assert tokenizer.model_max_length == 77
    (tmp_path / "sd").mkdir()
    tokenizer_folder.rename(tmp_path / "sd" / "tokenizer")  # a whole Stable Diffusion folder
    assert len(load_tokenizer(str(tmp_path / "sd"), text_encoder)) == 514
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no tokenizer\.json.*--no-tokenizer"):
        load_tokenizer(str(tmp_path / "empty"), text_encoder)
    for name in ("openai/clip-vit-large-patch14", str(tmp_path / "absent")):
        with pytest.raises(InputError, match=rf"{name}' cannot be loaded .*--tokenizer"):
            load_tokenizer(name, text_encoder)
    larger = tiny.make_tokenizer()
    larger.add_tokens(["<extra>"])
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(InputError, match=r"must have the 514 tokens .* has 515"):
        load_tokenizer(str(tmp_path / "larger"), text_encoder)
