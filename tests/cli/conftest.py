"""`featinv` run in this process, with a bundled pipeline of random tiny weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from featinv_diffusion.diffusion import folders as bundled
from featinv_diffusion.diffusion.folders import CardInfo
from tests import tiny
from train.tiny_family.pack import write_bundled


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Featinv = Callable[..., Outcome]


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the package's assets, with the member `tiny/convnext`."""
    assets = tmp_path_factory.mktemp("assets")
    pipeline = tiny.make_pipeline()
    pipeline.register_to_config(default_num_inference_steps=2)
    write_bundled(pipeline, assets / "tiny", "convnext", CardInfo("a test"))
    return assets


@pytest.fixture
def featinv(
    family: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Featinv:
    """Runs `featinv` with arguments, in an empty folder; no terminal is attached."""
    from featinv_diffusion.cli import main

    folder = tmp_path / "cwd"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(bundled, "ASSETS", family)
    # `--device auto` is the CPU also where there is a GPU, whose last bits are others.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["featinv", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three pictures, one of them in a folder below."""
    folder = tmp_path / "photos"
    for name, image in zip(["a.png", "b.jpg", "more/c.png"], tiny.make_images(3), strict=True):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = (image.permute(1, 2, 0) * 255).byte().numpy()
        Image.fromarray(pixels).resize((90, 70)).save(path)
    return folder
