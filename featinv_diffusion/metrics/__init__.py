"""Metrics: functions on features, class scores and images."""

from featinv_diffusion.metrics.features import feature_cosine, shuffled_cosine, top_k_match

__all__ = ["feature_cosine", "shuffled_cosine", "top_k_match"]
