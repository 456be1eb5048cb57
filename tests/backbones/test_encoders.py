"""The table of docs/encoders.md: names that exist, with the maps and layers that it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm

from featinv_diffusion.backbones import load_backbone

TEXT = (Path(__file__).parents[2] / "docs/encoders.md").read_text()
ROW = re.compile(r"\| `(\w+\.\w+)` \| (\d+) \| (\d+)×(\d+)×(\d+) \| (\d+) \|")
ROWS = [(name, *map(int, numbers)) for name, *numbers in ROW.findall(TEXT)]


def test_every_encoder_of_the_paper_has_a_row():
    table = TEXT.partition("## Encoders of the reconstruction paper")[2]
    encoders = [line for line in table.splitlines() if "×" in line and line.startswith("| ")][1:]
    assert len(ROWS) == len(encoders) == 17


@pytest.mark.parametrize(("name", "pixels", "channels", "height", "width", "patch"), ROWS)
def test_a_row_says_what_the_model_gives(name, pixels, channels, height, width, patch):
    assert name in timm.list_pretrained()
    backbone = load_backbone(name, pretrained=False, depth=1)
    assert backbone.input_size == (pixels, pixels)
    assert (backbone.spec.channels, backbone.spec.grid) == (channels, (height, width))
    assert (height, width) == (pixels // patch, pixels // patch)
    inner = next(spec for spec in backbone.layers() if spec.layer == "blocks.0")
    assert inner.grid == (height, width)
    assert inner.channels == (768 if "sam" in name else channels)


@pytest.mark.parametrize("name", [name for name, *_ in ROWS if "_clip_" in name])
def test_activations_are_those_of_training(name):
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    native = config.notes and "natively QuickGELU" in config.notes[0]
    assert bool(native) == ("quickgelu" in name)
