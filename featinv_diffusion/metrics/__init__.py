"""Metrics: functions on features, class scores, images and sets of images."""

from featinv_diffusion.metrics.distribution import (
    FeatureSample,
    FrechetDistance,
    KernelDistance,
    PrecisionRecall,
    PublishedMoments,
    frechet_distance,
    kernel_distance,
    precision_recall,
)
from featinv_diffusion.metrics.extractors import ClassifierFeatures, ImageFeatures
from featinv_diffusion.metrics.features import (
    feature_cosine,
    psnr,
    shuffled_cosine,
    ssim,
    top_k_match,
)
from featinv_diffusion.metrics.reference import Reference, load_reference
from featinv_diffusion.metrics.statistics import (
    FeatureMoments,
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_statistic,
)

__all__ = [
    "ClassifierFeatures",
    "FeatureMoments",
    "FeatureSample",
    "FrechetDistance",
    "ImageFeatures",
    "Interval",
    "KernelDistance",
    "PrecisionRecall",
    "PublishedMoments",
    "Reference",
    "bootstrap_difference",
    "bootstrap_mean",
    "bootstrap_statistic",
    "feature_cosine",
    "frechet_distance",
    "kernel_distance",
    "load_reference",
    "precision_recall",
    "psnr",
    "shuffled_cosine",
    "ssim",
    "top_k_match",
]
