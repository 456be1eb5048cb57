"""Inverters: features → images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from featinv_diffusion.inverters.base import Generators, Inverter, LatentInverter

if TYPE_CHECKING:
    from featinv_diffusion.inverters.diffusion import DiffusionInverter

__all__ = ["DiffusionInverter", "Generators", "Inverter", "LatentInverter"]


def __getattr__(name: str) -> Any:
    if name != "DiffusionInverter":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # With it comes diffusers, which features need not.
    from featinv_diffusion.inverters.diffusion import DiffusionInverter

    return DiffusionInverter
