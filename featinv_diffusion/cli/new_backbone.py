"""`featinv new-backbone`: a FeatInv for a backbone that has none, in a given time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.cli import options, terminal
from featinv_diffusion.cli.command_line import command_line
from featinv_diffusion.cli.train import TrustCode
from featinv_diffusion.training.config import NewBackboneSettings


@options.with_settings(NewBackboneSettings, data=options.REQUIRED)
def new_backbone(
    name: Annotated[
        str,
        typer.Argument(
            metavar="BACKBONE",
            help="A timm id, ID@FILE with weights, hf/FOLDER, or FILE.py:FUNCTION of yours.",
        ),
    ],
    output: options.Output = Path("outputs/new-backbone"),
    trust_code: TrustCode = False,
    *,
    settings: NewBackboneSettings,
) -> None:
    """Train a FeatInv for another backbone, on the trunk of a pipeline, in the time that you give.

    Prints first what the time buys on this machine. A new feature encoder is fitted to that of the
    trunk, then trained; figures are those of images that are held back, beside what another image
    has. The pipeline is written to OUTPUT/pipeline. The same command again goes on where an
    interrupted one ended.
    """
    from featinv_diffusion.cli.run import quiet_libraries
    from featinv_diffusion.training.new_backbone import make_new_backbone
    from featinv_diffusion.trust import trusting_code

    quiet_libraries()
    options.check_folder(output)
    with trusting_code(trust_code):
        result = make_new_backbone(name, settings, output, command=command_line())
    print(f"Wrote {result.folder}: featinv sample photo.jpg --pipeline {result.folder}")
    terminal.finish(result.figures, result.folder)
