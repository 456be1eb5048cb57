"""The operators of the tiny family are fitted once, on its images, for its packed encoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from featinv_diffusion.features.operators import Operator
from featinv_diffusion.images import to_pil, write_png
from featinv_diffusion.inverters.reconstructor import load_reconstructor
from tests import tiny
from tests.inverters import encoders
from train.tiny_family import family as pack_operators


def test_operators_fit_the_packed_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    member = encoders.save_member(tmp_path / "tiny" / pack_operators.MEMBER)
    for i, image in enumerate(to_pil(tiny.make_images(12))):
        write_png(image, tmp_path / f"images/a/{i:02d}.png")
    text = f"data: {{root: {tmp_path / 'images'}, classes: null}}\n"
    (tmp_path / f"reconstructor-{pack_operators.MEMBER}.yaml").write_text(text)
    monkeypatch.setattr(pack_operators, "CONFIGS", tmp_path)
    monkeypatch.setattr(pack_operators, "N_IMAGES", 10)
    paths = list(pack_operators.fit_operators(tmp_path / "tiny"))
    assert [path.stem for path in paths] == ["swap", "suppress", "colourise"]
    backbone = load_reconstructor(str(member)).backbone
    for path in paths:
        operator = Operator.load(path)
        assert operator.spec == backbone.spec
        assert operator.matrix.dtype == torch.float32
        assert len(operator.record.image_digests) == 10
    assert not list(pack_operators.fit_operators(tmp_path / "tiny"))


def test_nothing_is_fitted_without_the_encoder(tmp_path: Path) -> None:
    assert not list(pack_operators.fit_operators(tmp_path))
