"""One table of deterministic inverters: by name, by folder, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters import modular, reconstructor
from featinv_diffusion.inverters.chain import MapChain
from featinv_diffusion.inverters.open import list_inverters, load_inverter
from featinv_diffusion.inverters.reconstructor import ReconstructorInverter
from tests.inverters import encoders, small
from tests.inverters.test_rae import make_rae


@pytest.fixture
def folders(tmp_path: Path, monkeypatch) -> Path:
    """Assets with a reconstructor `siglip`, and beside them a modular inverter."""
    encoders.save_member(tmp_path / "tiny/siglip")
    monkeypatch.setattr(reconstructor, "ASSETS", tmp_path)
    monkeypatch.setattr(modular, "load_path", lambda _info: small.make_vit_path())
    small.make_vit_inverses(small.make_vit_path()).save_pretrained(tmp_path / "vit")
    return tmp_path


def test_names_and_folders_lead_to_their_kind(folders: Path) -> None:
    assert {"rae", "siglip"} <= set(list_inverters())
    named = load_inverter("siglip")
    beside = load_inverter(folders / "tiny/siglip/reconstructor")
    chain = load_inverter(folders / "vit", stage="blocks.1")
    assert isinstance(named, ReconstructorInverter)
    assert isinstance(beside, ReconstructorInverter)
    assert isinstance(chain, MapChain)
    assert chain.spec.layer == "blocks.1"
    for inverter in (named, beside, chain):
        assert inverter.is_deterministic
    assert list(named.networks) == ["reconstructor"]
    assert list(chain.networks) == ["blocks.1", "patches"]


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("siglop", {}, "did you mean 'siglip'"),
        ("siglip", {"stage": "encoder"}, "reads the layer 'last' and no other"),
        ("siglip", {"pipeline": "tiny/vit"}, "takes no pipeline"),
        ("rae", {}, "give --pipeline"),
        ("~nobody-of-that-name/x", {}, "leads nowhere"),
    ],
)
def test_what_does_not_fit_is_refused(folders: Path, name: str, settings: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        load_inverter(name, **settings)


def test_its_own_layer_is_a_stage(folders: Path) -> None:
    assert load_inverter("siglip", stage="last").spec == encoders.SPEC


def test_an_autoencoder_is_named_by_the_pipeline(tmp_path: Path) -> None:
    make_rae("mae").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"use --inverter rae --pipeline {tmp_path}"):
        load_inverter(tmp_path)
