"""Compares the reconstructor with the original code on the same random weights.

    python benchmarks/parity_reconstructor.py CHECKOUT

CHECKOUT is a clone of https://github.com/FusionBrainLab/feature_analysis, whose `training/model.py`
is imported as it is. Weights are mapped by `from_original`, batch norms have random statistics,
features are random. Prints the largest absolute difference of the normalised pixels, on maps of
14×14 cells and of the 16×16 and 32×32 cells of larger inputs.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn

from featinv_diffusion.inverters.reconstructor import Reconstructor, from_original
from featinv_diffusion.types import FeatureSpec

WIDTH, PATCH = 768, 16


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare with the original code.")
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sides", type=int, nargs="+", default=[14, 16, 32])
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_grad_enabled(False)
    original = make_original(arguments.checkout / "training")
    weights = from_original(original.state_dict())
    n_weights = sum(parameter.numel() for parameter in original.parameters())
    print(f"{n_weights:,} parameters in the original")
    for side in arguments.sides:
        spec = FeatureSpec("siglip", "last", WIDTH, (side, side))
        ours = Reconstructor(asdict(spec), (PATCH * side, PATCH * side)).eval()
        ours.load_state_dict(weights)
        assert sum(parameter.numel() for parameter in ours.parameters()) == n_weights - 2 * WIDTH
        difference, largest = compare(original, ours, side)
        print(f"{side}×{side} cells: max |difference| {difference:.2e}, max |pixel| {largest:.2f}")


def make_original(folder: Path) -> nn.Module:
    """Returns the original network with random weights, without the download of its config."""
    sys.path.insert(0, str(folder))
    # What the code reads of a config, in the transformers release that it was written for.
    vision = SimpleNamespace(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_attention_heads=12,
        attention_dropout=0.0,
        layer_norm_eps=1e-6,
        image_size=14 * PATCH,
        patch_size=PATCH,
        output_attentions=False,
        output_hidden_states=False,
        use_return_dict=True,
    )
    import model  # pyright: ignore[reportMissingImports]

    config = SimpleNamespace(vision_config=vision)
    with mock.patch.object(model.AutoConfig, "from_pretrained", return_value=config):
        network = model.R("siglip", None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.1)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.get_buffer("running_mean"), std=0.1)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2)
    return network.eval()


def compare(original: nn.Module, ours: Reconstructor, side: int) -> tuple[float, float]:
    """Raw features come to ours, which scales them; the original's caller does."""
    features = 5 * torch.randn(2, WIDTH, side, side)
    unit = features / features.norm(dim=1, keepdim=True)
    size = (PATCH * side, PATCH * side)
    theirs = original(unit, torch.ones(2, 3, *size))[0]
    difference = ours.reconstruct(features) - theirs
    return float(difference.abs().max()), float(theirs.abs().max())


if __name__ == "__main__":
    main()
