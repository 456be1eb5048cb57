"""What the tokens of a vision transformer say of a class, block by block, for the page."""

from __future__ import annotations

import shlex
from functools import lru_cache
from typing import Any

import torch

from featinv_diffusion.app.pictures import Stored
from featinv_diffusion.backbones import Backbone, load_backbone
from featinv_diffusion.class_embedding.anatomy import Anatomy, read_anatomy
from featinv_diffusion.class_embedding.images import class_name, to_input
from featinv_diffusion.class_embedding.pictures import identifiability_maps
from featinv_diffusion.class_embedding.reading import STATES, read_images
from featinv_diffusion.data.classes import find_class
from featinv_diffusion.devices import find_device
from featinv_diffusion.images import to_pil

VIT = "tiny/vit"
N_GUESSES = 5


def read_class_maps(stored: Stored, target: str | None, device: str) -> dict[str, Any]:
    """Returns the identifiability of a class at each patch after each block, as plain values.

    Args:
        target: the class, its name or number; None is the one that the model predicts.

    Raises:
        InputError: no such class.
    """
    anatomy = _open(device)
    backbone = anatomy.backbone
    label = None
    if target:
        label = find_class(target, backbone.labels, anatomy.n_classes, backbone.name)
    pixels = to_input([stored.decode()], backbone)
    chosen = None if label is None else torch.tensor([label])
    with torch.no_grad():
        reading = read_images(anatomy, pixels, chosen, STATES)
    maps = identifiability_maps(anatomy, reading)[0]
    assert reading.states is not None
    tops = reading.states.top[0, 1:, anatomy.n_prefix :]
    guesses = reading.logits[0].softmax(dim=0).topk(min(N_GUESSES, anatomy.n_classes))
    name = class_name(backbone, int(reading.labels[0]))
    return {
        "class": name,
        "guesses": [
            {"class": class_name(backbone, i), "probability": p}
            for p, i in zip(guesses.values.tolist(), guesses.indices.tolist(), strict=True)
        ],
        "maps": maps.tolist(),
        "tops": [
            [[class_name(backbone, int(i)) for i in row] for row in block]
            for block in tops.unflatten(1, anatomy.grid)
        ],
        "picture": to_pil(pixels)[0],
        "command": _command(stored.name, label),
        "python": _python(stored.name, label),
    }


@lru_cache(maxsize=1)
def _open(device: str) -> Anatomy:
    backbone: Backbone = load_backbone(VIT).to(find_device(device))
    return read_anatomy(backbone)


def _command(name: str, label: int | None) -> str:
    chosen = [] if label is None else ["--target", str(label)]
    return shlex.join(["featinv", "classemb", name, "--backbone", VIT, *chosen, "--output", "said"])


def _python(name: str, label: int | None) -> str:
    chosen = "" if label is None else f", target={label}"
    return (
        "import featinv_diffusion as fi\n\n"
        f"backbone = fi.load_backbone({VIT!r})\n"
        f'fi.read_tokens(backbone, {name!r}{chosen}).save("said")\n'
    )
