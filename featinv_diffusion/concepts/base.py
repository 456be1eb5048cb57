"""`ConceptDictionary`: directions in feature space, in groups, and how features split over them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from featinv_diffusion import schema
from featinv_diffusion.backbones.names import read_spec
from featinv_diffusion.concepts.heads import PooledHead
from featinv_diffusion.errors import InputError, choices_hint, what_is_at
from featinv_diffusion.files import read_tensors, write_tensors
from featinv_diffusion.types import Features, FeatureSpec

# ---- Files of concepts and of directions ---------------------------------------------------------

FORMAT = "featinv-concepts/1"


def write_concepts(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Writes a file, whole or not at all.

    Raises:
        InputError: the disk refuses.
    """
    write_tensors(path, tensors, header, FORMAT)


def read_concepts(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads tensors and header.

    Raises:
        InputError: no such file, a damaged one, or one that holds something else.
    """
    if not path.is_file():
        raise InputError(
            f"There must be a file of concepts at {path}, but there is {what_is_at(path)}. Write "
            "one with featinv concepts."
        )
    return read_tensors(path, FORMAT, "Find the concepts again.")


def read_directions(path: str | Path) -> tuple[Tensor, Tensor | None]:
    """Reads a matrix of directions, and the offset where the file holds one.

    Args:
        path: `.npy` with one matrix `[k, c]`, or `.safetensors` with `directions` and perhaps
            `offset`, or with a single matrix of any name.

    Raises:
        InputError: no such file, another format, or several matrices of which none is named
            `directions`.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"There must be a file of directions at {path}, but there is {what_is_at(path)}."
        )
    tensors = _read_tensors(path)
    matrices = [name for name, tensor in tensors.items() if tensor.ndim == 2]
    name = "directions" if "directions" in matrices else matrices[0] if matrices else ""
    if name != "directions" and len(matrices) != 1:
        listed = ", ".join(f"{key} {list(tensors[key].shape)}" for key in sorted(tensors))
        raise InputError(
            f"{path} must hold a matrix named directions, or a single matrix, but it holds "
            f"{listed or 'nothing'}."
        )
    offset = tensors.get("offset")
    if tensors[name].is_complex():
        raise InputError(f"{path} must hold real numbers, but it holds complex ones.")
    return tensors[name].float(), None if offset is None else offset.float()


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".npy":
            return {"directions": torch.from_numpy(np.load(path, allow_pickle=False))}
        if path.suffix == ".safetensors":
            return load_file(path)
    except (EOFError, OSError, ValueError, TypeError, SafetensorError) as error:
        raise InputError(f"{path} must hold directions, but it cannot be read: {error}.") from error
    raise InputError(f"Directions must be a .npy or .safetensors file, got {path}.")


def spec_to_json(spec: FeatureSpec | None) -> dict[str, Any] | None:
    return None if spec is None else asdict(spec)


def spec_from_json(fields: Mapping[str, Any] | None) -> FeatureSpec | None:
    return None if fields is None else read_spec(fields)


# ---- Linear subspaces spanned by rows ------------------------------------------------------------

RANK_TOLERANCE = 1e-4
"""Singular values below this share of the largest count as zero: subspaces at an angle of less
than about 0.01° intersect. The rounding of float32 features lies two orders below."""


@dataclass(frozen=True)
class Decomposition:
    """How any vector splits over rows `directions` `[k, c]` and what they do not span.

    For rows B of rank r: `v = Bᵀ (encoder v) + complementᵀ (complement v)` for every v. Where rows
    depend on each other (k > r) the coefficients are those of least norm, so the identity holds
    for intersecting subspaces too. In float64.

    Args:
        encoder: `[k, c]`, the pseudo-inverse of Bᵀ.
        span: `[r, c]`, orthonormal rows that span the same as B.
        complement: `[c - r, c]`, orthonormal rows that span the rest.
    """

    encoder: Float[Tensor, "k c"]
    span: Float[Tensor, "r c"]
    complement: Float[Tensor, "rest c"]

    @property
    def rank(self) -> int:
        return len(self.span)


