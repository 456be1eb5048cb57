"""Training of a reconstructor on a random small encoder and pictures."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from featinv_diffusion.config import load_config
from featinv_diffusion.data.crops import DataConfig
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.reconstructor import Reconstructor, load_encoder
from featinv_diffusion.training.config import OptimConfig, RunConfig
from featinv_diffusion.training.loop import Task, learning_rate
from featinv_diffusion.training.reconstructor import (
    ReconstructorConfig,
    ReconstructorModelConfig,
    ReconstructorTask,
    make_reconstructor,
    train_reconstructor,
)
from tests.inverters import encoders
from tests.tiny import make_images

CONFIGS = Path(__file__).parents[2] / "configs"
OPTIM = OptimConfig(
    lr=3e-3, weight_decay=0, batch_size=4, epochs=9, max_steps=6, schedule="one_cycle"
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return encoders.save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def config(encoder: Path, tmp_path_factory) -> ReconstructorConfig:
    root, output = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("run")
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir()
        for i in range(5):
            pixels = generator.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return ReconstructorConfig(
        data=DataConfig(
            root=str(root), size=64, crop="squash", held_back_per_class=1, num_workers=0
        ),
        model=ReconstructorModelConfig(
            backbone=encoders.NAME, weights=str(encoder), depth=1, n_heads=2, channels=[8, 8, 8]
        ),
        optim=OPTIM,
        run=RunConfig(
            output=str(output), tracker="none", cpu=True, checkpoint_every=3, validate_every=3
        ),
    )


@pytest.fixture(scope="module")
def final(config: ReconstructorConfig) -> Path:
    return train_reconstructor(config)


def test_training_leaves_a_reconstructor_and_its_figures(config, final: Path) -> None:
    model = Reconstructor.from_pretrained(final / "reconstructor")
    assert model.spec == encoders.SPEC
    assert (tuple(model.config["mean"]), tuple(model.config["std"])) == (
        encoders.MEAN,
        encoders.STD,
    )
    means = [m.running_mean for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(bool(mean.abs().sum() > 0) for mean in means)
    output = Path(config.run.output)
    records = [json.loads(line) for line in (output / "validation.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [3, 6]
    assert records[-1]["mse"] < records[0]["mse"]
    assert {"mse", "psnr"} <= records[0].keys()
    assert (output / "validation/reconstructions-00000006.png").is_file()
    rates = [json.loads(line)["lr"] for line in (output / "losses.jsonl").read_text().splitlines()]
    assert rates[-1] == pytest.approx(3e-3 / 250_000)


def test_a_run_that_was_killed_ends_alike(config, final: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(config.run.output, output)
    shutil.rmtree(output / "final")
    shutil.rmtree(sorted((output / "checkpoints").glob("step-*"))[-1])
    again = train_reconstructor(replace(config, run=replace(config.run, output=str(output))))
    weights = [
        Reconstructor.from_pretrained(f / "reconstructor").state_dict() for f in (final, again)
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_the_loss_is_that_of_the_encoders_normalised_pixels(encoder: Path) -> None:
    backbone = load_encoder(encoders.NAME, "last", weights=encoder)
    model, pixels = encoders.make_reconstructor(), (make_images(3) * 255).byte()
    task = ReconstructorTask(model, backbone, pixels[:2])
    assert isinstance(task, Task)
    loss, scalars = task.loss(model, {"pixels": pixels})
    images = pixels.float() / 255
    written = model.reconstruct(backbone.features(images))
    wanted = (written - backbone.preprocess(images)).square().mean()
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-6)
    assert scalars == {}
    loss.backward()
    assert all(p.grad is None for p in backbone.model.parameters())
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_validation_is_of_all_images_in_batches(encoder: Path) -> None:
    backbone = load_encoder(encoders.NAME, "last", weights=encoder)
    model, pixels = encoders.make_reconstructor(), (make_images(5) * 255).byte()
    seen: list[int] = []
    model.register_forward_hook(lambda _module, _inputs, output: seen.append(len(output)))
    task = ReconstructorTask(model, backbone, pixels, n_pictures=3, batch_size=2)
    scalars, pictures = task.validate(model)
    assert seen == [2, 2, 1]
    images = pixels.float() / 255
    written = model.reconstruct(backbone.features(images))
    wanted = float((written - backbone.preprocess(images)).square().mean())
    assert scalars["mse"] == pytest.approx(wanted, rel=1e-4)
    # three rows of (image, reconstruction), two beside each other, with lines of a pixel
    assert pictures["reconstructions"].size == (4 * 65 + 1, 2 * 65 + 1)
    first = np.asarray(pictures["reconstructions"])[1:65, 1:65]
    # whose levels are cut off on the way to the picture
    assert np.abs(first.astype(int) - pixels[0].permute(1, 2, 0).numpy()).max() <= 1


@pytest.mark.parametrize(
    ("data", "model", "words"),
    [
        ({"size": 48}, {}, "data.size must be at least the 64×64 pixels .* got 48"),
        ({"streaming": True}, {}, "data.streaming is true"),
        ({"held_back_per_class": 5}, {}, "holds back all 10"),
        ({"held_back_per_class": 0}, {}, "Validation images are needed"),
        ({}, {"channels": [8, -1]}, "channels"),
    ],
)
def test_settings_that_cannot_be_trained(config, data, model, words: str) -> None:
    changed = replace(
        config, data=replace(config.data, **data), model=replace(config.model, **model)
    )
    with pytest.raises(InputError, match=words):
        train_reconstructor(changed)


def test_an_earlier_layer_can_be_chosen(encoder: Path) -> None:
    backbone = load_encoder(encoders.NAME, "encoder.layers.0", weights=encoder)
    model = make_reconstructor(ReconstructorModelConfig(n_heads=2, depth=1), backbone)
    assert model.spec.layer == "encoder.layers.0"
    assert model.image_size == (64, 64)


def test_one_cycle_is_torchs() -> None:
    optim, n = OptimConfig(lr=0.5, schedule="one_cycle"), 200
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    # PyTorch counts its phases from the first step, ours ends them with their last: one apart.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.5, total_steps=n + 1, pct_start=11 / (n + 1), div_factor=25,
        final_div_factor=1e4, three_phase=False,
    )  # fmt: skip
    wanted = []
    for _ in range(n):
        optimizer.step()
        schedule.step()
        wanted.append(schedule.get_last_lr()[0])
    ours = [learning_rate(optim, step, n) for step in range(n)]
    assert max(ours) == ours[9] == 0.5
    assert ours[0] == pytest.approx(0.5 * (1 / 25 + 24 / 25 / 10))
    assert ours[-1] == pytest.approx(0.5 / 250_000)
    assert ours[10:] == pytest.approx(wanted[10:], rel=1e-6)


def test_one_cycle_has_its_own_warm_up(config) -> None:
    with pytest.raises(InputError, match="Leave that at 0"):
        train_reconstructor(replace(config, optim=replace(OPTIM, warmup_steps=5)))


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_the_recipes_are_readable(name: str) -> None:
    published = load_config(ReconstructorConfig, CONFIGS / f"inverters/{name}.yaml")
    assert (published.optim.lr, published.optim.schedule) == (3e-4, "one_cycle")
    assert published.optim.max_grad_norm == float("inf")
    tiny = load_config(ReconstructorConfig, CONFIGS / f"tiny/reconstructor-{name}.yaml")
    other = load_config(ReconstructorConfig, CONFIGS / "tiny/reconstructor-siglip.yaml")
    assert (tiny.data, tiny.optim, tiny.seed) == (other.data, other.optim, other.seed)
    assert tiny.model.backbone == f"tiny/{name}"
