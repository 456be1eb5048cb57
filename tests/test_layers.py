"""Imports go one way; the order of the layers is the order of the list."""

import ast
from pathlib import Path

import pytest

import featinv_diffusion

PACKAGE = Path(featinv_diffusion.__file__).parent
LAYERS = [
    {"types", "config", "errors", "files", "seeds", "processes", "settings"},
    {"images", "data"},
    {"backbones", "features", "concepts", "metrics"},
    {"diffusion", "inverters"},
    {"runs", "figures"},
    {"studies", "class_embedding", "evaluation", "training"},
    {"cli", "app"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imported_subjects(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    parts = [name.split(".") for name in names if name.startswith("featinv_diffusion.")]
    return {part[1] for part in parts if len(part) > 1 and part[1] in RANK}


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if "assets" not in p.parts)


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_module_imports_only_its_own_layer_or_lower(path: Path) -> None:
    subject = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if subject in {"__init__", "__main__"}:
        return
    assert subject in RANK, f"{subject} has no layer: add it to LAYERS"
    for other in imported_subjects(path.read_text()):
        assert RANK[other] <= RANK[subject], f"{subject} may not import {other}"


def test_the_check_sees_an_upward_import() -> None:
    source = "from featinv_diffusion.cli import main\nfrom featinv_diffusion import training\n"
    assert imported_subjects(source) == {"cli", "training"}


@pytest.mark.parametrize("folder", ["train", "sample"])
def test_no_script_hides_a_dependency(folder: str) -> None:
    taken = {"datasets", "diffusers", "transformers", "accelerate", "timm", "torch", "safetensors"}
    stems = {p.stem for p in (PACKAGE.parent / folder).iterdir()}
    assert not stems & taken
