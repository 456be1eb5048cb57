"""`featinv evaluate`: what it writes, that it can be killed, on any number of processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.models import AlexNet

import featinv_diffusion
from featinv_diffusion.evaluation import models
from featinv_diffusion.evaluation.evaluator import Evaluator
from featinv_diffusion.images import read_image, to_pil
from featinv_diffusion.metrics.extractors import ClassifierFeatures
from tests import tiny
from tests.cli.conftest import Featinv

ROOT = Path(featinv_diffusion.__file__).parents[1]
N_IMAGES, SHARD_SIZE = 7, 2
OPTIONS = ("--shard-size", SHARD_SIZE, "--n-null-images", 3, "--batch-size", 2)


@pytest.fixture(autouse=True)
def _fresh_accelerator(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parquet file as the Hub has them, whose classes are called as those of the backbone."""
    path = tmp_path_factory.mktemp("data") / "validation.parquet"
    names = [f"class {i}" for i in (3, 1, 2)]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=names)})
    pictures = to_pil(tiny.make_images(N_IMAGES))
    rows = {"image": pictures, "label": [i % 3 for i in range(N_IMAGES)]}
    Dataset.from_dict(rows, features=features).to_parquet(path)
    return path


def load(folder: str | Path) -> dict:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads((Path(folder) / "metrics.json").read_text(), parse_constant=refuse)


def without_command(metrics: dict) -> dict:
    return {key: value for key, value in metrics.items() if key != "command"}


# ---- what it writes ------------------------------------------------------------------------------


def test_it_writes_figures_with_nulls_and_ceilings(featinv: Featinv, table: Path):
    done = featinv("evaluate", "--data", table, *OPTIONS, "--output", "out")
    assert done.err == ""
    assert done.code == 0
    cost = "To make: 7 samples of the images, 3 more for the null of permuted cells, 3 more, "
    assert done.out.startswith(cost)
    assert "7 images: centred cosine " in done.out
    metrics = load("out")
    for name in ("cosine", "top1_match", "top5_match", "psnr", "ssim"):
        figure = metrics[name]
        assert figure["low"] <= figure["value"] <= figure["high"]
        assert figure["n"] == N_IMAGES
        assert figure["nulls"]["other_image"]["n"] == N_IMAGES
        assert figure["nulls"]["permuted_cells"]["n"] == 3
        assert figure["nulls"]["prior_only"]["n"] == 3
    assert set(metrics["ceilings"]["vae_round_trip"]) >= {"cosine", "top5_match", "psnr", "ssim"}
    # Random weights answer with whatever they like, but 64 px is 64 px.
    assert metrics["ceilings"]["resized_original"]["cosine"]["value"] == pytest.approx(1, abs=1e-5)
    assert metrics["label_accuracy"]["labels_matched_by"] == "name"
    assert metrics["distribution"]["frechet_distance_tiny/convnext"]["n"] == N_IMAGES
    assert metrics["data"]["n_classes"] == 3
    assert metrics["failures"] == []
    table_text = Path("out/metrics.md").read_text()
    assert "| cosine | " in table_text
    assert "permuted cells" in table_text


def test_the_settings_are_resolved_and_all_there(featinv: Featinv, table: Path):
    assert featinv("evaluate", "--data", table, "--n-images", 2, "-o", "out").code == 0
    metrics = load("out")
    settings = metrics["settings"]
    assert settings["pipeline"] == "tiny/convnext"
    assert (settings["steps"], settings["scheduler"]) == (2, "ddim")
    assert (settings["guidance"], settings["guidance_scale"]) == ("text", 1.75)
    assert settings["n_images"] == 2
    assert metrics["command"].startswith("featinv evaluate --data")
    assert metrics["environment"]["torch"] == version("torch")
    assert metrics["version"] == featinv_diffusion.__version__


