"""Training of detector, inverses and both end to end, on random small models and pictures."""

from __future__ import annotations

import json
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
from featinv_diffusion.inverters.detr import load_detr
from featinv_diffusion.inverters.modular import InverseSet
from featinv_diffusion.training.config import OptimConfig, RunConfig
from featinv_diffusion.training.inverter import (
    HungarianLoss,
    InverterConfig,
    InverterModelConfig,
    InverterTask,
    ModuleConfig,
    TuningConfig,
    TuningTask,
    make_inverses,
    measure_statistics,
    squared_error,
    train_inverter,
)
from tests.inverters import small
from tests.tiny import make_images
from train.tiny_family.detector import DetectorConfig, DetectorModelConfig, train_detector

CONFIGS = Path(__file__).parents[2] / "configs"
CONV = ModuleConfig(channels=(8,), kernels=(4, 4), strides=(4, 2))
SHAPE = {"depth": 1, "n_heads": 2, "feedforward": 16}
MODULES = {
    "backbone": CONV,
    "encoder": ModuleConfig(kind="encoder", writes="backbone", **SHAPE),
    "decoder": ModuleConfig(kind="decoder", writes="encoder", **SHAPE),
    "detection": ModuleConfig(kind="head", writes="decoder", hidden=(8, 8)),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("boxes")
    generator = np.random.default_rng(0)
    for name in ("n01", "n02"):
        folder = root / "train" / name / "images"
        folder.mkdir(parents=True)
        lines = []
        for i in range(6):
            pixels = generator.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}_{i}.png")
            lines.append(f"{name}_{i}.png 8 8 47 47\n")
        (folder.parent / f"{name}_boxes.txt").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def data(pictures: Path) -> DataConfig:
    return DataConfig(
        root=str(pictures), size=64, scale=(0.8, 1.0), held_back_per_class=1, num_workers=0
    )


OPTIM = OptimConfig(lr=1e-3, batch_size=5, epochs=2, max_steps=3)


def run_config(output: Path) -> RunConfig:
    return RunConfig(
        output=str(output), tracker="none", cpu=True, checkpoint_every=100, validate_every=100
    )


@pytest.fixture(scope="module")
def detector(data: DataConfig, tmp_path_factory) -> Path:
    """A detector that three steps of `train_detector` made."""
    root = tmp_path_factory.mktemp("detector")
    small.make_resnet().save_pretrained(root / "classifier")
    model = DetectorModelConfig(
        classifier=str(root / "classifier"), d_model=16, encoder_layers=1, decoder_layers=2,
        n_heads=2, feedforward=16, n_queries=3, max_boxes=1,
    )  # fmt: skip
    config = DetectorConfig(data=data, model=model, optim=OPTIM, run=run_config(root / "run"))
    return train_detector(config) / "detector"


@pytest.fixture(scope="module")
def config(data: DataConfig, detector: Path, tmp_path_factory) -> InverterConfig:
    model = InverterModelConfig(
        model="small/detr", weights=str(detector), input_size=(64, 64), modules=MODULES
    )
    output = tmp_path_factory.mktemp("inverter")
    return InverterConfig(data=data, model=model, optim=OPTIM, run=run_config(output))


@pytest.fixture(scope="module")
def inverter(config: InverterConfig) -> Path:
    return train_inverter(config) / "inverter"


def test_detector_training_keeps_the_classifiers_stages(detector: Path) -> None:
    stages = small.make_resnet().timm_model.state_dict()
    weights = load_detr(str(detector)).model.backbone.model.state_dict()
    assert all(torch.equal(weights[key], stages[key]) for key in weights)
    record = json.loads((detector.parents[1] / "validation.jsonl").read_text().splitlines()[-1])
    assert {"top1", "iou", "hit"} <= record.keys()


def test_a_trained_inverter_inverts_every_stage(inverter: Path, detector: Path) -> None:
    inverses = InverseSet.from_pretrained(inverter)
    assert inverses.chainable() == ["backbone", "encoder", "decoder", "detection"]
    assert inverses.info.model == "small/detr"
    record = json.loads((inverter.parents[1] / "validation.jsonl").read_text().splitlines()[-1])
    assert {"backbone", "detection", "psnr_decoder"} <= record.keys()
    assert list((inverter.parents[1] / "validation").glob("reconstructions-*.png"))


