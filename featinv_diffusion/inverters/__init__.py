"""Inverters: features → images."""

from featinv_diffusion.inverters.base import Generators, Inverter, LatentInverter
from featinv_diffusion.inverters.diffusion import DiffusionInverter

__all__ = ["DiffusionInverter", "Generators", "Inverter", "LatentInverter"]
