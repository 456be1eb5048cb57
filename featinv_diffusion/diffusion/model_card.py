"""The model card of a pipeline folder: metadata of the Hub, how to use it, how it was made."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from featinv_diffusion import __version__
from featinv_diffusion.files import write_text

TAGS = ["feature-inversion", "interpretability", "controlnet", "featinv"]

TEMPLATE = """\
# {title}

Turns feature maps of a frozen vision model back into images: a ControlNet on a latent
text-to-image model, conditioned on the map. Many images share one map; each seed gives another.

| | |
|---|---|
| Features | {features} |
| Images | {pixels} × {pixels} pixels |
| Sampling | {steps} steps of {scheduler}, guidance scale {scale} ({guidance}) |
| Prompt | {prompt} |

## Use

With diffusers, transformers and timm alone; the folder carries its code:

```python
import torch
from diffusers import DiffusionPipeline

folder = {folder!r}  # this folder, or the name of the repository it was pushed to
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
{features_code}
images = pipe(
    features=features, num_images_per_prompt=4, generator=torch.Generator().manual_seed(0)
).images
```

Where the package featinv-diffusion is installed, no code of the folder has to be trusted:

```python
from featinv_diffusion.diffusion.hub import load_pipeline

pipe = load_pipeline(folder)
```

## How it was made

```
{command}
```

Versions: {versions}.
{notes}"""


@dataclass(frozen=True)
class CardInfo:
    """What a model card says beyond what the pipeline knows about itself.

    Args:
        command: the command that made the folder.
        license: identifier of the Hub; `other` where it is that of the base models.
        base_models: Hub names of the models this one was made of.
        notes: further sections, as Markdown.
    """

    command: str
    license: str = "other"
    base_models: list[str] = field(default_factory=list)
    notes: str = ""


def write_model_card(folder: Path, pipeline: Any, info: CardInfo, title: str | None = None) -> None:
    """Writes `README.md` into a folder that holds, or is part of, the saved pipeline."""
    write_text(folder / "README.md", str(make_model_card(pipeline, info, title or folder.name)))


def read_card_info(folder: Path, command: str) -> CardInfo:
    """Returns license and base models that the card of a folder declares, where it has one."""
    path = folder / "README.md"
    if not path.is_file():
        return CardInfo(command)
    data: Any = ModelCard.load(path, ignore_metadata_errors=True).data
    models = data.base_model or []
    models = [models] if isinstance(models, str) else list(models)
    return CardInfo(command, license=str(data.license or "other"), base_models=models)


def make_model_card(pipeline: Any, info: CardInfo, title: str) -> ModelCard:
    data = ModelCardData(
        license=info.license,
        license_name="that-of-the-base-models" if info.license == "other" else None,
        library_name="diffusers",
        pipeline_tag="image-to-image",
        base_model=info.base_models or None,
        tags=TAGS,
    )
    body = TEMPLATE.format(**_facts(pipeline), title=title, folder=title, **_provenance(info))
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")


def _facts(pipeline: Any) -> dict[str, Any]:
    config, controlnet = pipeline.config, pipeline.controlnet.config
    spec = controlnet.get("feature_spec") or {}
    shape = f"{controlnet.feature_channels} channels"
    if spec:
        grid = "×".join(map(str, spec["grid"]))
        shape = f"{spec['channels']}×{grid}, layer `{spec['layer']}` of `{spec['backbone']}`"
    size = pipeline.unet.config.sample_size
    latent_size = size if isinstance(size, int) else size[0]
    has_backbone = pipeline.backbone is not None
    return {
        "features": shape + (", average-pooled" if controlnet.get("feature_pooled") else ""),
        "pixels": latent_size * pipeline.vae_scale_factor,
        "steps": config.default_num_inference_steps,
        "scheduler": type(pipeline.scheduler).__name__,
        "scale": config.default_guidance_scale,
        "guidance": config.default_guidance,
        "prompt": config.default_prompt,
        "features_code": (
            'features = pipe.encode_features("photo.jpg")'
            if has_backbone
            else "features = ...  # [b, c, h, w], of the backbone and layer above"
        ),
    }


def _provenance(info: CardInfo) -> dict[str, str]:
    versions = {"featinv-diffusion": __version__}
    versions |= {name: version(name) for name in ("torch", "diffusers", "transformers", "timm")}
    return {
        "command": info.command,
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "notes": f"\n{info.notes.strip()}\n" if info.notes else "",
    }
