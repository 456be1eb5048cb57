"""Inverters: features → images."""

from featinv_diffusion.inverters.base import Generators, Inverter, LatentInverter
from featinv_diffusion.inverters.chain import Chain, MapChain
from featinv_diffusion.inverters.diffusion import DiffusionInverter
from featinv_diffusion.inverters.modular import InverseSet, ModularInverter, load_modular
from featinv_diffusion.inverters.reconstructor import (
    Reconstructor,
    ReconstructorInverter,
    load_reconstructor,
)

__all__ = [
    "Chain",
    "DiffusionInverter",
    "Generators",
    "InverseSet",
    "Inverter",
    "LatentInverter",
    "MapChain",
    "ModularInverter",
    "Reconstructor",
    "ReconstructorInverter",
    "load_modular",
    "load_reconstructor",
]
