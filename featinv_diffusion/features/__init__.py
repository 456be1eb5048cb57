"""Pure functions on feature maps."""

from featinv_diffusion.features.edits import (
    FeatureEdit,
    in_sequence,
    interpolate,
    mix,
    paste,
    permute_cells,
    scale_part,
)
from featinv_diffusion.features.masks import box_mask, picture_mask

__all__ = [
    "FeatureEdit",
    "box_mask",
    "in_sequence",
    "interpolate",
    "mix",
    "paste",
    "permute_cells",
    "picture_mask",
    "scale_part",
]
