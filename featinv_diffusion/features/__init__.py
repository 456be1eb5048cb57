"""Pure functions on feature maps."""

from featinv_diffusion.features.edits import permute_cells

__all__ = ["permute_cells"]