def decompose(directions: Float[Tensor, "k c"]) -> Decomposition:
    """Inverts rows of any number and rank; see `Decomposition`."""
    rows = directions.double()
    values, vectors = torch.linalg.eigh(rows.T @ rows)
    kept = values > RANK_TOLERANCE**2 * values[-1].clamp(min=torch.finfo(values.dtype).tiny)
    span = vectors[:, kept].T
    encoder = (rows @ span.T / values[kept]) @ span
    return Decomposition(encoder, span, vectors[:, ~kept].T)


def orthonormal_rows(rows: Float[Tensor, "k c"]) -> Float[Tensor, "r c"]:
    """Returns orthonormal rows that span the same; directions shorter than 1e-4 are dropped."""
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    return vectors[values > RANK_TOLERANCE]


def principal_basis(
    rows: Float[Tensor, "n c"], *, centred: bool, threshold: float = 0.05
) -> Float[Tensor, "r c"]:
    """Returns the leading principal directions of rows, most energy first, in float64.

    Those whose eigenvalue exceeds `threshold` of the largest are kept (the rule of Fukunaga and
    Olsen, 1971). `centred` subtracts the mean, as MCD was published; otherwise directions go
    through the origin and may hold the mean itself. Rows without any spread give no direction.
    """
    values, directions = principal_directions(rows, centred=centred)
    floor = torch.finfo(values.dtype).eps * rows.double().square().sum()
    return directions[(values > threshold * values[0]) & (values > floor)]


def principal_directions(
    rows: Float[Tensor, "n c"], *, centred: bool
) -> tuple[Float[Tensor, " m"], Float[Tensor, "m c"]]:
    """Returns squared singular values, largest first, and right singular vectors, m = min(n, c)."""
    rows = rows.double()
    if centred:
        rows = rows - rows.mean(dim=0)
    if len(rows) > rows.shape[1]:
        values, vectors = torch.linalg.eigh(rows.T @ rows)
        return values.flip(0).clamp(min=0), vectors.T.flip(0)
    _, values, directions = torch.linalg.svd(rows, full_matrices=False)
    return values.square(), directions


def energy_share(span: Float[Tensor, "r c"], rows: Float[Tensor, "n c"]) -> float:
    """Share in [0, 1] of the summed squared length of rows that lies in an orthonormal span."""
    total = rows.square().sum().clamp(min=torch.finfo(rows.dtype).tiny)
    return float((rows @ span.T.to(rows)).square().sum() / total)


def completeness(span: Float[Tensor, "r c"], direction: Float[Tensor, " c"]) -> float:
    """‖P w‖ / ‖w‖ in [0, 1], P the projection on an orthonormal span (MCD, not squared)."""
    check_direction(direction, span.shape[1])
    direction = direction.to(span)
    return float((span @ direction).norm() / direction.norm())


def check_direction(direction: Tensor, channels: int) -> None:
    """Raises `InputError` unless a class direction is a finite vector of this length, not zero."""
    if direction.shape != (channels,):
        raise InputError(
            f"The direction of a class must be one vector of {channels} channels, "
            f"got the shape {list(direction.shape)}."
        )
    if not bool(direction.isfinite().all()) or not bool(direction.any()):
        raise InputError("The direction of a class must be finite and not zero.")


def principal_angles(
    first: Float[Tensor, "k c"], second: Float[Tensor, "m c"]
) -> Float[Tensor, " r"]:
    """Angles in radians between the spans of two sets of rows, smallest first."""
    a, b = decompose(first).span, decompose(second).span
    if len(a) > len(b):
        a, b = b, a
    cosines = torch.linalg.svdvals(a @ b.T).clamp(max=1)
    # The cosine is inexact for small angles, the sine for those near 90°.
    sines = torch.linalg.svdvals(a - (a @ b.T) @ b).clamp(max=1).flip(0)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())


