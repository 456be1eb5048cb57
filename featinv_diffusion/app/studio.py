"""From a state to its pictures: opened inverters, features and concepts, each kept for the next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, TypeVar

import msgspec
from torch import Tensor

from featinv_diffusion.app.edits import (
    Edit,
    Materials,
    Scale,
    apply_all,
    concepts_of,
    needs_second,
)
from featinv_diffusion.app.members import (
    Member,
    at_quality,
    find_member,
    has_places,
    list_members,
    open_member,
)
from featinv_diffusion.app.pictures import Pictures, Stored
from featinv_diffusion.app.state import State
from featinv_diffusion.concepts import ConceptDictionary, load_concepts
from featinv_diffusion.concepts.sae_files import BUNDLED
from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics.certainty import Certainty
from featinv_diffusion.runs.certainty import CertaintyJudge, open_certainty
from featinv_diffusion.runs.progress import Advance
from featinv_diffusion.runs.samples import Samples, sample
from featinv_diffusion.runs.sampling import Job, cell_cosine, encode_jobs
from featinv_diffusion.runs.second_eye import SecondEye, second_eye_line
from featinv_diffusion.types import FeatureMaps, FeatureSpec

T = TypeVar("T")
MAX_OPEN, MAX_MAPS, MAX_RENDERED = 8, 64, 24
N_CONCEPTS = 8


class Kept(OrderedDict[Any, T]):
    """The last values that were made, by key."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def get_or_make(self, key: Any, make: Callable[[], T]) -> T:
        """Returns what is kept under a key, or makes it."""
        if key not in self:
            self[key] = make()
            while len(self) > self.most:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]


@dataclass(frozen=True, eq=False)
class Rendered:
    """The pictures of one inverter.

    Args:
        picture, second: the picture files that the maps are of.
        edits: those that the inverter's map can take.
        first: the picture's map, `[1, c, h, w]`.
        maps: the map after the edits, which was inverted.
        certainty: what the features determine; None for drafts and where it is not calibrated.
        second_eye: what another backbone sees, a sentence; None where maps are edited or drafts.
        notes: sentences about edits that were left out.
        spec: the features.
        class_name: the class that the model gives the picture; None without a head.
        seconds: that sampling took.
    """

    member: Member
    state: State
    picture: Stored
    second: Stored | None
    edits: list[Edit]
    first: FeatureMaps
    maps: FeatureMaps
    samples: Samples
    certainty: Certainty | None
    second_eye: str | None
    notes: list[str]
    seconds: float
    spec: FeatureSpec
    class_name: str | None

    @property
    def cell_cosine(self) -> Tensor:
        """How well each cell comes back, the mean over samples `[h, w]`."""
        seen = self.samples.features[0]
        return cell_cosine(self.maps.as_subclass(Tensor), seen).mean(dim=0)