def test_rows_agree_with_the_figures(featinv: Featinv, table: Path):
    assert featinv("evaluate", "--data", table, *OPTIONS, "-o", "out").code == 0
    rows = pq.read_table("out/per_image.parquet")
    metrics = load("out")
    assert len(set(rows["id"].to_pylist())) == N_IMAGES
    for name in ("cosine", "top5_match", "vae_round_trip_psnr"):
        figure = metrics.get(name) or metrics["ceilings"]["vae_round_trip"]["psnr"]
        assert np.mean(rows[name].to_numpy()) == pytest.approx(figure["value"])
    assert np.isfinite(rows["prior_only_cosine"].to_numpy()).sum() == 3


def test_the_pictures_are_those_of_sample(featinv: Featinv, photos: Path):
    assert featinv("evaluate", "--data", photos, "--save-images", "-o", "evaluated").code == 0
    assert featinv("sample", photos, "--n-samples", 1, "-o", "sampled").code == 0
    for name, stem in (("a.png", "a"), ("b.jpg", "b"), ("more/c.png", "more/c")):
        one = np.asarray(read_image(f"evaluated/images/{name}.png"), dtype=int)
        two = np.asarray(read_image(f"sampled/{stem}_0.png"), dtype=int)
        assert np.abs(one - two).max() <= 1
    manifest = json.loads(Path("sampled/manifest.json").read_text())
    cosine = np.mean([entry["cosine"][0] for entry in manifest["images"]])
    assert load("evaluated")["cosine"]["value"] == pytest.approx(cosine, abs=1e-3)


def test_other_backbones(featinv: Featinv, table: Path, tmp_path: Path):
    tiny.make_backbone(dims=(8, 8, 16, 16)).save_pretrained(tmp_path / "other")
    name = f"hf/{tmp_path / 'other'}"
    done = featinv("evaluate", "--data", table, "--evaluated-by", name, "-o", "out")
    assert (done.code, done.err) == (0, "")
    figures = load("out")["evaluated_by"][name]
    measured = {"centred_cosine", "cosine", "top1_match", "top5_match", "normalised_agreement"}
    assert set(figures) == measured
    assert figures["cosine"]["nulls"]["other_image"]["n"] == N_IMAGES


def test_a_config_and_options_beside_it(featinv: Featinv, table: Path):
    Path("a.yaml").write_text(f"data: {table}\nn_images: 5\nseed: 3\nn_null_images: 0\n")
    done = featinv("evaluate", "--config", "a.yaml", "--n-images", 2, "-o", "out")
    assert done.code == 0
    metrics = load("out")
    assert (metrics["n_images"], metrics["settings"]["seed"]) == (2, 3)
    assert metrics["cosine"]["nulls"]["prior_only"] is None


