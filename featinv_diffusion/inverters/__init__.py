"""Inverters: features → images."""

from featinv_diffusion.inverters.base import Generators, Inverter
from featinv_diffusion.inverters.diffusion import DiffusionInverter

__all__ = ["DiffusionInverter", "Generators", "Inverter"]
