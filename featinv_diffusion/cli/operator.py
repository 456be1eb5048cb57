"""`featinv operator`: operations on pixels as matrices on features; fit, apply, analyze."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featinv_diffusion.cli import options, terminal
from featinv_diffusion.cli.command_line import command_line
from featinv_diffusion.errors import InputError
from featinv_diffusion.settings import SampleSettings, to_flat
from featinv_diffusion.studies.settings import FitSettings, OperatorStudySettings

if TYPE_CHECKING:
    from featinv_diffusion.backbones import Backbone
    from featinv_diffusion.data.sets import ImageSet
    from featinv_diffusion.features.operators import Operator
    from featinv_diffusion.inverters.base import Inverter
    from featinv_diffusion.runs.parts import Division

OperatorName = Annotated[
    str,
    typer.Option("--operator", metavar="FILE_OR_NAME", help="File of `fit`, or a bundled name."),
]
SHOWN = ("inverter", "pipeline", "stage", "steps", "seed", "device")
HIDDEN = tuple(f.name for f in fields(SampleSettings) if f.name not in SHOWN)
"""Settings of sampling without an option here."""

operator = typer.Typer(
    help="Do to features, by one matrix, what an operation does to pixels.", no_args_is_help=True
)


@operator.command()
@options.with_settings(FitSettings, data=options.REQUIRED, split="train")
def fit(
    backbone: Annotated[
        str, typer.Option(help="A bundled one such as tiny/vit, a timm id, or hf/FOLDER_OR_REPO.")
    ],
    operation: Annotated[
        str, typer.Option(metavar="swap|suppress|grey|colourise", help="Operation on the pixels.")
    ],
    *,
    layer: Annotated[str, typer.Option(help="Layer of the features.")] = "last",
    settings: FitSettings,
    device: options.Device = "auto",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="File to write.")
    ] = Path("operator.safetensors"),
    worker: options.WorkerOption = None,
) -> None:
    """Fit the matrix that turns features of images into those of the same images changed.

    Encodes each image before and after the operation; no inverter is involved. The file records
    which images it was fitted on, so that `analyze` measures on others. The images can be shared
    among workers that never talk, with --worker; `featinv merge FILE` then solves for the matrix.
    """
    from featinv_diffusion.cli.run import quiet_libraries, work
    from featinv_diffusion.features.operator_methods import check_method
    from featinv_diffusion.processes import find_worker
    from featinv_diffusion.runs.parts import WHOLE, units_of
    from featinv_diffusion.runs.record import reserved
    from featinv_diffusion.runs.workers import Call
    from featinv_diffusion.studies.operators import to_operation

    quiet_libraries()
    check_method(settings.method, settings.ridge)
    options.check_file(output)
    to_operation(operation, settings.alpha, settings.channel)
    model = Model(backbone, layer, device)
    fitted = partial(fit_to_file, settings, operation, model, output)
    if (one := find_worker(worker)) is not None:
        own = {"operation": operation, **asdict(model)}
        n, line = one.num_processes, command_line()
        call = Call("operator fit", n, to_flat(settings), own=own, line=line)
        raise typer.Exit(work(one, units_of(output), call, fitted, output))
    with reserved(output, is_file=True):
        fitted(WHOLE)


@dataclass(frozen=True)
class Model:
    """A backbone at a layer, by name."""

    backbone: str
    layer: str
    device: str

    def open(self) -> Backbone:
        """Loads it."""
        from featinv_diffusion.backbones import load_backbone
        from featinv_diffusion.backbones.base import without_progress_bars
        from featinv_diffusion.devices import find_device

        with without_progress_bars():
            return load_backbone(self.backbone, self.layer).to(find_device(self.device))


def fit_to_file(
    settings: FitSettings, operation: str, model: Model, output: Path, division: Division
) -> None:
    """Fits an operator, writes it and prints how well it fits."""
    from featinv_diffusion.studies.operators import fit_operator

    fitted = fit_operator(
        model.open(), operation=operation, **to_flat(settings), progress=True, division=division
    )
    fitted.save(output)
    print(fitted.summary())
    print(f"Wrote {output}.")
    terminal.finish(asdict(fitted.record), output)


@operator.command()
@options.with_settings(
    SampleSettings, without=HIDDEN, inverter=options.REQUIRED, n_samples=1, batch_size=1
)
def apply(
    images: options.Images = None,
    *,
    operator: OperatorName,
    power: Annotated[
        str, typer.Option(metavar="N,N,…", help="How often to apply it; 0 changes nothing.")
    ] = "0,1",
    settings: SampleSettings,
    output: options.Output = Path("outputs/operator"),
    worker: options.WorkerOption = None,
) -> None:
    """Apply an operator to the features of pictures, and see them through an inverter.

    Writes a PNG for each picture and power, grid.png (with the cosine between each picture's
    features and the map it was made from) and manifest.json (settings, seeds, cosines), which
    cannot be replayed. Some operations need a prepared input: colourise starts from a grey
    picture. It is made first and shown as the original. Many pictures can be shared among workers
    that never talk, with --worker; `featinv merge` then writes these files.
    """
    from featinv_diffusion.cli.run import quiet_libraries, work
    from featinv_diffusion.data.sets import open_pictures
    from featinv_diffusion.images import builtin_photo
    from featinv_diffusion.processes import find_worker
    from featinv_diffusion.runs.parts import WHOLE
    from featinv_diffusion.runs.record import reserved
    from featinv_diffusion.runs.workers import Call

    quiet_libraries()
    options.check_folder(output)
    powers = options.to_powers(power)
    found = open_pictures(images or [builtin_photo()], exclude=output)
    applied = partial(apply_to, settings, found, operator, powers, output)
    if (one := find_worker(worker)) is not None:
        own = {"operator": operator, "powers": powers}
        n, line, given = one.num_processes, command_line(), list(map(str, images or []))
        call = Call("operator apply", n, to_flat(settings), given, own=own, line=line)
        raise typer.Exit(work(one, output, call, applied, inputs=found.fingerprint))
    with reserved(output):
        applied(WHOLE)


def apply_to(
    settings: SampleSettings,
    images: ImageSet,
    operator: str,
    powers: Sequence[int],
    output: Path,
    division: Division,
) -> None:
    """Applies an operator to pictures, writes and prints what came of it."""
    import sys

    from featinv_diffusion.features.operators import open_operator
    from featinv_diffusion.inverters.diffusion import DiffusionInverter
    from featinv_diffusion.inverters.open import open_inverter
    from featinv_diffusion.runs.record import MANIFEST
    from featinv_diffusion.runs.samples import GRID
    from featinv_diffusion.runs.sampling import make_jobs
    from featinv_diffusion.runs.scope import scope_line
    from featinv_diffusion.studies.operator_pictures import apply_operator

    opened = open_operator(operator)
    jobs = make_jobs(images, settings.seed, 1)
    inverter = open_inverter(settings)
    applied = apply_operator(
        opened, inverter, jobs, powers, name=operator, progress=True, division=division
    )
    applied.save(output)
    for failure in applied.failures:
        print(f"Failed: {failure['error']}", file=sys.stderr)
    p_values = [p for done in applied.images for p in done.scope_p_value or []]
    of_pipeline = isinstance(inverter, DiffusionInverter)
    print(scope_line(p_values or None, applied.scope_basis, of_pipeline=of_pipeline))
    print(f"Wrote {output / GRID} and {output / MANIFEST}.")
    terminal.finish(output / MANIFEST, output)
    if applied.failures:
        raise typer.Exit(1)


@operator.command()
@options.with_settings(
    OperatorStudySettings,
    without={*HIDDEN, "inverter"} - {"batch_size"},
    data=options.REQUIRED,
    n_samples=1,
)
def analyze(
    *,
    operator: OperatorName,
    inverter: Annotated[
        str | None,
        typer.Option(
            metavar="NAME_OR_FOLDER",
            help="Inverter of the operator's features: siglip, vit, diffusion or a folder.",
            show_default="none: features alone",
        ),
    ] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Backbone of the features, if there is no inverter.", show_default="the operator's"
        ),
    ] = None,
    power: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,…",
            help="How often the operation and the operator are applied; the first is drawn.",
            show_default="1,4,8,12 for suppress, 1,2 for swap, else 1",
        ),
    ] = None,
    settings: OperatorStudySettings,
    output: options.Output = Path("outputs/operator"),
    worker: options.WorkerOption = None,
) -> None:
    """Measure an operator: its eigenvalues, and what it does to images it was not fitted on.

    Images whose pixels were in the fit are left out, whatever their names. Writes metrics.json
    (each measure with its interval), eigenvalues.png, measures.png and, with an inverter,
    pictures.png and powers.png. The floor is the inverter's picture of the true features, the
    ceiling its picture of the unchanged features. The images can be shared among workers that
    never talk, with --worker; `featinv merge` then writes these files.
    """
    from featinv_diffusion.cli.run import quiet_libraries, work
    from featinv_diffusion.processes import find_worker
    from featinv_diffusion.runs.parts import WHOLE
    from featinv_diffusion.runs.record import reserved
    from featinv_diffusion.runs.workers import Call

    quiet_libraries()
    _check_options(inverter, backbone, settings.sampling)
    options.check_folder(output)
    measured = Measured(operator, inverter, backbone, power)
    study = partial(measure, settings, measured, output, command_line())
    if (one := find_worker(worker)) is not None:
        n, line = one.num_processes, command_line()
        call = Call("operator analyze", n, to_flat(settings), own=asdict(measured), line=line)
        raise typer.Exit(work(one, output, call, study))
    with reserved(output):
        study(WHOLE)


@dataclass(frozen=True)
class Measured:
    """What `featinv operator analyze` measures, as it was given."""

    operator: str
    inverter: str | None
    backbone: str | None
    power: str | None


def measure(
    settings: OperatorStudySettings, what: Measured, output: Path, line: str, division: Division
) -> None:
    """Measures an operator, writes and prints what was found.

    Args:
        line: the command as it was typed.
    """
    from featinv_diffusion.data.sets import open_images
    from featinv_diffusion.features.operators import open_operator
    from featinv_diffusion.studies.operators import default_powers, measure_operator, operation_of

    sampling, choice = settings.sampling, settings.images
    opened = open_operator(what.operator)
    pixels = operation_of(opened)
    powers = default_powers(pixels) if what.power is None else options.to_powers(what.power)
    images = open_images(choice.data, choice.split, choice.classes, exclude=output)
    chosen, model = _open_model(what.inverter, what.backbone, opened, sampling)
    found = measure_operator(
        opened,
        chosen or model,
        images,
        powers=powers,
        n_images=settings.n_images,
        seed=sampling.seed,
        batch_size=sampling.batch_size,
        progress=True,
        division=division,
    )
    resolved = None if chosen is None else chosen.settings
    made_by = {
        "operator": what.operator,
        "backbone": model.spec.backbone,
        "layer": model.spec.layer,
        "device": str(model.device),
        "inverter": None,
        **({} if resolved is None else to_flat(resolved)),
        **to_flat(choice),
        "n_images": settings.n_images,
        "powers": list(powers),
        "seed": sampling.seed,
        "batch_size": sampling.batch_size,
    }
    found.save(output, analysis="operator", command=line, settings=made_by)
    print(found.summary())
    print(f"Wrote {output / 'metrics.json'} and figures.")
    terminal.finish(output / "metrics.json", output)


def _check_options(inverter: str | None, backbone: str | None, sampling: SampleSettings) -> None:
    """Raises `InputError` for options that would have no effect."""
    if inverter is not None:
        if backbone is not None:
            raise InputError("--backbone is for features alone; with --inverter leave it out.")
        return
    of_inverter = ("pipeline", "stage", "steps")
    if given := [f"--{name}" for name in of_inverter if getattr(sampling, name) is not None]:
        raise InputError(
            f"{' and '.join(given)} must come with --inverter; without one, features alone are "
            "measured."
        )


def _open_model(
    inverter: str | None, backbone: str | None, opened: Operator, sampling: SampleSettings
) -> tuple[Inverter | None, Backbone]:
    """Opens the inverter with its backbone, or the backbone alone."""
    from featinv_diffusion.inverters.open import open_inverter
    from featinv_diffusion.trust import refuse_code

    if inverter is not None:
        chosen = open_inverter(replace(sampling, inverter=inverter))
        return chosen, chosen.require_backbone()
    name = backbone or refuse_code(opened.spec.backbone, "The operator")
    return None, Model(name, opened.spec.layer, sampling.device).open()