@pytest.mark.parametrize("name", ["evaluation/imagenet", "evaluation/tiny", "tiny/held-back"])
def test_the_configs_of_the_repository_can_be_read(name: str):
    from featinv_diffusion.config import load_flat
    from featinv_diffusion.evaluation.settings import EvaluationSettings

    path = ROOT / "configs" / f"{name}.yaml"
    assert load_flat(EvaluationSettings, path, {}).sampling.batch_size == 32


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "must be named, e.g. --data validation.parquet"),
        (["--data", "none.parquet"], "A parquet file must exist at none.parquet"),
        (["--data", "TABLE", "--n-images", 8], "There are 7 images to choose from"),
        (["--data", "TABLE", "--n-images", 0], "n_images must be at least 1"),
        (["--data", "TABLE", "--backbone", "convnxt"], "did you mean 'convnext'"),
        (["--data", "TABLE", "--evaluated-by", "vitt"], "vitt"),
        (["--data", "TABLE", "--selection", "last"], "No selection is named 'last'"),
        (["--data", "TABLE", "--config", "none.yaml"], "there is no file at 'none.yaml'"),
        (["--data", "TABLE", "--steps", 5000], "steps must be at most 1000"),
        (["--data", "TABLE", "--device", "tpu9"], "device 'tpu9' cannot be used"),
        (["--data", "TABLE", "--lpips", "alex"], "--lpips-weights"),
        (["--data", "TABLE", "--fid", "clean"], "--inception-weights"),
        (["--data", "TABLE", "--reference", "ref.npz"], "without --fid or --fd-dinov2"),
        (["--data", "TABLE", "--scheduler", "dim"], "did you mean 'ddim'"),
        (["--data", "TABLE", "--inception-weights", "a.pth"], "does nothing without --fid"),
        (["--data", "TABLE", "--lpips-weights", "a.pth"], "does nothing without --lpips"),
        (["--data", "TABLE", "--evaluated-by", ""], "--evaluated-by must name one, or several"),
        (["--data", "TABLE", "--evaluated-by", ","], "--evaluated-by must name one, or several"),
        (["--data", "TABLE", "--shard-size", 513], "shard_size must be at most 512"),
        (["--data", "PHOTOS", "--per-class", 1], "--per-class needs images with classes"),
        (["--data", "PHOTOS", "--held-back-per-class", 1], "needs images with classes"),
        (["--data", "SPLITS"], "must hold the split 'validation', but holds train"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    featinv: Featinv, table: Path, photos, arguments, sentence: str, monkeypatch, tmp_path: Path
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no-weights"))
    (tmp_path / "splits").mkdir()
    shutil.copy(table, tmp_path / "splits" / "train-0.parquet")
    places = {"TABLE": table, "PHOTOS": photos, "SPLITS": tmp_path / "splits"}
    given = [places.get(argument, argument) for argument in arguments]
    done = featinv("evaluate", *given, "--output", "out")
    assert done.code == 2
    assert done.err.startswith("Error: ")
    assert sentence in done.err
    assert done.err.endswith("\n")
    assert done.err.count("\n") == 1
    assert not Path("out").exists()


def test_an_unknown_key_of_a_config(featinv: Featinv):
    Path("a.yaml").write_text("n_image: 5\n")
    done = featinv("evaluate", "--config", "a.yaml")
    assert done.code == 2
    assert "n_image" in done.err


def test_broken_pictures_are_listed_and_the_rest_is_measured(featinv: Featinv, photos: Path):
    (photos / "broken.png").write_text("hello")
    done = featinv("evaluate", "--data", photos, "-o", "out")
    assert done.code == 1
    assert "broken.png is not a picture" in done.err
    metrics = load("out")
    assert metrics["n_images"] == 3
    assert [failure["id"] for failure in metrics["failures"]] == ["broken.png"]


def test_nothing_but_broken_pictures(featinv: Featinv, tmp_path: Path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").touch()
    done = featinv("evaluate", "--data", tmp_path / "bad", "-o", "out")
    assert done.code == 2
    assert "No image could be evaluated" in done.err
    assert not Path("out").exists()


def test_pictures_beside_folders_are_noted(featinv: Featinv, photos: Path):
    done = featinv("evaluate", "--data", photos, "--n-images", 2, "-o", "out")
    assert done.code == 0
    note, few = load("out")["notes"]
    assert few.startswith("The figures rest on 2 images, fewer than 10.")
    assert note.startswith("2 pictures lie in")
    assert done.err == f"Note: {note}\n"
    assert f"Note: {note}" in Path("out/metrics.md").read_text()


def test_the_own_backbone_is_left_out_of_the_others(featinv: Featinv, table: Path):
    options = ("--n-images", 2, "--n-null-images", 0, "--evaluated-by", "convnext")
    done = featinv("evaluate", "--data", table, *options, "-o", "out")
    assert done.code == 0
    assert "convnext is the backbone that is inverted" in done.err
    assert load("out")["evaluated_by"] == {}
    assert load("out")["settings"]["evaluated_by"] == []


# ---- again, and together -------------------------------------------------------------------------


def test_a_run_that_lost_a_shard_comes_out_the_same(featinv: Featinv, table: Path):
    assert featinv("evaluate", "--data", table, *OPTIONS, "-o", "out").code == 0
    before, rows = load("out"), Path("out/per_image.parquet").read_bytes()
    kept = Path("out/shards/00000/unit.json").stat().st_mtime_ns
    Path("out/shards/00001/unit.json").unlink()
    assert featinv("evaluate", "--data", table, *OPTIONS, "-o", "out").code == 0
    assert load("out") == before
    assert Path("out/per_image.parquet").read_bytes() == rows
    assert Path("out/shards/00000/unit.json").stat().st_mtime_ns == kept


def test_other_settings_or_images_may_not_join_a_run(featinv: Featinv, table: Path):
    assert featinv("evaluate", "--data", table, "--n-images", 2, "-o", "out").code == 0
    before = Path("out/metrics.json").read_bytes()
    done = featinv("evaluate", "--data", table, "--n-images", 2, "--seed", 1, "-o", "out")
    assert done.code == 2
    assert "seed: 0 → 1" in done.err
    assert Path("out/metrics.json").read_bytes() == before


def test_other_weights_or_contents_may_not_join_a_run(
    featinv: Featinv, table: Path, saved_pipeline: Path, tmp_path: Path
):
    folder, data = tmp_path / "pipeline", tmp_path / "data.parquet"
    shutil.copytree(saved_pipeline, folder)
    shutil.copy(table, data)
    options = ("--pipeline", folder, "--n-images", 2, "--n-null-images", 0, "--steps", 1)
    run = ("evaluate", "--data", data, *options, "-o", "out")
    assert featinv(*run).code == 0
    before = load("out")
    assert len(before["pipeline_sha256"]) == 64
    assert before["evaluators_sha256"] == {}
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["decoder.conv_out.bias"][0] += 1e-3
    save_file(state, weights)
    done = featinv(*run)
    assert done.code == 2
    assert "pipeline_sha256" in done.err
    shutil.copy(saved_pipeline / "vae" / weights.name, weights)
    assert featinv(*run).code == 0
    os.utime(data, ns=(1, 1))
    done = featinv(*run)
    assert done.code == 2
    assert "data_fingerprint" in done.err
    assert load("out") == before


def test_what_failed_is_tried_again(featinv: Featinv, photos: Path):
    picture = photos / "a.png"
    content, stat = picture.read_bytes(), picture.stat()

    def put(data: bytes) -> None:
        picture.write_bytes(data)
        os.utime(picture, ns=(stat.st_mtime_ns, stat.st_mtime_ns))

    put(bytes(len(content)))
    run = ("evaluate", "--data", photos, "--n-null-images", 0, "-o", "out")
    assert featinv(*run).code == 1
    assert load("out")["n_images"] == 2
    put(content)
    assert featinv(*run).code == 0
    assert (load("out")["n_images"], load("out")["failures"]) == (3, [])


def test_a_finished_run_is_summarised_anew_with_a_reference(
    featinv: Featinv, table: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
):
    def load_extractors(settings, backbone):
        return {name: ClassifierFeatures(backbone) for name in ("classifier", "inception")}

    monkeypatch.setattr(models, "load_extractors", load_extractors)
    run = ("evaluate", "--data", table, "--fid", "clean", "--n-null-images", 0, "-o", "out")
    assert featinv(*run, "--reference", photos).code == 0
    kid = load("out")["distribution"]["kid"]
    assert (kid["reference"]["name"], kid["n_reference"]) == (str(photos), 3)
    monkeypatch.setattr(Evaluator, "run", None)  # nothing is sampled again
    assert featinv(*run).code == 0
    kid = load("out")["distribution"]["kid"]
    assert (kid["reference"]["name"], kid["n_reference"]) == (str(table), N_IMAGES)


def test_lpips_stands_with_what_it_is(
    featinv: Featinv, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    state = {f"features.{k}": v for k, v in AlexNet().features.state_dict().items()}
    torch.save(state, tmp_path / "alex.pth")
    options = ("--lpips", "alex", "--lpips-weights", tmp_path / "alex.pth")
    run = ("--data", table, "--n-images", 2, "--n-null-images", 0, *options, "-o", "out")
    assert featinv("evaluate", *run).code == 0
    stated = load("out")["lpips"]["conventions"]
    assert (stated["network"], stated["version"], stated["weights"]) == ("alex", "0.1", "alex.pth")
    assert stated["weights_sha256"] == sha256((tmp_path / "alex.pth").read_bytes()).hexdigest()
    assert set(load("out")["evaluators_sha256"]) == {"lpips"}


def environment() -> dict[str, str]:
    held = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    fixed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return held | fixed


def command(table: Path, pipeline: Path, output: Path, n_processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_processes}"]
    start = [sys.executable, *(launcher if n_processes > 1 else [])]
    options = ["--data", table, "--pipeline", pipeline, "--steps", 2, *OPTIONS, "--output", output]
    return [*start, "-m", "featinv_diffusion", "evaluate", *map(str, options)]


def launch(*arguments, **options) -> None:
    done = subprocess.run(
        command(*arguments, **options),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def whole(table: Path, saved_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes that nobody disturbs."""
    output = tmp_path_factory.mktemp("whole") / "out"
    launch(table, saved_pipeline, output)
    return output


def test_two_processes_write_the_same(table, saved_pipeline, whole: Path, tmp_path: Path):
    launch(table, saved_pipeline, tmp_path / "two", n_processes=2)
    assert without_command(load(tmp_path / "two")) == without_command(load(whole))
    name = "per_image.parquet"
    assert (tmp_path / "two" / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_a_killed_run_is_finished_by_the_same_command(
    table, saved_pipeline, whole: Path, tmp_path: Path
):
    output = tmp_path / "killed"
    process = subprocess.Popen(command(table, saved_pipeline, output), env=environment())
    done = output / "shards" / "00000" / "unit.json"
    deadline = time.monotonic() + 200
    while not done.is_file() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert done.is_file()
    shutil.rmtree(output / "shards" / "00002", ignore_errors=True)  # however far it came
    (output / "metrics.json").unlink(missing_ok=True)
    launch(table, saved_pipeline, output)
    assert without_command(load(output)) == without_command(load(whole))
    assert (output / "per_image.parquet").read_bytes() == (whole / "per_image.parquet").read_bytes()


def test_photos_of_any_size_are_squares_of_their_centre(featinv: Featinv, tmp_path: Path):
    folder = tmp_path / "wide"
    folder.mkdir()
    square = to_pil(tiny.make_images(1))[0]
    wide = Image.new("RGB", (164, 64), "red")
    wide.paste(square, (50, 0))
    wide.save(folder / "a.png")
    square.save(folder / "b.png")
    assert featinv("evaluate", "--data", folder, "-o", "out").code == 0
    digests = pq.read_table("out/per_image.parquet")["original_sha256"].to_pylist()
    assert digests[0] == digests[1]


def test_a_script_gives_what_the_command_gives(featinv: Featinv, table: Path):
    options = ("--per-class", 2, "--seed", 3, "--shard-size", 4, "--n-null-images", 2)
    assert featinv("evaluate", "--data", table, *options, "-o", "out").code == 0
    inverter = featinv_diffusion.load_inverter("tiny/convnext")
    result = featinv_diffusion.evaluate(
        inverter, table, per_class=2, seed=3, shard_size=4, n_null_images=2
    )
    assert without_command(result.metrics) == without_command(load("out"))
    assert str(result.rows()) == str(pq.read_table("out/per_image.parquet").to_pylist())
