"""`featinv train`: what the command reads, and that the scripts of a checkout are the same."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from featinv_diffusion.training import controlnet, inverter, reconstructor, shared_trunk
from featinv_diffusion.training.controlnet import ControlNetConfig
from featinv_diffusion.training.inverter import InverterConfig
from featinv_diffusion.training.reconstructor import ReconstructorConfig
from featinv_diffusion.training.shared_trunk import SharedTrunkConfig
from tests.cli.conftest import Featinv

SCRIPTS = Path(__file__).parents[2] / "train"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The configs that would have been trained."""
    asked: list[object] = []
    monkeypatch.setattr(controlnet, "train_controlnet", asked.append)
    monkeypatch.setattr(inverter, "train_inverter", asked.append)
    monkeypatch.setattr(reconstructor, "train_reconstructor", asked.append)
    monkeypatch.setattr(shared_trunk, "train_shared_trunk", asked.append)
    return asked


def test_a_config_by_name_and_overrides_around_it(featinv: Featinv, trained: list[object]) -> None:
    arguments = ("seed=3", "--config", "controlnet/swin", "optim.lr=2e-5", "--dry-run", "seed=4")
    assert featinv("train", "controlnet", *arguments).code == 0
    (config,) = trained
    assert isinstance(config, ControlNetConfig)
    assert (config.seed, config.optim.lr, config.run.dry_run) == (4, 2e-5, True)
    assert config.data.size == 384


def test_the_family_chooses_config_and_training(featinv: Featinv, trained: list[object]) -> None:
    Path("mine.yaml").write_text("model: {family: reconstructor}\n")
    assert featinv("train", "inverter", "--config", "mine.yaml", "seed=3").code == 0
    assert featinv("train", "inverter", "model.family=vit", "model.model=tiny/vit").code == 0
    assert featinv("train", "inverter").code == 0
    assert trained[0] == ReconstructorConfig(seed=3)
    assert [type(config) for config in trained[1:]] == [InverterConfig, InverterConfig]
    assert [config.model.family for config in trained[1:]] == ["vit", "detr"]


def test_a_shared_trunk_is_of_the_pipelines_that_are_named(
    featinv: Featinv, trained: list[object]
) -> None:
    pipelines = "model.pipelines=[tiny/swin,mine]"
    assert featinv("train", "shared-trunk", pipelines, "data.root=pictures").code == 0
    (config,) = trained
    assert isinstance(config, SharedTrunkConfig)
    assert config.model.pipelines == ("tiny/swin", "mine")
    assert config.data.held_back_per_class == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["controlnet", "--config", "controlnet/swinn"], "did you mean 'controlnet/swin'"),
        (["controlnet", "optim.lrr=1"], "lrr"),
        (["controlnet", "optim.lr"], "must read key=value"),
        (["inverter", "model.family=reconstructer"], "did you mean 'reconstructor'"),
    ],
)
def test_bad_input_is_a_sentence(
    featinv: Featinv, trained: list[object], arguments: list[str], sentence: str
) -> None:
    done = featinv("train", *arguments)
    assert done.code == 2
    assert done.err.startswith("Error: ")
    assert sentence in done.err
    assert trained == []


@pytest.mark.parametrize("name", ["controlnet", "inverter"])
def test_a_script_is_the_command(name: str) -> None:
    tree = ast.parse((SCRIPTS / f"{name}.py").read_text())
    (imported,) = (node for node in tree.body if isinstance(node, ast.ImportFrom))
    assert imported.module == "featinv_diffusion.cli.train"
    assert [alias.name for alias in imported.names] == [name, "run_script"]
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert [ast.unparse(call) for call in calls] == [f"run_script({name})"]
