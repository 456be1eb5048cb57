"""One trunk with several heads computes what each ControlNet does, trains, resumes and exports."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from featinv_diffusion.config import load_config
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.diffusion.hub import load_pipeline
from featinv_diffusion.errors import InputError
from featinv_diffusion.training.config import ADAPTED
from featinv_diffusion.training.controlnet import ControlNetConfig
from featinv_diffusion.training.shared_trunk import (
    SharedTrunk,
    SharedTrunkConfig,
    mean_of_trunks,
    train_shared_trunk,
    trunk_of,
)
from tests import tiny


def make_controlnet(seed: int) -> FeatureControlNet:
    """With heads and trunks that differ by the seed."""
    one = tiny.make_controlnet()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return one.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pipelines of the same base, a third of another one, and two classes of images."""
    folder = tmp_path_factory.mktemp("trunks")
    for i, name in enumerate(("one", "two", "other")):
        pipeline = tiny.make_pipeline()
        pipeline.register_modules(controlnet=make_controlnet(i))
        if name == "other":
            with torch.no_grad():
                pipeline.unet.conv_in.weight += 1
        pipeline.save_pretrained(folder / name)
    random = np.random.default_rng(0)
    for label in ("a", "b"):
        (folder / "images" / label).mkdir(parents=True)
        for i in range(6):
            pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"images/{label}/{i}.png")
    return folder


def config(folder: Path, output: Path, *extra: str) -> SharedTrunkConfig:
    settings = [
        f"data.root={folder / 'images'}",
        "data.size=64",
        "data.num_workers=0",
        f"model.pipelines=[{folder / 'one'},{folder / 'two'}]",
        "optim.batch_size=5",
        "optim.optimizer=muon",
        "optim.lr=1e-3",
        "optim.max_steps=3",
        f"run.output={output}",
        "run.tracker=none",
        "run.cpu=true",
        "run.n_validation_images=2",
        "run.validate_every=2",
        "run.checkpoint_every=2",
        "validation.num_inference_steps=2",
    ]
    return load_config(SharedTrunkConfig, None, [*settings, *extra])


@torch.no_grad()
def test_each_part_of_a_batch_is_its_own_controlnet_s() -> None:
    one, two = make_controlnet(0), make_controlnet(1)
    two.load_state_dict(two.state_dict() | trunk_of(one))
    shared = SharedTrunk([one, two], trunk_of(one)).eval()
    random = torch.Generator().manual_seed(0)
    sample = torch.randn(5, 4, 8, 8, generator=random)
    maps = torch.randn(5, tiny.CHANNELS, *tiny.GRID, generator=random)
    steps, prompt = torch.arange(5), torch.randn(5, 77, 32, generator=random)
    keep = torch.tensor([True, False, True, False, True])
    down, middle = shared(sample, steps, prompt, [maps[:3], maps[3:]], keep=keep)
    for network, part in ((one, slice(0, 3)), (two, slice(3, 5))):
        expected: Any = network(
            sample[part], steps[part], prompt[part], maps[part], keep=keep[part], return_dict=False
        )
        torch.testing.assert_close(middle[part], expected[1])
        for given, wanted in zip(down, expected[0], strict=True):
            torch.testing.assert_close(given[part], wanted)


def test_the_mean_is_of_trunks_alone_and_copies_have_their_heads() -> None:
    one, two = make_controlnet(0), make_controlnet(1)
    mean = mean_of_trunks([one, two])
    assert not any(name.startswith("feature_encoder.") for name in mean)
    shared = SharedTrunk([one, two], mean)
    for i, own in enumerate((one, two)):
        weights = shared.controlnet(i).state_dict()
        for name, value in own.state_dict().items():
            if name.startswith("feature_encoder."):
                assert torch.equal(weights[name], value)
            else:
                both = one.state_dict()[name] + two.state_dict()[name]
                torch.testing.assert_close(weights[name], both / 2)


def test_training_leaves_one_trunk_with_two_heads_and_resumes_to_the_same(
    folder: Path, tmp_path: Path
) -> None:
    final = train_shared_trunk(config(folder, tmp_path / "whole"))
    one, two = (FeatureControlNet.from_pretrained(final / n / "controlnet") for n in ("one", "two"))
    trunks = trunk_of(one), trunk_of(two)
    before = trunk_of(load_pipeline(folder / "one").controlnet)
    for name, value in trunks[0].items():
        assert torch.equal(value, trunks[1][name])
    assert any(not torch.equal(value, before[name]) for name, value in trunks[0].items())
    heads = [one.feature_encoder.conv3.weight, two.feature_encoder.conv3.weight]
    assert not torch.equal(*heads)
    for name, head in zip(("one", "two"), heads, strict=True):
        own = load_pipeline(folder / name).controlnet.feature_encoder.conv3.weight
        assert not torch.equal(head, own)
    text = (tmp_path / "whole/validation.jsonl").read_text()
    assert "one/cosine" in text
    assert "two/cosine" in text
    assert len(list((tmp_path / "whole/validation").glob("reconstructions-two-*.png"))) == 2

    resumed = shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(resumed / "final")
    shutil.rmtree(resumed / "checkpoints/step-00000003")
    again = train_shared_trunk(config(folder, resumed))
    for name in ("one", "two"):
        weights = f"{name}/controlnet/diffusion_pytorch_model.safetensors"
        assert (again / weights).read_bytes() == (final / weights).read_bytes()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.pipelines=[ONE]", "two or more"),
        ("model.pipelines=[ONE,ONE]", "end differently"),
        ("model.pipelines=[ONE,OTHER]", "unet of .* is not that of"),
        ("model.begin_with=[tiny/vit]", "tiny/vit is not one"),
        ("optim.batch_size=1", "an image of every batch"),
    ],
)
def test_bad_settings_are_one_sentence(
    folder: Path, tmp_path: Path, override: str, said: str
) -> None:
    text = override.replace("ONE", str(folder / "one")).replace("OTHER", str(folder / "other"))
    with pytest.raises(InputError, match=said):
        train_shared_trunk(config(folder, tmp_path, text))
    assert not list(tmp_path.iterdir())


def test_what_a_member_adapts_is_what_new_backbone_adapts() -> None:
    path = Path(__file__).parents[2] / "configs/tiny/adapted.yaml"
    assert load_config(ControlNetConfig, str(path)).model.trained == ADAPTED
