"""`featinv sample`: what it writes, what it says, and its exit codes."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TimmWrapperModel

import featinv_diffusion
from featinv_diffusion import files
from featinv_diffusion.backbones.names import _tell_short_name
from featinv_diffusion.images import read_image
from featinv_diffusion.seeds import derive_seed
from tests import tiny
from tests.cli.conftest import Featinv

SETTINGS = {
    "pipeline": "tiny/convnext",
    "backbone": "tiny/convnext",
    "layer": "last",
    "n_samples": 4,
    "seed": 0,
    "steps": 2,
    "scheduler": "ddim",
    "guidance_scale": 1.75,
    "guidance": "text",
    "strength": 1.0,
    "batch_size": 8,
    "attention": "native",
    "device": "cpu",
    "dtype": "float32",
}
PER_IMAGE = {
    "scope_p_value",
    "input",
    "outputs",
    "seed",
    "cosine",
    "cosine_shuffled",
    "top1_match",
    "top5_match",
}


def load(folder: str | Path) -> dict:
    return json.loads((Path(folder) / "manifest.json").read_text())


def names(folder: str | Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file()}


# ---- what it writes ------------------------------------------------------------------------------


def test_without_arguments_it_samples_the_photo_with_the_bundled_pipeline(featinv: Featinv):
    done = featinv("sample")
    assert done.code == 0
    assert done.err == ""  # no bar in a pipe, and no chatter of libraries
    first, *rest = done.out.splitlines()
    assert "built-in photo" in first
    assert "tiny/convnext" in first
    assert len(rest) == 3
    assert "scope_p_value is null" in rest[1]
    assert names("outputs/sample") == {
        *(f"flower_{j}.png" for j in range(4)),
        "grid.png",
        "manifest.json",
    }
    manifest = load("outputs/sample")
    assert {key: manifest[key] for key in SETTINGS} == SETTINGS
    assert manifest["version"] == featinv_diffusion.__version__
    assert manifest["failures"] == []


def test_a_folder_becomes_one_entry_per_image_with_one_value_per_sample(
    featinv: Featinv, photos: Path
):
    done = featinv("sample", photos, "--n-samples", 2, "--seed", 5, "-o", "out")
    assert (done.code, done.err) == (0, "")
    manifest = load("out")
    entries, ids = manifest["images"], ("a.png", "b.jpg", "more/c.png")
    assert [Path(entry["input"]) for entry in entries] == [photos / name for name in ids]
    assert entries[2]["outputs"] == ["more/c_0.png", "more/c_1.png"]
    for entry, image_id in zip(entries, ids, strict=True):
        assert set(entry) == PER_IMAGE
        assert entry["seed"] == [derive_seed(5, image_id.split("/")[-1], j) for j in range(2)]
        for key in ("cosine", "cosine_shuffled"):
            assert len(entry[key]) == 2
            assert all(-1 <= value <= 1 for value in entry[key])
        for key in ("top1_match", "top5_match"):
            assert [type(value) for value in entry[key]] == [bool, bool]
        assert all(
            not one or five
            for one, five in zip(entry["top1_match"], entry["top5_match"], strict=True)
        )
        assert all(read_image(Path("out") / name).size == (64, 64) for name in entry["outputs"])
    grid = read_image("out/grid.png")
    assert grid.height > 3 * 192 > grid.width / 1.5


def test_settings_given_are_settings_recorded_and_used(featinv: Featinv, photos: Path):
    given = {
        "n_samples": 1,
        "seed": -7,
        "steps": 3,
        "scheduler": "unipc",
        "guidance_scale": 0.0,
        "guidance": "features",
        "strength": 0.5,
        "batch_size": 2,
        "dtype": "bfloat16",
    }
    options = [x for k, v in given.items() for x in (f"--{k.replace('_', '-')}", v)]
    assert featinv("sample", photos / "a.png", *options, "-o", "out").code == 0
    manifest = load("out")
    assert {key: manifest[key] for key in given} == given
    assert featinv("sample", photos / "a.png", "--n-samples", 1, "-o", "plain").code == 0
    assert read_image("out/a_0.png").tobytes() != read_image("plain/a_0.png").tobytes()


@pytest.mark.parametrize("kind", ["folder", "bundled"])
def test_pipelines_by_folder_and_bundled_name(featinv: Featinv, photos, saved_pipeline, kind):
    name = str(saved_pipeline) if kind == "folder" else "tiny/convnext"
    arguments = ["--pipeline", name, "--steps", 2, "--n-samples", 1]
    done = featinv("sample", photos / "a.png", *arguments, "-o", "out")
    assert (done.code, done.err) == (0, "")
    assert "Using" not in done.out
    assert load("out")["pipeline"] == name


def test_a_pipeline_without_a_head_gives_null(featinv: Featinv, photos, tmp_path):
    config = tiny.make_backbone().config
    headless = TimmWrapperModel(config).eval()
    tiny.make_pipeline(backbone=headless).save_pretrained(tmp_path / "headless")
    arguments = ["--pipeline", tmp_path / "headless", "--steps", 2, "--n-samples", 2]
    done = featinv("sample", photos / "a.png", *arguments, "-o", "out")
    assert done.code == 0, done.err
    assert "top-5" not in done.out
    (entry,) = load("out")["images"]
    assert entry["top1_match"] == entry["top5_match"] == [None, None]


def test_an_older_manifest_does_not_outlive_its_pictures(featinv: Featinv, photos, monkeypatch):
    assert featinv("sample", photos / "a.png", "-o", "out").code == 0
    fill_disk_after(monkeypatch, 3)
    done = featinv("sample", photos / "a.png", "--seed", 1, "-o", "out")
    assert done.code == 2
    assert not Path("out/manifest.json").exists()


# ---- odd but valid -------------------------------------------------------------------------------


def test_odd_pictures_are_sampled_and_what_was_done_is_said(featinv: Featinv, tmp_path):
    folder = tmp_path / "odd"
    folder.mkdir()
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(folder / "deep.png")
    Image.new("RGBA", (20, 30), (255, 0, 0, 100)).save(folder / "glass.png")
    rgb.convert("P").save(folder / "palette.png")
    Image.new("RGB", (1, 1), "red").save(folder / "pixel.png")
    Image.new("RGB", (3000, 1), "red").save(folder / "sliver.png")
    rgb.save(folder / "moving.gif", save_all=True, append_images=[rgb.rotate(180)])
    done = featinv("sample", folder, "--n-samples", 1, "-o", "out")
    assert done.code == 0
    assert len(load("out")["images"]) == 7
    notes = [line for line in done.err.splitlines() if line]
    assert all(line.startswith("Note: ") for line in notes)
    said = {
        "cmyk.jpg": "CMYK",
        "deep.png": "16 bits",
        "glass.png": "white",
        "moving.gif": "first one",
    }
    assert len(notes) == len(said)
    for name, words in said.items():
        assert any(name in line and words in line for line in notes)


# ---- bad input -----------------------------------------------------------------------------------


def refused(done, *words: str) -> None:
    """Exit code 2, one sentence on stderr that has the words, no traceback, no manifest."""
    assert done.code == 2
    assert "Traceback" not in done.err
    assert done.err.startswith("Error: ")
    for word in words:
        assert word in done.err
    assert not Path("out/manifest.json").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "nothing is there"),
        (b"", "not a picture that can be read"),
        (b"hello", "not a picture that can be read"),
        ("cut", "cut off or corrupt"),
    ],
)
def test_one_bad_picture_is_bad_input(featinv: Featinv, photos, tmp_path, content, words):
    path = tmp_path / "bad.png"
    if content == "cut":
        noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:4000])
    elif content is not None:
        path.write_bytes(content)
    refused(featinv("sample", path, "-o", "out"), "bad.png", words)


def test_some_bad_pictures_of_a_folder_are_listed_and_the_rest_is_finished(
    featinv: Featinv, photos
):
    (photos / "aa.jpg").write_text("hello")
    (photos / "zz.png").write_bytes(b"")
    done = featinv("sample", photos, "--n-samples", 1, "-o", "out")
    assert done.code == 1
    failed = [line for line in done.err.splitlines() if line.startswith("Failed: ")]
    assert len(failed) == 2
    manifest = load("out")
    assert [Path(e["input"]).name for e in manifest["images"]] == ["a.png", "b.jpg", "c.png"]
    assert [Path(f["input"]).name for f in manifest["failures"]] == ["aa.jpg", "zz.png"]
    assert "not a picture" in manifest["failures"][0]["error"]
    assert "grid.png" in names("out")


def test_a_folder_of_bad_pictures_only(featinv: Featinv, tmp_path):
    for name in ("a.png", "b.png"):
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / name).touch()
    refused(featinv("sample", tmp_path / "bad", "-o", "out"), "No picture could be used", "b.png")


def test_a_folder_without_pictures(featinv: Featinv, tmp_path):
    refused(featinv("sample", tmp_path / "cwd", "-o", "out"), "holds no picture")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--backbone", "convnxt"], ["'convnxt'", "did you mean 'convnext'"]),
        (["--backbone", "tiny/resnet"], ["No bundled pipeline", "'tiny/resnet'"]),
        (["--layer", "stages.2"], ["'last'", "'stages.2'"]),
        (["--pipeline", "tiny/convnet"], ["tiny/convnext"]),
        (["--pipeline", "./none"], ["none"]),
        (["--scheduler", "unpic"], ["did you mean 'unipc'"]),
        (["--guidance", "both"], ["'both'", "text, features"]),
        (["--dtype", "float8"], ["'float8'", "bfloat16"]),
        (["--device", "tpu9"], ["'tpu9'"]),
        (["--device", "cuda:99"], ["'cuda:99'"]),
        (["--attention", "flash"], ["'flash'", "native, xformers"]),
        (["--n-samples", "0"], ["n_samples must be at least 1"]),
        (["--steps", "0"], ["steps must be at least 1"]),
        (["--batch-size", "-1"], ["batch_size must be at least 1"]),
        (["--guidance-scale", "nan"], ["guidance_scale must be a finite number"]),
        (["--strength", "inf"], ["strength must be a finite number"]),
    ],
)
def test_bad_options(featinv: Featinv, photos, options, words):
    refused(featinv("sample", photos, *options, "-o", "out"), *words)


@pytest.mark.parametrize("options", [["--steps", "many"], ["--nonsense"]])
def test_what_the_parser_refuses(featinv: Featinv, photos, options):
    done = featinv("sample", photos, *options)
    assert done.code == 2
    assert "Traceback" not in done.err


def test_more_steps_than_the_schedule_has(featinv: Featinv, photos):
    refused(featinv("sample", photos, "--steps", 5000, "-o", "out"), "5000", "1000")


def test_a_pipeline_of_another_backbone_is_refused_and_both_are_named(
    featinv: Featinv, photos, saved_pipeline
):
    done = featinv(
        "sample", photos, "--pipeline", saved_pipeline, "--backbone", "tiny/swin", "-o", "out"
    )
    refused(done, "'tiny/convnext'", "'tiny/swin'")


def test_a_short_name_is_the_bundled_backbone_and_no_other(featinv: Featinv, photos):
    _tell_short_name.cache_clear()
    options = ["sample", photos / "a.png", "--n-samples", 1, "--steps", 1]
    done = featinv(*options, "-o", "short", "--backbone", "convnext")
    note = "Note: 'convnext' means the bundled tiny/convnext; the paper's model is the timm id"
    assert done.code == 0
    assert done.err.startswith(note)
    options += ["--pipeline", "tiny/convnext"]
    for name in ("convnext", "tiny/convnext"):
        done = featinv(*options, "-o", "same", "--backbone", name)
        assert (done.code, done.err) == (0, "")
    done = featinv(*options, "-o", "out", "--backbone", "timm/convnext_base.fb_in22k_ft_in1k")
    refused(done, "'tiny/convnext'", "'convnext_base.fb_in22k_ft_in1k'")


def test_a_pipeline_of_an_earlier_version_reads_the_papers_model(
    featinv: Featinv, photos, saved_pipeline, tmp_path
):
    """It was trained by `convnext` when that word meant the paper's model."""
    old = shutil.copytree(saved_pipeline, tmp_path / "old")
    path = old / "controlnet" / "config.json"
    config = json.loads(path.read_text())
    config["feature_spec"]["backbone"] = "convnext"
    path.write_text(json.dumps(config))
    options = ["--pipeline", old, "--n-samples", 1, "--steps", 1, "-o", "out"]
    assert featinv("sample", photos / "a.png", *options).code == 0
    manifest = json.loads(Path("out/manifest.json").read_text())
    assert manifest["backbone"] == "convnext_base.fb_in22k_ft_in1k"
    manifest["backbone"] = "convnext"  # as it was recorded then
    Path("out/manifest.json").write_text(json.dumps(manifest))
    done = featinv("replay", "out", "-o", "again")
    assert done.code == 0, done.err
    assert "1 of 1 pictures are identical" in done.out


