"""`featinv operator fit`, `apply` and `analyze`, before modular and diffusion inverters."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featinv_diffusion.features import operators as operator_files
from featinv_diffusion.features.operators import Operator
from featinv_diffusion.images import center_square, read_image, to_pil, write_png
from featinv_diffusion.inverters import modular
from featinv_diffusion.studies.operator_pictures import AppliedOperator
from tests.cli.conftest import Featinv
from tests.inverters import small
from tests.tiny import make_images


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i, image in enumerate(to_pil(make_images(14))):
        write_png(image, folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def backbone(family: Path) -> str:
    """That of the bundled pipeline, by its folder."""
    return f"hf/{family / 'tiny/convnext/backbone'}"


@pytest.fixture(scope="module")
def swap(backbone: str, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fitted on ten of the fourteen pictures."""
    from featinv_diffusion.backbones import load_backbone
    from featinv_diffusion.studies.operators import fit_operator

    path = tmp_path_factory.mktemp("fitted") / "swap.safetensors"
    model = load_backbone(backbone)
    fit_operator(model, pictures, "swap", n_images=10, batch_size=4).save(path)
    return path


@pytest.fixture
def vit(tmp_path: Path, monkeypatch) -> Path:
    path = small.make_vit_path()
    monkeypatch.setattr(modular, "load_path", lambda _info: small.make_vit_path())
    small.make_vit_inverses(path).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_fit_writes_what_it_was_fitted_on(swap: Path):
    operator = Operator.load(swap)
    record = operator.record
    assert (record.operation, record.method, record.n_locations) == ("swap", "orthogonal", 640)
    assert len(set(record.image_digests)) == 10
    assert (operator.spec.channels, operator.spec.grid) == (32, (8, 8))
    torch.testing.assert_close(operator.matrix @ operator.matrix.T, torch.eye(32).double())


def test_fit_says_how_it_went(featinv: Featinv, backbone, pictures):
    given = [
        "--backbone",
        backbone,
        "--operation",
        "suppress",
        "--alpha",
        "0.5",
        "--data",
        pictures,
    ]
    done = featinv("operator", "fit", *given, "--method", "linear", "--n-images", 3)
    assert done.code == 0, done.err
    assert "suppress (alpha 0.5, channel blue) on hf/" in done.out
    assert "of 192 locations of 3 images; rank 32 of 32" in done.out
    assert Operator.load(Path("operator.safetensors")).record.ridge == 1e-6


def test_analyze_measures_on_the_other_pictures(featinv: Featinv, swap, pictures, tmp_path):
    given = ["--operator", swap, "--data", pictures, "--inverter", "diffusion"]
    options = ["--pipeline", "tiny/convnext", "--n-images", 4, "-o", tmp_path / "out"]
    done = featinv("operator", "analyze", *given, *options)
    assert done.code == 0, done.err
    assert "Held out, power 2: cosine" in done.out
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["n_images"] == 4
    assert metrics["settings"]["pipeline"] == "tiny/convnext"
    assert (metrics["settings"]["n_images"], metrics["settings"]["powers"]) == (4, [1, 2])
    held = metrics["held_out"]["1"]
    assert held["cosine"]["value"] > held["cosine_nothing"]["value"]
    assert held["delta_e_floor"]["n"] == 4
    for name in ("eigenvalues", "measures", "pictures", "powers"):
        assert (tmp_path / f"out/{name}.png").is_file()
    more = featinv("operator", "analyze", *given, "--n-images", 5)
    assert more.code == 2
    assert "5 images that the operator was not fitted on were asked for" in more.err
    both = featinv("operator", "analyze", *given, "--backbone", "tiny/convnext")
    assert (both.code, "with --inverter leave it out" in both.err) == (2, True)


