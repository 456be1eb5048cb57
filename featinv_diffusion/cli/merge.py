"""`featinv merge`: joins what workers did into what one process would have written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featinv_diffusion.cli import options
from featinv_diffusion.errors import InputError

if TYPE_CHECKING:
    from featinv_diffusion.runs.parts import Shared
    from featinv_diffusion.runs.workers import Call


def merge(
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="The --output that the workers were given.")
    ],
    device: Annotated[
        str | None,
        typer.Option(help="Device to load the models to.", show_default="that of the workers"),
    ] = None,
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the module that the workers' backbone names.")
    ] = False,
) -> None:
    """Join what the workers of a command did, once all of them are done.

    The files are those of one process, bit for bit. Start it in the folder in which the workers
    were started; pictures and models must still be there. Nothing is written while a unit is open.
    """
    from featinv_diffusion.cli.run import quiet_libraries
    from featinv_diffusion.runs.parts import units_of
    from featinv_diffusion.runs.workers import read_call
    from featinv_diffusion.trust import trusting_code

    quiet_libraries()
    beside = units_of(output)
    call = read_call(beside if beside.is_dir() else output)
    if call.command not in _JOIN:
        raise InputError(
            f"{output} holds units of {call.command!r}, which this version cannot join. Use the "
            "version that wrote them."
        )
    if device is not None:
        call.settings["device"] = device
    with trusting_code(trust_code):
        _JOIN[call.command](call, output)


def _evaluate(call: Call, output: Path) -> None:
    from featinv_diffusion.cli.evaluate import report
    from featinv_diffusion.evaluation.run import run_evaluation
    from featinv_diffusion.evaluation.settings import EvaluationSettings
    from featinv_diffusion.processes import Joiner

    settings = call.settings_as(EvaluationSettings, output)
    result = run_evaluation(settings, output, Joiner(call.n_workers), call.line)
    assert result is not None
    report(result, output)


def _sample(call: Call, output: Path) -> None:
    from featinv_diffusion.cli.run import report
    from featinv_diffusion.data.sets import open_pictures
    from featinv_diffusion.images import builtin_photo
    from featinv_diffusion.processes import Joiner
    from featinv_diffusion.runs.many import SHARDED_ROWS, in_shard, sample_units, unit_size
    from featinv_diffusion.runs.record import reserved
    from featinv_diffusion.settings import SampleSettings

    settings = call.settings_as(SampleSettings, output)
    images = open_pictures(call.images or [builtin_photo()], exclude=output)
    joiner = Joiner(call.n_workers)
    with reserved(output):
        if call.command == "sample":
            found = sample_units(joiner, settings, images, unit_size(settings), output)
        else:
            size = call.shard_size or 0
            place, n_rows = in_shard, SHARDED_ROWS
            found = sample_units(joiner, settings, images, size, output, place=place, n_rows=n_rows)
    assert found is not None
    report(found, output)
    if found.failures:
        raise typer.Exit(1)


def _encode(call: Call, output: Path) -> None:
    from featinv_diffusion import schema
    from featinv_diffusion.cli.maps import Encoder, say_maps
    from featinv_diffusion.data.sets import open_pictures
    from featinv_diffusion.images import builtin_photo
    from featinv_diffusion.processes import Joiner
    from featinv_diffusion.runs.many import encode_units
    from featinv_diffusion.runs.parts import units_of
    from featinv_diffusion.runs.record import reserved
    from featinv_diffusion.trust import is_code_trusted, refuse_code

    options.check_file(output)
    encoder = schema.convert(call.settings, Encoder, str(output))
    if not is_code_trusted():
        refuse_code(encoder.backbone, str(output))
    given = call.images or [builtin_photo()]
    images = open_pictures(given)
    with reserved(output, is_file=True), reserved(units_of(output)):
        model = encoder.open()
        maps = encode_units(Joiner(call.n_workers), model, images, output, call)
    assert maps is not None
    say_maps(len(maps), model.spec, output)


# ---- Studies in parts ----------------------------------------------------------------------------


@contextmanager
def _joining(call: Call, output: Path, *, is_file: bool = False) -> Iterator[Shared]:
    """Holds what is written, and the units where they lie beside it."""
    from featinv_diffusion.processes import Joiner
    from featinv_diffusion.runs.parts import Shared, units_of
    from featinv_diffusion.runs.record import reserved

    folder = units_of(output) if is_file else output
    if is_file:
        options.check_file(output)
    with reserved(output, is_file=is_file), reserved(folder) if is_file else nullcontext():
        yield Shared(Joiner(call.n_workers), folder, call)


def _encoders(call: Call, output: Path) -> None:
    from featinv_diffusion.cli.analyze import compare
    from featinv_diffusion.studies.settings import EncoderSettings

    settings = call.settings_as(EncoderSettings, output)
    with _joining(call, output) as division:
        compare(settings, output, call.line, division)


def _scope(call: Call, output: Path) -> None:
    from featinv_diffusion.cli.scope import fit
    from featinv_diffusion.studies.settings import ScopeSettings

    settings = call.settings_as(ScopeSettings, output)
    with _joining(call, output, is_file=True) as division:
        fit(settings, output.parent, division)


def _concepts(call: Call, output: Path) -> None:
    from featinv_diffusion.cli.concepts import run as find_and_write
    from featinv_diffusion.settings import ConceptSettings

    settings = call.settings_as(ConceptSettings, output)
    folder, figure = Path(_own(call, output, "folder")), _own(call, output, "figure")
    with _joining(call, output, is_file=True) as division:
        find_and_write(settings, folder, call.images, output, figure, division)


def _fit_operator(call: Call, output: Path) -> None:
    from featinv_diffusion import schema
    from featinv_diffusion.cli.operator import Model, fit_to_file
    from featinv_diffusion.studies.settings import FitSettings
    from featinv_diffusion.trust import is_code_trusted, refuse_code

    operation = _own(call, output, "operation")
    named = {name: value for name, value in call.own.items() if name != "operation"}
    device = {"device": d} if (d := call.settings.pop("device", None)) else {}
    model = schema.convert({**named, **device}, Model, str(output))
    if not is_code_trusted():
        refuse_code(model.backbone, str(output))
    settings = call.settings_as(FitSettings, output)
    with _joining(call, output, is_file=True) as division:
        fit_to_file(settings, operation, model, output, division)


def _apply_operator(call: Call, output: Path) -> None:
    from featinv_diffusion import schema
    from featinv_diffusion.cli.operator import apply_to
    from featinv_diffusion.data.sets import open_pictures
    from featinv_diffusion.images import builtin_photo
    from featinv_diffusion.settings import SampleSettings

    settings = call.settings_as(SampleSettings, output)
    images = open_pictures(call.images or [builtin_photo()], exclude=output)
    powers = schema.convert(call.own.get("powers"), list[int], f"the powers of {output}")
    with _joining(call, output) as division:
        division = replace(division, inputs={"data_fingerprint": images.fingerprint})
        apply_to(settings, images, _own(call, output, "operator"), powers, output, division)


def _analyze_operator(call: Call, output: Path) -> None:
    from featinv_diffusion import schema
    from featinv_diffusion.cli.operator import Measured, measure
    from featinv_diffusion.studies.settings import OperatorStudySettings
    from featinv_diffusion.trust import is_code_trusted, refuse_code

    settings = call.settings_as(OperatorStudySettings, output)
    what = schema.convert(call.own, Measured, str(output))
    if what.backbone is not None and not is_code_trusted():
        refuse_code(what.backbone, str(output))
    with _joining(call, output) as division:
        measure(settings, what, output, call.line, division)


def _own(call: Call, output: Path, name: str) -> str:
    """Returns an argument of the workers' command.

    Raises:
        InputError: it is not noted.
    """
    value = call.own.get(name)
    if not isinstance(value, str):
        raise InputError(
            f"The workers of {output} must have noted their {name!r}, got {value!r}. Start them "
            "again."
        )
    return value


_JOIN: dict[str, Callable[[Call, Path], None]] = {
    "evaluate": _evaluate,
    "sample": _sample,
    "reconstruct": _sample,
    "encode": _encode,
    "analyze encoders": _encoders,
    "scope": _scope,
    "concepts": _concepts,
    "operator fit": _fit_operator,
    "operator apply": _apply_operator,
    "operator analyze": _analyze_operator,
}
