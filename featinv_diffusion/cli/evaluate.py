"""`featinv evaluate`: how well the features of a data set come back."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from featinv_diffusion.cli import options, terminal
from featinv_diffusion.cli.command_line import command_line
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.settings import EvaluationSettings

if TYPE_CHECKING:
    from featinv_diffusion.evaluation.run import Evaluation


@options.with_settings(EvaluationSettings, config=True, without=["n_samples"])
def evaluate(
    *,
    settings: EvaluationSettings,
    output: options.Output = Path("outputs/evaluate"),
    worker: options.WorkerOption = None,
) -> None:
    """Reconstruct a data set and measure how well its features come back.

    Writes metrics.json (each figure with its interval, beside nulls and ceilings),
    per_image.parquet and metrics.md. Runs on any number of processes as
    `accelerate launch -m featinv_diffusion evaluate …`, or on workers that never talk, which
    `featinv merge` joins; the same command again finishes what was interrupted and tries again
    what failed.
    """
    from featinv_diffusion.cli.run import end_worker, quiet_libraries
    from featinv_diffusion.data.sets import EXAMPLE
    from featinv_diffusion.evaluation.run import run_evaluation
    from featinv_diffusion.processes import find_worker, make_accelerator

    if not settings.data:
        raise InputError(f"The images to evaluate on must be named, {EXAMPLE}.")
    quiet_libraries()
    if (found := find_worker(worker)) is not None:
        run_evaluation(settings, output, found, command_line(), print)
        raise typer.Exit(end_worker(found, output))
    accelerator = make_accelerator()
    result = run_evaluation(settings, output, accelerator, command_line(), print)
    accelerator.end_training()
    if result is not None:
        report(result, output)


def report(result: Evaluation, output: Path) -> None:
    """Prints what was found; exits with 1 where something failed."""
    from featinv_diffusion.evaluation.run import METRICS, PER_IMAGE, TABLE

    failures = [*result.metrics["failures"], *result.metrics["partial_failures"]]
    for failure in failures:
        print(f"Failed: {failure['error']}", file=sys.stderr)
    print(result.summary())
    print(f"Wrote {output / TABLE}, {output / METRICS} and {PER_IMAGE}.")
    terminal.finish(output / METRICS, output)
    if failures:
        raise typer.Exit(1)
