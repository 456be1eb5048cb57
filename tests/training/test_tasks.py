"""Every task trains through the one loop, lowers its loss and reads back what it wrote."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, DistributedType
from PIL import Image
from transformers import TimmWrapperForImageClassification

from featinv_diffusion.backbones import wrap_model
from featinv_diffusion.cli.export import choose_weights
from featinv_diffusion.config import load_config, to_yaml
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.errors import InputError
from featinv_diffusion.schema import parse_yaml
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.training import checkpoint, loop
from featinv_diffusion.training.checkpoint import list_checkpoints
from featinv_diffusion.training.config import OptimConfig, RunConfig
from featinv_diffusion.training.controlnet import (
    ControlNetConfig,
    load_frozen_parts,
    make_controlnet,
    set_feature_statistics,
    train_controlnet,
)
from featinv_diffusion.training.imitation import ImitationConfig, imitate, read_pairs
from featinv_diffusion.training.loop import find_tracker, make_accelerator
from tests import tiny
from train.tiny_family.autoencoder import AutoencoderConfig, train_autoencoder
from train.tiny_family.classifier import ClassifierConfig, distillation_loss, train_classifier
from train.tiny_family.text_to_image import TextToImageConfig, train_text_to_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("tasks"))


def make_folder(folder: Path) -> Path:
    """Ten images of each of two flat colours with noise, and trained-size-zero tiny models."""
    random = np.random.default_rng(0)
    for label, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (folder / "images" / label).mkdir(parents=True)
        for i in range(10):
            pixels = random.normal(colour, 20, (64, 64, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"images/{label}/{i}.png")
    for name in ("vae", "unet", "text_encoder", "tokenizer", "scheduler", "backbone"):
        getattr(tiny, f"make_{name}")().save_pretrained(str(folder / name))
    return folder


def settings(folder: Path, output: Path, steps: int, **more: Any) -> list[str]:
    values = {
        "data.root": folder / "images",
        "data.size": 64,
        "data.crop": "shift",
        "data.held_back_per_class": 2,
        "data.num_workers": 0,
        "optim.lr": 3e-3,
        "optim.batch_size": 8,
        "optim.epochs": 1000,
        "optim.max_steps": steps,
        "run.output": output,
        "run.tracker": "none",
        "run.cpu": True,
        **more,
    }
    return [f"{key}={value}" for key, value in values.items()]


def losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "losses.jsonl").read_text().splitlines()]


def last_validation(output: Path) -> dict[str, float]:
    return json.loads((output / "validation.jsonl").read_text().splitlines()[-1])


def test_classifier_learns_two_colours_and_reloads(folder: Path, tmp_path: Path) -> None:
    model = {
        "model.arguments": (
            "{depths: [1,1,1,1], dims: [8,16,24,32], output_stride: 8, ls_init_value: 1}"
        )
    }
    config = load_config(ClassifierConfig, None, settings(folder, tmp_path, 12, **model))
    final = train_classifier(config)
    assert last_validation(tmp_path)["top1"] == 1.0
    wrapper = TimmWrapperForImageClassification.from_pretrained(final / "classifier").eval()
    assert wrapper.config.id2label == {0: "blue", 1: "red"}
    statistics = wrapper.config.pretrained_cfg
    mean, std = (torch.tensor(statistics[k])[:, None, None] for k in ("mean", "std"))
    red = torch.tensor([200, 30, 30]).view(1, 3, 1, 1).expand(1, 3, 64, 64) / 255
    assert int(wrapper((red - mean) / std).logits.argmax()) == 1


def classifier_settings(folder: Path, output: Path, steps: int, **more: Any) -> list[str]:
    model = "{depths: [1,1,1,1], dims: [8,16,24,32], output_stride: 8, ls_init_value: 1}"
    return settings(folder, output, steps, **{"model.arguments": model, **more})


def test_a_pupil_follows_its_teacher_and_begins_where_it_is_told(
    folder: Path, tmp_path: Path
) -> None:
    teacher = tmp_path / "teacher"
    train_classifier(load_config(ClassifierConfig, None, classifier_settings(folder, teacher, 12)))
    weights = {"model.teacher": teacher / "final/classifier", "model.teacher_weight": 1.0}
    pupil = tmp_path / "pupil"
    config = classifier_settings(folder, pupil, 12, **weights)
    train_classifier(load_config(ClassifierConfig, None, config))
    assert last_validation(pupil)["top1"] == 1.0
    again = tmp_path / "again"
    weights["model.init"] = teacher / "final/classifier"
    config = classifier_settings(folder, again, 1, **weights, **{"run.log_every": 1})
    train_classifier(load_config(ClassifierConfig, None, config))
    # One pass with the teacher's own weights: only dropout or rounding could part the two.
    assert losses(again)[0] == pytest.approx(0, abs=1e-5)
    assert losses(pupil)[0] > 0.01


def test_distillation_loss_is_the_divergence_of_softened_classes() -> None:
    student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    p, q = torch.softmax(teacher / 4, 1), torch.softmax(student / 4, 1)
    wanted = float((p * (p / q).log()).sum() * 16)
    assert float(distillation_loss(student, teacher, 4.0)) == pytest.approx(wanted, rel=1e-5)


def test_teacher_and_beginning_must_fit(folder: Path, tmp_path: Path) -> None:
    config = classifier_settings(
        folder, tmp_path, 1, **{"model.teacher": folder / "backbone", "run.cpu": True}
    )
    with pytest.raises(InputError, match="must know the same classes"):
        train_classifier(load_config(ClassifierConfig, None, config))
    config = classifier_settings(folder, tmp_path, 1, **{"model.init": folder / "backbone"})
    with pytest.raises(InputError, match="must hold a classifier of this architecture"):
        train_classifier(load_config(ClassifierConfig, None, config))


def test_pictures_reach_the_tracker(folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = {
        "model.block_out_channels": "[8,8]",
        "model.latent_channels": 4,
        "model.norm_num_groups": 4,
        "run.tracker": "tensorboard",
    }
    train_autoencoder(load_config(AutoencoderConfig, None, settings(folder, tmp_path, 1, **more)))
    (events,) = (path.parent for path in tmp_path.glob("tracker/**/events*"))
    log = EventAccumulator(str(events)).Reload()
    (image,) = log.Images("round_trip")
    with Image.open(tmp_path / "validation/round_trip-00000001.png") as picture:
        assert (image.width, image.height) == picture.size


def test_autoencoder_lowers_its_loss_and_measures_its_scale(folder: Path, tmp_path: Path) -> None:
    from diffusers import AutoencoderKL

    more = {
        "model.block_out_channels": "[8,8,8,8]",
        "model.latent_channels": 4,
        "model.norm_num_groups": 4,
        "model.perceptual_classifier": folder / "backbone",
    }
    config = load_config(AutoencoderConfig, None, settings(folder, tmp_path, 30, **more))
    vae = AutoencoderKL.from_pretrained(train_autoencoder(config) / "vae").eval()
    values = losses(tmp_path)
    assert np.mean(values[-5:]) < 0.5 * values[0]
    assert vae.config["scaling_factor"] not in (1.0, 0.18215)


def test_text_to_image_lowers_its_loss_and_its_folder_is_stable_diffusion(
    folder: Path, tmp_path: Path
) -> None:
    from featinv_diffusion.training.controlnet import ControlNetModelConfig

    more = {
        "model.vae": folder / "vae",
        "model.block_out_channels": "[16,32]",
        "model.norm_num_groups": 8,
        "model.text_hidden_size": 32,
        "optim.ema_decay": 0.5,
    }
    config = load_config(TextToImageConfig, None, settings(folder, tmp_path, 40, **more))
    final = train_text_to_image(config)
    values = losses(tmp_path)
    assert np.mean(values[-10:]) < 0.9 * np.mean(values[:5])
    assert list(tmp_path.glob("validation/samples-*.png"))
    assert last_validation(tmp_path)["gaussian_floor"] == pytest.approx(0.373, abs=1e-3)
    base = ControlNetModelConfig(base=str(final), backbone=str(folder / "backbone"))
    parts = load_frozen_parts(base)
    assert parts.image_size == 64
    assert not torch.equal(parts.prompt_embeds[0], parts.prompt_embeds[1])


def controlnet_config(folder: Path, output: Path, steps: int, *extra: str) -> ControlNetConfig:
    more = {
        "model.base": folder,
        "model.backbone": folder / "backbone",
        "model.feature_hidden_channels": 16,
        "model.statistics_images": 8,
        "validation.num_inference_steps": 2,
        "run.n_validation_images": 2,
    }
    values = [*settings(folder, output, steps, **more), *extra]
    return load_config(ControlNetConfig, None, values)


def test_controlnet_trains_and_leaves_everything_else_bit_identical(
    folder: Path, tmp_path: Path
) -> None:
    config = controlnet_config(folder, tmp_path, 3, "run.gradient_checkpointing=true")
    final = train_controlnet(config)
    record = last_validation(tmp_path)
    assert {"cosine", "cosine_shuffled", "top1_match", "top5_match"} <= record.keys()
    assert list(tmp_path.glob("validation/reconstructions-*.png"))
    trained = FeatureControlNet.from_pretrained(final / "controlnet")
    assert trained.config["feature_spec"]["channels"] == tiny.CHANNELS
    assert bool(trained.feature_encoder.conv3.weight.any())
    assert bool(trained.feature_encoder.feature_mean.any())
    frozen = load_frozen_parts(config.model)
    for name in ("unet", "vae"):
        expected = getattr(tiny, f"make_{name}")().state_dict()
        for key, value in getattr(frozen, name).state_dict().items():
            assert torch.equal(value, expected[key])


def test_warm_start_takes_all_but_the_feature_encoder(folder: Path, tmp_path: Path) -> None:
    other = tiny.make_controlnet(feature_channels=7)
    other.save_pretrained(tmp_path / "other")
    config = controlnet_config(folder, tmp_path, 1, f"model.warm_start={tmp_path / 'other'}")
    parts = load_frozen_parts(config.model)
    controlnet = make_controlnet(config.model, parts)
    expected = other.state_dict()
    for key, value in controlnet.state_dict().items():
        if not key.startswith("feature_encoder."):
            assert torch.equal(value, expected[key])
    assert not bool(controlnet.feature_encoder.conv3.weight.any())


def test_warm_start_for_the_same_features_takes_the_feature_encoder_too(
    folder: Path, tmp_path: Path
) -> None:
    plain = controlnet_config(folder, tmp_path, 1)
    parts = load_frozen_parts(plain.model)
    other = make_controlnet(plain.model, parts)
    torch.nn.init.normal_(other.feature_encoder.conv3.weight)
    other.save_pretrained(tmp_path / "other")
    config = controlnet_config(folder, tmp_path, 1, f"model.warm_start={tmp_path / 'other'}")
    expected = other.state_dict()
    for key, value in make_controlnet(config.model, parts).state_dict().items():
        assert torch.equal(value, expected[key])


def test_only_named_parameters_are_trained(folder: Path, tmp_path: Path) -> None:
    tiny.make_controlnet().save_pretrained(tmp_path / "other")
    extra = (
        f"model.warm_start={tmp_path / 'other'}",
        "model.trained=[feature_encoder.*,controlnet_mid_block.*]",
        "optim.ema_decay=0.5",
        "optim.weight_decay=0.1",
    )
    final = train_controlnet(controlnet_config(folder, tmp_path / "run", 2, *extra))
    before = FeatureControlNet.from_pretrained(tmp_path / "other").state_dict()
    after = FeatureControlNet.from_pretrained(final / "controlnet").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.partition(".")[0] for name in changed} == {
        "feature_encoder",
        "controlnet_mid_block",
    }
    with pytest.raises(InputError, match=r"model\.trained must match parameters, but 'head\.\*'"):
        train_controlnet(controlnet_config(folder, tmp_path / "no", 1, "model.trained=[head.*]"))


def test_settings_that_were_added_mean_what_runs_did_before() -> None:
    """Else an older checkpoint could not be resumed, or another thing would be trained."""
    config = checkpoint._flatten(parse_yaml(to_yaml(ControlNetConfig()), "the defaults"))
    assert checkpoint.ADDED_KEYS.items() <= config.items()
    assert {key for key in config if key.startswith("imitation.")} <= checkpoint.ADDED_KEYS.keys()


def test_a_feature_encoder_imitates_another(folder: Path, tmp_path: Path) -> None:
    """One that is given the other's own maps comes close to it; of constant maps it cannot."""
    other = tiny.make_controlnet().requires_grad_(False)
    backbone = wrap_model(tiny.make_backbone(), name="tiny/convnext")
    images = torch.cat([tiny.make_images(24), tiny.make_images(24).flip(-1)])
    batches = [(one, None) for one in images.split(20)]
    pairs = read_pairs(backbone, other, backbone, batches, 50, (8, 8))
    assert pairs.conditions.shape == (48, 16, 8, 8)
    new = tiny.make_controlnet(zero=True, feature_projection_channels=24)
    trunk = {k: v.clone() for k, v in new.state_dict().items() if "feature_encoder" not in k}
    config = ImitationConfig(epochs=60, lr=0.02)
    left = imitate(new, pairs, config)
    assert left < 0.5
    assert all(torch.equal(new.state_dict()[name], value) for name, value in trunk.items())
    blind = replace(pairs, features=torch.zeros_like(pairs.features))
    assert imitate(tiny.make_controlnet(zero=True), blind, config) > 2 * left
    wide = replace(pairs, conditions=pairs.conditions.repeat(1, 2, 1, 1))
    with pytest.raises(InputError, match="conditions of 16 channels, but has 32"):
        imitate(new, wide, config)


