"""`featinv train`: train an inverter on your own images and backbone.

`train/controlnet.py` and `train/inverter.py` are the same commands as scripts of a checkout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from featinv_diffusion.cli import exits, process, terminal

Config = TypeVar("Config")

ConfigName = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="NAME_OR_FILE",
        help="Settings: a YAML file, or a config of the package such as controlnet/convnext.",
        show_default="the defaults",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would run, then stop.")]
TrustCode = Annotated[
    bool,
    typer.Option("--trust-code", help="Run the module that model.backbone=MODULE:FUNCTION names."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Settings that win, such as optim.lr=1e-4."),
]

train = typer.Typer(help="Train an inverter on your own images and backbone.", no_args_is_help=True)


@train.command()
def controlnet(
    overrides: Overrides = None,
    config: ConfigName = None,
    dry_run: DryRun = False,
    trust_code: TrustCode = False,
) -> None:
    """Train a FeatInv ControlNet on a frozen text-to-image UNet and a frozen backbone.

    Runs on any number of processes as `accelerate launch -m featinv_diffusion train controlnet …`;
    the same command again resumes an interrupted run.
    """
    from featinv_diffusion.training.controlnet import ControlNetConfig, train_controlnet
    from featinv_diffusion.trust import trusting_code

    with trusting_code(trust_code):
        run_training(ControlNetConfig, train_controlnet, config, overrides, dry_run)


@train.command(name="shared-trunk")
def shared_trunk(
    overrides: Overrides = None, config: ConfigName = None, dry_run: DryRun = False
) -> None:
    """Train one trunk for the ControlNets of several pipelines, each with a head of its own.

    The setting model.pipelines names them. Runs on any number of processes as `accelerate launch -m
    featinv_diffusion train shared-trunk …`; the same command again resumes an interrupted run.
    """
    from featinv_diffusion.training.shared_trunk import SharedTrunkConfig, train_shared_trunk

    run_training(SharedTrunkConfig, train_shared_trunk, config, overrides, dry_run)


@train.command()
def inverter(
    overrides: Overrides = None, config: ConfigName = None, dry_run: DryRun = False
) -> None:
    """Train a deterministic inverter: modules of a DETR, ViT, DeiT or Swin, or a reconstructor.

    The setting model.family says which: detr, vit (a DeiT too), swin or, for the reconstructor of
    an encoder, reconstructor. Runs on any number of processes as `accelerate launch -m
    featinv_diffusion train inverter …`; the same command again resumes an interrupted run.
    """
    from featinv_diffusion.config import read_setting
    from featinv_diffusion.errors import InputError, choices_hint
    from featinv_diffusion.training.inverter import InverterConfig, train_inverter
    from featinv_diffusion.training.reconstructor import ReconstructorConfig, train_reconstructor

    families: dict[str, tuple[type[Any], Callable[[Any], object]]] = {
        "detr": (InverterConfig, train_inverter),
        "vit": (InverterConfig, train_inverter),
        "swin": (InverterConfig, train_inverter),
        "reconstructor": (ReconstructorConfig, train_reconstructor),
    }
    family = str(read_setting("model.family", config, overrides or ()) or "detr")
    if family not in families:
        hint = choices_hint(family, list(families))
        raise InputError(f"No model.family is named {family!r}; {hint}")
    run_training(*families[family], config, overrides, dry_run)


def run_training(
    config_class: type[Config],
    train: Callable[[Config], object],
    config: str | None,
    overrides: Sequence[str] | None,
    dry_run: bool,
) -> None:
    """Trains what the settings describe; they are read from the config, then the overrides."""
    from featinv_diffusion.config import load_config

    extra = ["run.dry_run=true"] if dry_run else []
    output = train(load_config(config_class, config, [*(overrides or ()), *extra]))
    terminal.finish({}, output if isinstance(output, Path) else None)


def run_script(command: Callable[..., None]) -> None:
    """Runs a command as a script, with the exit codes of `featinv`."""
    process.keep_freed_memory()
    exits.run(lambda: typer.run(command))


def run_recipe(
    config_class: type[Config], train: Callable[[Config], object], doc: str | None
) -> None:
    """Runs a training script that has no command, with the options of `featinv train`."""

    def command(
        overrides: Overrides = None, config: ConfigName = None, dry_run: DryRun = False
    ) -> None:
        run_training(config_class, train, config, overrides, dry_run)

    command.__doc__ = doc
    run_script(command)
