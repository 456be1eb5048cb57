"""`scope.safetensors`: written, read, bound to a layer and to weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from featinv_diffusion.errors import InputError
from featinv_diffusion.features.natural_maps import Calibration, NaturalMaps, fit_density
from featinv_diffusion.types import FeatureSpec
from tests.features.natural import CHANNELS, GRID, make_maps

SPEC = FeatureSpec("tiny", "last", CHANNELS, GRID)


@pytest.fixture(scope="module")
def natural() -> NaturalMaps:
    density = fit_density(make_maps(300, 1).split(50))
    calibration = Calibration(density.distance(make_maps(120, 2)), torch.linspace(0, 1, 100))
    return NaturalMaps(SPEC, "abc", density, calibration, {"steps": 3, "scheduler": None}, 300)


def test_nothing_is_lost_in_the_file(natural: NaturalMaps, tmp_path: Path):
    path = tmp_path / "scope.safetensors"
    natural.save(path)
    again = NaturalMaps.load(path)
    kept = ("spec", "backbone_sha256", "sampling", "n_fitted")
    assert [getattr(again, k) for k in kept] == [getattr(natural, k) for k in kept]
    maps = make_maps(9, 3)
    assert again.p_values(maps) == natural.p_values(maps)
    assert again.p_values(maps, [0.3] * 9) == natural.p_values(maps, [0.3] * 9)
    assert natural.p_values(maps, [0.3] * 9) != natural.p_values(maps)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o044 == 0o044  # others may read it


def test_features_that_do_not_fit_are_refused(natural: NaturalMaps):
    with pytest.raises(InputError, match="shape"):
        natural.p_values(make_maps(2, 3, channels=5))
    with pytest.raises(InputError, match="finite"):
        natural.p_values(torch.full((1, CHANNELS, *GRID), float("nan")))


def test_they_are_bound_to_layer_and_weights(natural: NaturalMaps):
    natural.check(replace(SPEC, backbone="the same by another name"), "abc")
    with pytest.raises(InputError, match=r"stages\.1.*featinv scope"):
        natural.check(replace(SPEC, layer="stages.1"), "abc")
    with pytest.raises(InputError, match=r"other weights of tiny.*featinv scope"):
        natural.check(SPEC, "abd")


def test_another_file_is_refused(natural: NaturalMaps, tmp_path: Path):
    path = tmp_path / "scope.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="format"):
        NaturalMaps.load(path)
    natural.save(path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="truncated"):
        NaturalMaps.load(path)
    with pytest.raises(InputError, match=r"scope\.safetensors"):
        NaturalMaps.load(tmp_path / "missing" / "scope.safetensors")
