"""Files of feature maps: what is written comes back, with where it is from."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from featinv_diffusion.errors import InputError
from featinv_diffusion.features.maps import is_maps_file, load_maps, spec_of, write_maps
from featinv_diffusion.types import FeatureMaps, FeatureSpec, Source

SPEC = FeatureSpec("tiny/convnext", "last", 5, (2, 3))


def make_maps() -> FeatureMaps:
    maps = torch.randn(4, 5, 2, 3, generator=torch.Generator().manual_seed(0))
    sources = [Source(f"{i}.jpg", f"a/{i}.jpg", logits=torch.arange(3.0) + i) for i in range(4)]
    return FeatureMaps.of(maps, sources)


@pytest.mark.parametrize("suffix", ["safetensors", "npy", "parquet"])
def test_maps_come_back_bit_for_bit(tmp_path: Path, suffix: str):
    path, maps = tmp_path / f"maps.{suffix}", make_maps()
    write_maps(path, maps, SPEC)
    assert is_maps_file(path)
    assert spec_of(path) == SPEC
    again = load_maps(path, SPEC)
    assert torch.equal(again, maps)
    assert [s.name for s in again.sources] == [s.name for s in maps.sources]
    assert [s.location for s in again.sources] == [s.location for s in maps.sources]
    if suffix != "npy":
        assert torch.equal(again.sources[2].logits, maps.sources[2].logits)
    other = FeatureSpec("tiny/resnet", "last", 5, (2, 3))
    with pytest.raises(InputError, match="holds a map of tiny/convnext"):
        load_maps(path, other)


def test_arrays_of_others_are_taken_and_told(tmp_path: Path, caplog):
    maps = make_maps().as_subclass(torch.Tensor)
    np.savez(tmp_path / "a.npz", features=maps.numpy().astype("float64"), ids=np.arange(4))
    save_file({"x": maps.half()}, tmp_path / "b.safetensors")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(load_maps(tmp_path / "a.npz", SPEC), maps)
    assert "does not say where its maps come from" in caplog.text
    assert torch.equal(load_maps(tmp_path / "b.safetensors", SPEC), maps.half().float())
    assert spec_of(tmp_path / "a.npz") is None


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda p: np.save(p, np.zeros((2, 9))), "must hold maps"),
        (lambda p: np.save(p, np.zeros((1, 4, 2, 3))), "must have shape"),
        (lambda p: np.save(p, np.full((1, 5, 2, 3), np.nan)), "must be finite"),
        (lambda p: p.write_bytes(b"junk"), "arrays of numbers"),
        (lambda p: np.save(p, np.array([{}]), allow_pickle=True), "arrays of numbers"),
        (lambda p: np.save(p, np.array(["a"])), "arrays of numbers"),
    ],
)
def test_what_is_no_map_is_refused(tmp_path: Path, write, words):
    path = tmp_path / "x.npy"
    write(path)
    with pytest.raises(InputError, match=words):
        load_maps(path, SPEC)


def test_damaged_headers_are_refused(tmp_path: Path):
    path = tmp_path / "maps.npy"
    write_maps(path, make_maps(), SPEC)
    beside = tmp_path / "maps.npy.json"
    for text, words in (
        ("{", "must hold JSON"),
        ('{"spec": 3}', "spec"),
        ('{"spec": {"backbone": "x"}}', "the spec in .*missing"),
        ('{"names": ["a"]}', "as many names"),
    ):
        beside.write_text(text)
        with pytest.raises(InputError, match=words):
            load_maps(path, SPEC)


def test_damaged_files_are_refused(tmp_path: Path):
    for suffix in ("safetensors", "parquet"):
        path = tmp_path / f"maps.{suffix}"
        write_maps(path, make_maps(), SPEC)
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(InputError, match="whole"):
            load_maps(path, SPEC)