def test_batch_norm_statistics_move_in_training_and_are_used_in_evaluation(inverter: Path) -> None:
    module = InverseSet.from_pretrained(inverter)["backbone"]
    norm = module.layers[1]
    assert norm.num_batches_tracked == 3
    assert norm.running_mean.abs().max() > 0
    maps = torch.randn(4, 16, 8, 8)
    with torch.no_grad():
        evaluated, alone = module(maps), module(maps[:1])
        assert torch.allclose(evaluated[:1], alone, atol=1e-6), "statistics of the batch"
        norm.running_mean += 1
        assert not torch.allclose(module(maps), evaluated)


def test_training_leaves_the_forward_model_bit_identical(data: DataConfig) -> None:
    path = small.make_detr_path()
    before = small.state_of(path.model)
    inverses = make_inverses(InverterModelConfig(model=path.name, modules=MODULES), path)
    statistics = measure_statistics(path, ["image", *path.main_stages], make_images(4))
    task = InverterTask(inverses, path, (make_images(2) * 255).byte(), statistics)
    optimizer = torch.optim.Adam(inverses.parameters(), lr=1e-2)
    batch = {"pixels": (make_images(4) * 255).to(torch.uint8)}
    for _ in range(2):
        inverses.train()
        loss, _ = task.loss(inverses, batch)
        loss.backward()
        optimizer.step()
    task.validate(inverses.eval())
    assert all(torch.equal(value, before[key]) for key, value in path.model.state_dict().items())


def test_each_module_learns_from_its_own_stage_alone() -> None:
    path = small.make_detr_path()
    inverses = make_inverses(InverterModelConfig(model=path.name, modules=MODULES), path)
    statistics = measure_statistics(path, ["image", *path.main_stages], make_images(4))
    task = InverterTask(inverses, path, (make_images(2) * 255).byte(), statistics)
    batch = {"pixels": (make_images(4) * 255).to(torch.uint8)}
    _, losses = task.loss(inverses, batch)
    losses["encoder"].backward()
    touched = {n.split(".")[0] for n, p in inverses.named_parameters() if p.grad is not None}
    assert touched == {"encoder"}


@torch.no_grad()
def test_losses_are_relative_to_the_variance_of_what_is_written() -> None:
    path = small.make_detr_path()
    inverses = make_inverses(InverterModelConfig(model=path.name, modules=MODULES), path).eval()
    images = make_images(4)
    pixels = (images * 255).to(torch.uint8)
    statistics = measure_statistics(path, ["image", *path.main_stages], images)
    _, losses = InverterTask(inverses, path, pixels, statistics).loss(inverses, {"pixels": pixels})
    found = path.embeddings(pixels / 255)
    maps, wanted = inverses["decoder"](found["decoder"]), found["encoder"]
    variance = path.embeddings(images)["encoder"].var(dim=(0, 2, 3), correction=0).mean()
    expected = (maps - wanted).square().mean() / variance
    assert float(losses["decoder"]) == pytest.approx(float(expected), rel=1e-3)


def test_statistics_are_those_of_channels_over_images_and_cells() -> None:
    path = small.make_detr_path()
    images = make_images(5)
    with torch.no_grad():
        maps, queries = path.embeddings(images, ["encoder", "decoder"]).values()
    found = measure_statistics(path, ["encoder", "decoder"], images, batch_size=2)
    assert torch.allclose(found["encoder"][0], maps.mean(dim=(0, 2, 3)), atol=1e-5)
    assert torch.allclose(found["encoder"][1], maps.std((0, 2, 3), correction=0), atol=1e-4)
    assert torch.allclose(found["decoder"][0], queries.mean(dim=(0, 1)), atol=1e-5)


