"""`featinv operator apply`: pictures through an operator and an inverter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.cli import operator_options, options
from featinv_diffusion.errors import InputError


def apply(
    images: options.Images = None,
    *,
    operator: operator_options.OperatorName,
    inverter: operator_options.InverterName,
    power: Annotated[
        str, typer.Option(metavar="N,N,…", help="How often to apply it; 0 is not at all.")
    ] = "0,1",
    pipeline: options.Pipeline = None,
    stage: options.Stage = None,
    steps: options.Steps = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    output: options.Output = Path("outputs/operator"),
) -> None:
    """Apply an operator to the features of pictures, and see them through an inverter.

    Writes a PNG per picture and power, grid.png (with the cosine of each picture's features to the
    map it was made from) and manifest.json (settings, seeds, cosines; it has no replay). Of an
    operation that does not start from the picture itself, such as colourise, which starts from
    grey, that is made of the picture first and shown as what was given.
    """
    import sys

    from featinv_diffusion.analysis.operator_apply import (
        GRID,
        apply_operator,
        make_apply_jobs,
        write_applied,
    )
    from featinv_diffusion.analysis.scope import open_scope, scope_line
    from featinv_diffusion.cli.run import progress_bar, quiet_libraries
    from featinv_diffusion.features.operator_files import open_operator
    from featinv_diffusion.images import builtin_photo
    from featinv_diffusion.manifest import MANIFEST
    from featinv_diffusion.reconstruction import Job, find_images, make_jobs
    from featinv_diffusion.sampling import DIFFUSION, SampleSettings, open_chosen

    quiet_libraries()
    operator_options.check_folder(output)
    powers = operator_options.to_powers(power)
    opened = open_operator(operator)
    found = find_images(images or [builtin_photo()], exclude=output)
    jobs = make_apply_jobs(make_jobs(found, seed, 1), powers)
    settings = SampleSettings(
        inverter=inverter,
        pipeline=pipeline,
        stage=stage,
        steps=steps,
        n_samples=1,
        seed=seed,
        batch_size=1,
        device=device,
    )
    failures: list[dict[str, str]] = []

    def fail(job: Job, error: str) -> None:
        failures.append({"input": str(job.input.absolute()), "error": error})

    with progress_bar(len(jobs) * len(powers)) as advance:
        chosen, resolved = open_chosen(settings, on_progress=advance)
        scope = open_scope(chosen, resolved)
        applied = list(apply_operator(opened, chosen, jobs, powers, fail, scope))
    if not applied:
        raise InputError("\n".join(failure["error"] for failure in failures))
    write_applied(applied, failures, opened, operator, powers, resolved, scope, output)
    for failure in failures:
        print(f"Failed: {failure['error']}", file=sys.stderr)
    p_values = [p for done in applied for p in done.scope_p_value or []]
    is_deterministic = resolved.inverter != DIFFUSION
    print(scope_line(p_values or None, scope.basis, deterministic=is_deterministic))
    print(f"Wrote {output / GRID} and {output / MANIFEST}.")
    if failures:
        raise typer.Exit(1)
