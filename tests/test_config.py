from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from featinv_diffusion.backbones.names import PUBLISHED
from featinv_diffusion.config import (
    CONFIGS,
    find_config,
    list_configs,
    load_config,
    read_setting,
    to_yaml,
)
from featinv_diffusion.errors import InputError
from featinv_diffusion.training.controlnet import ControlNetConfig


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


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("inner.lrr=1", "lr"),
        ("inner.lr=fast", "fast"),
        ("inner.kind=c", "'a', 'b'"),
        ("inner.lr", "key=value"),
        ("inner={lr:[1}", "YAML"),
    ],
)
def test_bad_override_is_one_sentence_that_names_it(override: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(Outer, None, [override])
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_setting_that_cannot_be_read() -> None:
    with pytest.raises(InputError, match=r"inner\.kind cannot be read: .*nope"):
        read_setting("inner.kind", None, ["inner.kind=${nope}"])
    assert read_setting("inner.kind", None, ["inner=3"]) is None  # which `load_config` refuses


def test_missing_and_broken_files_are_refused(tmp_path: Path) -> None:
    for read in (lambda path: load_config(Outer, path), lambda path: read_setting("name", path)):
        with pytest.raises(InputError, match="there is no file at"):
            read(tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(InputError, match="valid YAML"):
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
