"""`featinv new-backbone`: what the time buys, a run that goes on, and a pipeline that samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featinv_diffusion.backbones.public_weights import packed_weights
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.diffusion.hub import load_pipeline
from featinv_diffusion.training import controlnet, new_backbone
from featinv_diffusion.training.new_backbone import Costs, Plan, describe
from tests.cli.conftest import Featinv

FACTORY = """
import torch
from featinv_diffusion import wrap_module

def make():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 8, 8), torch.nn.Tanh())
    return wrap_module(net, input_size=64, preprocess=((.5,) * 3, (.5,) * 3))
"""
TRUNK = "tiny/convnext"
"""The only pipeline that these tests have."""
QUICK = ("--minutes", 0.01, "--batch-size", 2, "--n-evaluated", 2, "--trunk", TRUNK)


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(FACTORY)
    return f"{tmp_path / 'own.py'}:make"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Noise of two classes, six pictures each."""
    random = np.random.default_rng(0)
    for label in ("a", "b"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for i in range(6):
            pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"pictures/{label}/{i}.png")
    return tmp_path / "pictures"


def test_a_plan_divides_the_time() -> None:
    """60 min, a tenth kept: 3240 s. Half of it for .03 s and 5 · .48 / 48 s of each image."""
    costs = Costs(3.0, 0.03, 0.48, 2**30, pair=2**18, row=2**17, features_dtype="float16")
    plan = Plan.of(60, 24, 100_000, costs)
    assert plan.n_imitated == 16_384  # 4 GiB of pairs
    assert plan.n_images == int((1620 - 16_384 * 0.05) / 0.03)  # the rest of the half
    assert plan.n_steps == int((3240 - plan.n_images * 0.03 - 16_384 * 0.05) / 3)
    text = str(plan)
    assert "60 minutes buy about 26,693 images, whose maps take 13.3 min and 3.3 GiB" in text
    assert "a regression of the head on 16,384 of them (13.7 min), and 540 steps, 0.5 times" in text
    assert "1.0 GiB of memory" in text
    small = Plan.of(1, 24, 100_000, costs)
    assert small.n_images == small.n_imitated == int(0.5 * 54 / 0.08)
    few = Plan.of(60, 24, 40, costs)
    assert (few.n_images, few.n_imitated) == (40, 0)
    assert "regression" not in str(few)
    assert Plan.of(0.01, 24, 40, costs).n_images == 24  # a batch must be full


def test_figures_below_their_null_are_called_none() -> None:
    keys = ("cosine", "cosine_of_another_image", "cosine_of_shuffled_cells", "centred_cosine")
    figures = dict.fromkeys((*keys, "centred_cosine_of_another_image"), 0.25) | {"n_images": 8.0}
    assert "below its null" in describe(figures)
    assert "below its null" not in describe(figures | {"cosine": 0.5})


