"""`featinv push`: a pipeline folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(help="Pipeline folder, as `featinv export` writes it.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="user/name; made where it is new.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository visible to you only.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the folder, list its files, upload nothing.")
    ] = False,
) -> None:
    """Upload a pipeline folder to the Hub, after checking that it loads.

    Log in first with `hf auth login`, or set HF_TOKEN.
    """
    from featinv_diffusion.diffusion.hub import push_folder

    files = push_folder(folder, repo, private=private, dry_run=dry_run)
    for name, size in files:
        typer.echo(f"{size / 1e6:10.3f} MB  {name}")
    total = sum(size for _, size in files) / 1e6
    verb = "Would upload" if dry_run else "Uploaded"
    typer.echo(f"{verb} {len(files)} files, {total:.1f} MB, to {repo}.")