@pytest.mark.parametrize(
    ("path", "modules"),
    [
        (small.make_detr_path, MODULES),
        (
            small.make_vit_path,
            {
                "patches": replace(CONV, channels=(8,)),
                "encoder": ModuleConfig(kind="blocks", writes="patches", depth=1, n_heads=3),
                "last": ModuleConfig(kind="blocks", writes="blocks.1", depth=1, n_heads=3),
            },
        ),
    ],
)
def test_the_mean_embedding_scores_exactly_1(path, modules) -> None:
    """Also where the images have another size than the model and prefix tokens do not count."""
    path = path()
    inverses = make_inverses(InverterModelConfig(model=path.name, modules=modules), path)
    images = nn.functional.interpolate(make_images(6), (80, 72), mode="bilinear")
    stages = {*inverses.stages, *(inverses[s].writes.layer for s in inverses.stages)}
    statistics = measure_statistics(path, sorted(stages), images, batch_size=4)
    task = InverterTask(inverses, path, (images * 255).byte(), statistics)
    embeddings = task._embed(images)
    means = {
        stage: statistics[target][0].view(-1, 1, 1) if embeddings[target].ndim == 4
        else statistics[target][0]
        for stage, target in task.targets.items()
    }  # fmt: skip
    constant = {s: mean.expand_as(embeddings[task.targets[s]]) for s, mean in means.items()}
    for stage, loss in task._relative_losses(constant, embeddings).items():
        assert float(loss) == pytest.approx(1, rel=1e-5), stage


def test_statistics_of_patches_leave_out_the_prefix() -> None:
    path = small.make_vit_path()
    nn.init.constant_(path.model.cls_token, 100)
    images = make_images(3)
    mean, std = measure_statistics(path, ["patches"], images)["patches"]
    with torch.no_grad():
        patches = path.embeddings(images, ["patches"])["patches"][:, 1:]
    assert torch.allclose(mean, patches.mean(dim=(0, 1)), atol=1e-5)
    assert torch.allclose(std, patches.std(dim=(0, 1), correction=0), atol=1e-5)


@pytest.mark.parametrize(
    ("stage", "module"),
    [
        ("encoder", ModuleConfig(kind="decoder", writes="backbone", **SHAPE)),
        ("decoder", ModuleConfig(kind="encoder", writes="encoder", **SHAPE)),
        ("decoder", CONV),
        ("prediction", ModuleConfig(kind="head", writes="encoder", hidden=(8, 8))),
        ("encoder", ModuleConfig(kind="encoder", writes="image", **SHAPE)),
    ],
)
def test_a_module_of_the_wrong_kind_is_an_error_at_wiring_time(stage, module) -> None:
    path = small.make_detr_path()
    config = InverterModelConfig(model=path.name, modules={stage: module})
    with pytest.raises(InputError, match=r"A stage that \w+Inverse can (read|write) must be of"):
        make_inverses(config, path)


def test_prefix_tokens_that_never_change_do_not_count() -> None:
    path = small.make_vit_path()
    a, b = torch.randn(2, 65, 192), torch.randn(2, 65, 192)
    assert torch.equal(squared_error(path, "patches", a, b), (a - b)[:, 1:].square())
    assert squared_error(path, "encoder", a, b).shape == (2, 65, 192)
    image = squared_error(path, "image", torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))
    assert torch.allclose(image[0, :, 0, 0], torch.tensor([0.229, 0.224, 0.225]) ** -2)


def test_wrong_stages_are_errors_at_wiring_time(config: InverterConfig) -> None:
    path = small.make_detr_path()
    wrong = {**MODULES, "encoder": replace(MODULES["encoder"], writes="backbon")}
    with pytest.raises(InputError, match="did you mean 'backbone'"):
        make_inverses(InverterModelConfig(model=path.name, modules=wrong), path)
    for writes in ("encoder", "decoder"):
        cyclic = {**MODULES, "encoder": replace(MODULES["encoder"], writes=writes)}
        with pytest.raises(InputError, match=f"a stage before it, but '{writes}' is not"):
            make_inverses(InverterModelConfig(model=path.name, modules=cyclic), path)
    with pytest.raises(InputError, match="at least one stage"):
        make_inverses(InverterModelConfig(model=path.name), path)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_lambda_weighs_reconstruction_against_detection(weight: float) -> None:
    path = small.make_detr_path()
    inverses = small.make_detr_inverses(path)
    batch = {
        "pixels": (make_images(4) * 255).to(torch.uint8),
        "boxes": torch.full((4, 1, 4), 0.5),
        "box_labels": torch.tensor([[0], [1], [2], [-1]]),
    }
    task = TuningTask(path, inverses, TuningConfig(reconstruction_weight=weight), batch)
    task.module.train()
    loss, parts = task.loss(task.module, batch)
    expected = weight * parts["mse"] + (1 - weight) * parts["hungarian"]
    assert torch.allclose(loss, expected)
    loss.backward()
    moved = {n for n, p in task.module.named_parameters() if p.grad is not None and p.grad.any()}
    assert any(n.startswith("path.model.model.encoder") for n in moved)
    assert any(n.startswith("inverses.decoder") for n in moved) == (weight > 0)
    assert any("bbox_predictor" in n for n in moved) == (weight < 1)
    assert not any(n.startswith("inverses.prediction") for n in moved)
    assert not path.model.training
    assert inverses["backbone"].training


