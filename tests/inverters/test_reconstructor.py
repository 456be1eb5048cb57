"""The reconstructor: its published form, sizes and files, and the encoder that it goes with."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters import Inverter, reconstructor
from featinv_diffusion.inverters.reconstructor import (
    Reconstructor,
    ReconstructorInverter,
    count_doublings,
    find_reconstructor,
    from_original,
    load_encoder,
    load_reconstructor,
    save_original,
)
from featinv_diffusion.types import FeatureSpec
from tests.inverters import encoders
from tests.tiny import make_images, seeded


@pytest.fixture(scope="module")
def member(tmp_path_factory) -> Path:
    return encoders.save_member(tmp_path_factory.mktemp("assets") / "siglip")


def test_published_sizes_are_the_defaults() -> None:
    spec = FeatureSpec("siglip", "last", 768, (14, 14))
    with torch.device("meta"):
        model = Reconstructor(asdict(spec), (224, 224))
    # 38,237,187 parameters of the original without the norm whose output it does not use
    assert sum(p.numel() for p in model.parameters()) == 38_237_187 - 2 * 768
    widths = [m.out_channels for m in model.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert widths == [384, 192, 96, 48]
    assert len(model.blocks) == 4
    assert model.blocks[0].attn.num_heads == 12


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-1.702 * x))


def attend(block, x: torch.Tensor) -> torch.Tensor:
    """Attention of two heads, written out."""
    q, k, v = F.linear(x, block.qkv.weight, block.qkv.bias).chunk(3, dim=-1)
    heads = []
    for part in zip(*(t.chunk(2, dim=-1) for t in (q, k, v)), strict=True):
        scores = part[0] @ part[1].transpose(1, 2) / part[0].shape[-1] ** 0.5
        heads.append(scores.softmax(-1) @ part[2])
    return F.linear(torch.cat(heads, -1), block.proj.weight, block.proj.bias)


def norm(layer: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return unit * layer.weight + layer.bias


@seeded
def randomise_norms(model: nn.Module) -> None:
    """Scales and shifts as after training, so that leaving one out would show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)


@torch.no_grad()
def test_the_network_is_the_published_one_written_out() -> None:
    model = encoders.make_reconstructor(n_residual=1)
    randomise_norms(model)
    weights = model.state_dict()
    features = encoders.make_features(2)
    unit = features / features.square().sum(1, keepdim=True).sqrt()
    tokens = unit.permute(0, 2, 3, 1).reshape(2, 64, encoders.WIDTH)
    tokens = norm(model.norm, torch.cat([weights["token"].expand(2, 1, -1), tokens], 1))
    for block in model.blocks:
        tokens = tokens + attend(block.attn, norm(block.norm1, tokens))
        hidden = quick_gelu(F.linear(norm(block.norm2, tokens), *block.mlp.fc1.parameters()))
        tokens = tokens + F.linear(hidden, *block.mlp.fc2.parameters())
    x = tokens[:, 1:].reshape(2, 8, 8, encoders.WIDTH).permute(0, 3, 1, 2)

    def convolve(x: torch.Tensor, path: str) -> torch.Tensor:
        return F.conv2d(x, weights[f"{path}.weight"], weights[f"{path}.bias"], padding=1)

    def batch_norm(x: torch.Tensor, path: str) -> torch.Tensor:
        mean, variance = weights[f"{path}.running_mean"], weights[f"{path}.running_var"]
        unit = (x - mean[:, None, None]) / (variance + 1e-5).sqrt()[:, None, None]
        scale, shift = weights[f"{path}.weight"], weights[f"{path}.bias"]
        return unit * scale[:, None, None] + shift[:, None, None]

    def residual(x: torch.Tensor, path: str) -> torch.Tensor:
        inner = quick_gelu(batch_norm(convolve(x, f"{path}.conv1"), f"{path}.bn1"))
        return quick_gelu(batch_norm(convolve(inner, f"{path}.conv2"), f"{path}.bn2") + x)

    for i in range(3):
        path = f"decoder.layers.{2 * i}"
        kernel, bias = weights[f"{path}.weight"], weights[f"{path}.bias"]
        x = F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)
        x = residual(x, f"decoder.layers.{2 * i + 1}")
    x = convolve(residual(x, "decoder.layers.6"), "decoder.layers.7")
    torch.testing.assert_close(model.reconstruct(features), x, rtol=1e-4, atol=1e-5)
    mean, std = (torch.tensor(v)[:, None, None] for v in (encoders.MEAN, encoders.STD))
    torch.testing.assert_close(model(features), x * std + mean, rtol=1e-4, atol=1e-5)


