"""`featinv replay`: the same pictures again."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec import Meta

from featinv_diffusion.errors import InputError

if TYPE_CHECKING:
    from featinv_diffusion.settings import SampleSettings


@dataclass(frozen=True)
class Verb:
    """What makes the pictures of a command again.

    Args:
        name: of the function, in this module of `featinv_diffusion.studies`.
        files: its positional arguments, as the manifest names them: paths.
        arguments: its other arguments and their types.
    """

    module: str
    name: str
    files: tuple[str, ...]
    arguments: Mapping[str, Any]


Numbers = Annotated[list[float], Meta(max_length=10_000)]

VERBS = {
    "interpolate": Verb("interpolation", "interpolate", ("a", "b"), {"weights": Numbers}),
    "compose": Verb(
        "composition", "compose", ("a", "b"), {"box": Numbers | None, "mask": str | None}
    ),
    "variability": Verb("variability", "variability", ("image",), {}),
    "viz": Verb(
        "featinv_viz",
        "show_concept",
        ("image", "concepts"),
        {
            "concept": int,
            "factor": float,
            "film": Numbers,
            "sae_format": str,
            "n_directions": int,
        },
    ),
}
"""By command; those of samples and of concepts have manifests of their own."""


DEFAULT = Path("outputs/replay")


def replay(
    manifest: Annotated[
        Path, typer.Argument(help="A manifest, or the folder that holds manifest.json.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write to.", show_default=str(DEFAULT)),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="Device to compute on; another one changes the last bits.",
            show_default="the manifest's",
        ),
    ] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the code that the manifest names as backbone.")
    ] = False,
) -> None:
    """Make the pictures (or concepts) of a manifest again, from the seeds and settings in it.

    On the same machine and libraries they are identical; says how many are. The manifest may be
    somebody else's: it is read as data, writes inside of the output folder alone, and replaces
    nothing there but what an earlier run made.
    """
    from featinv_diffusion.runs.record import path_of, read_content
    from featinv_diffusion.trust import trusting_code

    with trusting_code(trust_code):
        path = path_of(manifest)
        content = read_content(path)
        folder = manifest if manifest.is_dir() else manifest.parent
        target = output or _default_output(folder)
        command = content.get("command")
        if command is None:
            _replay_samples(path, folder, target, device)
        elif command == "concepts":
            _replay_concepts(path, content, folder, target, device)
        elif str(command) in VERBS:
            _replay_study(path, content, folder, target, device)
        else:
            raise InputError(f"{path} is of the command {command!r}, which has no replay.")


def _default_output(folder: Path) -> Path:
    """Returns a folder below the working folder, which the manifest's folder must not hold."""
    if any(place.is_relative_to(folder.resolve()) for place in (Path.cwd(), DEFAULT.resolve())):
        raise InputError(
            f"A replay must not write into the folder of its manifest by itself, but {DEFAULT} "
            f"lies in {folder}. Name a folder with --output."
        )
    return DEFAULT


def _replay_samples(path: Path, folder: Path, target: Path, device: str | None) -> None:
    from featinv_diffusion.cli.run import quiet_libraries, report
    from featinv_diffusion.runs.record import check_targets
    from featinv_diffusion.runs.samples import GRID, read_manifest, run_jobs, to_jobs

    before = read_manifest(path)
    names = [name for entry in before.images for name in entry["outputs"]]
    check_targets(target, names, [GRID])
    digests = _digests(folder, names)
    _use_threads(before.environment)
    quiet_libraries()
    assert before.settings is not None
    settings = _on(before.settings, device)
    after = run_jobs(settings, to_jobs(before), target, certainty=before.certainty)
    report(after, target)
    _compare(digests, target, [name for entry in after.images for name in entry["outputs"]])
    if after.failures:
        raise typer.Exit(1)


def _replay_study(
    path: Path, content: dict[str, Any], folder: Path, target: Path, device: str | None
) -> None:
    from importlib import import_module

    from featinv_diffusion.cli.run import run_study
    from featinv_diffusion.figures.board import check_name
    from featinv_diffusion.runs.record import Environment, Seeds, check_output_name, check_targets
    from featinv_diffusion.settings import SampleSettings

    command = content["command"]
    verb = VERBS[command]
    if verb.name == "show_concept":
        content.setdefault("sae_format", "auto")  # of an earlier version
    kinds = {
        "seeds": Seeds,
        "figure": str,
        **dict.fromkeys(verb.files, str),
        **verb.arguments,
        "outputs": list[str],
        "environment": Environment,
    }
    given = vars(_read(path, content, make_dataclass("Arguments", kinds.items())))
    settings = _read(path, content, SampleSettings)
    outputs, environment = given.pop("outputs"), given.pop("environment")
    for name in outputs:
        check_output_name(name, [".png"])
    check_name(given["figure"])
    made_too = [given["figure"], f"{command}.json", f"{command}.parquet"]
    check_targets(target, outputs, made_too)
    digests = _digests(folder, outputs)
    _use_threads(vars(environment))
    study = getattr(import_module(f"featinv_diffusion.studies.{verb.module}"), verb.name)
    files, figure = [given.pop(name) for name in verb.files], given.pop("figure")
    after = run_study(study, _on(settings, device), target, figure, *files, **given)
    _compare(digests, target, list(after.pictures()))


