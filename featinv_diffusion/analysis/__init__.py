"""Studies that need a backbone, and perhaps an inverter."""

from featinv_diffusion.analysis.composition import Composition, compose
from featinv_diffusion.analysis.featinv_viz import ConceptEffect, measure_concept
from featinv_diffusion.analysis.interpolation import Mixtures, sample_mixtures
from featinv_diffusion.analysis.sampling import Encoded, SampleBatch, encode_picture, sample_map
from featinv_diffusion.analysis.variability import Variability, measure_variability

__all__ = [
    "Composition",
    "ConceptEffect",
    "Encoded",
    "Mixtures",
    "SampleBatch",
    "Variability",
    "compose",
    "encode_picture",
    "measure_concept",
    "measure_variability",
    "sample_map",
    "sample_mixtures",
]
