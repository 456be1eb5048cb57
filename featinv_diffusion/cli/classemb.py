"""`featinv classemb`: what the tokens of a vision transformer say, by its own class embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.class_embedding.settings import TokenSettings
from featinv_diffusion.cli import options, terminal
from featinv_diffusion.settings import changed


@options.with_settings(TokenSettings, without=("n_random",))
def classemb(
    data: Annotated[
        str | None,
        typer.Argument(
            metavar="IMAGE|FOLDER",
            help="Picture, folder of pictures or of class folders, parquet file or Hub name.",
            show_default="a photo",
        ),
    ] = None,
    *,
    pipeline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER_OR_REPO",
            help="Diffusion pipeline that inverts one of the blocks; may be given several times.",
            show_default="the bundled one",
        ),
    ] = None,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="Stage of the modular inverter; may be given several times."),
    ] = None,
    settings: TokenSettings,
    output: options.Output = Path("outputs/classemb"),
) -> None:
    """Project the tokens of a vision transformer on its class embedding.

    Writes metrics.json, per_image.parquet, identifiability.png and, for the first images, a figure
    of what each block says of the class. Images without classes are read for the predicted class
    (label_source in metrics.json). The measures are those of Vilas et al. 2023. The perturbation
    test orders patches for the label, as published, and also for the predicted class and for a
    wrong one, since the order for the label knows the answer.
    """
    from featinv_diffusion.class_embedding.study import METRICS, read_tokens_of
    from featinv_diffusion.cli.run import quiet_libraries
    from featinv_diffusion.runs.record import reserved

    quiet_libraries()
    named = {"pipelines": tuple(pipeline or ()), "stages": tuple(stage or ())}
    asked = changed(settings, data=data, **named)
    with reserved(output):
        found = read_tokens_of(asked, exclude=output, progress=True)
        found.save(output)
    print(found.summary())
    print(f"Wrote {output / METRICS}, identifiability.png and the figures of images.")
    terminal.finish(output / METRICS, output)
