"""Options of commands: those that several share, and those that a settings class gives."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from featinv_diffusion.errors import InputError
from featinv_diffusion.settings import flat_fields, flat_types, from_flat

Images = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="IMAGE|FOLDER",
        help="Pictures, folders of pictures, parquet files, tars, or URLs of these.",
        show_default="a photo",
    ),
]
Device = Annotated[str, typer.Option(help="Device to compute on: auto, cpu, cuda, cuda:1, mps …")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.")]
WorkerOption = Annotated[
    str | None,
    typer.Option(
        "--worker",
        metavar="i/N",
        help="Do every N-th unit of the work beside other workers, from i = 0; `featinv merge` "
        "joins them. whole: one process, also in a job array.",
        show_default="the task of a Slurm job array, if it is one",
    ),
]
FigureName = Annotated[
    str,
    typer.Option("--figure", metavar="NAME", help="File name of the figure: a .png, .pdf or .svg."),
]
PictureA = Annotated[
    Path, typer.Argument(metavar="A", help="A picture; the noise depends on its file name.")
]
PictureB = Annotated[Path, typer.Argument(metavar="B", help="Another picture.")]
SAEFormat = Annotated[
    str,
    typer.Option(
        metavar="auto|overcomplete|saev|prisma[:…]",
        help="Library that made the file of an SAE, and what it does not say: "
        "overcomplete:top_k=8.",
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        metavar="YAML", help="File, or name of a packaged config, with settings; options win."
    ),
]
REQUIRED: Any = inspect.Parameter.empty
"""As a default in `with_settings`: the option must be given."""


def to_powers(text: str) -> list[int]:
    """Reads whole numbers with commas between.

    Raises:
        InputError: something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--power must be whole numbers with commas between, such as 1,2, got {text!r}."
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


# ---- Options that a settings class gives ---------------------------------------------------------


def with_settings(
    kind: type, *, without: Collection[str] = (), config: bool = False, **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates a command that takes `settings`: gives it an option for each field of `kind`.

    Args:
        kind: a settings class, see `featinv_diffusion.settings`.
        without: fields that get no option and keep their default.
        config: add `--config YAML`; options that are given win over it.
        **defaults: of this command, where they differ from those of the class.
    """
    types = flat_types(kind)
    fields = {
        name: f for name, f in flat_fields(kind).items() if f.metadata and name not in without
    }

    def to_parameter(name: str) -> inspect.Parameter:
        field = fields[name]
        default = defaults.get(name, field.default)
        shown, hint = field.metadata["shown"], types[name]
        if config or _is_list(hint):
            shown = _shown(default) if shown is True else shown
            default, hint = None, (str if _is_list(hint) else _plain(hint)) | None
        option = typer.Option(
            field.metadata["flag"] or "--" + name.replace("_", "-"),
            help=field.metadata["help"],
            metavar=field.metadata["metavar"],
            show_default=shown,
        )
        return inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[hint, option],
        )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, localns={kind.__name__: Any}, include_extras=True)
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name == "settings":
                parameters += map(to_parameter, fields)
                if config:
                    path = parameter.replace(name="config", annotation=Config, default=None)
                    parameters.append(path.replace(kind=parameter.KEYWORD_ONLY))
            else:
                hint = hints[parameter.name]
                parameters.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hint))

        @functools.wraps(command)
        def with_options(**given: Any) -> None:
            path = given.pop("config", None) if config else None
            values = {name: given.pop(name) for name in fields}
            values = {name: v for name, v in values.items() if v is not None}
            for name, value in values.items():
                if _is_list(types[name]):
                    values[name] = to_names(value, "--" + name.replace("_", "-"))
            if config:
                from featinv_diffusion.config import load_flat

                settings = load_flat(kind, path, values)
            else:
                settings = from_flat(kind, {**_own(defaults, fields, without), **values})
            command(**given, settings=settings)

        with_options.__dict__["__signature__"] = inspect.Signature(parameters)
        with_options.__annotations__ = {p.name: p.annotation for p in parameters}
        return with_options

    return decorate


def _own(
    defaults: dict[str, Any], fields: dict[str, Any], without: Collection[str]
) -> dict[str, Any]:
    """Returns the command's own defaults of fields without an option."""
    return {name: v for name, v in defaults.items() if name in without or name not in fields}


def _plain(hint: Any) -> Any:
    """Returns the type without None."""
    parts = [part for part in get_args(hint) if part is not type(None)]
    return parts[0] if type(None) in get_args(hint) else hint


def _is_list(hint: Any) -> bool:
    return get_origin(_plain(hint)) is tuple


def _shown(default: Any) -> str | bool:
    if default is None or default == () or isinstance(default, bool):
        return False
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


def to_names(text: str, option: str) -> tuple[str, ...]:
    """Reads names with commas between.

    Raises:
        InputError: no name.
    """
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not names:
        raise InputError(f"{option} must name one, or several as A,B.")
    return names


def to_numbers(option: str, text: str) -> list[float]:
    """Reads numbers with commas between.

    Raises:
        InputError: something else.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"{option} must be numbers with commas between, such as 0,.25,1, got {text!r}."
        ) from None