class Studio:
    """What a server or a widget makes pictures with; one thread at a time.

    Args:
        pictures: those that states name.
        pipelines: the inverters to offer; none are the bundled ones.
        concepts: files of concepts or SAEs to offer beside the bundled ones.
        device: of all models.

    Raises:
        InputError: a file of concepts that cannot be read or does not say what it is of.
    """

    def __init__(
        self,
        pictures: Pictures,
        pipelines: Sequence[str] = (),
        concepts: Sequence[str] = (),
        device: str = "auto",
    ):
        self.pictures, self.device = pictures, device
        self.members = list_members(pipelines)
        self.concepts = {name: _open_concepts(name) for name in (*BUNDLED, *concepts)}
        self._inverters: Kept[Inverter] = Kept(MAX_OPEN)
        self._maps: Kept[FeatureMaps] = Kept(MAX_MAPS)
        self._eyes: Kept[SecondEye] = Kept(2)
        self._judges: Kept[CertaintyJudge] = Kept(MAX_OPEN)
        self._rendered: Kept[Rendered] = Kept(MAX_RENDERED)

    @property
    def default(self) -> Member:
        """The inverter that the page starts with."""
        return next((one for one in self.members if one.layer == "last"), self.members[0])

    def open(self, name: str, quality: str = "standard") -> Inverter:
        """Opens an inverter that is offered, and shares its weights among qualities.

        Raises:
            InputError: it is not offered, or cannot be opened.
        """
        member = find_member(name, self.members)
        base = self._inverters.get_or_make(name, lambda: open_member(member, self.device))
        return at_quality(base, quality)

    def encode(self, key: str, name: str) -> FeatureMaps:
        """Returns the map of a picture, as every command takes it."""

        def make() -> FeatureMaps:
            stored = self.pictures.get(key)
            backbone = self.open(name).require_backbone()
            job = Job(stored.name, ("",), (0,), stored.decode)
            return encode_jobs(backbone, [job])

        self.pictures.get(key)  # also one that was encoded must still be here
        return self._maps.get_or_make((key, name), make)

    def load_concepts(self, name: str) -> ConceptDictionary:
        """Returns a dictionary that is offered.

        Raises:
            InputError: it is not.
        """
        if name not in self.concepts:
            hint = choices_hint(name, list(self.concepts))
            raise InputError(f"The page was started without the concepts {name!r}; {hint}")
        return self.concepts[name]

    def find_concepts(self, key: str, name: str, n: int = N_CONCEPTS) -> list[dict[str, Any]]:
        """Returns `find_strongest` of each dictionary that fits a picture's map."""
        maps, spec = self.encode(key, name), self.open(name).spec
        return [
            {"concepts": concepts, "concept": i, "share": share, "cells": cells.tolist()}
            for concepts, dictionary in self.concepts.items()
            if dictionary.spec == spec
            for i, share, cells in find_strongest(maps, dictionary, n)
        ]

    def edit(self, state: State, name: str) -> tuple[FeatureMaps, list[Edit], list[str]]:
        """Returns the edited map, the edits that were made, and notes about others."""
        first, inverter = self.encode(state.picture, name), self.open(name)
        edits, notes = self._fitting(state.edits, inverter)
        if not edits:
            return first, edits, notes
        # The layout of maps decides the last bits of sums over their channels and cells.
        plain = first.as_subclass(Tensor).contiguous()
        second = None
        if needs_second(edits):
            assert state.second is not None
            second = self.encode(state.second, name).as_subclass(Tensor).contiguous()
        edited = apply_all(edits, Materials(plain, second, self.load_concepts))
        sources = [replace(source, location=None) for source in first.sources]
        return FeatureMaps.of(edited.contiguous(), sources), edits, notes

    def render(self, state: State, name: str, advance: Advance = lambda n: None) -> Rendered:
        """Makes the pictures of one inverter of a state, or returns them where they are kept.

        Args:
            advance: called with the share of all samples that is done; it may raise to stop.

        Raises:
            InputError: pictures, inverters or concepts that are not here, or edits that do not fit.
        """
        inverter = self.open(name, state.quality)
        n_samples = 1 if inverter.is_deterministic else state.n_samples
        quality = None if inverter.is_deterministic else state.quality
        wanted = replace_struct(state, members=[name], n_samples=n_samples)
        key = (wanted.to_link(), quality)
        return self._rendered.get_or_make(key, lambda: self._render(wanted, inverter, advance))

    def _render(self, state: State, inverter: Inverter, advance: Advance) -> Rendered:
        (name,) = state.members
        maps, edits, notes = self.edit(state, name)
        inverter.on_progress = lambda n: advance(n / state.n_samples)
        start = perf_counter()
        try:
            samples = sample(inverter, maps, n_samples=state.n_samples, seed=state.seed)
        finally:
            inverter.on_progress = None
        seconds = perf_counter() - start
        is_final = not edits and state.quality != "draft"
        return Rendered(
            member=find_member(name, self.members),
            state=state,
            picture=self.pictures.get(state.picture),
            second=self.pictures.get(state.second)
            if state.second and needs_second(edits)
            else None,
            edits=edits,
            first=self.encode(state.picture, name),
            maps=maps,
            samples=samples,
            certainty=self._judge(state, inverter, samples),
            second_eye=self._look(name, inverter, samples) if is_final else None,
            notes=notes,
            seconds=seconds,
            spec=inverter.spec,
            class_name=_class_of(inverter, maps),
        )

    def _judge(self, state: State, inverter: Inverter, samples: Samples) -> Certainty | None:
        """Returns what the features determine of the pictures, where that is calibrated."""
        if state.quality == "draft":
            return None
        key = (*state.members, state.quality)
        judge = self._judges.get_or_make(key, lambda: open_certainty(inverter))
        return judge.judge(samples.images[0], samples.features[0])

    def _look(self, name: str, inverter: Inverter, samples: Samples) -> str | None:
        """Returns what a backbone sees in the samples that took no part in them."""
        if samples.second_eye is not None:
            return second_eye_line(samples.second_eye)
        eye = self._eyes.get_or_make(name, lambda: SecondEye(inverter.require_backbone()))
        eye.take()
        eye.look(samples.reconstructions[0])
        seen = eye.content()
        if seen is None:
            return None
        second, own = seen["second"], seen["own"]
        return (
            f"Second eye: {second['backbone']}, which took no part, sees cosine "
            f"{second['cosine']:.2f} (another image {second['other_image']:.2f}); "
            f"{own['backbone']}, whose features these are, sees cosine {own['cosine']:.2f} "
            f"(another image {own['other_image']:.2f})."
        )

    def _fitting(self, edits: Sequence[Edit], inverter: Inverter) -> tuple[list[Edit], list[str]]:
        kept: list[Edit] = []
        notes: list[str] = []
        for edit in edits:
            others = [c for c in concepts_of([edit]) if self.load_concepts(c).spec != inverter.spec]
            if others:
                notes.append(f"{others[0]} is of other features, so these pictures are without it.")
            elif not isinstance(edit, Scale) and not has_places(inverter.spec):
                notes.append(
                    "These features are a sequence without places, so no cells were painted."
                )
            else:
                kept.append(edit)
        return kept, list(dict.fromkeys(notes))


def find_strongest(
    maps: FeatureMaps, dictionary: ConceptDictionary, n: int = N_CONCEPTS
) -> list[tuple[int, float, Tensor]]:
    """Returns the concepts that hold most of a map.

    Returns:
        The number of each, its part's share of the map's energy, and the length of its part by
        cell `[h, w]`, the greatest of which is 1.
    """
    features = maps.as_subclass(Tensor)
    lengths = dictionary.activations(features, "none")[0]
    shares = lengths.square().sum(dim=(1, 2)) / features.square().sum().clamp_min(1e-12)
    return [
        (i, shares[i].item(), lengths[i] / lengths[i].max().clamp_min(1e-12))
        for i in shares.argsort(descending=True, stable=True)[:n].tolist()
    ]


def replace_struct(state: State, **values: Any) -> State:
    """Returns a state with other values."""
    return msgspec.structs.replace(state, **values)


def _class_of(inverter: Inverter, maps: FeatureMaps) -> str | None:
    labels, logits = inverter.require_backbone().labels, maps.sources[0].logits
    return None if labels is None or logits is None else labels[int(logits.argmax())]


def _open_concepts(name: str) -> ConceptDictionary:
    dictionary = load_concepts(name)
    if dictionary.spec is None:
        raise InputError(
            f"{name} must say which features its concepts are of, but does not. Save it with "
            "`featinv concepts --sae FILE`, which says so."
        )
    return dictionary