def test_only_the_direction_of_each_location_counts() -> None:
    model, features = encoders.make_reconstructor(), encoders.make_features(2)
    scale = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) + 0.5
    before = features.clone()
    torch.testing.assert_close(model(features * scale), model(features), rtol=1e-4, atol=1e-5)
    assert torch.equal(features, before)
    assert model(torch.zeros_like(features)).isfinite().all()


@pytest.mark.parametrize(
    ("grid", "size", "n"),
    [((14, 14), 224, 4), ((8, 8), 64, 3), ((7, 7), 224, 5), ((16, 16), 224, 4), ((37, 37), 518, 4)],
)
def test_stages_double_where_the_patch_is_a_power_of_two(grid, size: int, n: int) -> None:
    assert count_doublings(grid, (size, size)) == n


@pytest.mark.parametrize(
    ("grid", "size"), [((4, 4), (56, 56)), ((2, 3), (32, 48)), ((3, 2), (30, 40)), ((6, 6), (6, 6))]
)
def test_the_output_has_the_size_of_the_image(grid, size) -> None:
    spec = replace(encoders.SPEC, grid=grid)
    model = encoders.make_reconstructor(spec, image_size=size)
    assert model(encoders.make_features(1, spec)).shape == (1, 3, *size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_patches_of_14_in_half_precision(dtype: torch.dtype) -> None:
    """The resize at the end, which the CPU does not have in half precision."""
    spec = replace(encoders.SPEC, grid=(4, 4))
    model = encoders.make_reconstructor(spec, image_size=(56, 56))
    features = encoders.make_features(1, spec)
    wanted = model(features)
    with torch.autocast("cpu", dtype):
        written = model(features)
        assert model.decoder(features).dtype == dtype
    assert 0 < (written - wanted).abs().max() < 0.05
    assert model.to(dtype).reconstruct(features).dtype == dtype


def test_other_channels_and_a_feedforward_that_is_no_multiple() -> None:
    model = encoders.make_reconstructor(channels=[8, 4], feedforward=50, n_residual=0)
    assert model.blocks[0].mlp.fc1.out_features == 50
    assert model(encoders.make_features(1)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_heads": 3}, "features, got 3"),
        ({"spec": replace(encoders.SPEC, kind="tokens", grid=(64, 1))}, "must read a map"),
        ({"spec": replace(encoders.SPEC, grid=(0, 0))}, r"grid\[0\] must be a whole number >= 1"),
        ({"image_size": (64,)}, r"image_size must be 2 whole numbers, got \(64,\)"),
        ({"depth": -1}, "depth .* at least 0, got -1"),
        ({"n_heads": 0}, "n_heads .* at least 1, got 0"),
        ({"n_heads": -1}, "n_heads .* at least 1, got -1"),
        ({"feedforward": -5}, "feedforward .* at least 1, got -5"),
        ({"channels": [8, 0]}, "channels .* at least 1, got 0"),
        ({"channels": [-1]}, "channels .* at least 1, got -1"),
        ({"n_residual": -3}, "n_residual .* at least 0, got -3"),
    ],
)
def test_what_cannot_be_built_is_refused(settings, words: str) -> None:
    with pytest.raises(InputError, match=words):
        encoders.make_reconstructor(**settings)


def test_files_give_the_same_network_with_its_statistics(tmp_path) -> None:
    model, features = encoders.make_reconstructor(), encoders.make_features(1)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    again = Reconstructor.from_pretrained(tmp_path).eval()
    assert torch.equal(again(features), model(features))
    assert again.spec == encoders.SPEC


def test_it_is_an_inverter_with_its_encoder(member: Path) -> None:
    counts: list[float] = []
    inverter = load_reconstructor(str(member))
    inverter.on_progress = counts.append
    assert isinstance(inverter, Inverter)
    assert inverter.spec == encoders.SPEC
    assert inverter.backbone.spec == inverter.spec
    assert inverter.backbone.preprocessing.mean == encoders.MEAN
    features = inverter.backbone.features(make_images(3))
    images = inverter.invert(features)
    assert images.shape == (3, 3, 64, 64)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    alone = torch.cat([inverter.invert(f[None]) for f in features])
    torch.testing.assert_close(images, alone, rtol=1e-4, atol=1e-5)
    assert counts == [3, 1, 1, 1]


def test_alone_in_a_folder_it_finds_its_encoder_by_name(tmp_path: Path) -> None:
    spec = FeatureSpec("tiny/vit", "blocks.3", 192, (8, 8))
    encoders.make_reconstructor(spec, n_heads=3).save_pretrained(tmp_path)
    inverter = load_reconstructor(str(tmp_path))
    assert inverter.backbone.spec == spec
    assert inverter.invert(inverter.backbone.features(make_images(1))).shape == (1, 3, 64, 64)


