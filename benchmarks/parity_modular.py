"""Compares the inverse modules with the original code on the same random weights.

    python benchmarks/parity_modular.py CHECKOUT

CHECKOUT is a clone of https://github.com/wiskott-lab/inverse-tvm, whose modules are imported as
they are. Weights are mapped by name, batch norms have random statistics, inputs are random; the
convolutional inverses run on maps of 2×3 cells. Prints the largest absolute difference of outputs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from featinv_diffusion.inverters.blocks import ConvInverse, published_layers
from featinv_diffusion.inverters.detr import (
    DecoderInverse,
    EncoderInverse,
    HeadInverse,
    sine_positions,
)
from featinv_diffusion.inverters.vit import BlocksInverse
from featinv_diffusion.types import FeatureSpec

GRID, N_QUERIES, N_CLASSES = (3, 4), 100, 91
MAP = FeatureSpec("detr", "map", 256, GRID)
QUERIES = FeatureSpec("detr", "queries", 256, (N_QUERIES, 1), "queries")
SCORES = FeatureSpec("detr", "detection", N_CLASSES + 5, (N_QUERIES, 1), "queries")
TOKENS = FeatureSpec("vit", "tokens", 768, (197, 1), "tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare with the original code.")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.checkout))
    torch.manual_seed(arguments.seed)
    torch.set_grad_enabled(False)
    rows = {
        "backbone⁻¹ of DETR, paper": compare_conv("BatchNormalizedConvolutionalDecoder", "paper"),
        "backbone⁻¹ of DETR, released": compare_conv(
            "EnhancedBatchNormalizedConvolutionalDecoder", "released"
        ),
        "encoder⁻¹ of DETR": compare_encoder(),
        "decoder⁻¹ of DETR": compare_decoder(),
        "detection⁻¹ of DETR": compare_head(),
        "encoder⁻¹ of ViT": compare_blocks(),
        "backbone⁻¹ of ViT": compare_vit_backbone(),
    }
    for name, difference in rows.items():
        print(f"{name:<30} max |difference| {difference:.2e}")


def compare_conv(original_name: str, published: str) -> float:
    original = getattr(load("modules.inv_detr.inv_bb.models"), original_name)().eval()
    reads = FeatureSpec("detr", "backbone", 256, (2, 3))
    writes = FeatureSpec("detr", "image", 3, (64, 96))
    ours = ConvInverse(**ends(reads, writes), **published_layers(published)).eval()
    copy_in_order(original, ours)
    maps = torch.randn(2, 256, 2, 3)
    return difference(ours(maps), original(maps))


def compare_encoder() -> float:
    original = load("modules.inv_detr.inv_enc.models").InverseTransformerEncoder().eval()
    ours = EncoderInverse(**ends(MAP, MAP), linear_output=False).eval()
    for theirs, layer in zip(original.layers, ours.layers, strict=True):
        copy_layer(theirs, layer)
    maps = torch.randn(2, 256, *GRID)
    position = sine_positions(256, maps).transpose(0, 1)
    tokens = maps.flatten(2).permute(2, 0, 1)
    return difference(ours(maps).flatten(2).permute(2, 0, 1), original(tokens, pos=position))


def compare_decoder() -> float:
    original = load("modules.inv_detr.inv_dec.models").InverseTransformerDecoder().eval()
    ours = DecoderInverse(**ends(QUERIES, MAP), linear_output=False).eval()
    for theirs, layer in zip(original.layers, ours.layers, strict=True):
        copy_layer(theirs, layer)
    ours.query_positions.load_state_dict(original.query_embed.state_dict())
    queries = torch.randn(2, N_QUERIES, 256)
    position = sine_positions(256, torch.zeros(2, 1, *GRID)).transpose(0, 1)
    memory_position = original.query_embed.weight[:, None].expand(-1, 2, -1)
    target = torch.zeros_like(position)
    memory = queries.transpose(0, 1)
    theirs = original(target, memory, pos=memory_position, query_pos=position)
    theirs = theirs[0] if theirs.ndim == 4 else theirs
    return difference(ours(queries).flatten(2).permute(2, 0, 1), theirs)


def compare_head() -> float:
    original = load("modules.inv_detr.inv_pred.models").InverseDetector().eval()
    ours = HeadInverse(**ends(SCORES, QUERIES)).eval()
    weights = original.inverse_classifier_regressor.state_dict()
    ours.load_state_dict(weights, strict=False)
    scores, boxes = torch.randn(2, N_QUERIES, N_CLASSES + 1), torch.rand(2, N_QUERIES, 4)
    one_hot = nn.functional.one_hot(scores.argmax(-1), N_CLASSES + 1).float()
    return difference(ours(torch.cat([one_hot, boxes], -1)), original(scores, boxes))


def compare_blocks() -> float:
    original = load("modules.inv_vit.inv_enc.models").InverseViTEncoder().eval()
    ours = BlocksInverse(**ends(TOKENS, TOKENS)).eval()
    ours.blocks.load_state_dict(original.blocks.state_dict())
    tokens = torch.randn(1, 197, 768)
    return difference(ours(tokens), original(tokens))


def compare_vit_backbone() -> float:
    """The original takes 14×14 patches alone."""
    original = load("modules.inv_vit.inv_bb.models").EnhancedVitBackbone().eval()
    writes = FeatureSpec("vit", "image", 3, (224, 224))
    settings = {**published_layers("vit"), "n_prefix": 1, "grid": [14, 14]}
    ours = ConvInverse(**ends(TOKENS, writes), **settings).eval()
    copy_in_order(original, ours)
    tokens = torch.randn(1, 197, 768)
    return difference(ours(tokens), original(tokens))


def load(name: str):
    return importlib.import_module(name)


def ends(reads: FeatureSpec, writes: FeatureSpec) -> dict[str, dict]:
    return {"reads_spec": asdict(reads), "writes_spec": asdict(writes)}


def copy_in_order(original: nn.Module, ours: nn.Module) -> None:
    """Copies convolutions and batch norms in the order of their definition."""
    for kind in (nn.ConvTranspose2d, nn.BatchNorm2d):
        theirs = [m for m in original.modules() if isinstance(m, kind)]
        mine = [m for m in ours.modules() if isinstance(m, kind)]
        for source, target in zip(theirs, mine, strict=True):
            if isinstance(source, nn.BatchNorm2d):
                source.running_mean.normal_(std=0.1)
                source.running_var.uniform_(0.5, 2)
            target.load_state_dict(source.state_dict())


def copy_layer(theirs: nn.Module, ours: nn.Module) -> None:
    """Copies a DETR layer of PyTorch's attention into one of transformers."""
    copy_attention(theirs.self_attn, ours.self_attn)
    ours.mlp.fc1.load_state_dict(theirs.linear1.state_dict())
    ours.mlp.fc2.load_state_dict(theirs.linear2.state_dict())
    ours.self_attn_layer_norm.load_state_dict(theirs.norm1.state_dict())
    last = theirs.norm2
    if hasattr(theirs, "multihead_attn"):
        copy_attention(theirs.multihead_attn, ours.encoder_attn)
        ours.encoder_attn_layer_norm.load_state_dict(theirs.norm2.state_dict())
        last = theirs.norm3
    ours.final_layer_norm.load_state_dict(last.state_dict())


def copy_attention(theirs: nn.MultiheadAttention, ours: nn.Module) -> None:
    weights, biases = theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)
    for name, weight, bias in zip("qkv", weights, biases, strict=True):
        projection = getattr(ours, f"{name}_proj")
        projection.weight.copy_(weight)
        projection.bias.copy_(bias)
    ours.o_proj.load_state_dict(theirs.out_proj.state_dict())


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


if __name__ == "__main__":
    main()