def test_a_backbone_of_ones_own_in_little_time(
    featinv: Featinv, own: str, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_backbone, "BATCH", 4)  # a regression on so few images
    done = featinv("new-backbone", own, "--data", pictures, *QUICK, "--trunk-is", "frozen")
    assert done.code == 0, done.err
    assert "0.01 minutes buy" in done.out
    output = Path("outputs/new-backbone")
    n_images = json.loads((output / "plan.json").read_text())["n_images"]
    assert f"about {n_images} images" in done.out
    assert f"10 steps, {20 / n_images:.1f} times through them" in done.out
    figures = json.loads((output / "figures.json").read_text())
    assert figures["n_images"] == 2
    assert describe(figures) in done.out
    pipeline = load_pipeline(output / "pipeline")
    assert pipeline.backbone is None
    assert pipeline.config["through"] == 64
    trunk = load_pipeline(TRUNK).controlnet.state_dict()
    for name, weight in pipeline.controlnet.state_dict().items():
        if not name.startswith("feature_encoder."):
            assert torch.equal(weight, trunk[name]), name
    assert bool(pipeline.controlnet.feature_encoder.conv3.weight.any())
    card = (output / "pipeline/README.md").read_text()
    assert describe(figures) in card
    assert str(pictures.parent) not in card
    plan = (output / "plan.json").read_text()
    assert not (output / "cache").exists()
    monkeypatch.setattr(new_backbone, "measure_costs", None)  # a second call measures nothing
    monkeypatch.setattr(controlnet, "_cached", None)  # nor does it fill the cache again
    again = featinv("new-backbone", own, "--data", pictures, *QUICK, "--trunk-is", "frozen")
    assert again.code == 0, again.err
    assert (output / "plan.json").read_text() == plan
    assert json.loads((output / "figures.json").read_text()) == figures
    sampled = featinv(
        "sample",
        pictures / "a/0.png",
        "--pipeline",
        output / "pipeline",
        "--backbone",
        own,
        "-o",
        "out",
    )
    assert sampled.code == 0, sampled.err
    other = featinv("new-backbone", own, "--data", pictures, *QUICK[2:], "--minutes", 5)
    assert other.code == 2
    assert "holds a run of 0.01 minutes in batches of 2" in other.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["resnett50"], "No backbone is named 'resnett50'"),
        (["{own}", "--trunk", "tiny/none"], "The trunk must be a bundled pipeline"),
        (["{own}", "--trunk-is", "warm"], "No trunk_is is named 'warm'"),
        (["{own}", "--minutes", "0"], "minutes must be"),
        (["{own}", "--n-evaluated", "12"], "Images to train on must be left"),
        (["{own}", "--data", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_a_sentence(
    featinv: Featinv, own: str, pictures: Path, arguments: list[str], sentence: str
) -> None:
    given = [word.format(own=own) for word in arguments]
    data = () if "--data" in given else ("--data", pictures)
    few = () if "--n-evaluated" in given else ("--n-evaluated", 2)
    done = featinv("new-backbone", "--trunk", TRUNK, *given, *data, *few)
    assert done.code == 2
    assert done.err.startswith("Error: ")
    assert sentence in done.err
    assert not Path("outputs").exists()


def test_features_beyond_float16_name_the_flag_that_holds_them(
    featinv: Featinv, tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(new_backbone, "BATCH", 4)
    large = "torch.nn.Identity())\n    torch.nn.init.constant_(net[0].bias, 1e5)"
    (tmp_path / "large.py").write_text(FACTORY.replace("torch.nn.Tanh())", large))
    command = ("new-backbone", f"{tmp_path / 'large.py'}:make", "--data", pictures, *QUICK)
    done = featinv(*command)
    assert done.code == 2
    assert "reach 1e+05. Set cache.features_dtype=float32" in done.err
    assert "--features-dtype float32" in done.err
    done = featinv(*command, "--features-dtype", "float32")
    assert done.code == 0, done.err
    row = json.loads(Path("outputs/new-backbone/plan.json").read_text())["costs"]["row"]
    assert row == 12 * 8 * 8 * 4 + 2 * 4 * 8 * 8 * 2  # maps in float32, latents in float16
    done = featinv(*command)
    assert done.code == 2
    assert "with maps in float32. Go on with these" in done.err


@pytest.mark.slow
@pytest.mark.skipif(packed_weights("tf_efficientnet_lite0") is None, reason="needs the extra real")
def test_a_timm_model_travels_with_the_pipeline(featinv: Featinv, pictures: Path) -> None:
    name = "tf_efficientnet_lite0"
    done = featinv("new-backbone", name, "--data", pictures, *QUICK, "-o", "new")
    assert done.code == 0, done.err
    pipeline = load_pipeline("new/pipeline")
    assert pipeline.backbone is not None
    assert isinstance(pipeline.controlnet, FeatureControlNet)
    done = featinv("sample", pictures / "a/0.png", "--pipeline", "new/pipeline", "-o", "out")
    assert done.code == 0, done.err


def test_a_plan_of_an_earlier_version_says_what_to_do(
    featinv: Featinv, own: str, pictures: Path
) -> None:
    Path("old").mkdir()
    Path("old/plan.json").write_text('{"minutes": 0.01, "batch_size": 2}')
    done = featinv("new-backbone", own, "--data", pictures, *QUICK, "-o", "old")
    assert done.code == 2
    assert "Remove it, or name another --output" in done.err


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_number_format_is_that_of_the_training(
    featinv: Featinv, own: str, pictures: Path
) -> None:
    done = featinv("new-backbone", own, "--data", pictures, *QUICK, "--mixed-precision", "bf16")
    assert done.code == 0, done.err
    checkpoint = sorted(Path("outputs/new-backbone/training/checkpoints").glob("step-*"))[-1]
    assert "mixed_precision: bf16" in (checkpoint / "config.yaml").read_text()
    weights = load_pipeline("outputs/new-backbone/pipeline").controlnet.state_dict().values()
    assert {weight.dtype for weight in weights if weight.is_floating_point()} == {torch.float32}