def orthogonalise(
    bases: Sequence[Float[Tensor, "_ c"]], direction: Float[Tensor, " c"]
) -> tuple[list[Float[Tensor, "_ c"]], list[int]]:
    """Makes subspaces orthogonal one after the other; whichever adds most completeness comes first.

    Each is projected on what the chosen ones leave over, and left out where that is nothing.

    Returns:
        The bases and, for each, its position among the given.
    """
    chosen: list[Tensor] = []
    order: list[int] = []
    open_ = {i: basis.double() for i, basis in enumerate(bases)}
    while open_:
        taken = torch.cat(chosen) if chosen else bases[0].double()[:0]
        open_ = {i: orthonormal_rows(b - (b @ taken.T) @ taken) for i, b in open_.items()}
        open_ = {i: b for i, b in open_.items() if len(b)}
        if open_:
            best = max(open_, key=lambda i: float((open_[i] @ direction.to(taken)).norm()))
            order.append(best)
            chosen.append(open_.pop(best))
    return chosen, order


Scaling = Literal["image", "cell", "none"]

ACTIVE_FROM = "active_from"
"""Entry of `origin`: the activation, scaled by image, from which a cell counts as one of each
concept; one threshold for all pictures."""


@dataclass(frozen=True)
class _Kind:
    """What every file of concepts tells, also of a later version."""

    kind: str


@dataclass(frozen=True)
class _Header(_Kind):
    """The schema of a file of concepts."""

    sizes: list[Annotated[int, Meta(ge=1)]]
    settings: dict[str, Any]
    spec: dict[str, Any] | None
    report: Any
    origin: dict[str, Any] = field(default_factory=dict)


