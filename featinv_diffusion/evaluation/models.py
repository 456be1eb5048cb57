"""What is loaded for an evaluation beside the inverter: other backbones, extractors, baselines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from featinv_diffusion.backbones import Backbone, load_backbone, same_backbone
from featinv_diffusion.backbones.base import LAST, weights_sha256, without_progress_bars
from featinv_diffusion.data.selection import Item, select_items
from featinv_diffusion.data.sets import ImageSet, open_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.evaluation.baselines import Optimise, fit_baselines
from featinv_diffusion.evaluation.evaluator import Evaluator
from featinv_diffusion.evaluation.labels import match_labels
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.evaluation.storage import CLASSIFIER, check_references, load_extractors
from featinv_diffusion.evaluation.views import OWN
from featinv_diffusion.inverters.base import Inverter, LatentInverter
from featinv_diffusion.inverters.optimise import STEPS
from featinv_diffusion.metrics.perceptual import Lpips
from featinv_diffusion.runs.record import count
from featinv_diffusion.runs.second_eye import second_eye_of
from featinv_diffusion.runs.units import describe_inverter


@dataclass(frozen=True, eq=False)
class Opened:
    """What is loaded.

    Args:
        settings: with the other backbones that are left.
        labels_matched_by: `name`, `number`, or None where labels are not the backbone's classes.
        weights: digests of the weights and what else decides samples; see `describe_inverter`.
        notes: what a user may not expect, a sentence each.
        training: images for the baselines; None without them.
    """

    evaluator: Evaluator
    settings: EvaluationSettings
    labels_matched_by: str | None
    weights: dict[str, Any]
    notes: tuple[str, ...] = ()
    training: ImageSet | None = None

    def ready(self, items: Sequence[Item], progress: bool = False) -> Evaluator:
        """Returns the evaluator with what must be known before the first unit.

        That are the mean maps of the images and the baselines; each process finds the same.

        Args:
            items: all images of the run.

        Raises:
            InputError: too few training images.
        """
        evaluator = self.evaluator
        ready = replace(evaluator, natural=evaluator.measure_natural(items))
        if (n := min(self.settings.n_optimised_images, len(items))) > 0:
            chosen = frozenset(items[i * len(items) // n].id for i in range(n))
            optimiser = Optimise.of(evaluator.inverter, evaluator.image_size)
            ready = replace(ready, optimiser=optimiser, optimised=chosen)
        if self.training is None or OWN not in ready.natural:
            return ready
        baselines = fit_baselines(
            evaluator.inverter,
            self.training,
            ready.natural[OWN],
            n_images=self.settings.n_baseline_images,
            image_size=evaluator.image_size,
            batch_size=evaluator.batch_size,
            progress=progress,
        )
        return replace(ready, baselines=baselines)

    def gallery(self, items: Sequence[Item]) -> Iterator[tuple[Item, Tensor]]:
        """Yields the next images of the selection with the vectors of their maps."""
        evaluator, settings = self.evaluator, self.settings
        alone = replace(evaluator, backbones={OWN: evaluator.own})
        chosen = replace(settings.selected, n_images=None, n_null_images=0)
        drawn = select_items(evaluator.images, chosen, settings.seed)
        more = drawn[len(items) : len(items) + settings.n_gallery_images]
        if more and (natural := alone.measure_natural(items)):
            yield from replace(alone, natural=natural).vectors_of(more)

    def cost(self, items: Sequence[Item]) -> str:
        """Says in a sentence or two what each part of the evaluation costs."""
        n_nulls, settings = sum(item.has_null for item in items), self.settings
        words = [f"{count(len(items), 'sample')} of the images"]
        if n_nulls:
            words.append(f"{n_nulls} more for the null of permuted cells")
            if isinstance(self.evaluator.inverter, LatentInverter):
                words.append(f"{n_nulls} more, which need no ControlNet, for the prior alone")
        text = f"To make: {', '.join(words)}."
        if n_nulls:
            text += " --n-null-images 0 leaves the nulls out."
        if self.training is not None:
            n = min(settings.n_baseline_images, len(self.training))
            text += f" Baselines: {count(n, 'training image')} to encode, and no samples."
        if settings.n_optimised_images:
            n = min(settings.n_optimised_images, len(items))
            text += f" Without training: {count(n, 'image')} by {STEPS} gradient steps."
        return text


def open_evaluator(inverter: Inverter, images: ImageSet, settings: EvaluationSettings) -> Opened:
    """Loads all models beside the inverter.

    Raises:
        InputError: unknown names, or weights that are not there.
    """
    own = inverter.require_backbone()
    settings, notes = _without_own(settings, own)
    if inverter.is_optimised and images.maps is None and not settings.evaluated_by:
        settings = replace(settings, evaluated_by=(second_eye_of(own.name),))
    if images.maps is not None:
        inverter.spec.check_features(images.maps)
        _check_no_pictures_needed(settings)
    others = _load_others(settings, own.device)
    matched_by, class_of_label = match_labels(images, own)
    lpips = Lpips(settings.lpips, settings.lpips_weights).to(own.device) if settings.lpips else None
    extractors = load_extractors(settings, own) if images.maps is None else {}
    check_references(settings.reference, extractors)
    training = _open_training(settings, images)
    if settings.n_optimised_images:
        own.check_gradient()
    evaluator = Evaluator(
        inverter=inverter,
        backbones={OWN: own, **others},
        images=images,
        batch_size=settings.sampling.batch_size,
        seed=settings.seed,
        lpips=lpips,
        extractors=extractors,
        class_of_label=class_of_label,
    )
    evaluators: dict[str, nn.Module] = {name: other.model for name, other in others.items()}
    evaluators |= {name: e for name, e in extractors.items() if name != CLASSIFIER}
    evaluators |= {} if lpips is None else {"lpips": lpips}
    digests = {name: weights_sha256({"": model}) for name, model in evaluators.items()}
    weights = {**describe_inverter(inverter, own), "evaluators_sha256": digests}
    if training is not None:
        weights["baselines_fingerprint"] = training.fingerprint
    return Opened(evaluator, settings, matched_by, weights, notes, training)


def _open_training(settings: EvaluationSettings, images: ImageSet) -> ImageSet | None:
    if settings.baselines_from is None:
        return None
    training = open_images(settings.baselines_from, "train", settings.classes)
    if training.fingerprint and training.fingerprint == images.fingerprint:
        raise InputError(
            "--baselines-from must hold other images than those that are evaluated, but "
            f"{settings.baselines_from} holds these. Name the images that the models were "
            "trained on."
        )
    return training


def _check_no_pictures_needed(settings: EvaluationSettings) -> None:
    """Raises `InputError` where a figure is asked for that only pictures can give."""
    for name in ("evaluated_by", "lpips", "fid", "fd_dinov2"):
        if getattr(settings, name):
            raise InputError(
                f"--{name.replace('_', '-')} compares with pictures, but {settings.data} holds "
                "feature maps. Leave it out, or give the pictures that they come from."
            )


def _without_own(
    settings: EvaluationSettings, own: Backbone
) -> tuple[EvaluationSettings, tuple[str, ...]]:
    """Leaves out the backbone that looks anyway; at an earlier layer it is another one."""
    if own.spec.layer != LAST:
        return settings, ()

    left_out = [name for name in settings.evaluated_by if same_backbone(name, own.name)]
    others = tuple(name for name in settings.evaluated_by if name not in left_out)
    notes = tuple(
        f"{name} is the backbone that is inverted and is left out of those that evaluate."
        for name in left_out
    )
    return replace(settings, evaluated_by=others), notes


def _load_others(settings: EvaluationSettings, device: torch.device) -> dict[str, Backbone]:
    others: dict[str, Backbone] = {}
    for name in settings.evaluated_by:
        with without_progress_bars():
            others[name] = load_backbone(name).to(device)
        if others[name].input_size[0] != others[name].input_size[1]:
            raise InputError(
                f"A backbone that evaluates must read squares, but {name!r} reads "
                f"{'×'.join(map(str, others[name].input_size))} pixels."
            )
    return others
