"""Turn the feature maps of frozen vision models back into images.

    import featinv_diffusion as fi

    inverter = fi.load_inverter("tiny/convnext")
    features = inverter.encode(["a.jpg", "b.jpg"])  # [2, 256, 8, 8]
    fi.sample(inverter, features, n_samples=4).save("out")

`dir(featinv_diffusion)` lists what there is, and `help` of each says how to use it.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featinv_diffusion.app.widgets import ConceptSliders, MapPainter, paint, slider
    from featinv_diffusion.backbones import list_backbones, load_backbone, wrap_model, wrap_module
    from featinv_diffusion.backbones.base import Backbone
    from featinv_diffusion.class_embedding.study import TokenReading, read_tokens
    from featinv_diffusion.concepts import ConceptDictionary, SAEConcepts, load_concepts
    from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
    from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
    from featinv_diffusion.diffusion.hub import load_pipeline
    from featinv_diffusion.errors import InputError
    from featinv_diffusion.evaluation.run import Evaluation, evaluate
    from featinv_diffusion.features.operators import Operator
    from featinv_diffusion.inverters.base import Inverter
    from featinv_diffusion.inverters.diffusion import DiffusionInverter
    from featinv_diffusion.inverters.open import list_inverters, load_inverter
    from featinv_diffusion.metrics.certainty import Certainty
    from featinv_diffusion.runs.certainty import CertaintyCalibration, calibrate_certainty
    from featinv_diffusion.runs.samples import Samples, sample
    from featinv_diffusion.studies.composition import Composition, compose
    from featinv_diffusion.studies.concepts import FoundConcepts, find_concepts
    from featinv_diffusion.studies.differencing import compare_models
    from featinv_diffusion.studies.edit import Edited, edit
    from featinv_diffusion.studies.featinv_viz import ConceptViz, show_concept
    from featinv_diffusion.studies.interpolation import Interpolation, interpolate
    from featinv_diffusion.studies.operators import fit_operator
    from featinv_diffusion.studies.patching import Patching, patch_tokens
    from featinv_diffusion.studies.steerability import Steerability, steerability
    from featinv_diffusion.studies.variability import Variability, variability
    from featinv_diffusion.types import FeatureMaps, FeatureSpec

__version__ = "0.1.0"

SELDOM = 50_000
"""New objects after which garbage is looked for during imports; Python's own number is 700."""

# Imported at first use: `import featinv_diffusion` itself loads nothing heavy.
_MODULES = {
    "Backbone": "backbones.base",
    "Certainty": "metrics.certainty",
    "CertaintyCalibration": "runs.certainty",
    "Composition": "studies.composition",
    "ConceptDictionary": "concepts",
    "ConceptSliders": "app.widgets",
    "ConceptViz": "studies.featinv_viz",
    "DiffusionInverter": "inverters.diffusion",
    "Edited": "studies.edit",
    "Evaluation": "evaluation.run",
    "FeatInvPipeline": "diffusion.featinv_pipeline",
    "FeatureControlNet": "diffusion.featinv_controlnet",
    "FeatureMaps": "types",
    "FeatureSpec": "types",
    "FoundConcepts": "studies.concepts",
    "InputError": "errors",
    "Interpolation": "studies.interpolation",
    "Inverter": "inverters.base",
    "MapPainter": "app.widgets",
    "Operator": "features.operators",
    "SAEConcepts": "concepts",
    "Samples": "runs.samples",
    "Patching": "studies.patching",
    "Steerability": "studies.steerability",
    "TokenReading": "class_embedding.study",
    "Variability": "studies.variability",
    "calibrate_certainty": "runs.certainty",
    "compare_models": "studies.differencing",
    "compose": "studies.composition",
    "edit": "studies.edit",
    "evaluate": "evaluation.run",
    "find_concepts": "studies.concepts",
    "fit_operator": "studies.operators",
    "interpolate": "studies.interpolation",
    "list_backbones": "backbones",
    "list_inverters": "inverters.open",
    "load_backbone": "backbones",
    "load_concepts": "concepts",
    "load_inverter": "inverters.open",
    "load_pipeline": "diffusion.hub",
    "paint": "app.widgets",
    "patch_tokens": "studies.patching",
    "read_tokens": "class_embedding.study",
    "sample": "runs.samples",
    "show_concept": "studies.featinv_viz",
    "slider": "app.widgets",
    "steerability": "studies.steerability",
    "variability": "studies.variability",
    "wrap_model": "backbones",
    "wrap_module": "backbones",
}

__all__ = [
    "Backbone",
    "Certainty",
    "CertaintyCalibration",
    "Composition",
    "ConceptDictionary",
    "ConceptSliders",
    "ConceptViz",
    "DiffusionInverter",
    "Edited",
    "Evaluation",
    "FeatInvPipeline",
    "FeatureControlNet",
    "FeatureMaps",
    "FeatureSpec",
    "FoundConcepts",
    "InputError",
    "Interpolation",
    "Inverter",
    "MapPainter",
    "Operator",
    "Patching",
    "SAEConcepts",
    "Samples",
    "Steerability",
    "TokenReading",
    "Variability",
    "__version__",
    "calibrate_certainty",
    "compare_models",
    "compose",
    "edit",
    "evaluate",
    "find_concepts",
    "fit_operator",
    "interpolate",
    "list_backbones",
    "list_inverters",
    "load_backbone",
    "load_concepts",
    "load_inverter",
    "load_pipeline",
    "paint",
    "patch_tokens",
    "read_tokens",
    "sample",
    "show_concept",
    "slider",
    "steerability",
    "variability",
    "wrap_model",
    "wrap_module",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = f"{__name__}.{_MODULES[name]}"
    return getattr(sys.modules.get(module) or _import_quickly(module), name)


def _import_quickly(name: str) -> ModuleType:
    """Imports a module while garbage is collected seldom: what imports make stays for good."""
    normal = gc.get_threshold()
    if normal[0] == 0 or normal[0] >= SELDOM:
        return import_module(name)
    gc.set_threshold(SELDOM, *normal[1:])
    try:
        return import_module(name)
    finally:
        gc.set_threshold(*normal)


def __dir__() -> list[str]:
    return __all__