class ConceptDictionary(ABC):
    """A set of concepts, each spanned by one or more directions of length c.

    Every feature vector splits as `f = Σ_l part_l + remainder`, a part being the combination of a
    concept's directions that `encode` gives. Inputs are never changed; results have the dtype and
    device of the features.

    Args:
        spec: where the features come from; features of another width are refused.
        settings: what the subclass was built with; saved, so values must be plain.

    Attributes:
        report: numbers of the last fit; plain values, which are saved too.
        origin: what else is known of the fit, such as its class; plain values, saved too.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[ConceptDictionary]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ConceptDictionary.kinds[cls.kind] = cls

    def __init__(self, spec: FeatureSpec | None = None, **settings: Any):
        self.spec = spec
        self.settings = settings
        self.report: dict[str, Any] = {}
        self.origin: dict[str, Any] = {}
        self._directions: Tensor | None = None
        self._offset: Tensor | None = None
        self._sizes: tuple[int, ...] = ()

    # ---- What a subclass defines

    @abstractmethod
    def fit(self, features: Features, *, progress: bool = False) -> ConceptDictionary:
        """Finds the concepts of feature maps; returns itself."""

    @abstractmethod
    def _encode(self, cells: Float[Tensor, "n c"]) -> Float[Tensor, "n k"]:
        """Returns the codes of vectors from which the offset is subtracted."""

    # ---- Public methods

    @property
    def is_linear(self) -> bool:
        """Whether concepts are directions; only an SAE may have a decoder that is not linear."""
        return True

    @property
    def directions(self) -> Float[Tensor, "k c"]:
        """All concepts' directions, one concept's after the other's."""
        if self._directions is None:
            raise InputError("The dictionary holds no concepts yet. Call fit or load first.")
        return self._directions

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many directions each concept has."""
        return self._sizes

    @property
    def n_concepts(self) -> int:
        return len(self._sizes)

    @property
    def channels(self) -> int:
        """The length c of feature vectors."""
        return self.directions.shape[1]

    def basis(self, concept: int) -> Float[Tensor, "k c"]:
        """Returns the directions of one concept."""
        return self.directions[self._slice(concept)]

    def encode(self, features: Features) -> Float[Tensor, "b k h w"]:
        """Returns the codes of every cell, the concepts' first, in the order of `directions`."""
        cells = to_cells(features, self.channels)
        offset = self._offset
        codes = self._encode(cells if offset is None else cells - offset.to(cells))
        return _to_map(codes, features)

    def decode(self, codes: Float[Tensor, "b k h w"]) -> Features:
        """Returns the features that codes stand for; exact for MCD, an approximation for others.

        Raises:
            InputError: another number of codes than `encode` gives.
        """
        decoder = self._decoder
        if codes.shape[1] != len(decoder):
            raise InputError(f"Codes must have {len(decoder)} channels, got {codes.shape[1]}.")
        cells = _from_map(codes) @ decoder.to(codes)
        if self._offset is not None:
            cells = cells + self._offset.to(cells)
        return _to_map(cells, codes)

    def part(self, features: Features, concept: int) -> Features:
        """Returns the part of the features that lies in one concept.

        Raises:
            InputError: no such concept.
        """
        return self._part(self._strengths(features), self._slice(concept))

    def parts(self, features: Features) -> Float[Tensor, "b n_concepts c h w"]:
        """Returns the parts of all concepts; takes n times the memory of the features."""
        codes = self._strengths(features)
        slices = map(self._slice, range(self.n_concepts))
        return torch.stack([self._part(codes, chosen) for chosen in slices], dim=1)

    def remainder(self, features: Features) -> Features:
        """Returns what no concept holds: features minus all parts."""
        codes = self._strengths(features)
        return features - _to_map(_from_map(codes) @ self.directions.to(codes), codes)

    def edit(self, features: Features, codes: Float[Tensor, "b k h w"]) -> Features:
        """Returns the features with other codes: f + Δc · d, so that what codes miss is kept.

        Args:
            codes: what `encode` gives, changed as wanted; unchanged codes give the very features.

        Raises:
            InputError: codes of another shape than `encode` gives.
        """
        change = codes.to(features) - self._checked(features, codes)
        return features + _to_map(_from_map(change) @ self._decoder.to(change), change)

    def set_code(
        self,
        features: Features,
        concept: int,
        value: float,
        mask: Bool[Tensor, ...] | None = None,
    ) -> Features:
        """Returns the features with one concept's codes set to a value; see `edit`.

        Args:
            value: of each of the concept's codes.
            mask: the cells to change, `[h, w]` or `[b, h, w]`; None is all.
        """
        codes = self.encode(features)
        chosen = codes[:, self._slice(concept)]
        wanted = torch.full_like(chosen, value)
        if mask is not None:
            cells = (mask if mask.ndim == 3 else mask[None])[:, None].to(codes.device)
            wanted = torch.where(cells, wanted, chosen)
        codes[:, self._slice(concept)] = wanted
        return self.edit(features, codes)

    def activations(
        self, features: Features, scaling: Scaling = "image"
    ) -> Float[Tensor, "b n_concepts h w"]:
        """Returns the concept activation maps ‖part_l(y, x)‖.

        Args:
            features: `[b, c, h, w]`.
            scaling: divided by the greatest ‖f‖ of the `image` (as published), by ‖f‖ of each
                `cell`, or by nothing.
        """
        norms = self._part_norms(features)
        if scaling == "none":
            return norms
        lengths = features.norm(dim=1, keepdim=True)
        if scaling == "image":
            lengths = lengths.amax(dim=(2, 3), keepdim=True)
        return norms / lengths.clamp(min=torch.finfo(lengths.dtype).tiny)

    def local_relevance(
        self, features: Features, head: PooledHead, class_index: int
    ) -> Float[Tensor, "b n_concepts_and_rest h w"]:
        """Returns what each cell of each concept adds to a logit; the remainder comes last.

        `R_l(y, x) = s u · part_l(y, x)` with s and u of the `PooledHead`, so that exactly
        `logit − b = Σ_l mean_yx R_l(y, x)`.
        """
        direction = head.direction(class_index).to(features)
        codes = self._strengths(features)
        weighted = codes * (self.directions.to(features) @ direction)[:, None, None]
        shares = [weighted[:, self._slice(i)].sum(dim=1) for i in range(self.n_concepts)]
        total = torch.einsum("bchw,c->bhw", features, direction)
        relevance = torch.stack([*shares, total - weighted.sum(dim=1)], dim=1)
        return relevance * head.scale(features)[:, None, None, None]

    def global_relevance(
        self, direction: Float[Tensor, " c"]
    ) -> Float[Tensor, " n_concepts_and_rest"]:
        """Returns ‖w_l‖ of the split of w / ‖w‖ over the concepts; their complement comes last.

        The norms are not squared, as published; only squares of orthogonal subspaces add up to 1.
        Where directions depend on each other, the split is that of least norm.

        Args:
            direction: w of a class, `PooledHead.direction`.
        """
        check_direction(direction, self.channels)
        unit = (direction / direction.norm()).double()
        codes = self._split.encoder @ unit
        rows = self.directions.double()
        slices = [self._slice(i) for i in range(self.n_concepts)]
        norms = [(codes[chosen] @ rows[chosen]).norm() for chosen in slices]
        rest = (self._split.complement @ unit).norm()
        return torch.stack([*norms, rest]).to(direction.dtype)

    def completeness(self, direction: Float[Tensor, " c"]) -> float:
        """Returns ‖P w‖ / ‖w‖ in [0, 1], P the projection on all concepts together.

        The published number is this norm; its square is the share of the squared length.
        """
        return completeness(self._split.span, direction)

    def reorder(self, order: Sequence[int]) -> ConceptDictionary:
        """Puts concepts into another order, in place, or drops some; returns itself.

        Args:
            order: positions of the concepts to keep, each at most once.
        """
        self._reorder_origin(order)
        bases = [self.basis(i) for i in order]
        self._set(torch.cat(bases), [len(basis) for basis in bases], self._offset)
        return self

    def sort_by_relevance(self, direction: Float[Tensor, " c"]) -> ConceptDictionary:
        """Orders concepts by global relevance to a class, greatest first, in place."""
        relevance = self.global_relevance(direction)[:-1]
        return self.reorder(relevance.argsort(descending=True, stable=True).tolist())

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with a JSON header, whole or not at all."""
        tensors = {"directions": self.directions}
        if self._offset is not None:
            tensors["offset"] = self._offset
        header = {
            "kind": self.kind,
            "sizes": self._sizes,
            "settings": self.settings,
            "spec": spec_to_json(self.spec),
            "report": self.report,
            "origin": self.origin,
        }
        write_concepts(Path(path), tensors, header)

    @staticmethod
    def load(path: str | Path) -> ConceptDictionary:
        """Reads what `save` wrote, of whichever kind.

        Raises:
            InputError: no such file, or not one of concepts.
        """
        tensors, content = read_concepts(Path(path))
        source = f"{path} (its header)"
        name = schema.convert(content, _Kind, source).kind
        if name not in ConceptDictionary.kinds:
            hint = choices_hint(name, sorted(ConceptDictionary.kinds))
            raise InputError(f"{path} must hold a known kind of concepts, got {name!r}; {hint}")
        header: _Header = schema.convert(content, _Header, source)
        kind = ConceptDictionary.kinds[name]
        try:
            dictionary = kind._rebuild(tensors, header.settings, spec_from_json(header.spec))
        except (TypeError, KeyError) as error:
            raise InputError(
                f"{path} must hold the settings of {header.kind} concepts: {error}."
            ) from None
        dictionary.report, dictionary.origin = header.report, header.origin
        if "directions" in tensors:
            directions, offset = tensors["directions"], tensors.get("offset")
            fits = directions.ndim == 2 and sum(header.sizes) == len(directions)
            if not fits or (offset is not None and offset.shape != directions.shape[1:]):
                raise InputError(
                    f"{path} must hold a direction for each of its {sum(header.sizes)} axes, got "
                    f"an array of the shape {list(directions.shape)}."
                )
            dictionary._set(directions, header.sizes, offset)
        return dictionary

    @classmethod
    def _rebuild(
        cls, tensors: dict[str, Tensor], settings: dict[str, Any], spec: FeatureSpec | None
    ) -> ConceptDictionary:
        return cls(spec=spec, **settings)

    # ---- Internals

    def _reorder_origin(self, order: Sequence[int]) -> None:
        """Checks a new order, and brings what `origin` tells of single concepts into it."""
        if len(set(order)) != len(order) or not order:
            raise InputError(f"An order must name each concept at most once, got {list(order)}.")
        for i in order:
            self._slice(i)
        if known := self.origin.get(ACTIVE_FROM):
            self.origin = {**self.origin, ACTIVE_FROM: [known[i] for i in order]}

    def _cells_to_fit(self, features: Features) -> Float[Tensor, "n c"]:
        return to_cells(features.detach(), self.spec.channels if self.spec else None)

    @property
    def _decoder(self) -> Tensor:
        return self.directions

    @cached_property
    def _split(self) -> Decomposition:
        return decompose(self.directions)

    def _set(self, directions: Tensor, sizes: Sequence[int], offset: Tensor | None = None) -> None:
        self._directions = directions.detach().float().cpu().contiguous()
        self._sizes = tuple(sizes)
        self._offset = None if offset is None else offset.detach().float().cpu()
        vars(self).pop("_split", None)  # a cached property

    def _slice(self, concept: int) -> slice:
        if not 0 <= concept < self.n_concepts:
            raise InputError(f"The concept must lie in 0 … {self.n_concepts - 1}, got {concept}.")
        first = sum(self._sizes[:concept])
        return slice(first, first + self._sizes[concept])

    def _strengths(self, features: Features) -> Float[Tensor, "b k h w"]:
        """Returns the factor on each of the directions; only an SAE's differ from the codes."""
        return self.encode(features)[:, : len(self.directions)]

    def _checked(self, features: Features, codes: Tensor) -> Tensor:
        """Returns the codes that the features have, of the same shape as the given ones."""
        before = self.encode(features)
        if codes.shape != before.shape:
            raise InputError(
                f"Codes of these features must have the shape {list(before.shape)}, "
                f"got {list(codes.shape)}."
            )
        return before

    def _part_norms(self, features: Features) -> Float[Tensor, "b n_concepts h w"]:
        codes = self._strengths(features)
        slices = map(self._slice, range(self.n_concepts))
        return torch.stack([self._part(codes, s).norm(dim=1) for s in slices], dim=1)

    def _part(self, codes: Tensor, chosen: slice) -> Tensor:
        return _to_map(_from_map(codes[:, chosen]) @ self.directions[chosen].to(codes), codes)


