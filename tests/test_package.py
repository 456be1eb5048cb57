import subprocess
import sys

import pytest

import featinv_diffusion


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
