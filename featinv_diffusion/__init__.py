"""Turn the feature maps of frozen vision models back into images."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featinv_diffusion.backbones import list_backbones, load_backbone, wrap_model
    from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
    from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
    from featinv_diffusion.diffusion.hub import load_pipeline
    from featinv_diffusion.errors import InputError
    from featinv_diffusion.inverters.diffusion import DiffusionInverter
    from featinv_diffusion.types import FeatureSpec

__version__ = "0.1.0"

# Imported at first use: `import featinv_diffusion` itself loads nothing heavy.
_MODULES = {
    "DiffusionInverter": "inverters.diffusion",
    "FeatInvPipeline": "diffusion.featinv_pipeline",
    "FeatureControlNet": "diffusion.featinv_controlnet",
    "FeatureSpec": "types",
    "InputError": "errors",
    "list_backbones": "backbones",
    "load_backbone": "backbones",
    "load_pipeline": "diffusion.hub",
    "wrap_model": "backbones",
}

__all__ = [
    "DiffusionInverter",
    "FeatInvPipeline",
    "FeatureControlNet",
    "FeatureSpec",
    "InputError",
    "__version__",
    "list_backbones",
    "load_backbone",
    "load_pipeline",
    "wrap_model",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
