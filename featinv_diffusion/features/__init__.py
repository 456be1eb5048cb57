"""Pure functions on feature maps."""

from featinv_diffusion.features.edits import (
    FeatureEdit,
    box_mask,
    in_sequence,
    interpolate,
    mix,
    paste,
    permute_cells,
    picture_mask,
    scale_part,
)

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