def test_feature_statistics_standardise_the_cells(folder: Path, tmp_path: Path) -> None:
    from featinv_diffusion.data.crops import open_training_images
    from featinv_diffusion.training.entry import make_datasets, stack_images

    config = controlnet_config(folder, tmp_path, 1)
    parts = load_frozen_parts(config.model)
    controlnet = make_controlnet(config.model, parts)
    train, _ = make_datasets(open_training_images(config.data), config.data, 0)
    images = stack_images(train, 16)[0]
    set_feature_statistics(controlnet, parts.backbone, images)
    features = parts.backbone.features(images)
    cells = controlnet.feature_encoder.standardise(features).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(cells.mean(0), torch.zeros(tiny.CHANNELS), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        cells.std(0, unbiased=False), torch.ones(tiny.CHANNELS), atol=1e-3, rtol=0
    )


def test_streaming_trains_needs_a_length_and_resumes_exactly(folder: Path, tmp_path: Path) -> None:
    import tarfile

    names = [f"{label}/{i}.png" for i in range(10) for label in ("red", "blue")]
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i, name in enumerate(names[shard::2]):
                tar.add(folder / "images" / name, f"{i:04d}.png")
    stream = [f"data.root={tmp_path / '*.tar'}", "data.streaming=true", "data.shuffle_buffer=4"]
    stream += ["optim.batch_size=4", "run.checkpoint_every=3", "data.num_workers=2"]
    with pytest.raises(InputError, match=r"optim\.max_steps"):
        train_controlnet(
            controlnet_config(folder, tmp_path / "a", 1, *stream, "optim.max_steps=null")
        )
    with pytest.raises(InputError, match="latent cache"):
        train_controlnet(controlnet_config(folder, tmp_path / "a", 1, *stream, "cache.folder=x"))
    train_controlnet(controlnet_config(folder, tmp_path / "whole", 8, *stream))
    train_controlnet(controlnet_config(folder, tmp_path / "parts", 3, *stream))
    train_controlnet(
        controlnet_config(folder, tmp_path / "parts", 8, *stream, "run.allow_changed_config=true")
    )
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_streamed_shards_are_each_seen_once_and_validation_never(
    folder: Path, tmp_path: Path
) -> None:
    import tarfile

    images = [folder / f"images/{label}/{i}.png" for i in range(10) for label in ("red", "blue")]
    for shard in range(4):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i, path in enumerate(images[shard::4]):
                tar.add(path, f"{i:04d}.png")
    stream = [f"data.root={tmp_path / '*.tar'}", "data.streaming=true", "data.num_workers=2"]
    stream += ["optim.batch_size=3", "run.n_validation_images=8"]
    train_controlnet(controlnet_config(folder, tmp_path / "run", 4, *stream))
    orders = [
        json.loads(line)["order"]
        for line in (tmp_path / "run/losses.jsonl").read_text().splitlines()
    ]
    # Two workers in turn, whose indices count on, even and odd: none of them comes twice.
    expected = [[0, 2, 4], [1, 3, 5], [6, 8, 10], [7, 9, 11]]
    assert orders == [f"{derive_seed(*indices):016x}" for indices in expected]


