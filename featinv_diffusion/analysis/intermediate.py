"""States within the stages, through inverses that were trained on the last of them.

Source: "Inverting DETR" (modular inversion), section 4.4 and figure 9.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from featinv_diffusion.backbones.tracing import to_meta
from featinv_diffusion.inverters.modular import ModularInverter
from featinv_diffusion.inverters.path import ForwardPath
from featinv_diffusion.types import Images


def matching_states(inverter: ModularInverter, stage: str) -> list[str]:
    """Returns the stages and states whose shape the inverse of a stage reads, in order.

    Of several names of one state, such as the last state of a stage and the stage itself, only the
    stage that was asked for, or else a main stage, is returned.
    """
    specs = inverter.path.specs
    wanted = specs[stage]
    found = [
        name
        for name, spec in specs.items()
        if (spec.kind, spec.channels, spec.grid) == (wanted.kind, wanted.channels, wanted.grid)
    ]
    return _drop_aliases(inverter.path, stage, found)


def _drop_aliases(path: ForwardPath, stage: str, names: Sequence[str]) -> list[str]:
    """Leaves out the names under which a forward pass (on the meta device) hands on one tensor."""
    ghost = to_meta(path)
    pixels = torch.zeros(1, 3, *path.input_size, device="meta")
    with torch.no_grad():
        states = ghost.embeddings(pixels, names)
    chosen: dict[int, str] = {}
    for name in sorted(names, key=lambda name: (name != stage, name not in path.main_stages)):
        chosen.setdefault(id(states[name]), name)
    return [name for name in names if name in chosen.values()]


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
