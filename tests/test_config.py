from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from featinv_diffusion.config import load_config, read_setting, to_yaml
from featinv_diffusion.errors import InputError
from featinv_diffusion.training.controlnet import ControlNetConfig

ROOT = Path(__file__).parents[1]


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
    with pytest.raises(InputError, match="nothing is there"):
        load_config(Outer, tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(InputError, match="valid YAML"):
        load_config(Outer, tmp_path / "broken.yaml")


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load_config(Outer, None, ["inner.lr=0.25", "name=x"])
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    assert load_config(Outer, path) == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs/controlnet").glob("*.yaml")), ids=str)
def test_shipped_controlnet_configs_load(path: Path) -> None:
    config = load_config(ControlNetConfig, path)
    assert config.model.base == "lambdalabs/miniSD-diffusers"
    assert config.optim.lr == 1e-5
