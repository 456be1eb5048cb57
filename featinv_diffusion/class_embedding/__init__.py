"""Reading ViT tokens without an inverter: projection on the class embedding (Vilas et al. 2023)."""

from featinv_diffusion.class_embedding.anatomy import (
    Anatomy,
    Trace,
    make_random,
    read_anatomy,
    record,
)
from featinv_diffusion.class_embedding.reading import (
    Reading,
    attention_rollout_relevance,
    concatenate,
    read_images,
    relevance_of,
)
from featinv_diffusion.class_embedding.removal import order_by, removal_curve
from featinv_diffusion.class_embedding.study import read_ablated, read_tokens_alone

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
