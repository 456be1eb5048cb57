"""`evaluate` in Python: pictures of any kind, any inverter, and a result that shows itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor

import featinv_diffusion as fi
from featinv_diffusion.data.sets import open_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.evaluator import Evaluator
from featinv_diffusion.evaluation.report import to_markdown
from featinv_diffusion.evaluation.run import Evaluation, evaluate
from featinv_diffusion.features.maps import load_maps, write_maps
from featinv_diffusion.images import to_pil
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.metrics.features import centred_cosine
from featinv_diffusion.types import FeatureMaps
from tests import tiny

N = 3
QUICK = {"n_null_images": 1, "batch_size": 2}


@pytest.fixture(scope="module")
def inverter() -> DiffusionInverter:
    return DiffusionInverter(tiny.make_pipeline(), num_inference_steps=1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name, picture in zip("abc", to_pil(tiny.make_images(N)), strict=True):
        picture.resize((90, 70)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def whole(inverter, photos: Path) -> Evaluation:
    return evaluate(inverter, photos, **QUICK)


def columns(result: Evaluation) -> str:
    """The figures without ids and seeds, as text, in which NaN are equal."""
    return str({name: result.table[name].to_pylist() for name in result.table.column_names[3:]})


def test_it_is_found_where_the_package_says():
    assert fi.evaluate is evaluate
    assert fi.Evaluation is Evaluation


def test_a_folder_needs_no_accelerator_and_leaves_nothing(inverter, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    AcceleratorState._reset_state(reset_partial_state=True)
    result = evaluate(inverter, str(photos), **QUICK)
    assert not AcceleratorState._shared_state
    assert not list(tmp_path.iterdir())
    assert [row["id"] for row in result.rows()] == [row["id"] for row in result.table.to_pylist()]
    assert {row["id"] for row in result.rows()} == {"a.png", "b.png", "c.png"}
    assert result.metrics["cosine"]["n"] == N
    assert result.metrics["cosine"]["nulls"]["prior_only"]["n"] == 1


def test_it_shows_itself(whole: Evaluation):
    assert whole.summary().startswith("3 images: centred cosine ")
    assert repr(whole) == f"Evaluation: {whole.summary()}"
    assert whole._repr_markdown_() == to_markdown(whole.metrics)
    assert "a pipeline that was built by hand" in whole._repr_markdown_()
    assert "1 steps of ddim, guidance text 1.75" in whole._repr_markdown_()
    (axes,) = whole.figure().axes
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == [
        "reconstruction",
        "other image",
        "permuted cells",
        "prior only",
        "vae round trip",
        "resized original",
    ]
    assert axes.patches[0].get_height() == whole.metrics["centred_cosine"]["value"]


def test_it_is_saved_as_the_command_writes_it(whole: Evaluation, tmp_path: Path):
    whole.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == whole.metrics
    assert (tmp_path / "out" / "metrics.md").read_text() == to_markdown(whole.metrics)
    table = pq.read_table(tmp_path / "out" / "per_image.parquet")
    assert str(table.to_pydict()) == str(whole.table.to_pydict())


@pytest.mark.parametrize("kind", ["paths", "image_set"])
def test_paths_and_image_sets_are_as_the_folder(inverter, photos: Path, whole, kind: str):
    images = open_images(str(photos), "validation")
    data = images if kind == "image_set" else [photos / name for name in images.ids]
    result = evaluate(inverter, data, **QUICK)
    assert columns(result) == columns(whole)
    assert result.metrics["data"]["name"] == "pictures given in Python"


@pytest.mark.parametrize("kind", ["PIL", "array", "tensor"])
def test_pictures_in_memory_are_the_same_whatever_holds_them(inverter, kind: str):
    images = tiny.make_images(2)
    pictures = to_pil(images)
    given = {"PIL": pictures, "array": np.stack([np.asarray(p) for p in pictures])}
    result = evaluate(inverter, given.get(kind, images), **QUICK)
    assert [row["id"] for row in result.rows()] == ["picture-00001", "picture-00000"]
    assert columns(result) == columns(evaluate(inverter, pictures, **QUICK))


def test_one_picture_alone_and_two_of_one_name(inverter, photos: Path, tmp_path: Path):
    picture = Image.open(photos / "a.png")
    assert evaluate(inverter, picture, **QUICK).metrics["n_images"] == 1
    picture.save(tmp_path / "a.png")
    twice = evaluate(inverter, [photos / "a.png", tmp_path / "a.png"], **QUICK).rows()
    assert {row["id"] for row in twice} == {"0/a.png", "1/a.png"}
    assert twice[0]["seed"] == twice[1]["seed"]
    assert twice[0]["cosine"] == pytest.approx(twice[1]["cosine"], abs=1e-4)


def test_pictures_that_cannot_be_read(inverter, photos: Path, tmp_path: Path):
    (tmp_path / "broken.png").write_text("hello")
    result = evaluate(inverter, [photos / "a.png", tmp_path / "broken.png"], **QUICK)
    assert [failure["id"] for failure in result.metrics["failures"]] == ["broken.png"]
    with pytest.raises(InputError, match=r"No image could be evaluated\.\n.*broken.png is not"):
        evaluate(inverter, [tmp_path / "broken.png"], **QUICK)
    with pytest.raises(InputError, match=r"must exist at .*none.png"):
        evaluate(inverter, [photos / "none.png"], **QUICK)
    with pytest.raises(InputError, match="at least one picture to evaluate, got none"):
        evaluate(inverter, [])


def test_a_folder_to_write_to_is_gone_on_with(inverter, photos: Path, whole, tmp_path, monkeypatch):
    first = evaluate(inverter, photos, output=tmp_path / "out", shard_size=2, **QUICK)
    assert (tmp_path / "out" / "metrics.json").is_file()
    monkeypatch.setattr(Evaluator, "run", None)  # nothing is sampled again
    again = evaluate(inverter, photos, output=tmp_path / "out", shard_size=2, **QUICK)
    assert again.metrics == first.metrics
    with pytest.raises(InputError, match=r"\(seed: 0 → 1\)"):
        evaluate(inverter, photos, seed=1, output=tmp_path / "out", shard_size=2, **QUICK)


def test_pictures_in_memory_that_changed_may_not_join_a_run(inverter, tmp_path: Path):
    images = tiny.make_images(2)
    evaluate(inverter, images, output=tmp_path, **QUICK)
    images[0] = 1 - images[0]
    with pytest.raises(InputError, match="data_fingerprint: "):
        evaluate(inverter, images, output=tmp_path, **QUICK)


def test_a_deterministic_inverter_has_no_prior(photos: Path):
    inverter = fi.load_inverter("vit", stage="blocks.2", device="cpu")
    result = evaluate(inverter, photos, n_null_images=1, per_class=None)
    assert result.metrics["settings"]["inverter"] == "vit"
    assert result.metrics["cosine"]["nulls"]["prior_only"] is None
    assert len(result.figure().axes[0].patches) == 4


def test_what_the_inverter_decides_and_unknown_options_are_refused(inverter, photos: Path):
    with pytest.raises(InputError, match="The inverter decides steps: give that to load_inverter"):
        evaluate(inverter, photos, steps=5)
    with pytest.raises(InputError, match="did you mean 'per_class'"):
        evaluate(inverter, photos, per_clas=5)


# ---- centred cosine, retrieval, baselines --------------------------------------------------------


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    for i, picture in enumerate(to_pil(tiny.make_images(N + 12)[N:])):
        picture.save(folder / f"{i:02d}.png")
    return folder


def test_the_mean_cell_is_that_of_the_images(inverter, photos: Path, whole: Evaluation):
    with torch.no_grad():
        maps = inverter.encode(sorted(photos.glob("*.png"))).as_subclass(Tensor)
    mean = maps.mean(dim=(0, 2, 3))[:, None, None]
    result = evaluate(inverter, photos, save_images=True, output=photos.parent / "out", **QUICK)
    made = inverter.encode(sorted((photos.parent / "out" / "images").glob("*.png")))
    expected = centred_cosine(maps, made.as_subclass(Tensor), mean).tolist()
    found = {row["id"]: row["centred_cosine"] for row in result.rows()}
    assert [found[name] for name in sorted(found)] == pytest.approx(expected, abs=1e-4)
    assert result.metrics["centred_cosine"] == whole.metrics["centred_cosine"]
    assert whole.metrics["centred_cosine"]["nulls"]["other_image"]["value"] < 1
    assert any("rest on 3 images" in note for note in whole.metrics["notes"])


def test_baselines_stand_beside_the_reconstruction(inverter, photos, training, tmp_path: Path):
    for name in ("a.png", "b.png"):  # the same pixels as an original are no neighbour of it
        Image.open(photos / name).save(training / name)
    options = {"baselines_from": str(training), "n_optimised_images": 1, "shard_size": 2, **QUICK}
    result = evaluate(inverter, photos, output=tmp_path / "out", **options)
    baselines = result.metrics["baselines"]
    assert list(baselines) == ["nearest_neighbour", "ridge_latents", "ridge_pixels", "optimise"]
    for name, figures in baselines.items():
        assert figures["centred_cosine"]["n"] == (1 if name == "optimise" else N)
        assert np.isfinite(figures["psnr"]["value"])
    assert max(row["nearest_neighbour_psnr"] for row in result.rows()) < 40
    assert baselines["ridge_pixels"]["psnr"]["value"] > result.metrics["psnr"]["value"]
    retrieval = result.metrics["retrieval"]
    assert (retrieval["n_gallery"], retrieval["same_class"]) == (N, None)
    assert retrieval["ceilings"]["vae_round_trip"]["top5"]["value"] == 1
    page = to_markdown(result.metrics)
    assert "| nearest neighbour | " in page
    assert "| optimise (optimised) | " in page
    assert "Own original found first among 3: " in page
    assert "nearest neighbour" in [t.get_text() for t in result.figure().axes[0].get_xticklabels()]
    again = evaluate(inverter, photos, n_images=2, n_gallery_images=5, **QUICK)
    assert again.metrics["retrieval"]["n_gallery"] == N
    assert again.metrics["retrieval"]["top1"]["n"] == 2
    (training / "a.png").unlink()
    with pytest.raises(InputError, match="baselines_fingerprint: "):
        evaluate(inverter, photos, output=tmp_path / "out", **options)


def test_baselines_need_other_images_and_enough_of_them(inverter, photos: Path, training: Path):
    with pytest.raises(InputError, match="must hold other images than those that are evaluated"):
        evaluate(inverter, training, baselines_from=str(training), **QUICK)
    with pytest.raises(InputError, match=r"at least 10 training images .* gives 3"):
        evaluate(inverter, training, baselines_from=str(photos), **QUICK)


# ---- feature maps in place of pictures -----------------------------------------------------------


@pytest.fixture
def maps_file(inverter, photos: Path, tmp_path: Path) -> Path:
    path = tmp_path / "maps.safetensors"
    write_maps(path, inverter.encode(sorted(photos.glob("*.png"))), inverter.spec)
    return path


def test_maps_give_the_figures_of_their_pictures(inverter, photos, whole, maps_file):
    for data in (maps_file, load_maps(maps_file)):
        of_maps = evaluate(inverter, data, **QUICK)
        for name in ("cosine", "other_image_cosine", "top1_match"):
            found, wanted = (sorted(r.table[name].to_pylist()) for r in (of_maps, whole))
            assert found == pytest.approx(wanted, abs=1e-5)
        assert of_maps.metrics["normalised_agreement"] is None
        assert not {"psnr", "ssim"} & of_maps.metrics.keys()
        assert any("instead of pictures" in note for note in of_maps.metrics["notes"])
        assert "cosine" in to_markdown(of_maps.metrics)
        of_maps.figure()


@pytest.mark.parametrize(
    "option", [{"evaluated_by": ("tiny/resnet",)}, {"lpips": "alex"}, {"fd_dinov2": "x"}]
)
def test_maps_refuse_what_compares_with_pictures(inverter, maps_file, option):
    (name,) = option
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} compares with pictures"):
        evaluate(inverter, maps_file, **QUICK, **option)


def test_maps_of_another_spec_are_refused(inverter, maps_file, tmp_path):
    other = replace(inverter.spec, backbone="another")
    path = tmp_path / "other.safetensors"
    write_maps(path, load_maps(maps_file), other)
    with pytest.raises(InputError, match="another"):
        evaluate(inverter, path, **QUICK)


def test_names_of_foreign_maps_lead_nowhere(inverter, maps_file, tmp_path):
    maps = load_maps(maps_file)
    named = FeatureMaps.of(
        maps.as_subclass(Tensor), [replace(s, name=f"../../{s.name}") for s in maps.sources]
    )
    evaluate(inverter, named, output=tmp_path / "a" / "b" / "out", save_images=True, **QUICK)
    assert not list((tmp_path / "a").glob("*.png"))
    assert len(list((tmp_path / "a" / "b" / "out" / "images").glob("*.png"))) == N