def test_analyze_of_features_alone(featinv: Featinv, swap, pictures, backbone, tmp_path):
    given = ["--operator", swap, "--data", pictures, "--n-images", 4, "--power", "1"]
    done = featinv("operator", "analyze", *given, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    settings = metrics["settings"]
    assert (settings["inverter"], settings["backbone"]) == (None, backbone)
    assert (settings["data"], settings["split"]) == (str(pictures), "validation")
    assert (settings["n_images"], settings["powers"], settings["seed"]) == (4, [1], 0)
    assert (metrics["n_images"], metrics["seed"], len(metrics["ids_sha256"])) == (4, 0, 64)
    assert "delta_e_floor" not in metrics["held_out"]["1"]
    assert not (tmp_path / "out/pictures.png").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pipeline", "tiny/convnext"], "--pipeline must come with --inverter"),
        (["--stage", "last", "--steps", 4], "--stage and --steps must come with --inverter"),
        (["--n-images", 1], "n_images must be at least 2"),
        (["--batch-size", 0], "batch_size must be at least 1, got 0"),
        (["--power", "1,1001"], "whole number in 0 … 1000, got 1001"),
        (["--power", "9" * 20], "whole number in 0 … 1000"),
        (["--output", "a.txt"], "--output must be a folder, but a.txt is a file"),
        (["--output", "a.txt/b/c"], "below a.txt, which is a file"),
    ],
)
def test_what_cannot_be_analyzed(featinv: Featinv, swap, pictures, arguments, words):
    Path("a.txt").write_text("a file")
    given = ["--operator", swap, "--data", pictures, "--n-images", 4]
    done = featinv("operator", "analyze", *given, *arguments)
    assert done.code == 2
    assert words in done.err
    assert Path("a.txt").read_text() == "a file"
    assert not Path("outputs/operator").exists()


