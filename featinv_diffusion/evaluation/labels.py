"""Which class of the backbone a label means."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.data.sets import ImageSet

_NUMBER_LIKE = re.compile(r"n\d{8}|((label|class)[ _-]?)?\d+")
"""Names of classes that say no more than a number: WordNet ids, `LABEL_3`, `class 3`, `3`."""


def match_labels(images: ImageSet, backbone: Backbone) -> tuple[str | None, list[int] | None]:
    """Returns how labels are matched with the backbone's classes, and the class of each label.

    Labels are matched by name where each name is that of one class. They are matched by number
    where there are as many of both and either the names are equal in their order (two classes may
    share one) or one side has no names that say more than a number; equally many other names are
    no reason to think that they correspond.
    """
    if images.labels is None or not backbone.has_head:
        return None, None
    names, known = (_fold_case(n) for n in (images.class_names, backbone.labels))
    n_labels = len(names) if names else max(images.labels) + 1
    if names and known and len(set(names)) == len(names):
        found = [i for name in names for i, other in enumerate(known) if other == name]
        if [known[i] for i in found] == names:
            return "name", found
    by_number = list(range(n_labels))
    if n_labels != (len(known) if known else _count_classes(backbone)):
        return None, None
    says_nothing = any(not n or all(map(_NUMBER_LIKE.fullmatch, n)) for n in (names, known))
    return ("number", by_number) if says_nothing or names == known else (None, None)


def _fold_case(names: Sequence[str] | None) -> list[str] | None:
    return None if names is None else [name.casefold() for name in names]


@torch.no_grad()
def _count_classes(backbone: Backbone) -> int:
    blank = torch.zeros(1, 3, *backbone.input_size, device=backbone.device)
    return backbone.classify(blank).shape[1]
