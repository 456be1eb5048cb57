"""Frozen vision models under one interface."""

from featinv_diffusion.backbones.base import LAST, Backbone
from featinv_diffusion.backbones.loading import load_backbone, wrap_model
from featinv_diffusion.backbones.names import list_backbones, resolve_backbone, same_backbone

__all__ = [
    "LAST",
    "Backbone",
    "list_backbones",
    "load_backbone",
    "resolve_backbone",
    "same_backbone",
    "wrap_model",
]