@pytest.mark.parametrize(("operation", "is_grey"), [("colourise", True), ("swap", False)])
def test_apply_gives_an_operator_what_its_operation_starts_from(
    featinv: Featinv, swap, photos, tmp_path, operation, is_grey, monkeypatch
):
    seen: list[Image.Image] = []
    save = AppliedOperator.save

    def spy(applied, folder):
        seen.append(applied.images[0].original)
        return save(applied, folder)

    monkeypatch.setattr(AppliedOperator, "save", spy)
    fitted = Operator.load(swap)
    changed = replace(fitted, record=replace(fitted.record, operation=operation))
    changed.save(tmp_path / "other.safetensors")
    given = ["--operator", tmp_path / "other.safetensors", "--inverter", "diffusion"]
    done = featinv("operator", "apply", photos / "a.png", *given, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    shown = np.asarray(seen[0])
    square = np.asarray(center_square(read_image(photos / "a.png"), 64)).astype(float)
    if is_grey:
        square = np.repeat((square @ [0.2989, 0.587, 0.114])[..., None], 3, axis=2)
    assert np.abs(shown - square).max() <= 0.51
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["given"] == ("what colourise starts from" if is_grey else "the picture")
    (tmp_path / "grey").mkdir()
    write_png(seen[0], tmp_path / "grey/a.png")
    options = ["--n-samples", 1, "-o", tmp_path / "sampled"]
    assert featinv("sample", tmp_path / "grey/a.png", *options).code == 0
    sampled = np.asarray(read_image(tmp_path / "sampled/a_0.png")).astype(float)
    unedited = np.asarray(read_image(tmp_path / "out/a_power0.png")).astype(float)
    assert np.abs(sampled - unedited).mean() < 3  # the grey was not rounded to 8 bits before


def test_apply_says_where_the_operation_is_not_known(featinv: Featinv, swap, photos, tmp_path):
    fitted = Operator.load(swap)
    other = replace(fitted, record=replace(fitted.record, operation="brighten"))
    other.save(tmp_path / "other.safetensors")
    given = ["--operator", tmp_path / "other.safetensors", "--inverter", "diffusion"]
    done = featinv("operator", "apply", photos / "a.png", *given, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "'brighten' is not one of this package" in done.err
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["given"] == "the picture, for the operation is not known"


def test_apply_before_diffusion(featinv: Featinv, swap, photos, tmp_path):
    given = ["--operator", swap, "--inverter", "diffusion", "--power", "0,1,2"]
    done = featinv("operator", "apply", photos, *given, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["command"] == "operator apply"
    assert (manifest["operator"], manifest["powers"]) == (str(swap), [0, 1, 2])
    assert manifest["record"]["operation"] == "swap"
    entries = {Path(entry["input"]).name: entry for entry in manifest["images"]}
    assert entries["c.png"]["outputs"] == [f"more/c_power{n}.png" for n in range(3)]
    for entry in manifest["images"]:
        assert len(entry["cosine"]) == 3
        assert all(
            Image.open(tmp_path / "out" / name).size == (64, 64) for name in entry["outputs"]
        )
    assert (tmp_path / "out/grid.png").is_file()
    replayed = featinv("replay", tmp_path / "out")
    assert (replayed.code, "which has no replay" in replayed.err) == (2, True)
    sampled = featinv("sample", photos / "a.png", "--n-samples", 1, "-o", tmp_path / "sampled")
    assert sampled.code == 0
    names = ("sampled/a_0.png", "out/a_power0.png", "out/a_power1.png")
    sample, same, changed = (np.asarray(Image.open(tmp_path / name), int) for name in names)
    assert (same != sample).sum() <= 3  # the batches differ, which may round a pixel otherwise
    assert (changed != sample).sum() > 100


def test_a_modular_inverter_takes_operators_of_its_stage(featinv: Featinv, vit, pictures, tmp_path):
    from featinv_diffusion.inverters.chain import StageBackbone
    from featinv_diffusion.studies.operators import fit_operator

    backbone = StageBackbone(small.make_vit_path(), "last")
    operator = fit_operator(backbone, pictures, "suppress", method="linear", n_images=8)
    operator.save(tmp_path / "blue.safetensors")
    given = ["--operator", tmp_path / "blue.safetensors", "--inverter", vit]
    options = ["--data", pictures, "--n-images", 3, "--power", "1,4", "-o", tmp_path / "out"]
    done = featinv("operator", "analyze", *given, "--stage", "last", *options)
    assert done.code == 0, done.err
    assert set(json.loads((tmp_path / "out/metrics.json").read_text())["held_out"]) == {"1", "4"}
    one = pictures / "00.png"
    applied = featinv("operator", "apply", one, *given, "--stage", "last", "-o", tmp_path / "one")
    assert applied.code == 0, applied.err
    assert "only pipelines of the diffusion inverter hold statistics" in applied.out
    wrong = featinv("operator", "apply", one, *given, "--stage", "encoder")
    assert wrong.code == 2
    assert "acts on a map of small/vit at layer 'last'" in wrong.err


def test_a_bundled_operator_goes_by_its_name(featinv: Featinv, swap, photos, tmp_path, monkeypatch):
    folder = tmp_path / "assets/tiny/convnext/operators"
    folder.mkdir(parents=True)
    shutil.copy(swap, folder / "swap.safetensors")
    monkeypatch.setattr(operator_files, "ASSETS", tmp_path / "assets")
    assert operator_files.list_operators() == ["tiny/convnext/swap"]
    given = ["--inverter", "diffusion", "-o", tmp_path / "out"]
    done = featinv("operator", "apply", photos, "--operator", "tiny/convnext/swap", *given)
    assert done.code == 0, done.err
    wrong = featinv("operator", "apply", photos, "--operator", "tiny/convnext/swop", *given)
    assert (wrong.code, "did you mean 'tiny/convnext/swap'" in wrong.err) == (2, True)


def test_a_picture_that_cannot_be_read_leaves_the_others(featinv: Featinv, swap, photos, tmp_path):
    (photos / "broken.png").write_bytes(b"no picture")
    given = ["--operator", swap, "--inverter", "diffusion", "-o", tmp_path / "out"]
    done = featinv("operator", "apply", photos, *given)
    assert done.code == 1
    assert "broken.png" in done.err
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert (len(manifest["images"]), len(manifest["failures"])) == (3, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--operation", "swop"], "did you mean 'swap'"),
        (["--operation", "swap", "--alpha", "0.5"], "takes no parameters, got alpha"),
        (["--operation", "suppress", "--alpha", "2"], "must lie in 0 … 1"),
        (["--operation", "swap", "--method", "rotation"], "No method is named 'rotation'"),
        (["--operation", "swap", "--ridge", "-1"], "ridge must be at least 0"),
        (["--operation", "swap", "--n-images", "15"], "there are 14 among 14"),
        (["--operation", "swap", "--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--operation", "swap", "-o", "."], "--output must be a file, but . is a folder"),
        (["--operation", "swap", "-o", "a.txt/q"], "a.txt/q is below a.txt, which is a file"),
    ],
)
def test_what_cannot_be_fitted(featinv: Featinv, backbone, pictures, arguments, words):
    Path("a.txt").write_text("a file")
    done = featinv("operator", "fit", "--backbone", backbone, "--data", pictures, *arguments)
    assert done.code == 2
    assert words in done.err
    assert not Path("operator.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--power", "1,x"], "whole numbers with commas"),
        (["--power", "1,1"], "distinct whole numbers"),
        (["--power", "-1"], "distinct whole numbers"),
        (["--power", "1001"], "whole numbers in 0 … 1000"),
        (["--power", "9" * 20], "whole numbers in 0 … 1000"),
        (["--output", "a.txt"], "--output must be a folder, but a.txt is a file"),
        (["--operator", "nothing.safetensors"], "must be a file of featinv operator fit"),
    ],
)
def test_what_cannot_be_applied(featinv: Featinv, swap, photos, arguments, words):
    Path("a.txt").write_text("a file")
    given = ["--operator", swap, "--inverter", "diffusion", *arguments]
    done = featinv("operator", "apply", photos, *given)
    assert done.code == 2
    assert words in done.err