@pytest.mark.parametrize("name", ["optim.batch_size", "run.log_every", "run.n_validation_images"])
def test_counts_of_zero_are_refused(folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=name):
        train_controlnet(controlnet_config(folder, tmp_path, 1, f"{name}=0"))


def test_warm_start_from_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tiny.make_controlnet(tiny.make_unet(block_out_channels=(8, 16)))
    other.save_pretrained(tmp_path / "other")
    config = controlnet_config(folder, tmp_path, 1, f"model.warm_start={tmp_path / 'other'}")
    with pytest.raises(InputError, match="same base"):
        train_controlnet(config)


def test_finished_run_started_again_changes_nothing_but_the_final_folder(
    folder: Path, tmp_path: Path
) -> None:
    config = controlnet_config(folder, tmp_path, 2, "run.mixed_precision=fp32")
    train_controlnet(config)
    names = ("losses.jsonl", "validation.jsonl")
    before = [(tmp_path / name).read_text() for name in names]
    (tmp_path / "checkpoints/partial-00000009").mkdir()
    train_controlnet(config)
    assert [(tmp_path / name).read_text() for name in names] == before
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_dry_run_writes_nothing_and_names_the_shapes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_controlnet(controlnet_config(folder, tmp_path / "run", 3, "run.dry_run=true"))
    printed = capsys.readouterr().out
    assert "trainable parameters" in printed
    assert "batch['pixels']: (8, 3, 64, 64)" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.base=absent", "Stable Diffusion"),
        ("model.base=x y", "x y"),
        ("validation.scheduler=unipcc", "did you mean 'unipc'"),
        ("data.held_back_per_class=0", "held_back_per_class"),
        ("optim.batch_size=64", "got 16 images"),
        ("model.attention=xformers", "needs a CUDA device and the package xformers"),
    ],
)
def test_bad_settings_are_one_sentence(
    folder: Path, tmp_path: Path, override: str, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        train_controlnet(controlnet_config(folder, tmp_path / "run", 3, override))


def test_base_without_its_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "base", ignore=shutil.ignore_patterns("images"))
    for path in (tmp_path / "base/tokenizer").iterdir():
        path.unlink()
    config = controlnet_config(folder, tmp_path / "run", 1, f"model.base={tmp_path / 'base'}")
    with pytest.raises(InputError, match="tokenizer"):
        train_controlnet(config)