def test_features_of_another_shape_are_refused(member: Path) -> None:
    inverter = load_reconstructor(str(member / "reconstructor"))
    with pytest.raises(InputError, match="must have shape"):
        inverter.invert(torch.zeros(1, encoders.WIDTH, 4, 4))
    with pytest.raises(InputError, match="must be finite"):
        inverter.invert(torch.full((1, encoders.WIDTH, 8, 8), torch.nan))


def test_an_encoder_of_another_size_is_refused(member: Path) -> None:
    backbone = load_encoder(encoders.NAME, "last", weights=member / "backbone")
    with pytest.raises(InputError, match=r"writes 32×32 pixels, but 'small/siglip' reads 64×64"):
        ReconstructorInverter(encoders.make_reconstructor(image_size=(32, 32)), backbone)
    other = encoders.make_reconstructor(replace(encoders.SPEC, layer="encoder.layers.0"))
    with pytest.raises(InputError, match=r"encoder\.layers\.0"):
        ReconstructorInverter(other, backbone)


def test_folders_without_a_reconstructor(member: Path, tmp_path: Path) -> None:
    assert find_reconstructor(str(member / "backbone")) is None
    with pytest.raises(InputError, match="must be a bundled name or a folder"):
        load_reconstructor(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "Reconstructor"}))
    with pytest.raises(InputError, match="could not be read"):
        load_reconstructor(str(tmp_path))


