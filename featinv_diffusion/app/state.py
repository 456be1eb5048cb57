"""What the page shows, as one value: its link, and what the server is asked for."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from featinv_diffusion.app.edits import Edit, needs_second
from featinv_diffusion.errors import InputError
from featinv_diffusion.schema import parse_json

MAX_MEMBERS, MAX_SAMPLES, MAX_EDITS = 4, 8, 64
MAX_LINK = 200_000
"""Characters of a state in a link."""

Key = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,80}$")]
Quality = Literal["draft", "standard", "best"]


class State(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Everything that decides the pictures, for all inverters that stand side by side.

    Args:
        picture: key of the picture whose features are inverted.
        second: key of the picture that cells are taken from.
        members: names of inverters, see `members.Member`.
        quality: see `inverters.quality`; deterministic inverters have one only.
        n_samples: samples of each map.
        seed: random seed.
        edits: of the map, in order.
    """

    picture: Key
    members: Annotated[
        list[Annotated[str, Meta(min_length=1, max_length=1000)]],
        Meta(min_length=1, max_length=MAX_MEMBERS),
    ]
    second: Key | None = None
    quality: Quality = "best"
    n_samples: Annotated[int, Meta(ge=1, le=MAX_SAMPLES)] = 4
    seed: Annotated[int, Meta(ge=0, lt=2**53)] = 0
    edits: Annotated[list[Edit], Meta(max_length=MAX_EDITS)] = []

    def __post_init__(self) -> None:
        if self.second is None and needs_second(self.edits):
            raise InputError("An edit takes cells of a second picture, but none is chosen.")

    def to_content(self) -> dict[str, Any]:
        """Returns plain values, as JSON has them."""
        return msgspec.to_builtins(self)

    def to_link(self) -> str:
        """Returns the state as letters that a URL may hold."""
        text = json.dumps(self.to_content(), separators=(",", ":"), sort_keys=True)
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def read_state(text: str | bytes) -> State:
    """Reads a state of JSON text.

    Raises:
        InputError: no state.
    """
    return parse_json(text, State, "the state of the page")


def read_link(link: str) -> State:
    """Reads what `State.to_link` returned.

    Raises:
        InputError: no state.
    """
    if len(link) > MAX_LINK:
        raise InputError(f"A link must have at most {MAX_LINK:,} letters, got {len(link):,}.")
    try:
        text = base64.urlsafe_b64decode(link.encode() + b"=" * (-len(link) % 4))
    except (ValueError, binascii.Error):
        raise InputError("The link must hold a state of this page, but is damaged.") from None
    return read_state(text)
