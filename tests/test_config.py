from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import pytest

from featinv_diffusion.backbones.names import PUBLISHED
from featinv_diffusion.class_embedding.settings import TokenSettings
from featinv_diffusion.config import (
    CONFIGS,
    find_config,
    list_configs,
    load_config,
    read_setting,
    to_yaml,
)
from featinv_diffusion.data.crops import DataConfig
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.settings import ConceptSettings
from featinv_diffusion.studies.settings import (
    EncoderSettings,
    FitSettings,
    OperatorStudySettings,
    ScopeSettings,
)
from featinv_diffusion.training.config import OptimConfig
from featinv_diffusion.training.controlnet import ControlNetConfig
from featinv_diffusion.training.inverter import InverterConfig
from featinv_diffusion.training.reconstructor import ReconstructorConfig
from train.tiny_family.autoencoder import AutoencoderConfig
from train.tiny_family.classifier import ClassifierConfig
from train.tiny_family.contrastive import ContrastiveConfig
from train.tiny_family.detector import DetectorConfig
from train.tiny_family.text_to_image import TextToImageConfig


@dataclass(frozen=True)
class Inner:
    lr: float = 1e-5
    kind: Literal["a", "b"] = "a"
    scale: tuple[float, float] = (0.08, 1.0)


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    name: str | None = None


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: file\ninner:\n  lr: 1.0e-3\n  kind: b\n")
    config = load_config(Outer, path, ["inner.lr=1e-4", "inner.scale=[0.5,1]"])
    assert config == Outer(Inner(1e-4, "b", (0.5, 1.0)), "file")


