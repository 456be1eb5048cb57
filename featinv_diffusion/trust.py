"""Code of a user's own, which runs only where the user names it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from featinv_diffusion.errors import InputError

FACTORY = re.compile(r"(?P<place>.+\.py|[A-Za-z_][\w.]*):(?P<function>[A-Za-z_]\w*)")
"""A function that makes a backbone: of a file, or of a module that can be imported."""
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


def refuse_code(name: str, source: str) -> str:
    """Returns the name of a backbone that a file holds.

    Raises:
        InputError: it names code, which would run because a file says so.
    """
    if FACTORY.fullmatch(name):
        raise InputError(
            f"{source} names the code {name!r} as its backbone, which is not run because a file "
            "says so. If you trust it, say it yourself: as --backbone, as model.backbone=… of a "
            "training, or by replay --trust-code."
        )
    return name


@contextmanager
def trusting_code(trust: bool = True) -> Iterator[None]:
    """Lets `load_backbone` run modules that are named without their path, inside the block."""
    token = _trusted.set(trust)
    try:
        yield
    finally:
        _trusted.reset(token)


def is_code_trusted() -> bool:
    """Whether `trusting_code` holds."""
    return _trusted.get()
