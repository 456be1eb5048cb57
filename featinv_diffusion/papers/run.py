"""The studies by name, and the run of one item."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from featinv_diffusion.errors import InputError
from featinv_diffusion.papers.base import Finding, Request, Study
from featinv_diffusion.papers.items import Item
from featinv_diffusion.papers.settings import PaperSettings

STUDIES = {
    "reconstruction": ("reconstruction", "measure_reconstruction"),
    "warm start": ("warm_start", "measure_warm_start"),
    "settings": ("grid", "measure_settings"),
    "other domains": ("domains", "measure_other_domains"),
    "mixtures": ("applications", "measure_mixtures"),
    "spread": ("applications", "measure_spread"),
    "concepts": ("applications", "measure_concepts"),
    "tokens": ("tokens", "measure_tokens_of_paper"),
    "probes": ("tokens", "measure_probes"),
    "token models": ("tokens", "measure_token_models"),
    "stages": ("stages", "measure_detr_stages"),
    "recolouring": ("recolouring", "measure_recolouring"),
    "prototypes": ("prototypes", "measure_prototypes"),
    "grey": ("grey", "measure_grey"),
    "tuned": ("recolouring", "measure_tuned"),
    "layers": ("layers", "measure_layers_of_detr"),
    "shape": ("spatial", "measure_shape"),
    "spatial": ("spatial", "measure_spatial"),
    "families": ("families", "measure_families"),
    "cost": ("cost", "measure_cost"),
    "swap": ("operators", "measure_swap"),
    "suppression": ("operators", "measure_suppression"),
    "colourisation": ("colourisation", "measure_colourisation"),
    "channels": ("encoders", "measure_channels"),
    "conditions": ("encoders", "measure_conditions"),
    "time": ("encoders", "measure_time"),
    "encoders": ("encoders", "measure_encoders_of_paper"),
    "readout": ("readout", "measure_readout"),
}
"""Module and function of each study; a study may speak of several items."""


def find_study(item: Item) -> Study:
    """Returns the study of an item.

    Raises:
        InputError: an item that nothing is run for; says what to do instead.
    """
    if item.study is None:
        instead = "" if item.command == "–" else f" What there is: {item.command}"
        raise InputError(f"Nothing is run for {item.name}: {item.how or item.state}.{instead}")
    module, function = STUDIES[item.study]
    return getattr(import_module(f"featinv_diffusion.papers.{module}"), function)


def run_item(
    item: Item, settings: PaperSettings, output: Path, command: str = ""
) -> tuple[Finding, Path]:
    """Runs the study of an item and writes its folder.

    Raises:
        InputError: nothing to run, or settings, images or models that cannot be used.
    """
    found = find_study(item)(Request(settings, output))
    return found, found.save(output, item, settings, command)
