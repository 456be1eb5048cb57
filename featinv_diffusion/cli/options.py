"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OF_PIPELINE = "the pipeline's"

Images = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="IMAGE|FOLDER",
        help="Pictures; of a folder, all below it.",
        show_default="a photo",
    ),
]
Backbone = Annotated[
    str | None,
    typer.Option(help="Whose features to invert; must be the pipeline's.", show_default="convnext"),
]
Pipeline = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER_OR_REPO",
        help="Pipeline folder, Hub repo or bundled name.",
        show_default="tiny/BACKBONE",
    ),
]
Layer = Annotated[
    str | None,
    typer.Option(help="Layer of the features; must be the pipeline's.", show_default=OF_PIPELINE),
]
NSamples = Annotated[int, typer.Option("--n-samples", help="Samples per picture.")]
Seed = Annotated[
    int, typer.Option(help="Noise derives from it, the file name and the sample's number.")
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", show_default=OF_PIPELINE)]
Scheduler = Annotated[
    str | None,
    typer.Option(help="ddim, dpmsolver++, euler, heun, unipc …", show_default=OF_PIPELINE),
]
GuidanceScale = Annotated[
    float | None, typer.Option(help="1 is no guidance.", show_default=OF_PIPELINE)
]
Guidance = Annotated[
    str | None,
    typer.Option(
        metavar="text|features",
        help="What the negative branch lacks: the prompt, or the features too.",
        show_default=OF_PIPELINE,
    ),
]
Strength = Annotated[float, typer.Option(help="Factor on the residuals of the ControlNet.")]
BatchSize = Annotated[int, typer.Option(help="Samples per batch.")]
Attention = Annotated[str, typer.Option(metavar="native|xformers", help="Attention kernels.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps …")]
Dtype = Annotated[
    str, typer.Option(help="float32, float16 or bfloat16; the backbone stays in float32.")
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
