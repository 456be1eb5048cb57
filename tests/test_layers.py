"""Imports go one way; the order of the layers is the order of the list."""

import ast
from pathlib import Path

import pytest

import featinv_diffusion

PACKAGE = Path(featinv_diffusion.__file__).parent
LAYERS = [
    {"types", "config", "errors", "files", "schema", "seeds", "processes", "devices", "settings"}
    | {"trust"},
    {"images", "data"},
    {"backbones", "features", "concepts", "metrics"},
    {"diffusion", "inverters"},
    {"runs", "figures"},
    {"studies", "class_embedding", "evaluation", "training"},
    {"papers"},
    {"cli", "app", "ray"},
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


def find_circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Returns the chains of modules that import themselves in the end."""
    circles: list[list[str]] = []
    done: set[str] = set()

    def follow(name: str, chain: list[str]) -> None:
        if name in chain:
            circles.append(chain[chain.index(name) :])
        elif name not in done:
            for other in sorted(imports.get(name, ())):
                follow(other, [*chain, name])
            done.add(name)

    for name in imports:
        follow(name, [])
    return circles


def imports_of(path: Path, known: set[str]) -> set[str]:
    """Returns the modules of the package that a module imports when it is imported itself."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= parts or ({node.module} & known)
    return found


def test_no_module_imports_itself_in_the_end() -> None:
    names = {path: to_module(path) for path in modules()}
    known = set(names.values())
    assert (
        find_circles({name: imports_of(path, known) - {name} for path, name in names.items()}) == []
    )


def test_the_check_sees_a_circle() -> None:
    assert find_circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c"]]


def to_module(path: Path) -> str:
    parts = ["featinv_diffusion", *path.relative_to(PACKAGE).with_suffix("").parts]
    return ".".join(parts).removesuffix(".__init__")


def test_the_check_sees_an_upward_import() -> None:
    source = "from featinv_diffusion.cli import main\nfrom featinv_diffusion import training\n"
    assert imported_subjects(source) == {"cli", "training"}


@pytest.mark.parametrize("folder", ["train", "sample"])
def test_no_script_hides_a_dependency(folder: str) -> None:
    taken = {"datasets", "diffusers", "transformers", "accelerate", "timm", "torch", "safetensors"}
    stems = {p.stem for p in (PACKAGE.parent / folder).iterdir()}
    assert not stems & taken