def to_cells(features: Tensor, channels: int | None) -> Tensor:
    """Returns the cells `[b·h·w, c]`, image after image in raster order, in float32 or float64.

    Raises:
        InputError: not a finite batch of maps of this width (any width where None).
    """
    if features.ndim != 4 or channels not in (None, features.shape[1]) or not features.numel():
        raise InputError(
            f"Features must be maps [batch, {channels or 'channels'}, height, width], "
            f"got the shape {list(features.shape)}."
        )
    if not bool(features.isfinite().all()):
        raise InputError("Features must be finite, got NaN or infinite values.")
    cells = _from_map(features)
    return cells if cells.dtype == torch.float64 else cells.float()


def check_n_concepts(n_concepts: int, n_cells: int) -> None:
    """Raises `InputError` unless there is at least one concept, and a cell for each."""
    if not 1 <= n_concepts <= n_cells:
        raise InputError(
            f"n_concepts must lie in 1 … {n_cells}, the number of cells, got {n_concepts}."
        )


def _from_map(features: Tensor) -> Tensor:
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def _to_map(cells: Tensor, like: Tensor) -> Tensor:
    b, _, h, w = like.shape
    return cells.reshape(b, h, w, -1).permute(0, 3, 1, 2).contiguous().to(like.dtype)
