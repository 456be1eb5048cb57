"""The sigmoid loss, self-distillation, and the training of an encoder with either recipe."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from featinv_diffusion.backbones import load_backbone
from featinv_diffusion.config import load_config
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import read_tensors, write_tensors
from train.tiny_family.contrastive import (
    STATE_FORMAT,
    ContrastiveConfig,
    ContrastiveModelConfig,
    ContrastiveNetworks,
    ContrastiveTask,
    SelfDistillation,
    SelfDistillationConfig,
    find_titles,
    make_networks,
    normalise,
    random_crops,
    random_mask,
    sigmoid_loss,
    train_contrastive,
)

CONFIGS = Path(__file__).parents[2] / "configs/tiny"
TITLES = ["goldfish", "tree frog", "monarch butterfly"]
SMALL = ContrastiveModelConfig(
    patch_size=16, hidden_size=32, depth=2, n_heads=2, text_hidden_size=16, text_depth=1
)
DISTILLED = dataclasses.replace(
    SMALL, self_distillation=SelfDistillationConfig(n_images=4, predictor_size=16)
)


def networks_of(config: ContrastiveModelConfig) -> ContrastiveNetworks:
    torch.manual_seed(0)
    return make_networks(config, 64, TITLES)[0]


def pixels_of(n: int) -> Tensor:
    return torch.rand(n, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def distillation_of(networks: ContrastiveNetworks) -> SelfDistillation:
    assert networks.distillation is not None
    return networks.distillation


def test_sigmoid_loss_sums_every_pair_once() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
    labels = [0, 2]
    total = 0.0
    for i, label in enumerate(labels):
        for k in range(3):
            z = 1 if k == label else -1
            total -= math.log(1 / (1 + math.exp(-z * float(logits[i, k]))))
    assert float(sigmoid_loss(logits, torch.tensor(labels))) == pytest.approx(total / 2, rel=1e-6)


def test_with_one_image_of_each_class_the_loss_is_that_of_transformers() -> None:
    networks = networks_of(SMALL).eval()
    pixels = pixels_of(3)
    theirs = networks.siglip(input_ids=networks.input_ids, pixel_values=pixels, return_loss=True)
    logits, extra = networks(pixels)
    torch.testing.assert_close(logits, theirs.logits_per_image, rtol=1e-5, atol=1e-5)
    assert extra == {}
    loss = sigmoid_loss(logits, torch.arange(3))
    torch.testing.assert_close(loss, theirs.loss, rtol=1e-5, atol=1e-5)


def test_with_cosines_of_zero_each_class_is_as_likely() -> None:
    networks = networks_of(SMALL).requires_grad_(False)
    prior = torch.sigmoid(networks.siglip.logit_bias)
    assert float(prior) == pytest.approx(1 / 3, rel=1e-6)
    assert float(networks.siglip.logit_scale.exp()) == pytest.approx(10.0, rel=1e-6)


def test_only_the_kept_patches_are_seen_each_at_its_place() -> None:
    networks = networks_of(SMALL).eval()
    pixels = pixels_of(2)
    whole = networks(pixels)[0]
    shuffled = torch.stack([torch.randperm(16) for _ in range(2)])
    torch.testing.assert_close(networks(pixels, shuffled)[0], whole, rtol=1e-5, atol=1e-5)

    kept = torch.arange(15).expand(2, -1)
    before = networks(pixels, kept)[0]
    changed = pixels.clone()
    changed[:, :, 48:, 48:] = 0  # the last patch
    assert torch.equal(networks(changed, kept)[0], before)
    changed[:, :, :16, :16] = 0  # the first
    assert not torch.allclose(networks(changed, kept)[0], before)


def test_recipes_begin_with_the_same_weights() -> None:
    plain, distilled = networks_of(SMALL), networks_of(DISTILLED)
    expected = plain.siglip.state_dict()
    for name, value in distilled.siglip.state_dict().items():
        assert torch.equal(value, expected[name])


def views(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    masked = random_mask(torch.rand(n, 16, generator=generator), 0.5)
    return masked, random_crops(pixels_of(n), 32, torch.rand(n, 2, generator=generator))


def test_the_teacher_gets_no_gradient_and_follows_by_its_momentum() -> None:
    networks = networks_of(DISTILLED).train()
    distillation = distillation_of(networks)
    student = networks.siglip.vision_model
    start = [p.clone() for p in distillation.teacher.parameters()]
    for mine, theirs in zip(start, student.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with torch.no_grad():
        for p in student.parameters():
            p.add_(1.0)
    logits, extra = networks(pixels_of(4), None, views(4))
    (logits.sum() + extra["masked"] + extra["local"]).backward()
    for before, p in zip(start, distillation.teacher.parameters(), strict=True):
        assert p.grad is None
        torch.testing.assert_close(p, before + 0.01)
    for name, p in networks.named_parameters():
        assert p.requires_grad == (not name.startswith("distillation.teacher"))
        assert p.grad is not None or not p.requires_grad, name

    moved = [p.clone() for p in distillation.teacher.parameters()]
    networks.eval()(pixels_of(4), None, views(4))
    for before, p in zip(moved, distillation.teacher.parameters(), strict=True):
        assert torch.equal(p, before)


def test_the_student_does_not_see_what_is_masked() -> None:
    networks = networks_of(DISTILLED).eval()
    pixels = pixels_of(2).requires_grad_()
    masked, crops = views(2)
    distillation = distillation_of(networks)
    losses = distillation(networks.siglip.vision_model, pixels, masked, crops)
    (gradient,) = torch.autograd.grad(losses["masked"], pixels)
    per_patch = gradient.abs().sum(1).unfold(1, 16, 16).unfold(2, 16, 16).sum((-1, -2)).flatten(1)
    assert bool((per_patch[masked] == 0).all())
    assert bool((per_patch[~masked] > 0).all())
    (of_local,) = torch.autograd.grad(losses["local"], pixels, allow_unused=True)
    assert of_local is None  # its student sees the crop alone, and its teacher is fixed


def test_losses_of_the_trivial_predictors() -> None:
    networks = networks_of(DISTILLED).eval()
    distillation = distillation_of(networks)
    pixels = pixels_of(3)
    masked = views(3)[0]
    last: Any = distillation.patch_predictor[2]  # pyright: ignore[reportIndexIssue]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    distillation.pooled_predictor = nn.Identity()
    losses = distillation(networks.siglip.vision_model, pixels, masked, pixels)
    assert float(losses["masked"]) == pytest.approx(1, abs=1e-3)  # layer-normalised target
    assert float(losses["local"]) == pytest.approx(0, abs=1e-5)  # whole view, equal weights
    assert 0 < float(losses["teacher_std"]) < 1.1


def test_a_collapsed_teacher_is_seen() -> None:
    networks = networks_of(DISTILLED).eval()
    distillation = distillation_of(networks)
    nn.init.zeros_(distillation.teacher.post_layernorm.weight)
    losses = distillation(networks.siglip.vision_model, pixels_of(4), *views(4))
    assert float(losses["teacher_std"]) == pytest.approx(0, abs=1e-6)
    assert float(losses["teacher_pooled_std"]) == pytest.approx(0, abs=1e-5)


def test_masks_and_crops_are_what_they_say() -> None:
    draws = torch.tensor([[0.9, 0.1, 0.5, 0.3], [0.2, 0.8, 0.1, 0.7]])
    wanted = torch.tensor([[False, True, False, True], [True, False, True, False]])
    assert torch.equal(random_mask(draws, 0.5), wanted)
    image = torch.arange(16.0).view(1, 1, 4, 4).expand(2, 1, 4, 4)
    crops = random_crops(image, 2, torch.tensor([[0.0, 0.0], [0.999, 0.5]]))
    assert crops[0, 0].tolist() == [[0, 1], [4, 5]]
    assert crops[1, 0].tolist() == [[9, 10], [13, 14]]  # the last of 3 rows, the 2nd of 3 columns


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images of each of two flat colours with noise."""
    folder = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    for label, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (folder / label).mkdir(parents=True)
        for i in range(10):
            pixels = random.normal(colour, 20, (64, 64, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{label}/{i}.png")
    return folder


def config_of(folder: Path, output: Path, steps: int, **more: Any) -> ContrastiveConfig:
    values = {
        "data.root": folder,
        "data.size": 64,
        "data.crop": "shift",
        "data.held_back_per_class": 2,
        "data.num_workers": 0,
        "model.patch_size": 16,
        "model.hidden_size": 32,
        "model.depth": 1,
        "model.n_heads": 2,
        "model.text_hidden_size": 16,
        "model.text_depth": 1,
        "optim.optimizer": "muon",
        "optim.lr": 0.02,
        "optim.batch_size": 8,
        "optim.epochs": 1000,
        "optim.max_steps": steps,
        "run.output": output,
        "run.tracker": "none",
        "run.cpu": True,
        **more,
    }
    return load_config(ContrastiveConfig, None, [f"{k}={v}" for k, v in values.items()])


DISTIL = {"model.self_distillation": "{n_images: 4, predictor_size: 16}"}


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_both_recipes_learn_two_colours_from_the_same_beginning(
    folder: Path, tmp_path: Path
) -> None:
    drop = {"model.patch_drop_rate": 0.5, "model.full_after": 20}
    for name, extra in (("siglip", {}), ("siglip2", DISTIL)):
        final = train_contrastive(config_of(folder, tmp_path / name, 25, **drop, **extra))
        assert lines(tmp_path / name / "validation.jsonl")[-1]["top1"] == 1.0
        backbone = load_backbone(f"hf/{final / 'backbone'}")
        assert (backbone.spec.channels, backbone.spec.grid) == (32, (4, 4))
        images = torch.rand(2, 3, 64, 64)
        torch.testing.assert_close(backbone.preprocess(images), normalise(images))
    plain, distilled = (lines(tmp_path / n / "losses.jsonl") for n in ("siglip", "siglip2"))
    assert plain[0]["contrastive"] == distilled[0]["contrastive"]
    assert [x["order"] for x in plain] == [x["order"] for x in distilled]
    assert distilled[-1]["masked"] < 0.8 * distilled[0]["masked"]
    assert distilled[-1]["local"] < 0.5 * distilled[0]["local"]


def test_saved_model_classifies_by_its_own_tokenizer(folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPTokenizer, SiglipModel

    final = train_contrastive(config_of(folder, tmp_path, 25))
    model = SiglipModel.from_pretrained(final / "model").eval()
    tokenizer: Any = CLIPTokenizer.from_pretrained(str(final / "model"))
    texts = ["a photo of a red", "a photo of a blue"]
    ids = torch.tensor(tokenizer(texts, padding="max_length").input_ids)
    assert ids.shape == (2, 16)
    red = torch.tensor([200, 30, 30]).view(1, 3, 1, 1).expand(1, 3, 64, 64) / 255
    scores = model(input_ids=ids, pixel_values=normalise(red)).logits_per_image
    assert int(scores.argmax()) == 0


def test_a_resumed_run_ends_bit_identical(folder: Path, tmp_path: Path) -> None:
    """The teacher, the step that patches return at, and the weights all go on where they were."""
    more = {**DISTIL, "model.patch_drop_rate": 0.5, "model.full_after": 5}
    more |= {"run.checkpoint_every": 3, "run.checkpoints_total_limit": 9}
    whole, again = tmp_path / "whole", tmp_path / "again"
    train_contrastive(config_of(folder, whole, 7, **more))
    shutil.copytree(whole, again)
    shutil.rmtree(again / "final")
    for step in (6, 7):
        shutil.rmtree(again / f"checkpoints/step-{step:08d}")
    train_contrastive(config_of(folder, again, 7, **more))
    assert (again / "losses.jsonl").read_text() == (whole / "losses.jsonl").read_text()
    for name in ("model/model.safetensors", "training.safetensors", "backbone/model.safetensors"):
        expected, weights = load_file(whole / "final" / name), load_file(again / "final" / name)
        assert expected.keys() == weights.keys()
        assert [k for k in expected if not torch.equal(expected[k], weights[k])] == []
    state = load_file(whole / "final/training.safetensors")
    assert int(state["step"]) == 7
    key = "embeddings.position_embedding.weight"
    student = load_file(whole / "final/backbone/model.safetensors")
    assert not torch.equal(state[f"distillation.teacher.{key}"], student[key])


def test_a_training_state_of_another_recipe_is_refused(tmp_path: Path) -> None:
    networks, tokenizer = make_networks(DISTILLED, 64, TITLES)
    held = (torch.rand(1, 3, 64, 64), torch.zeros(1))
    task = ContrastiveTask(networks, tokenizer, DISTILLED, held)
    task.save(networks, tmp_path)
    networks.step.fill_(7)
    task.load(networks, tmp_path)
    assert int(networks.step) == 0
    with pytest.raises(InputError, match=r"e\.g\. 'distillation"):  # unexpected
        task.load(networks_of(SMALL), tmp_path)
    path = tmp_path / "training.safetensors"
    state, _ = read_tensors(path, STATE_FORMAT, "")
    del state["step"]
    write_tensors(path, state, {}, STATE_FORMAT)
    with pytest.raises(InputError, match=r"1 tensors, e\.g\. 'step'"):  # missing
        task.load(networks, tmp_path)


def test_a_file_of_titles_must_hold_one_for_each_class(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("# a comment\nn03 frog\nn01 gold fish\n")
    assert find_titles(["frog", "gold fish"], str(path)) == ["frog", "gold fish"]
    path.write_text("n01 gold fish\nn02\nn03 frog\nn04\n")
    with pytest.raises(InputError, match="these have none: n02, n04"):
        find_titles(["gold fish", "n02", "frog", "n04"], str(path))
    assert find_titles(["red", "blue"], None) == ["red", "blue"]
    assert len(find_titles([], str(CONFIGS / "classes.txt"))) == 100


def test_recipes_of_the_tiny_family_differ_in_the_objective_only() -> None:
    plain = load_config(ContrastiveConfig, CONFIGS / "siglip.yaml")
    distilled = load_config(ContrastiveConfig, CONFIGS / "siglip2.yaml")
    assert distilled.model.self_distillation is not None
    model = dataclasses.replace(distilled.model, self_distillation=None)
    run = dataclasses.replace(distilled.run, output=plain.run.output)
    assert dataclasses.replace(distilled, model=model, run=run) == plain


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.text_length": 4}, "the longest has"),
        ({"model.patch_size": 24}, "multiple of model.patch_size"),
        ({"model.patch_drop_rate": 1.0}, "patch_drop_rate must be in"),
        ({"model.self_distillation": "{crop_size: 40}"}, "crop_size must be a multiple"),
        ({"model.self_distillation": "{momentum: 1.0}"}, "momentum must lie between"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    folder: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train_contrastive(config_of(folder, tmp_path, 1, **settings))


def test_classes_of_one_name_are_refused() -> None:
    with pytest.raises(InputError, match="'a photo of a crane' names several"):
        make_networks(SMALL, 64, ["crane", "bus", "crane"])
