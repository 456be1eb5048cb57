"""Inverse modules against independent formulas, their statistics and their files."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.blocks import ConvInverse, published_layers
from featinv_diffusion.inverters.detr import (
    DecoderInverse,
    EncoderInverse,
    HeadInverse,
    sine_positions,
)
from featinv_diffusion.inverters.swin import SwinInverse
from featinv_diffusion.inverters.vit import AnalyticPatchInverse, BlocksInverse
from tests.inverters import small
from tests.tiny import make_images

SIZES = {"depth": 1, "n_heads": 2, "feedforward": 24, "linear_output": False}


@pytest.fixture(scope="module")
def detr():
    return small.make_detr_path()


@pytest.fixture(scope="module")
def vit():
    return small.make_vit_path()


def attention_of(layer: nn.Module) -> nn.MultiheadAttention:
    """PyTorch's attention with the weights of transformers' module."""
    module = nn.MultiheadAttention(16, 2, batch_first=True)
    parts = [layer.q_proj, layer.k_proj, layer.v_proj]
    module.in_proj_weight.data = torch.cat([p.weight for p in parts])
    module.in_proj_bias.data = torch.cat([p.bias for p in parts])
    module.out_proj.load_state_dict(layer.o_proj.state_dict())
    return module


def test_sine_positions_follow_the_formula() -> None:
    positions = sine_positions(8, torch.zeros(1, 8, 2, 3)).unflatten(1, (2, 3))
    y, x = 2 * math.pi * 1 / 2, 2 * math.pi * 3 / 3  # row 0, column 2; places are counted from 1
    expected = [math.sin(y), math.cos(y), math.sin(y / 100), math.cos(y / 100)]
    expected += [math.sin(x), math.cos(x), math.sin(x / 100), math.cos(x / 100)]
    assert torch.allclose(positions[0, 0, 2], torch.tensor(expected), atol=1e-4)


@torch.no_grad()
def test_encoder_inverse_is_a_post_norm_layer_with_positions_in_queries_and_keys(detr) -> None:
    module = EncoderInverse(**small.ends(detr, "encoder", "backbone"), **SIZES).eval()
    maps = torch.randn(2, 16, 8, 8)
    layer = module.layers[0]
    x = maps.flatten(2).transpose(1, 2)
    q = x + sine_positions(16, maps)
    x = layer.self_attn_layer_norm(x + attention_of(layer.self_attn)(q, q, x)[0])
    x = layer.final_layer_norm(x + layer.mlp.fc2(F.relu(layer.mlp.fc1(x))))
    assert torch.allclose(module(maps), x.transpose(1, 2).unflatten(2, (8, 8)), atol=1e-5)


@torch.no_grad()
def test_decoder_inverse_begins_with_zero_cells_and_reads_the_queries(detr) -> None:
    module = DecoderInverse(**small.ends(detr, "decoder", "encoder"), **SIZES).eval()
    queries = torch.randn(2, 5, 16)
    layer = module.layers[0]
    position = sine_positions(16, torch.zeros(2, 1, 8, 8))
    x = torch.zeros(2, 64, 16)
    x = layer.self_attn_layer_norm(
        x + attention_of(layer.self_attn)(x + position, x + position, x)[0]
    )
    keys = queries + module.query_positions.weight
    x = layer.encoder_attn_layer_norm(
        x + attention_of(layer.encoder_attn)(x + position, keys, queries)[0]
    )
    x = layer.final_layer_norm(x + layer.mlp.fc2(F.relu(layer.mlp.fc1(x))))
    assert torch.allclose(module(queries), x.transpose(1, 2).unflatten(2, (8, 8)), atol=1e-5)


@torch.no_grad()
def test_head_inverse_is_an_mlp_of_three_layers(detr) -> None:
    module = HeadInverse(**small.ends(detr, "detection", "decoder"), hidden=(12, 10))
    read = torch.randn(2, 5, small.CLASSES + 1 + 4)
    hidden = F.relu(module.fc2(F.relu(module.fc1(read))))
    assert torch.equal(module(read), module.fc3(hidden))
    assert (module.fc2.in_features, module.fc2.out_features) == (12, 10)


@torch.no_grad()
def test_linear_output_lets_mean_and_variance_of_a_cell_vary(detr) -> None:
    free = {**SIZES, "linear_output": True}
    ends = small.ends(detr, "encoder", "backbone")
    maps = torch.randn(1, 16, 8, 8) * 5
    assert EncoderInverse(**ends, **SIZES)(maps).mean(1).abs().max() < 1e-5
    assert EncoderInverse(**ends, **free)(maps).mean(1).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "n_layers", "millions"), [("paper", 7, 25.7), ("released", 9, 78.8)]
)
def test_published_backbone_inverses_have_their_sizes(name, n_layers, millions) -> None:
    path_spec = {"backbone": "d", "channels": 256, "grid": (15, 20), "layer": "backbone"}
    image = {"backbone": "d", "channels": 3, "grid": (480, 640), "layer": "image"}
    with torch.device("meta"):
        module = ConvInverse(reads_spec=path_spec, writes_spec=image, **published_layers(name))
    convolutions = [m for m in module.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert len(convolutions) == n_layers
    n = sum(p.numel() for p in module.parameters())
    assert n / 1e6 == pytest.approx(millions, abs=0.05)
    assert module(torch.zeros(2, 256, 15, 20, device="meta")).shape == (2, 3, 480, 640)


@pytest.mark.parametrize(
    ("module", "reads", "writes", "message"),
    [
        (EncoderInverse, "decoder", "encoder", r"EncoderInverse can read must be of kind map, "),
        (EncoderInverse, "encoder", "decoder", r"EncoderInverse can write must be of kind map, "),
        (EncoderInverse, "encoder", "image", r"EncoderInverse can write must be of kind map, "),
        (DecoderInverse, "encoder", "backbone", r"can read must be of kind queries or tokens, "),
        (DecoderInverse, "prediction", "decoder", r"DecoderInverse can write must be of kind map"),
        (HeadInverse, "encoder", "decoder", r"HeadInverse can read must be of kind queries or"),
        (HeadInverse, "prediction", "encoder", r"HeadInverse can write must be of kind queries"),
        (ConvInverse, "decoder", "image", r"ConvInverse can read must be of kind map or tokens, "),
        (ConvInverse, "encoder", "backbone", r"ConvInverse can write must be of kind image, "),
        (BlocksInverse, "decoder", "prediction", r"BlocksInverse can read must be of kind tokens"),
    ],
)
def test_a_module_refuses_stages_of_a_kind_that_it_cannot_read_or_write(
    detr, module, reads: str, writes: str, message: str
) -> None:
    with pytest.raises(InputError, match=f"A stage that .*{message}.* of small/detr at layer"):
        module(**small.ends(detr, reads, writes))


def test_modules_of_a_vit_refuse_a_map_to_write_and_the_analytic_one_a_map_to_read(vit) -> None:
    with pytest.raises(InputError, match="BlocksInverse can write must be of kind tokens, "):
        BlocksInverse(**small.ends(vit, "encoder", "last"))
    with pytest.raises(InputError, match="AnalyticPatchInverse can read must be of kind tokens, "):
        AnalyticPatchInverse(**small.ends(vit, "last", "image"))


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (4, 2), (8, 8), (5, 2)])
def test_each_layer_enlarges_by_its_stride(detr, kernel: int, stride: int) -> None:
    last = 8 // stride
    module = ConvInverse(
        **small.ends(detr, "backbone", "image"),
        channels=[4],
        kernels=[kernel, last],
        strides=[stride, last],
    )
    assert module(torch.zeros(2, 16, 8, 8)).shape == (2, 3, 64, 64)
    assert module.layers[0](torch.zeros(2, 16, 8, 8)).shape == (2, 4, 8 * stride, 8 * stride)


def test_a_kernel_smaller_than_its_stride_is_refused(detr) -> None:
    with pytest.raises(InputError, match="at least its stride, got 2 and 8"):
        ConvInverse(**small.ends(detr, "backbone", "image"), kernels=[2], strides=[8])


def test_strides_that_miss_the_image_are_refused(detr) -> None:
    with pytest.raises(InputError, match="8×8 cells to 64×64 pixels, got a product of 4"):
        ConvInverse(
            **small.ends(detr, "backbone", "image"), channels=[4], kernels=[3, 3], strides=[2, 2]
        )


@torch.no_grad()
def test_conv_inverse_of_tokens_drops_prefix_and_subtracts_positions(vit) -> None:
    module = ConvInverse(
        **small.ends(vit, "patches", "image"), n_prefix=1, grid=[8, 8], positions=True
    )
    module.set_positions(vit.positions())
    tokens = vit.embeddings(make_images(2), ["patches"])["patches"]
    patches = (tokens - vit.model.pos_embed)[:, 1:].transpose(1, 2).reshape(2, 192, 8, 8)
    expected = F.conv_transpose2d(
        patches, module.layers[0].weight, module.layers[0].bias, stride=8
    ).sigmoid()
    assert torch.allclose(module(tokens), expected, atol=1e-6)


@torch.no_grad()
def test_statistics_standardise_what_is_read_and_undo_it_for_what_is_written(detr) -> None:
    module = EncoderInverse(**small.ends(detr, "encoder", "backbone"), **SIZES).eval()
    maps = torch.randn(2, 16, 8, 8)
    plain = module(maps)
    mean, std = torch.randn(16), torch.rand(16) + 0.5
    out_mean, out_std = torch.randn(16), torch.rand(16) + 0.5
    module.set_statistics((mean, std), (out_mean, out_std))
    shifted = maps * std[:, None, None] + mean[:, None, None]
    expected = plain * out_std[:, None, None] + out_mean[:, None, None]
    assert torch.allclose(module(shifted), expected, atol=1e-4)


@torch.no_grad()
def test_a_map_gets_learned_prefix_tokens(vit) -> None:
    module = BlocksInverse(**small.ends(vit, "last", "patches"), depth=1, n_heads=3).eval()
    module.prefix.normal_()
    maps = torch.randn(2, 192, 8, 8)
    tokens = torch.cat([module.prefix.expand(2, -1, -1), maps.flatten(2).transpose(1, 2)], 1)
    assert torch.equal(module(maps), module.blocks(tokens))


@torch.no_grad()
def test_swin_inverse_unmerges_each_cell_into_its_own_square() -> None:
    """Without blocks, a cell of what is written depends on one cell of what is read."""
    swin = small.make_swin_path()
    module = SwinInverse(**small.ends(swin, "encoder", "layers.0"), depth=0)
    assert module.factor == 4
    with torch.no_grad():
        before = module(torch.zeros(1, 64, 4, 4))
        changed = torch.zeros(1, 64, 4, 4)
        changed[..., 1, 2] = torch.randn(1, 64)
        differs = (module(changed) != before).any(1)[0]
    assert before.shape == (1, 16, 16, 16)
    assert differs[4:8, 8:12].all()
    assert int(differs.sum()) == 16


def test_swin_inverse_lets_windows_see_each_other_from_the_second_block_on() -> None:
    swin = small.make_swin_path()
    read = torch.zeros(2, 32, 8, 8)
    read[1, :, 0, 0] = torch.linspace(-1, 1, 32)
    reached = []
    for depth in (1, 2):
        torch.manual_seed(0)
        module = SwinInverse(
            **small.ends(swin, "layers.1", "layers.0"), depth=depth, n_heads=2, window=4
        )
        nn.init.normal_(module.unmerge.weight)
        with torch.no_grad():
            plain, changed = module(read)
        reached.append(int(((plain - changed).abs() > 1e-6).any(0).sum()))
    assert reached[0] == 8 * 8  # one window of 4 × 4 cells, each unmerged into 2 × 2
    assert reached[1] > reached[0]


def test_swin_inverse_refuses_grids_that_are_no_multiples(vit) -> None:
    swin = small.make_swin_path()
    with pytest.raises(InputError, match="whole multiples"):
        SwinInverse(**small.ends(swin, "patches", "encoder"))
    with pytest.raises(InputError, match="must be of kind map"):
        SwinInverse(**small.ends(vit, "encoder", "patches"))


def test_analytic_inverse_reproduces_the_image_in_float64(vit) -> None:
    module = AnalyticPatchInverse.from_path(vit)
    weight = vit.model.patch_embed.proj.weight.double().flatten(1)
    images = make_images(2).double()
    mean, std = (
        torch.tensor(v).double()[:, None, None]
        for v in (vit.preprocessing.mean, vit.preprocessing.std)
    )
    cells = F.unfold((images - mean) / std, 8, stride=8).transpose(1, 2)  # [b, n, 192]
    tokens = cells @ weight.T + vit.model.patch_embed.proj.bias + vit.model.pos_embed[:, 1:]
    tokens = torch.cat([torch.zeros(2, 1, 192), tokens], dim=1)
    assert torch.allclose(module(tokens), images, atol=1e-9)
    assert module.condition_number == pytest.approx(float(torch.linalg.cond(weight)), rel=1e-6)


@torch.no_grad()
def test_analytic_inverse_leaves_out_weak_directions() -> None:
    path = small.make_vit_path()
    projection = path.model.patch_embed.proj
    u, s, v = torch.linalg.svd(projection.weight.flatten(1))
    s[-3:] = s[0] * 1e-9
    projection.weight.copy_((u * s @ v).view_as(projection.weight))
    module = AnalyticPatchInverse.from_path(path)
    assert module.condition_number == pytest.approx(float(s[0] / s[-4]), rel=1e-3)
    tokens = path.embeddings(make_images(1), ["patches"])["patches"]
    assert module(tokens).abs().max() < 10
