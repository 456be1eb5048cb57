"""Loads what an evaluation needs: the inverter, other backbones, extractors."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from featinv_diffusion.backbones import SHORT_NAMES, Backbone, list_backbones, load_backbone
from featinv_diffusion.backbones.base import LAST
from featinv_diffusion.diffusion.quiet import without_progress_bars
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.dataset import ImageSet
from featinv_diffusion.evaluation.distribution import (
    CLASSIFIER,
    check_references,
    load_extractors,
)
from featinv_diffusion.evaluation.evaluator import Evaluator
from featinv_diffusion.evaluation.fingerprints import describe_inverter, weights_sha256
from featinv_diffusion.evaluation.observers import OWN, Observers
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.metrics.perceptual import Lpips
from featinv_diffusion.sampling import BUNDLED, open_chosen

_NUMBER_LIKE = re.compile(r"n\d{8}|((label|class)[ _-]?)?\d+")
"""Names of classes that say no more than a number: WordNet ids, `LABEL_3`, `class 3`, `3`."""


@dataclass(frozen=True, eq=False)
class Opened:
    """What is loaded.

    Args:
        settings: with nothing left to a default of the pipeline.
        labels_matched_by: `name`, `number`, or None where labels are not the backbone's classes.
        weights: digests of the weights and what else decides samples; see `describe_inverter`.
        notes: what a user may not expect, a sentence each.
    """

    evaluator: Evaluator
    settings: EvaluationSettings
    labels_matched_by: str | None
    weights: dict[str, Any]
    notes: tuple[str, ...] = ()


def open_evaluator(
    settings: EvaluationSettings,
    images: ImageSet,
    on_progress: Callable[[float], None] | None = None,
) -> Opened:
    """Loads all models.

    Raises:
        InputError: unknown names, weights that are not there, a device that is not there.
    """
    inverter, sampling = open_chosen(settings.sampling, on_progress)
    own = inverter.backbone
    assert own is not None
    resolved = replace(
        settings,
        inverter=sampling.inverter,
        stage=sampling.stage,
        pipeline=sampling.pipeline,
        backbone=sampling.backbone,
        layer=sampling.layer,
        steps=sampling.steps,
        scheduler=sampling.scheduler,
        guidance_scale=sampling.guidance_scale,
        guidance=sampling.guidance,
        device=sampling.device,
    )
    resolved, notes = _without_own(resolved, own)
    others = _load_others(resolved, own.device)
    matched_by, class_of_label = match_labels(images, own)
    lpips = Lpips(settings.lpips, settings.lpips_weights).to(own.device) if settings.lpips else None
    extractors = load_extractors(settings, own)
    check_references(settings.reference, extractors)
    evaluator = Evaluator(
        inverter=inverter,
        observers=Observers({OWN: own, **others}, lpips),
        images=images,
        batch_size=settings.batch_size,
        seed=settings.seed,
        extractors=extractors,
        class_of_label=class_of_label,
    )
    evaluators: dict[str, nn.Module] = {name: other.model for name, other in others.items()}
    evaluators |= {name: e for name, e in extractors.items() if name != CLASSIFIER}
    evaluators |= {} if lpips is None else {"lpips": lpips}
    digests = {name: weights_sha256({"": model}) for name, model in evaluators.items()}
    weights = {**describe_inverter(inverter, own), "evaluators_sha256": digests}
    return Opened(evaluator, resolved, matched_by, weights, notes)


def match_labels(images: ImageSet, backbone: Backbone) -> tuple[str | None, list[int] | None]:
    """Returns how labels are matched with the backbone's classes, and the class of each label.

    By name, where each name is that of one class. By number, where there are as many of both and
    either the names are equal in their order (two classes may share one) or one side has no names
    that say more than a number; equally many other names are no reason to think that they
    correspond.
    """
    if images.labels is None or not backbone.has_head:
        return None, None
    names, known = (_fold_case(n) for n in (images.class_names, backbone.labels))
    n_labels = len(names) if names else max(images.labels) + 1
    if names and known and len(set(names)) == len(names):
        found = [i for name in names for i, other in enumerate(known) if other == name]
        if [known[i] for i in found] == names:
            return "name", found
    by_number = list(range(n_labels))
    if n_labels != (len(known) if known else _count_classes(backbone)):
        return None, None
    says_nothing = any(not n or all(map(_NUMBER_LIKE.fullmatch, n)) for n in (names, known))
    return ("number", by_number) if says_nothing or names == known else (None, None)


def _fold_case(names: Sequence[str] | None) -> list[str] | None:
    return None if names is None else [name.casefold() for name in names]


@torch.no_grad()
def _count_classes(backbone: Backbone) -> int:
    blank = torch.zeros(1, 3, *backbone.input_size, device=backbone.device)
    return backbone.classify(blank).shape[1]


def _without_own(
    settings: EvaluationSettings, own: Backbone
) -> tuple[EvaluationSettings, tuple[str, ...]]:
    """Leaves out the backbone that is looked through anyway; at an earlier layer it is another."""
    if own.spec.layer != LAST:
        return settings, ()

    def identify(name: str) -> str:
        full = _full_name(name, settings.pipeline).removeprefix("timm/")
        return SHORT_NAMES.get(full, full).removeprefix("timm/")

    is_own = [identify(name) == identify(own.name) for name in settings.evaluated_by]
    left_out = [name for name, same in zip(settings.evaluated_by, is_own, strict=True) if same]
    others = tuple(n for n, same in zip(settings.evaluated_by, is_own, strict=True) if not same)
    notes = tuple(
        f"{name} is the backbone that is inverted and is left out of those that evaluate."
        for name in left_out
    )
    return replace(settings, evaluated_by=others), notes


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