def test_full_disk_is_one_sentence_and_leaves_no_half_checkpoint(
    folder: Path, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # smaller than the weights
    try:
        with pytest.raises(InputError, match="checkpoint must be written"):
            train_controlnet(controlnet_config(folder, tmp_path, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert not (tmp_path / "final").exists()


def test_diverged_loss_stops_the_run(folder: Path, tmp_path: Path) -> None:
    config = controlnet_config(folder, tmp_path, 50, "optim.lr=1e30", "optim.max_grad_norm=1e30")
    with pytest.raises(InputError, match="loss must be finite"):
        train_controlnet(config)


def test_weights_that_are_not_finite_are_never_saved(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    train_controlnet(controlnet_config(folder, tmp_path / "run", 2))
    weights = tmp_path / "run/final/controlnet/diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    wild = ["optim.lr=1e38", "optim.weight_decay=1e38", "run.allow_changed_config=true"]
    with pytest.raises(InputError, match=r"Lower optim\.lr"):
        train_controlnet(controlnet_config(folder, tmp_path / "run", 3, *wild))

    def step(optimizer: torch.optim.Optimizer, closure: object = None) -> None:
        optimizer.param_groups[0]["params"][-1].data.fill_(float("nan"))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    for name, n_steps in (("run", 3), ("new", 1)):
        with pytest.raises(InputError, match="weights must be finite"):
            train_controlnet(controlnet_config(folder, tmp_path / name, n_steps, *wild[2:]))
    assert weights.read_bytes() == before
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]
    assert not (tmp_path / "new/final").exists()
    assert list_checkpoints(tmp_path / "new") == []


def test_what_decides_no_weight_never_blocks_a_resume(
    folder: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_controlnet(controlnet_config(folder, tmp_path / "run", 2))
    (tmp_path / "run").rename(tmp_path / "moved")
    monkeypatch.chdir(folder)
    more = ["data.num_workers=1", "data.root=./images", "model.base=.", "run.log_every=3"]
    more += ["run.checkpoint_every=7", "validation.guidance_scale=2"]
    train_controlnet(controlnet_config(folder, tmp_path / "moved", 2, *more))
    assert "Resumed from" in capsys.readouterr().out
    for change in ("optim.lr=0.1", "data.root=.", "model.dropout=0.5"):
        with pytest.raises(InputError, match=f"these changed: {change.partition('=')[0]}"):
            train_controlnet(controlnet_config(folder, tmp_path / "moved", 2, *more, change))


def test_one_run_at_a_time_and_leftovers_of_killed_ones_go(folder: Path, tmp_path: Path) -> None:
    config = controlnet_config(folder, tmp_path / "run", 1)
    final = train_controlnet(config)
    final.rename(tmp_path / "run/final-replaced")  # as a kill between the two renames leaves it
    for name in ("final-partial", "checkpoints/partial-00000009"):
        (tmp_path / "run" / name).mkdir()
    code = (
        "import sys; from pathlib import Path; from featinv_diffusion.files import holding\n"
        "with holding(Path(sys.argv[1])): print('held', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InputError, match=rf"another process \({other.pid} on"):
            train_controlnet(config)
        other.kill()
    train_controlnet(config)
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["checkpoints", "final", "losses.jsonl", "validation", "validation.jsonl"]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000001"]


def test_what_completes_a_run_is_on_the_disk_first(
    folder: Path, tmp_path: Path, monkeypatch
) -> None:
    flushed: list[str] = []

    for name in ("flush_to_disk", "flush_one"):
        monkeypatch.setattr(checkpoint, name, lambda path: flushed.append(path.name))
    train_controlnet(controlnet_config(folder, tmp_path / "run", 1))
    assert flushed == ["partial-00000001", "checkpoints", "final-partial", "run"]


class Foreign:
    """Code that a pickle would run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_damaged_checkpoint_is_named_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    config = controlnet_config(folder, tmp_path / "run", 1, "optim.ema_decay=0.5")
    train_controlnet(config)
    step = tmp_path / "run/checkpoints/step-00000001"
    model = "controlnet/diffusion_pytorch_model.safetensors"
    pickles = ["optimizer.bin", "average.bin", "random_states_0.pkl"]
    cases: list[tuple[str, bytes | None]] = [
        *((name, None) for name in pickles),
        *((name, pickle.dumps(Foreign(tmp_path / "ran"))) for name in pickles),
        *((name, b"{") for name in ("environment.json", "progress.json")),
        *((name, b"[]") for name in ("environment.json", "progress.json", "average.bin")),
        ("environment.json", b'{"n_processes": "many", "versions": {}}'),
        ("progress.json", b'{"step": -1}'),
        ("config.yaml", b"a: ["),
        (model, None),
    ]
    for name, content in cases:
        whole = (step / name).read_bytes()
        (step / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
        with pytest.raises(InputError) as caught:
            train_controlnet(config)
        (step / name).write_bytes(whole)
        assert str(step) in str(caught.value)
        assert name == model or name in str(caught.value)
        assert "\n" not in str(caught.value)
    torch.save(Foreign(tmp_path / "ran"), step / "optimizer.bin")
    with pytest.raises(InputError, match=r"optimizer\.bin must hold tensors and plain values"):
        train_controlnet(config)
    assert not (tmp_path / "ran").exists()


def test_export_takes_the_average_of_a_checkpoint(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["optim.ema_decay=0.9", "model.backbone_name=tiny/convnext"]
    config = controlnet_config(folder, tmp_path / "run", 2, *more)
    final = FeatureControlNet.from_pretrained(train_controlnet(config) / "controlnet")
    step = tmp_path / "run/checkpoints/step-00000002"
    last = FeatureControlNet.from_pretrained(step / "controlnet")
    name = "feature_encoder.conv3.weight"
    assert not torch.equal(last.state_dict()[name], final.state_dict()[name])
    for weights, wanted in ((None, final), ("average", final), ("raw", last)):
        for path in (step, step / "controlnet"):
            last_copy = FeatureControlNet.from_pretrained(step / "controlnet")
            choose_weights(last_copy, path, weights)
            assert torch.equal(last_copy.state_dict()[name], wanted.state_dict()[name])
            assert ("the average" in capsys.readouterr().out) == (weights != "raw")
    choose_weights(last, tmp_path / "run/final", None)
    assert capsys.readouterr().out == ""
    with pytest.raises(InputError, match=r"optim\.ema_decay"):
        choose_weights(last, tmp_path / "run/final", "average")
    with pytest.raises(InputError, match="did you mean 'average'"):
        choose_weights(last, step, "averag")


def test_what_a_data_worker_says_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "images", tmp_path / "images")
    for path in sorted((tmp_path / "images/red").iterdir())[:5]:
        path.write_bytes(b"broken")
    more = {"data.num_workers": 1, "data.on_bad_image": "error"}
    values = classifier_settings(tmp_path, tmp_path / "run", 6, **more)
    with pytest.raises(InputError, match=r"^\S+\.png is not a picture.*$"):
        train_classifier(load_config(ClassifierConfig, None, values))


def test_tensorboard_is_used_where_it_is_installed(monkeypatch) -> None:
    assert [find_tracker(RunConfig(tracker=name)) for name in ("auto", "wandb", "none")] == [
        "tensorboard",
        "wandb",
        None,
    ]
    monkeypatch.setattr(loop, "is_tensorboard_available", lambda: False)
    assert find_tracker(RunConfig()) is None
    with pytest.raises(InputError, match=r"pip install 'featinv-diffusion\[train\]'"):
        make_accelerator(OptimConfig(), RunConfig(tracker="tensorboard", cpu=True))


@pytest.mark.parametrize("name", ["FSDP", "DeepSpeed"])
def test_models_divided_among_processes_are_refused(monkeypatch, name: str) -> None:
    with monkeypatch.context() as launch:
        launch.setenv(f"ACCELERATE_USE_{name.upper()}", "true")
        with pytest.raises(InputError, match=f"must hold the whole model, .* asked for {name}"):
            make_accelerator(OptimConfig(), RunConfig(cpu=True))
    kind = property(lambda accelerator: DistributedType(name.upper()))
    monkeypatch.setattr(Accelerator, "distributed_type", kind)  # as a plugin in Python sets it
    with pytest.raises(InputError, match=f"must hold the whole model, .* asked for {name}"):
        make_accelerator(OptimConfig(), RunConfig(cpu=True))


def test_a_run_without_tensorboard_says_so(
    folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(loop, "is_tensorboard_available", lambda: False)
    overrides = classifier_settings(folder, tmp_path, 1, **{"run.tracker": "auto"})
    train_classifier(load_config(ClassifierConfig, None, overrides))
    assert "No tracker: tensorboard is not installed." in capsys.readouterr().out
    assert not (tmp_path / "tracker").exists()


def test_images_that_cannot_be_read_are_replaced_and_listed(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The same with workers, and in a run that was resumed."""
    shutil.copytree(folder / "images", tmp_path / "images")
    broken = [tmp_path / "images" / name for name in ("blue/3.png", "red/0.png", "red/9.png")]
    for path in broken:
        path.write_bytes(b"broken")  # the last one is held back

    def train(name: str, steps: int, **more: Any) -> Path:
        output = tmp_path / name
        values = classifier_settings(tmp_path, output, steps, **{"run.log_every": 1, **more})
        train_classifier(load_config(ClassifierConfig, None, values))
        return output

    whole = train("whole", 6)
    listed = (whole / "unreadable.txt").read_text().splitlines()
    assert listed == [str(path) for path in broken[:2]]
    assert f"{broken[2]} cannot be read and is replaced." in caplog.text
    assert "2 images could not be read and were replaced" in capsys.readouterr().out
    train("resumed", 3, **{"data.num_workers": 2})
    assert (tmp_path / "resumed/unreadable.txt").read_text()
    (tmp_path / "resumed/unreadable.txt").unlink()
    changed = {"data.num_workers": 2, "run.allow_changed_config": True}
    resumed = train("resumed", 6, **changed)
    assert (resumed / "unreadable.txt").read_text().splitlines() == listed
    assert losses(resumed) == losses(whole)
    with pytest.raises(InputError, match=r"\d\.png is not a picture"):
        train("error", 6, **{"data.on_bad_image": "error"})
