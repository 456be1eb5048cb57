"""Operations on pixels, whose counterparts in feature space are fitted.

They work on values in [0, 1] and do not round to 8 bits: a channel that is suppressed n times is
multiplied by αⁿ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.features.operators import with_parameters
from featinv_diffusion.types import Images

PixelMap: TypeAlias = Callable[[Images], Images]
"""A function from images to images of the same shape, which does not change its input."""

CHANNELS = ("red", "green", "blue")
GREY_WEIGHTS = (0.2989, 0.5870, 0.1140)
DEFAULT_ALPHA, DEFAULT_CHANNEL = 0.9, "blue"


def keep(images: Images) -> Images:
    """Returns the images unchanged."""
    return images


def swap_channels(images: Images) -> Images:
    """Reverses the order of the channels: red becomes blue and blue red."""
    return images.flip(1)


def suppress_channel(
    images: Images, alpha: float = DEFAULT_ALPHA, channel: str = DEFAULT_CHANNEL
) -> Images:
    """Multiplies one channel by alpha.

    Raises:
        InputError: alpha outside of [0, 1], or an unknown channel.
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
    """An operation on pixels as a pair of functions of the original image.

    An operator maps the features of `source(x)` to those of `target(x)`. Any function can be used:
    `PixelOperation("brighten", lambda x: x.sqrt())`.

    Args:
        name: name in operators and figures.
        target: gives the wanted image from the original.
        source: gives the input image from the original; the original itself for most operations,
            but a grey image for `colourise`.
        parameters: arguments with which `make_operation` makes the operation again.
    """

    name: str
    target: PixelMap
    source: PixelMap = keep
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return with_parameters(self.name, self.parameters)

    def repeated(self, images: Images, power: int) -> Images:
        """Returns originals after `power` applications of the operation; 0 gives the source.

        Raises:
            InputError: a power below 0.
        """
        if power < 0:
            raise InputError(f"A power must be at least 0, got {power}.")
        if power == 0:
            return self.source(images)
        for _ in range(power):
            images = self.target(images)
        return images


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
        raise InputError(f"alpha must lie in 0 … 1, got {alpha}.")


_MAKERS: dict[str, tuple[Callable[..., PixelOperation], frozenset[str]]] = {
    "swap": (partial(PixelOperation, "swap", swap_channels), frozenset()),
    "suppress": (_suppress, frozenset({"alpha", "channel"})),
    "grey": (partial(PixelOperation, "grey", to_grey), frozenset()),
    "colourise": (partial(PixelOperation, "colourise", keep, to_grey), frozenset()),
}
OPERATIONS = tuple(_MAKERS)


def make_operation(name: str, **parameters: Any) -> PixelOperation:
    """Makes `swap`, `suppress` (alpha, channel), `grey` or `colourise`, the opposite of `grey`.

    Raises:
        InputError: an unknown operation, or parameters that it does not take.
    """
    if name not in _MAKERS:
        hint = choices_hint(name, list(OPERATIONS))
        raise InputError(f"No pixel operation is named {name!r}; {hint}")
    make, takes = _MAKERS[name]
    if unknown := sorted(parameters.keys() - takes):
        taken = f"only {', '.join(sorted(takes))}" if takes else "no parameters"
        raise InputError(f"The operation {name!r} takes {taken}, got {', '.join(unknown)}.")
    return make(**parameters)
