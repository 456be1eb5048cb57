"""States within the stages, through inverses that were trained on the last of them.

Source: "Inverting DETR" (modular inversion), section 4.4 and figure 9.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from featinv_diffusion.inverters.modular import ModularInverter
from featinv_diffusion.types import Images


def matching_states(inverter: ModularInverter, stage: str) -> list[str]:
    """Returns the stages and states whose shape the inverse of a stage reads, in order.

    `encoder.0`, another name for `backbone`, is left out where that one is there; the last state of
    a stage stands beside the stage itself.
    """
    specs = inverter.path.specs
    wanted = specs[stage]
    found = [
        name
        for name, spec in specs.items()
        if (spec.kind, spec.channels, spec.grid) == (wanted.kind, wanted.channels, wanted.grid)
    ]
    return [name for name in found if name != "encoder.0" or "backbone" not in found]


@torch.no_grad()
def invert_states(
    inverter: ModularInverter,
    images: Images,
    stage: str,
    states: Sequence[str],
    batch_size: int = 32,
) -> dict[str, Images]:
    """Returns reconstructions of every state through the chain of one stage, on the CPU."""
    chain = inverter.chain(stage)
    parts: dict[str, list[Tensor]] = {state: [] for state in states}
    for batch in images.split(batch_size):
        found = inverter.path.embeddings(batch.to(inverter.path.device), states)
        for state in states:
            parts[state].append(chain.invert(found[state]).cpu())
    return {state: torch.cat(part) for state, part in parts.items()}
