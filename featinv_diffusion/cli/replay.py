"""`featinv replay`: the same pictures again."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer


def replay(
    manifest: Annotated[Path, typer.Argument(help="manifest.json, or the folder that holds it.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write to.", show_default="replay beside it"),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Last bits differ on another.", show_default="the manifest's"),
    ] = None,
) -> None:
    """Make the pictures of a manifest again, from the seeds and settings in it.

    On the same machine and libraries they are identical; says how many are.
    """
    import torch

    from featinv_diffusion.cli.run import report, run_jobs
    from featinv_diffusion.manifest import MANIFEST, read_manifest, to_jobs

    folder = manifest if manifest.is_dir() else manifest.parent
    before = read_manifest(manifest)
    settings = before.settings if device is None else replace(before.settings, device=device)
    target = output or folder / "replay"
    names = [name for entry in before.images for name in entry["outputs"]]
    digests = {name: _digest(folder / name) for name in names if (folder / name).is_file()}
    if n_threads := before.environment.get("n_threads"):
        torch.set_num_threads(n_threads)  # sums are taken in another order on more threads
    after = run_jobs(settings, to_jobs(before), target)
    report(after, target)
    made = [name for entry in after.images for name in entry["outputs"] if name in digests]
    n_same = sum(_digest(target / name) == digests[name] for name in made)
    if made:
        print(f"{n_same} of {len(made)} pictures are identical to those beside {MANIFEST}.")
    if after.failures:
        raise typer.Exit(1)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
