"""`featinv compare`: two models through one inverter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.cli import options, terminal
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.settings import SampleSettings

MAPPINGS = ["auto", "none", "ridge"]


@options.with_settings(SampleSettings, without=("n_samples", "backbone"))
def compare(
    model_a: Annotated[
        str, typer.Argument(metavar="MODEL_A", help="Backbone that the inverter is of.")
    ],
    model_b: Annotated[str, typer.Argument(metavar="MODEL_B", help="Backbone to compare with it.")],
    images: options.Images = None,
    null: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL",
            help="A model that differs by nothing that matters, such as another training seed; "
            "can be given several times.",
        ),
    ] = None,
    mapping: Annotated[
        str,
        typer.Option(
            "--map",
            metavar="|".join(MAPPINGS),
            help="Decode B's maps as they are, or by a ridge map of cells to A's.",
        ),
    ] = "auto",
    fit_data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Pictures for the ridge map.",
            show_default="the first half of the pictures",
        ),
    ] = None,
    *,
    settings: SampleSettings,
    output: options.Output = Path("outputs/compare"),
) -> None:
    """Decode the features of two models with one inverter, and name what differs.

    The models are two checkpoints of one architecture (ID@FILE, hf/FOLDER), or any two. Writes
    compare.png (original, both decoded pictures, their difference) and metrics.json: for each
    attribute of the decoded pictures its change, the null's, and a p-value over all attributes.
    """
    from featinv_diffusion.backbones import load_backbone
    from featinv_diffusion.cli.command_line import command_line
    from featinv_diffusion.cli.run import quiet_libraries, say_notes
    from featinv_diffusion.data.sets import open_pictures
    from featinv_diffusion.inverters.open import open_inverter
    from featinv_diffusion.runs.record import reserved
    from featinv_diffusion.studies.differencing import compare_models

    quiet_libraries()
    options.check_folder(output)
    if mapping not in MAPPINGS:
        raise InputError(f"--map must be one of {choices_hint(mapping, MAPPINGS)}")
    if not images:
        raise InputError("Pictures must be given to compare models on: a folder or a data set.")
    found = open_pictures(images, exclude=output)
    say_notes(found)
    fit_on = None if fit_data is None else open_pictures([fit_data], exclude=output)
    with reserved(output):
        inverter = open_inverter(replace(settings, backbone=model_a))
        layer, device = inverter.spec.layer, inverter.require_backbone().device
        others = [load_backbone(name, layer).to(device) for name in (model_b, *(null or ()))]
        result = compare_models(
            inverter,
            others[0],
            [found.read(i) for i in range(len(found))],
            fit_on=None if fit_on is None else [fit_on.read(i) for i in range(len(fit_on))],
            nulls=others[1:],
            mapping=mapping,  # pyright: ignore[reportArgumentType]
            seed=settings.seed,
            batch_size=settings.batch_size,
            progress=True,
        )
    result.save(output, command=command_line())
    print(result.summary())
    print(f"Wrote {output / 'metrics.json'} and compare.png.")
    terminal.finish(output / "metrics.json", output)
