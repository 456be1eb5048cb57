import subprocess
import sys
import tomllib
import zlib
from pathlib import Path

import pytest

import featinv_diffusion
from featinv_diffusion import errors
from featinv_diffusion.config import CONFIGS, list_configs
from featinv_diffusion.errors import IN_OTHER_PACKAGE, choices_hint, elsewhere_hint

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


def test_each_asset_is_in_one_of_the_two_wheels_and_both_are_small() -> None:
    root = Path(__file__).parents[1]
    other = tomllib.loads((root / "packages/tiny/pyproject.toml").read_text())
    assert other["project"]["version"] == PYPROJECT["project"]["version"]
    package = Path(featinv_diffusion.__file__).parent
    first, second = (
        {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
        for folder, patterns in (
            (package, PYPROJECT["tool"]["setuptools"]["package-data"]["featinv_diffusion"]),
            (package / "assets/tiny", *other["tool"]["setuptools"]["package-data"].values()),
        )
    )
    assets = {path for path in (package / "assets").rglob("*") if path.is_file()}
    assert not first & second
    assert {path for path in first if path in assets} | second == assets
    for wheel in (first, second):
        assert sum(len(zlib.compress(path.read_bytes())) for path in wheel) <= 60e6
    members = {path.relative_to(package / "assets/tiny").parts[0] for path in second}
    assert members == set(IN_OTHER_PACKAGE)
    licence = root / "packages/tiny/LICENSE-WEIGHTS"
    assert licence.read_text() == (package / "assets/LICENSE-WEIGHTS").read_text()


def test_a_member_that_is_not_installed_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert elsewhere_hint("tiny/convnext-pooled") == ""  # a checkout has all members
    monkeypatch.setattr(errors, "__file__", str(tmp_path / "errors.py"))
    assert "featinv-diffusion-tiny" in elsewhere_hint("tiny/convnext-pooled")
    assert "featinv-diffusion-tiny" in choices_hint("siglip2/swap", ["tiny/convnext"])
    assert elsewhere_hint("tiny/convnext") == elsewhere_hint("somebody/detr") == ""


def test_the_licence_of_the_bundled_weights_is_named() -> None:
    project = PYPROJECT["project"]
    assert "LicenseRef-ImageNet-non-commercial-research" in project["license"]
    for name in project["license-files"]:
        assert (Path(__file__).parents[1] / name).is_file()