def test_lambda_out_of_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"must be at most 1, got 1\.2"):
        TuningConfig(reconstruction_weight=1.2)


def test_end_to_end_tuning_writes_detector_and_inverter(
    config: InverterConfig, inverter: Path, detector: Path, tmp_path: Path
) -> None:
    tuned = replace(
        config,
        tuning=TuningConfig(inverter=str(inverter), reconstruction_weight=0.5),
        run=run_config(tmp_path),
    )
    final = train_inverter(tuned)
    before, after = (load_detr(str(p)) for p in (detector, final / "detector"))
    assert any(
        not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    )
    assert InverseSet.from_pretrained(final / "inverter").stages == list(MODULES)


def test_hungarian_loss_of_a_hand_worked_case() -> None:
    """Two queries, one object: the second query has its class, and its box but for a shift."""
    scores = torch.tensor([[[0.0, 0.0, 3.0], [0.0, 3.0, 0.0]]])
    boxes = torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.5, 0.6, 0.4, 0.4]]])
    target = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    total, parts = HungarianLoss(n_classes=2)(scores, boxes, [target])
    surprise = float(-torch.tensor([3.0, 0, 0]).log_softmax(0)[0])  # the same for both queries
    overlap, hull = 0.12 / 0.2, 0.4 * 0.5
    giou = overlap - (hull - 0.2) / hull
    assert float(parts["ce"]) == pytest.approx(surprise, rel=1e-5)
    assert float(parts["bbox"]) == pytest.approx(0.1, rel=1e-5)
    assert float(parts["giou"]) == pytest.approx(1 - giou, rel=1e-4)
    assert float(total) == pytest.approx(surprise + 5 * 0.1 + 2 * (1 - giou), rel=1e-4)


def test_an_inverter_of_a_swin_is_built_from_its_config() -> None:
    swin = small.make_swin_path()
    sizes = {"depth": 1, "n_heads": 2, "window": 4}
    modules = {
        "layers.0": ModuleConfig(kind="swin", writes="patches", **sizes),
        "encoder": ModuleConfig(kind="swin", writes="layers.0", **sizes),
    }
    config = InverterModelConfig(family="swin", model="small/swin", modules=modules)
    inverses = make_inverses(config, swin)
    assert inverses.info.family == "swin"
    states = swin.embeddings(make_images(2), ["encoder", "layers.0", "patches"])
    written = inverses(states)
    assert written["encoder"].shape == states["layers.0"].shape
    assert written["layers.0"].shape == states["patches"].shape
    assert inverses["encoder"].config["window"] == 4


@pytest.mark.parametrize("folder", ["tiny", "inverters"])
@pytest.mark.parametrize("family", ["detr", "vit", "swin"])
def test_recipes_can_be_read(folder: str, family: str) -> None:
    name = f"inverter-{family}.yaml" if folder == "tiny" else f"{family}.yaml"
    config = load_config(InverterConfig, CONFIGS / folder / name)
    assert config.model.family == family
    assert config.model.modules["encoder"].writes != "image"


@pytest.mark.parametrize("name", ["tiny/inverter-detr-tuned.yaml", "inverters/detr-tuned.yaml"])
def test_recipes_of_tuning_can_be_read(name: str) -> None:
    assert load_config(InverterConfig, CONFIGS / name).tuning.reconstruction_weight == 0.9
    assert load_config(DetectorConfig, CONFIGS / "tiny/detr.yaml").model.n_queries == 8
