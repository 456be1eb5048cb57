"""Steerability of latents, where it is known: an inverter that paints three of four channels."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor, nn

import featinv_diffusion as fi
from featinv_diffusion.concepts import SAEConcepts
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.base import Inverter


class Colours(nn.Module):
    """Mean colour of each of 8 × 8 patches, and as a fourth channel what no paint shows."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 3, 1, bias=False)
        nn.init.dirac_(self.mix.weight)

    def forward(self, images: Tensor) -> Tensor:
        colours = nn.functional.avg_pool2d(self.mix(images), 8)
        return torch.cat([colours, colours[:, :1] * colours[:, 1:2]], dim=1)


class Painter(Inverter):
    """Paints the first three channels, and nothing else."""

    networks: ClassVar[dict[str, nn.Module]] = {}

    def __init__(self):
        model = nn.Sequential(Colours())
        self.backbone = fi.wrap_module(
            model, "0", input_size=64, preprocess=((0, 0, 0), (1, 1, 1)), name="colours"
        )
        self.spec = self.backbone.spec

    def _invert(self, features: Tensor, generator) -> Tensor:
        return features[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(0, 1)


@pytest.fixture
def inverter() -> Painter:
    return Painter()


@pytest.fixture
def concepts(inverter) -> SAEConcepts:
    return SAEConcepts(
        encode=lambda cells: (cells - 0.1).relu(),
        decode=lambda codes: codes + 0.1,
        spec=inverter.spec,
    )


@pytest.fixture
def pictures(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        blocks = torch.rand(4, 4, 3, generator=generator) ** 2 * 200
        blocks[..., i % 3] *= 0.05  # this colour is not active here
        blocks = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)
        Image.fromarray(blocks.byte().numpy()).save(tmp_path / f"{i:02}.png")
    return tmp_path


def test_painted_latents_are_seen_and_steerable_and_the_hidden_one_is_not(
    inverter, concepts, pictures, tmp_path
):
    found = fi.steerability(inverter, concepts, pictures, n_directions=9)
    rows = found.rows()
    assert [row["tested"] for row in rows] == [True] * 4
    assert [row["seen"] for row in rows] == [True, True, True, False]
    assert [row["steerable"] for row in rows] == [True, True, True, False]
    assert found.metrics["shares"]["both"]["value"] == 0.75
    assert found.metrics["shares"]["both"]["low"] < 0.4
    for row in rows[:3]:
        assert row["carried"] == pytest.approx(row["carried_map"], abs=0.02)
        assert row["carried_map"] > 0.8
        assert row["carried_before"] < 0.5
        assert (row["carried_active"], row["carried_inactive"]) != (None, None)
    assert rows[3]["effect"] == 0 < rows[3]["effect_null"]
    found.save(tmp_path / "out")
    assert parquet.read_table(tmp_path / "out/steerability.parquet").to_pylist() == rows
    names = {"steerability.png", "steerability.json", "steerability.parquet", "metrics.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_the_same_again_and_a_choice_of_latents(inverter, concepts, pictures):
    runs = [fi.steerability(inverter, concepts, pictures, n_latents=2, seed=3) for _ in range(2)]
    assert runs[0].rows() == runs[1].rows()
    assert sum(row["tested"] for row in runs[0].rows()) == 2
    untested = next(row for row in runs[0].rows() if not row["tested"])
    assert untested["carried"] is None
    assert untested["greatest"] > 0


def test_what_is_refused(inverter, concepts, pictures):
    with pytest.raises(InputError, match="n_pictures must be at least 2"):
        fi.steerability(inverter, concepts, pictures, n_pictures=1)
    with pytest.raises(InputError, match="At least 2 pictures"):
        fi.steerability(inverter, concepts, [pictures / "00.png"])
    silent = SAEConcepts(lambda cells: cells.relu() * 0, lambda codes: codes, inverter.spec)
    with pytest.raises(InputError, match="No concept is active"):
        fi.steerability(inverter, silent, pictures)
    spans = fi.find_concepts(inverter, pictures, n_concepts=1).concepts
    with pytest.raises(InputError, match="one direction each"):
        fi.steerability(inverter, spans, pictures)
