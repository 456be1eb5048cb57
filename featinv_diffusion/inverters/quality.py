"""Presets of how much a diffusion pipeline spends on a picture: `--quality`.

- `draft`: 2 steps, to look at many pictures.
- `standard`, the default: the pipeline's own steps and no refinement. A sample of the conditional
  model, whose agreement with the features is evidence.
- `best`: the same, refined where and by as many steps as an outside eye preferred for this
  pipeline. A pipeline for which no other backbone has judged is not refined.
- `published`: the sampler of the paper, 50 steps of DDIM with guidance by the prompt.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.inverters.diffusion import DiffusionInverter
from featinv_diffusion.settings import SampleSettings

STANDARD = "standard"
PRESETS: dict[str, dict[str, Any]] = {
    "draft": {"steps": 2},
    STANDARD: {},
    "best": {},
    "published": {"steps": 50, "scheduler": "ddim", "guidance": "text", "guidance_scale": 1.75},
}


def with_quality(settings: SampleSettings, pipeline: FeatInvPipeline) -> SampleSettings:
    """Returns settings with the values of their preset where none is set."""
    quality = settings.quality or STANDARD
    preset = dict(PRESETS[quality])
    best = pipeline.config["best_refine"], pipeline.config["best_refine_at"]
    preset["refine"], preset["refine_at"] = best if quality == "best" else (0, "end")
    unset = {name: value for name, value in preset.items() if getattr(settings, name) is None}
    return replace(settings, quality=quality, **unset)


def other_qualities(inverter: DiffusionInverter) -> list[DiffusionInverter]:
    """Returns draft and best of a standard inverter, where they differ; they share its weights."""
    own = inverter.num_inference_steps
    draft, best = (PRESETS["draft"]["steps"], 0), (own, inverter.pipeline.config["best_refine"])
    best_at = inverter.pipeline.config["best_refine_at"]
    return [
        DiffusionInverter(
            inverter.pipeline,
            backbone=inverter.backbone,
            num_inference_steps=n_steps,
            guidance_scale=inverter.guidance_scale,
            guidance=inverter.guidance,
            strength=inverter.strength,
            refine=refine,
            refine_at=best_at if refine else "end",
        )
        for n_steps, refine in (draft, best)
        if (n_steps, refine) != (own, inverter.refine)
    ]
