"""What encoders were trained for, by name: those of the reconstruction paper and the bundled ones.

Source: "Image Reconstruction as a Tool for Feature Analysis", tables 4 and 5.
"""

from __future__ import annotations

from featinv_diffusion.backbones.names import canonical_name

CONTRASTIVE, CAPTIONING, MASKED = "contrastive", "captioning", "masked modelling"
SEGMENTATION, ALIGNMENT, DISTILLATION = (
    "segmentation",
    "alignment to a language model",
    "distillation",
)
LABELS, DETECTION = "class labels", "detection"
OF_IMAGES = frozenset({MASKED, SEGMENTATION, DISTILLATION, DETECTION})
"""Objectives that look at places in images, beside those that compare them with texts or labels."""

OBJECTIVES: dict[str, tuple[str, ...]] = {
    "eva02_base_patch16_clip_224": (CONTRASTIVE, MASKED),
    "vit_base_patch16_clip_quickgelu_224": (CONTRASTIVE,),
    "vit_base_patch16_clip_224": (CONTRASTIVE,),
    "vit_base_patch16_siglip_224.webli": (CONTRASTIVE,),
    "vit_base_patch16_siglip_256.webli": (CONTRASTIVE,),
    "vit_base_patch16_siglip_384.webli": (CONTRASTIVE,),
    "vit_base_patch16_siglip_512.webli": (CONTRASTIVE,),
    "vit_base_patch16_siglip_224.v2_webli": (CONTRASTIVE, CAPTIONING, MASKED, DISTILLATION),
    "vit_base_patch16_siglip_256.v2_webli": (CONTRASTIVE, CAPTIONING, MASKED, DISTILLATION),
    "vit_base_patch16_siglip_384.v2_webli": (CONTRASTIVE, CAPTIONING, MASKED, DISTILLATION),
    "vit_base_patch16_siglip_512.v2_webli": (CONTRASTIVE, CAPTIONING, MASKED, DISTILLATION),
    "samvit_base_patch16": (SEGMENTATION,),
    "vit_base_patch14_dinov2": (MASKED, DISTILLATION),
    "vit_intern300m_patch14_448": (CONTRASTIVE, ALIGNMENT, DISTILLATION),
    "tiny/siglip": (CONTRASTIVE,),
    "tiny/siglip2": (CONTRASTIVE, MASKED, DISTILLATION),
    "tiny/convnext": (LABELS,),
    "tiny/resnet": (LABELS,),
    "tiny/swin": (LABELS,),
    "tiny/vit": (LABELS,),
    "tiny/detr": (DETECTION,),
}
"""By canonical name, or by timm's architecture where all its weights share them."""


def find_objectives(name: str) -> tuple[str, ...]:
    """Returns what an encoder was trained for; nothing where it is not known."""
    full = canonical_name(name)
    return OBJECTIVES.get(full, OBJECTIVES.get(full.partition(".")[0], ()))


def is_image_based(name: str) -> bool:
    """Whether an objective of the encoder looks at places in images."""
    return bool(OF_IMAGES & set(find_objectives(name)))
