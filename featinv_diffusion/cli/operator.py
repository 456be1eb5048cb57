"""`featinv operator`: operations on pixels as matrices on features; fit, apply, analyze."""

from __future__ import annotations

import typer

from featinv_diffusion.cli.operator_analyze import analyze
from featinv_diffusion.cli.operator_apply import apply
from featinv_diffusion.cli.operator_fit import fit

operator = typer.Typer(
    help="Do to features, by one matrix, what an operation does to pixels.", no_args_is_help=True
)
for _command in (fit, apply, analyze):
    operator.command()(_command)
