"""Reading ViT tokens without an inverter: projection on the class embedding (Vilas et al. 2023)."""

from featinv_diffusion.class_embedding.ablations import read_ablated, read_tokens_alone
from featinv_diffusion.class_embedding.anatomy import Anatomy, make_random, read_anatomy
from featinv_diffusion.class_embedding.perturbation import order_by, removal_curve
from featinv_diffusion.class_embedding.reading import Reading, concatenate, read_images
from featinv_diffusion.class_embedding.recording import Trace, record
from featinv_diffusion.class_embedding.relevance import attention_rollout_relevance, relevance_of

__all__ = [
    "Anatomy",
    "Reading",
    "Trace",
    "attention_rollout_relevance",
    "concatenate",
    "make_random",
    "order_by",
    "read_ablated",
    "read_anatomy",
    "read_images",
    "read_tokens_alone",
    "record",
    "relevance_of",
    "removal_curve",
]