def _replay_concepts(
    path: Path, content: dict[str, Any], folder: Path, target: Path, device: str | None
) -> None:
    """Concepts are compared as numbers, for their file's header has no fixed order."""
    from featinv_diffusion.cli import concepts
    from featinv_diffusion.concepts import ConceptDictionary
    from featinv_diffusion.figures.board import check_name
    from featinv_diffusion.runs.record import Environment, check_output_name, check_targets
    from featinv_diffusion.settings import AUTO, ConceptSettings
    from featinv_diffusion.studies.concepts import MANIFEST_SUFFIX, SUFFIX

    if content.get("n_concepts", "") is None and content.get("method") == "mcd":
        content["n_concepts"] = AUTO
    elif type(content.get("n_concepts")) is int:
        content["n_concepts"] = str(content["n_concepts"])
    if content.get("max_cells", "") is None:
        content["max_cells"] = 0
    for name, value in (("sae", None), ("sae_format", "auto")):  # not in earlier versions
        content.setdefault(name, value)
    kinds = {
        "folder": str,
        "images": list[str],
        "output": str,
        "figure": str,
        "environment": Environment,
    }
    given = vars(_read(path, content, make_dataclass("Arguments", kinds.items())))
    settings = _read(path, content, ConceptSettings)
    check_output_name(given["output"], [SUFFIX])
    check_name(given["figure"])
    before, stem = folder / given["output"], (target / given["output"]).stem
    beside = [given["figure"], f"{stem}.json", f"{stem}.parquet"]
    check_targets((target / given["output"]).parent, [before.name], beside, stem + MANIFEST_SUFFIX)
    earlier = ConceptDictionary.load(before).directions if before.is_file() else None
    _use_threads(vars(given["environment"]))
    after = concepts.run(
        settings if device is None else replace(settings, device=device),
        Path(given["folder"]),
        given["images"],
        target / given["output"],
        given["figure"],
    )
    if earlier is not None:
        same = after.concepts.directions.equal(earlier)
        verb = "are identical to" if same else "differ from"
        print(f"The concepts {verb} those beside the manifest.")


def _read(path: Path, content: dict[str, Any], kind: type) -> Any:
    """Builds a dataclass of those values of a manifest that it has fields for.

    Raises:
        InputError: a value that is missing, of a wrong type, or known in memory only.
    """
    from featinv_diffusion.runs.record import from_values
    from featinv_diffusion.settings import LATER

    names = [
        field.name for field in fields(kind) if field.name in content or field.name not in LATER
    ]
    if missing := [name for name in names if name not in content]:
        raise InputError(
            f"{path} is no manifest of featinv {content['command']}; it lacks {', '.join(missing)}."
        )
    for name in {"a", "b", "image", "concepts", "folder"}.intersection(names):
        if content[name] is None:
            raise InputError(
                f"{path} names no file as {name!r}, for it was given in memory. Only runs of files "
                "can be replayed."
            )
    return from_values(kind, {name: content[name] for name in names}, path)


def _on(settings: SampleSettings, device: str | None) -> SampleSettings:
    from featinv_diffusion.backbones.names import recorded_name

    backbone = None if settings.backbone is None else recorded_name(settings.backbone)
    return replace(settings, backbone=backbone, device=device or settings.device)


def _use_threads(environment: dict[str, Any]) -> None:
    import torch

    if n_threads := environment.get("n_threads"):
        torch.set_num_threads(n_threads)  # sums are taken in another order on more threads


def _digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    return {name: _digest(folder / name) for name in names if (folder / name).is_file()}


def _compare(digests: Mapping[str, str], target: Path, names: Sequence[str]) -> None:
    """Says how many pictures are those that were there before."""
    from featinv_diffusion.runs.record import MANIFEST

    made = [name for name in names if name in digests]
    n_same = sum(_digest(target / name) == digests[name] for name in made)
    if made:
        print(f"{n_same} of {len(made)} pictures are identical to those beside {MANIFEST}.")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
