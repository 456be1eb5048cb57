import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import featinv_diffusion
from featinv_diffusion.config import CONFIGS, list_configs

PYPROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())


@pytest.mark.parametrize("name", featinv_diffusion.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(featinv_diffusion, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="absent"):
        _ = featinv_diffusion.absent


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, featinv_diffusion; print({'torch', 'diffusers', 'timm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_wheel_holds_every_package_and_every_named_config() -> None:
    setuptools = PYPROJECT["tool"]["setuptools"]
    root = Path(featinv_diffusion.__file__).parent
    folders = {path.parent.relative_to(root.parent) for path in root.rglob("__init__.py")}
    packages = {".".join(folder.parts) for folder in folders}
    assert set(setuptools["packages"]) == packages | {"featinv_diffusion.configs"}
    patterns = setuptools["package-data"]["featinv_diffusion.configs"]
    packed = {path.relative_to(CONFIGS) for pattern in patterns for path in CONFIGS.glob(pattern)}
    assert {path.with_suffix("").as_posix() for path in packed} == set(list_configs())


def test_the_licence_of_the_bundled_weights_is_named() -> None:
    project = PYPROJECT["project"]
    assert "LicenseRef-ImageNet-non-commercial-research" in project["license"]
    for name in project["license-files"]:
        assert (Path(__file__).parents[1] / name).is_file()
