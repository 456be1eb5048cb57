"""Operations on pixels whose counterparts in feature space are looked for.

They work on values in [0, 1] and do not round to 8 bits, so that a channel that is suppressed n
times is that channel times αⁿ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.types import Images

PixelMap: TypeAlias = Callable[[Images], Images]
"""From images to others of the same shape, which leaves its input as it was."""

CHANNELS = ("red", "green", "blue")
GREY_WEIGHTS = (0.2989, 0.5870, 0.1140)
DEFAULT_ALPHA, DEFAULT_CHANNEL = 0.9, "blue"


def keep(images: Images) -> Images:
    """Returns the images as they are."""
    return images


def swap_channels(images: Images) -> Images:
    """Reverses the order of the channels: red becomes blue and blue red."""
    return images.flip(1)


def suppress_channel(
    images: Images, alpha: float = DEFAULT_ALPHA, channel: str = DEFAULT_CHANNEL
) -> Images:
    """Multiplies one channel by alpha.

    Raises:
        InputError: alpha outside of [0, 1], or no such channel.
    """
    _check_suppression(alpha, channel)
    factors = images.new_ones(3)
    factors[CHANNELS.index(channel)] = alpha
    return images * factors[:, None, None]


def to_grey(images: Images) -> Images:
    """Sets all channels to 0.2989 R + 0.5870 G + 0.1140 B."""
    weights = images.new_tensor(GREY_WEIGHTS)[:, None, None]
    return (images * weights).sum(1, keepdim=True).expand_as(images).contiguous()


@dataclass(frozen=True)
class PixelOperation:
    """What is done to pixels, as a pair of maps: features of `source(x)` become `target(x)`'s.

    Any function will do: `PixelOperation("brighten", lambda x: x.sqrt())`.

    Args:
        name: what operators and figures call it.
        target: from the original to what is wanted.
        source: from the original to what is given; the original itself unless the operation has
            no inverse, such as `colourise`.
        parameters: what `make_operation` needs besides the name to make it again.
    """

    name: str
    target: PixelMap
    source: PixelMap = keep
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        values = ", ".join(f"{key} {value}" for key, value in self.parameters.items())
        return f"{self.name} ({values})" if values else self.name

    def repeated(self, images: Images, power: int) -> Images:
        """Returns what `power` times the operation makes of originals; 0 times is the source.

        Raises:
            InputError: a power below 0.
        """
        if power < 0:
            raise InputError(f"A power must be at least 0, but {power} came.")
        if power == 0:
            return self.source(images)
        for _ in range(power):
            images = self.target(images)
        return images


def _swap() -> PixelOperation:
    return PixelOperation("swap", swap_channels)


def _suppress(alpha: float = DEFAULT_ALPHA, channel: str = DEFAULT_CHANNEL) -> PixelOperation:
    _check_suppression(alpha, channel)
    parameters = {"alpha": alpha, "channel": channel}

    def target(images: Images) -> Images:
        return suppress_channel(images, alpha, channel)

    return PixelOperation("suppress", target, parameters=parameters)


def _check_suppression(alpha: float, channel: str) -> None:
    if channel not in CHANNELS:
        raise InputError(f"No channel is named {channel!r}; {choices_hint(channel, [*CHANNELS])}")
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha must lie in 0 … 1, but {alpha} came.")


def _grey() -> PixelOperation:
    return PixelOperation("grey", to_grey)


def _colourise() -> PixelOperation:
    return PixelOperation("colourise", keep, source=to_grey)


_MAKERS: dict[str, tuple[Callable[..., PixelOperation], frozenset[str]]] = {
    "swap": (_swap, frozenset()),
    "suppress": (_suppress, frozenset({"alpha", "channel"})),
    "grey": (_grey, frozenset()),
    "colourise": (_colourise, frozenset()),
}
OPERATIONS = tuple(_MAKERS)


def make_operation(name: str, **parameters: Any) -> PixelOperation:
    """Makes `swap`, `suppress` (alpha, channel), `grey` or `colourise`.

    `colourise` takes grey images for given and their originals for wanted.

    Raises:
        InputError: no such operation, or parameters that it does not take.
    """
    if name not in _MAKERS:
        hint = choices_hint(name, list(OPERATIONS))
        raise InputError(f"No pixel operation is named {name!r}; {hint}")
    make, takes = _MAKERS[name]
    if unknown := sorted(parameters.keys() - takes):
        taken = f"only {', '.join(sorted(takes))}" if takes else "no parameters"
        raise InputError(f"The operation {name!r} takes {taken}, but {', '.join(unknown)} came.")
    return make(**parameters)