def test_what_a_default_gives_its_part_stays_where_another_setting_of_it_is_named() -> None:
    config = load_config(ControlNetConfig, None, ["data.root=pictures"])
    assert config.data.held_back_per_class == ControlNetConfig().data.held_back_per_class == 1
    assert load_config(ControlNetConfig, None, ["data.held_back_per_class=0"]).data == DataConfig()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("inner.lrr=1", "lr"),
        ("inner.lr=fast", "fast"),
        ("inner.kind=c", "Choices: a, b."),
        ("inner.lr", "key=value"),
        ("inner={lr:[1}", "YAML"),
    ],
)
def test_bad_override_is_one_sentence_that_names_it(override: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(Outer, None, [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_are_data_and_nothing_is_looked_up(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    text = "${oc.env:SECRET}"
    (tmp_path / "c.yaml").write_text(f"name: {text}\n")
    assert load_config(Outer, tmp_path / "c.yaml").name == text
    assert load_config(Outer, None, [f"name={text}"]).name == text
    assert read_setting("name", tmp_path / "c.yaml") == text
    assert read_setting("inner.kind", None, ["inner=3"]) is None  # which `load_config` refuses


def test_scalars_become_what_the_field_is(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("name: 12\ninner:\n  lr: 1e-4\n")
    assert load_config(Outer, tmp_path / "c.yaml") == Outer(Inner(1e-4), "12")
    assert load_config(Outer, tmp_path / "c.yaml", ["name=null"]).name is None
    assert load_config(Outer, tmp_path / "c.yaml", ["name=2026-01-01"]).name == "2026-01-01"


@pytest.mark.parametrize(
    "override",
    [
        "optim.max_steps=-5",
        "optim.lr=inf",
        "optim.max_grad_norm=nan",
        "optim.betas=[2,2]",
        "optim.batch_size=1000000",
        "optim.ema_decay=2",
        "seed=nan",
        "seed=9223372036854775808",
        "data.num_workers=1000",
        "data.size=0",
        "data.scale=[1,0.1]",
        "model.dropout=2",
        "model.statistics_images=0",
        "cache.n_crops=0",
        "validation.num_inference_steps=100000",
        "validation.guidance_scale=.nan",
        "run.checkpoint_every=0",
        "run.resume=maybe",
    ],
)
def test_numbers_out_of_range_are_refused_by_their_dotted_name(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(InputError, match=f"{key.replace('.', '[.]')}(.0.)? (must be|is named)"):
        load_config(ControlNetConfig, None, [override])


def test_the_same_limits_hold_for_values_given_in_python() -> None:
    for values, words in (
        ({"max_steps": -5}, "max_steps must be at least 1, got -5"),
        ({"lr": float("inf")}, "lr must be at most 1e[+]38, got inf"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be more than 0, got nan"),
        ({"betas": (0.9, 1.0)}, "betas must be less than 1, got 1.0"),
        ({"batch_size": 2**70}, "batch_size must be at most"),
    ):
        with pytest.raises(InputError, match=words):
            OptimConfig(**values)


def every_class(kind: type) -> Iterator[type]:
    """Yields a class of settings and those that it holds, also in dicts and beside None."""
    yield kind
    for hint in get_type_hints(kind).values():
        for part in (hint, *get_args(hint)):
            if is_dataclass(part):
                yield from every_class(part)


@pytest.mark.parametrize(
    "config",
    [
        ControlNetConfig,
        InverterConfig,
        ReconstructorConfig,
        AutoencoderConfig,
        ClassifierConfig,
        ContrastiveConfig,
        DetectorConfig,
        TextToImageConfig,
        EvaluationSettings,
        TokenSettings,
        ConceptSettings,
        FitSettings,
        OperatorStudySettings,
        ScopeSettings,
        EncoderSettings,
    ],
)
def test_every_number_of_every_config_has_limits(config: type) -> None:
    for kind in every_class(config):
        for name, hint in get_type_hints(kind, include_extras=True).items():
            option = kind.__dataclass_fields__[name].metadata
            has_limits = "Meta(" in str(hint) or option.get("most") is not None
            is_float = float in (hint, *get_args(hint))  # `check` refuses what is not finite
            is_number = int in (hint, *get_args(hint)) or is_float
            assert not is_number or has_limits or (is_float and option), f"{kind.__name__}.{name}"


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    for read in (lambda path: load_config(Outer, path), lambda path: read_setting("name", path)):
        with pytest.raises(InputError, match="there is no file at"):
            read(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(InputError, match="must hold YAML"):
        load_config(Outer, tmp_path / "broken.yaml")


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load_config(Outer, None, ["inner.lr=0.25", "name=x"])
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    assert load_config(Outer, path) == config


def test_a_config_is_found_by_its_name_from_anywhere(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = CONFIGS / "controlnet/convnext.yaml"
    assert expected.is_file()
    assert find_config("controlnet/convnext") == find_config("controlnet/convnext.yaml") == expected


def test_a_file_comes_before_a_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "controlnet").mkdir()
    (tmp_path / "controlnet/convnext.yaml").write_text("seed: 3\n")
    assert load_config(ControlNetConfig, "controlnet/convnext.yaml").seed == 3
    assert load_config(ControlNetConfig, "controlnet/convnext").seed == 0


@pytest.mark.parametrize("name", ["controlnet/convnxt", "tiny/vit", "../configs/controlnet/swin"])
def test_an_unknown_config_is_refused_with_the_choices(name: str) -> None:
    with pytest.raises(InputError, match=r"Choices: controlnet/convnext, .*, inverters/vit\.$"):
        find_config(name)


def test_the_nearest_config_is_named() -> None:
    with pytest.raises(InputError, match="did you mean 'controlnet/convnext'"):
        find_config("controlnet/convnxt.yaml")


@pytest.mark.parametrize("name", [n for n in list_configs() if n.startswith("controlnet/")])
def test_shipped_controlnet_configs_train_on_the_papers_models(name: str) -> None:
    config = load_config(ControlNetConfig, name)
    assert config.model.base == "lambdalabs/miniSD-diffusers"
    assert config.optim.lr == 1e-5
    assert config.model.backbone == PUBLISHED[name.removeprefix("controlnet/")]
