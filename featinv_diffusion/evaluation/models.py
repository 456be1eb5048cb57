"""Loads what an evaluation needs: the inverter, other backbones, extractors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from featinv_diffusion.backbones import Backbone, list_backbones, load_backbone
from featinv_diffusion.diffusion.quiet import without_progress_bars
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.dataset import ImageSet
from featinv_diffusion.evaluation.distribution import CLASSIFIER, check_reference, load_extractors
from featinv_diffusion.evaluation.evaluator import Evaluator
from featinv_diffusion.evaluation.observers import OWN, Observers
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.metrics.perceptual import Lpips
from featinv_diffusion.sampling import BUNDLED, open_inverter


@dataclass(frozen=True, eq=False)
class Opened:
    """What is loaded.

    Args:
        settings: with nothing left to a default of the pipeline.
        labels_matched_by: `name`, `number`, or None where labels are not the backbone's classes.
    """

    evaluator: Evaluator
    settings: EvaluationSettings
    labels_matched_by: str | None


def open_evaluator(
    settings: EvaluationSettings,
    images: ImageSet,
    on_progress: Callable[[float], None] | None = None,
) -> Opened:
    """Loads all models.

    Raises:
        InputError: unknown names, weights that are not there, a device that is not there.
    """
    inverter, sampling = open_inverter(settings.sampling, on_progress)
    own = inverter.backbone
    assert own is not None
    resolved = replace(
        settings,
        pipeline=sampling.pipeline,
        backbone=sampling.backbone,
        layer=sampling.layer,
        steps=sampling.steps,
        scheduler=sampling.scheduler,
        guidance_scale=sampling.guidance_scale,
        guidance=sampling.guidance,
        device=sampling.device,
    )
    others = _load_others(resolved, own.device)
    matched_by, class_of_label = match_labels(images, own)
    lpips = Lpips(settings.lpips, settings.lpips_weights).to(own.device) if settings.lpips else None
    extractors = load_extractors(settings, own)
    check_reference(settings.reference, extractors)
    evaluator = Evaluator(
        inverter=inverter,
        observers=Observers({OWN: own, **others}, lpips),
        images=images,
        batch_size=settings.batch_size,
        seed=settings.seed,
        extractors=extractors,
        originals_for=[CLASSIFIER] if settings.reference else list(extractors),
        class_of_label=class_of_label,
    )
    return Opened(evaluator, resolved, matched_by)


def match_labels(images: ImageSet, backbone: Backbone) -> tuple[str | None, list[int] | None]:
    """Returns how labels are matched with the backbone's classes, and the class of each label.

    By name, where the backbone has a class of every name; else by number, where there are as many
    of both or the data have no names.
    """
    if images.labels is None or not backbone.has_head:
        return None, None
    names, known = images.class_names, backbone.labels
    if names and known:
        number = {name.casefold(): i for i, name in enumerate(known)}
        found = [number.get(name.casefold()) for name in names]
        matched = [i for i in found if i is not None]
        if len(matched) == len(names):
            return "name", matched
    n_labels = len(names) if names else max(images.labels) + 1
    fits = known is None or n_labels == len(known) or (not names and n_labels < len(known))
    return ("number", list(range(n_labels))) if fits else (None, None)


def _load_others(settings: EvaluationSettings, device: torch.device) -> dict[str, Backbone]:
    others: dict[str, Backbone] = {}
    for name in settings.evaluated_by:
        with without_progress_bars():
            others[name] = load_backbone(_full_name(name, settings.pipeline)).to(device)
        if others[name].input_size[0] != others[name].input_size[1]:
            raise InputError(
                f"A backbone that evaluates must read squares, but {name!r} reads "
                f"{'×'.join(map(str, others[name].input_size))} pixels."
            )
    return others


def _full_name(name: str, pipeline: str | None) -> str:
    """Beside a bundled pipeline, a short name means the bundled backbone, as in `--backbone`."""
    bundled = BUNDLED + name
    is_bundled = (pipeline or "").startswith(BUNDLED) and bundled in list_backbones()
    return bundled if is_bundled else name
