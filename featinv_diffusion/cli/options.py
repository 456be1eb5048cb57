"""Options that several commands share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from featinv_diffusion.errors import InputError

# ---- Options that the commands of `featinv operator` share ---------------------------------------

OperatorName = Annotated[
    str,
    typer.Option("--operator", metavar="FILE_OR_NAME", help="That `fit` wrote, or a bundled one."),
]
InverterName = Annotated[
    str,
    typer.Option(
        metavar="NAME_OR_FOLDER",
        help="Of the operator's features: siglip, vit, a folder, or diffusion.",
    ),
]
Data = Annotated[
    str,
    typer.Option(metavar="PATH_OR_NAME", help="Images: a folder, parquet file or Hub name."),
]
Split = Annotated[str, typer.Option(help="Of the data, where they have any.")]
Classes = Annotated[
    str | None, typer.Option(metavar="FILE", help="Only these class folders, one a line.")
]
ImageBatchSize = Annotated[int, typer.Option(help="Images per batch.")]


def to_powers(text: str) -> list[int]:
    """Reads whole numbers with commas between.

    Raises:
        InputError: something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--power must be whole numbers with commas between, such as 1,2, but {text!r} came."
        ) from None


def check_file(output: Path) -> None:
    """Raises `InputError`, before the work, unless a file can be written there."""
    if output.is_dir():
        raise InputError(
            f"--output must be a file, but {output} is a folder. Name a file in it, such as "
            f"{output / 'operator.safetensors'}."
        )
    _check_above(output)


def check_folder(output: Path) -> None:
    """Raises `InputError`, before the work, unless this is a folder or one can be made there."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output must be a folder, but {output} is a file. Name another place.")
    _check_above(output)


def _check_above(output: Path) -> None:
    above = next((path for path in output.parents if path.exists()), None)
    if above is not None and not above.is_dir():
        raise InputError(
            f"--output must lie in a folder, but {output} is below {above}, which is a file. "
            "Name another place."
        )


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
    typer.Option(
        help="Whose features to invert; must be the pipeline's.", show_default="tiny/convnext"
    ),
]
Pipeline = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER_OR_REPO",
        help="Pipeline folder, Hub repo or bundled name; of rae, its autoencoder.",
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
INVERTERS = "diffusion|detr|rae|siglip|siglip2|vit|FOLDER"
"""What `--inverter` takes; written out, for listing them imports torch."""
INVERTER_HELP = "What turns features into images; all but diffusion imply their backbone."
Inverter = Annotated[str, typer.Option(metavar=INVERTERS, help=INVERTER_HELP)]
InverterOrNone = Annotated[
    str | None,
    typer.Option(metavar=INVERTERS, help=INVERTER_HELP, show_default="diffusion"),
]
Stage = Annotated[
    str | None,
    typer.Option(
        help="Of detr: backbone, encoder, decoder …; of vit: patches, encoder, last.",
        show_default="encoder",
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]

_SAMPLING: dict[str, tuple[Any, Any]] = {
    "backbone": (Backbone, None),
    "pipeline": (Pipeline, None),
    "layer": (Layer, None),
    "n_samples": (NSamples, 1),
    "seed": (Seed, 0),
    "steps": (Steps, None),
    "scheduler": (Scheduler, None),
    "guidance_scale": (GuidanceScale, None),
    "guidance": (Guidance, None),
    "strength": (Strength, 1.0),
    "batch_size": (BatchSize, 8),
    "attention": (Attention, "native"),
    "device": (Device, "auto"),
    "dtype": (Dtype, "float32"),
}
"""Field of `SampleSettings` → its option and default."""


def with_sampling(
    n_samples: int, without: Collection[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command that takes `settings: SampleSettings`: gives it an option per field.

    Args:
        n_samples: default of `--n-samples`.
        without: fields that get no option and keep the default of `SampleSettings`.
    """
    fields = {name: option for name, option in _SAMPLING.items() if name not in without}
    fields["n_samples"] = (NSamples, n_samples)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, localns={"SampleSettings": Any}, include_extras=True)
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == "settings":
                parameters += [
                    inspect.Parameter(name, parameter.KEYWORD_ONLY, default=value, annotation=hint)
                    for name, (hint, value) in fields.items()
                ]
            else:
                hint = hints[parameter.name]
                parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hint))

        @functools.wraps(command)
        def with_settings(**given: Any) -> None:
            from featinv_diffusion.inverters.open import SampleSettings

            settings = SampleSettings(**{name: given.pop(name) for name in fields})
            command(**given, settings=settings)

        with_settings.__dict__["__signature__"] = inspect.Signature(parameters)
        with_settings.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_settings

    return decorate
