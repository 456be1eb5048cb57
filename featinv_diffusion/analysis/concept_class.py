"""The class that concepts are relevant to: by name, by index, or by majority prediction."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.concepts import PooledHead, read_head
from featinv_diffusion.errors import InputError


@dataclass(frozen=True, eq=False)
class TargetClass:
    """A class of the backbone.

    Args:
        name: as the backbone calls it; the index where it knows no names.
        n_predicted: pictures that are classified so.
        head: None where relevance is not defined for this backbone and layer.
        note: why not.
    """

    index: int
    name: str
    n_predicted: int
    head: PooledHead | None
    note: str | None = None

    @property
    def direction(self) -> Float[Tensor, " c"] | None:
        """The direction of the class in feature space, float32 on the CPU."""
        return None if self.head is None else self.head.direction(self.index).float().cpu()


def find_class(
    backbone: Backbone, given: str | None, logits: Float[Tensor, "n k"] | None
) -> TargetClass | None:
    """Returns the class that is meant, or without a classification head None.

    Args:
        given: name or index; None is the majority of the predictions, the first of equals.

    Raises:
        InputError: no such class, a name that several have, or a class that is asked for where
            there are none.
    """
    if logits is None:
        if given is not None:
            raise InputError(f"{backbone.name} must classify to have classes, but has no head.")
        return None
    predicted = logits.argmax(dim=1)
    index = (
        int(predicted.bincount().argmax())
        if given is None
        else _index_of(given, backbone.labels, logits.shape[1])
    )
    head, note = None, None
    try:
        head = read_head(backbone)
    except InputError as error:
        note = f"Relevance to the class is not defined here, and concepts are not sorted: {error}"
    name = str(index) if backbone.labels is None else backbone.labels[index]
    return TargetClass(index, name, int((predicted == index).sum()), head, note)


def _index_of(given: str, labels: tuple[str, ...] | None, n_classes: int) -> int:
    if given.isdecimal():
        if int(given) < n_classes:
            return int(given)
        raise InputError(f"The class must lie in 0 … {n_classes - 1}, but {given} came.")
    if labels is None:
        raise InputError(f"The backbone knows its classes by index only, but {given!r} came.")
    wanted = given.strip().casefold()
    spellings = [[part.strip() for part in [label, *label.split(",")]] for label in labels]
    found = [i for i, names in enumerate(spellings) if wanted in map(str.casefold, names)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InputError(
            f"The classes {', '.join(map(str, found))} are all named {given!r}. Give the index."
        )
    near = get_close_matches(given, [name for names in spellings for name in names[1:]], n=3)
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else "give its index."
    raise InputError(f"No class is named {given!r}; {hint}")