def without_spec(config: dict) -> dict:
    return {key: value for key, value in config.items() if key != "spec"}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda config: [config], "group of named values"),
        (without_spec, "'spec'"),
        (lambda config: config | {"spec": None}, "could not be read"),
        (lambda config: config | {"image_size": 64}, "could not be read"),
        (lambda config: config | {"image_size": [64]}, r"2 whole numbers, got \[64\]"),
        (lambda config: config | {"mean": None}, "could not be read"),
        (lambda config: config | {"depth": "2"}, "could not be read"),
        (lambda config: config | {"spec": config["spec"] | {"grid": [0, 0]}}, r"grid\[0\]"),
        (lambda config: config | {"spec": config["spec"] | {"colour": 1}}, "colour"),
        (lambda config: config | {"depth": 3}, r"12 are missing, blocks\.2"),
        (lambda config: config | {"depth": 1}, r"12 are unexpected, blocks\.1"),
    ],
)
def test_a_damaged_config_is_refused(member: Path, tmp_path: Path, damage, words: str) -> None:
    shutil.copytree(member, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "reconstructor/config.json"
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(InputError, match=words):
        load_reconstructor(str(tmp_path))


@pytest.mark.parametrize(
    ("values", "words"),
    [(64, "must be 2"), ([64], "must be 2"), ("64", "must be 2"), ([64, "2"], "got '2'")],
)
def test_sizes_of_another_type_are_refused(values, words: str) -> None:
    """Which the type checker of the tests keeps from the constructor."""
    with pytest.raises(InputError, match=words):
        reconstructor._check_sizes("image_size", values, n=2)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda weights: weights.pop("token"), "1 are missing, token among them"),
        (lambda weights: weights.update(colour=torch.zeros(2)), "1 are unexpected, colour among"),
        (lambda weights: weights.update(token=torch.zeros(5)), "could not be read"),
    ],
)
def test_weights_that_do_not_fit_are_refused(member, tmp_path: Path, damage, words: str) -> None:
    shutil.copytree(member, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "reconstructor/diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    damage(weights)
    save_file(weights, path)
    with pytest.raises(InputError, match=words):
        load_reconstructor(str(tmp_path))


def original_weights(width: int) -> dict[str, torch.Tensor]:
    """Names and shapes as the original's state dict has them, counted through as values."""
    shapes: dict[str, tuple[int, ...]] = {"transformer.embeddings.class_embedding": (width,)}
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"transformer.{name}.{kind}": (width,) for kind in ("weight", "bias")}
    for i in range(2):
        layer = f"transformer.encoder.layers.{i}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes[f"{layer}.self_attn.{part}.weight"] = (width, width)
            shapes[f"{layer}.self_attn.{part}.bias"] = (width,)
        for part in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{part}.{kind}": (width,) for kind in ("weight", "bias")}
        shapes[f"{layer}.mlp.fc1.weight"] = (4 * width, width)
        shapes[f"{layer}.mlp.fc1.bias"] = (4 * width,)
        shapes[f"{layer}.mlp.fc2.weight"] = (width, 4 * width)
        shapes[f"{layer}.mlp.fc2.bias"] = (width,)
    for n in range(1, 5):
        shapes[f"decoder.upconv{n}.weight"] = (width // 2 ** (n - 1), width // 2**n, 4, 4)
        shapes[f"decoder.upconv{n}.bias"] = (width // 2**n,)
    for n in range(1, 7):
        size = width // 2 ** min(n, 4)
        for part in (1, 2):
            shapes[f"decoder.resblock{n}.conv{part}.weight"] = (size, size, 3, 3)
            shapes[f"decoder.resblock{n}.conv{part}.bias"] = (size,)
            for kind in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"decoder.resblock{n}.bn{part}.{kind}"] = (size,)
            shapes[f"decoder.resblock{n}.bn{part}.num_batches_tracked"] = ()
    shapes |= {"decoder.final_conv.weight": (3, width // 16, 3, 3), "decoder.final_conv.bias": (3,)}
    return {key: torch.full(shape, i + 1.0) for i, (key, shape) in enumerate(shapes.items())}


def test_published_weights_are_read_by_name() -> None:
    weights = original_weights(32)
    model = encoders.make_reconstructor(replace(encoders.SPEC, grid=(4, 4)))
    model.load_state_dict(from_original(weights))
    found = model.state_dict()
    assert torch.equal(found["blocks.1.attn.qkv.bias"].chunk(3)[1],
                       weights["transformer.encoder.layers.1.self_attn.k_proj.bias"])  # fmt: skip
    pairs = {
        "token": "transformer.embeddings.class_embedding",
        "blocks.0.attn.proj.weight": "transformer.encoder.layers.0.self_attn.out_proj.weight",
        "decoder.layers.6.weight": "decoder.upconv4.weight",
        "decoder.layers.7.conv2.weight": "decoder.resblock4.conv2.weight",
        "decoder.layers.9.bn1.running_var": "decoder.resblock6.bn1.running_var",
        "decoder.layers.10.bias": "decoder.final_conv.bias",
    }
    assert all(torch.equal(found[ours], weights[theirs]) for ours, theirs in pairs.items())


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(InputError, match="class_embedding"):
        from_original({"vqvae.weight": torch.zeros(1)})
    weights = original_weights(32)
    for extra, words in (
        ("decoder.upsample.weight", "upsample"),
        ("transformer.encoder.layers.x.mlp.fc1.weight", r"layers\.x\..* does not belong"),
    ):
        with pytest.raises(InputError, match=words):
            from_original({**weights, extra: torch.zeros(1)})
    with pytest.raises(InputError, match="have no decoder"):
        from_original({k: v for k, v in weights.items() if not k.startswith("decoder.")})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A file as the published ones are, of a network of width 32."""
    path = tmp_path_factory.mktemp("published") / "siglip.pt"
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: value if value.ndim == 0 else torch.rand(value.shape, generator=generator) / 8
        for key, value in original_weights(32).items()
    }
    torch.save(weights, path)
    return path


def test_a_published_checkpoint_becomes_an_inverter(checkpoint, member, tmp_path: Path) -> None:
    """Beside its encoder, at whose patches of 8 pixels the 128 written ones are resized."""
    encoder = member / "backbone"
    layer = "encoder.layers.0"  # the second-last, as published
    target = save_original(checkpoint, encoders.NAME, tmp_path, layer=layer, weights=encoder)
    assert target == tmp_path / "reconstructor"
    shutil.copytree(encoder, tmp_path / "backbone")
    inverter = load_reconstructor(str(tmp_path))
    assert inverter.spec == replace(encoders.SPEC, layer=layer)
    assert tuple(inverter.reconstructor.config["mean"]) == encoders.MEAN
    weights = from_original(torch.load(checkpoint))
    found = inverter.reconstructor.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], weights[key]) for key in found)
    images = inverter.invert(inverter.backbone.features(make_images(2)))
    assert images.shape == (2, 3, 64, 64)
    with pytest.raises(InputError, match="must not exist yet"):
        save_original(checkpoint, encoders.NAME, tmp_path, weights=encoder)


def test_files_that_are_no_published_checkpoint(checkpoint, member, tmp_path: Path) -> None:
    broken, other, odd = (tmp_path / name for name in ("broken.pt", "other.pt", "odd.pt"))
    broken.write_bytes(checkpoint.read_bytes()[:500])
    torch.save([1, 2], other)
    torch.save(torch.load(checkpoint) | {"decoder.upconv1.bias": torch.zeros(3)}, odd)
    for path, words in (
        (tmp_path / "nothing.pt", "cannot be read"),
        (broken, "cannot be read"),
        (other, "must hold a state dict, got a list"),
        (odd, r"do not fit: size mismatch for decoder\.layers\.0\.bias"),
    ):
        with pytest.raises(InputError, match=words):
            save_original(path, encoders.NAME, tmp_path, weights=member / "backbone")
    assert not (tmp_path / "reconstructor").exists()