def test_a_controlnet_of_another_backbone_in_the_folder(featinv: Featinv, photos, tmp_path):
    wide = tiny.make_backbone(dims=(8, 16, 24, 40))
    tiny.make_pipeline(backbone=wide).save_pretrained(tmp_path / "mixed")
    done = featinv("sample", photos, "--pipeline", tmp_path / "mixed", "-o", "out")
    refused(done, "32×8×8", "40×8×8")


def test_a_pipeline_folder_with_a_file_missing(featinv: Featinv, photos, tmp_path):
    folder = tmp_path / "broken"
    tiny.make_pipeline().save_pretrained(folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    done = featinv("sample", photos, "--pipeline", folder, "-o", "out")
    refused(done, "vae")


def test_weights_with_nan_give_no_pictures(featinv: Featinv, photos, tmp_path):
    pipeline = tiny.make_pipeline()
    next(pipeline.backbone.parameters()).data.fill_(float("nan"))
    pipeline.save_pretrained(tmp_path / "nan")
    done = featinv("sample", photos, "--pipeline", tmp_path / "nan", "--steps", 2, "-o", "out")
    refused(done, "NaN")


def test_xformers_that_is_not_installed(featinv: Featinv, photos, monkeypatch):
    find = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "xformers" else find(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    done = featinv("sample", photos, "--attention", "xformers", "-o", "out")
    refused(done, "pip install 'featinv-diffusion[xformers]'")


# ---- the disk ------------------------------------------------------------------------------------


def fill_disk_after(monkeypatch, n_files: int) -> None:
    """The disk is full when file number n + 1 is moved to its place."""
    moved, replace = [], os.replace

    def full(source, target):
        moved.append(target)
        if len(moved) > n_files:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", full)


@pytest.mark.parametrize("n_files", [0, 1, 3, 5, 6])
def test_a_full_disk_is_a_sentence_and_leaves_whole_files(
    featinv: Featinv, photos, monkeypatch, n_files
):
    """At the note of who holds the folder; after none, two or all samples; after the grid."""
    fill_disk_after(monkeypatch, n_files)
    done = featinv("sample", photos / "a.png", "-o", "out")
    refused(done, "disk is full", "out")
    written = names("out")
    assert len(written) == max(n_files - 1, 0)  # the note is gone
    assert not any(name.endswith(".part") for name in written)
    for name in written:
        read_image(Path("out") / name)


def test_an_output_that_is_a_file(featinv: Featinv, photos):
    Path("out").touch()
    refused(featinv("sample", photos, "-o", "out"), "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_may_not_be_written(featinv: Featinv, photos):
    Path("out").mkdir(mode=0o500)
    refused(featinv("sample", photos, "-o", "out"), "Permission denied")


def test_a_device_without_memory(featinv: Featinv, photos, monkeypatch):
    from featinv_diffusion.inverters import DiffusionInverter

    def run_out(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DiffusionInverter, "_invert", run_out)
    refused(featinv("sample", photos, "-o", "out"), "--batch-size")


def test_an_output_folder_above_the_input(featinv: Featinv, photos: Path):
    done = featinv("sample", photos, "-o", photos)
    assert done.code == 2
    assert "Name another output folder" in done.err
    done = featinv("sample", photos / "a.png", "--n-samples", 1, "-o", photos)
    assert done.code == 0
    assert (photos / "manifest.json").is_file()


def test_a_url_is_called_one(featinv: Featinv, photos: Path):
    done = featinv("interpolate", "https://example.org/a.png", photos / "a.png")
    assert done.code == 2
    assert "only a URL" in done.err
