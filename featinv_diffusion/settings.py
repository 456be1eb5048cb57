"""Settings that decide the pictures of a run; light to import, so that options are built from them.

A settings class is a frozen dataclass whose fields say, by `option`, how the command line shows
them. One class may hold another as a field. Outside the code (options, YAML, JSON) the fields of
both stand side by side, so their names must differ: see `to_flat` and `from_flat`.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from msgspec import Meta

from featinv_diffusion.errors import InputError, choices_hint
from featinv_diffusion.files import expand_path

T = TypeVar("T")

_LARGEST = 1e38  # of float32, about
Finite = Annotated[float, Meta(ge=-_LARGEST, le=_LARGEST)]
NotNegative = Annotated[float, Meta(ge=0, le=_LARGEST)]
Positive = Annotated[float, Meta(gt=0, le=_LARGEST)]
PositiveOrInfinite = Annotated[float, Meta(gt=0)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Beta = Annotated[float, Meta(ge=0, lt=1)]
"""A share of what is kept at each step."""
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, Meta(ge=1, le=10**9)]
"""A number of times, or of what lies on the disk."""
Number = Annotated[int, Meta(ge=0, le=10**9)]
Pictures = Annotated[int, Meta(ge=1, le=10**6)]
"""Pictures that are in memory at once."""
Size = Annotated[int, Meta(ge=1, le=16_384)]
"""Pixels of a side, or what a layer or batch holds."""
Depth = Annotated[int, Meta(ge=1, le=1000)]
"""Layers of a network, or steps of a sampler."""
Workers = Annotated[int, Meta(ge=0, le=64)]
"""Each is a process."""

DIFFUSION = "diffusion"
BY_GRADIENT = ("guided", "optimise")
"""Inverters that need no training, but gradients through any backbone that they are given."""
REFINE_AT = ("end", "steps")
PARAMETRISATIONS = ("latents", "pixels")
LATER = ("capture", "parametrise", "quality", "refine", "refine_at")
"""Settings that older manifests lack; what they recorded was made with the default."""
SCHEDULERS = (
    "ddim",
    "ddpm",
    "deis",
    "dpmsolver++",
    "sde-dpmsolver++",
    "euler",
    "euler-ancestral",
    "heun",
    "pndm",
    "unipc",
)
GUIDANCE = ("text", "features")
QUALITIES = ("draft", "standard", "best", "published")
"""Presets of steps, refinement and guidance: see `inverters.quality`."""
ATTENTION = ("native", "xformers")
DTYPES = ("float32", "float16", "bfloat16")
OF_PIPELINE = "the pipeline's"
BASES, ORDERS = ("auto", "uncentred", "centred"), ("energy", "relevance")
METHODS = ("mcd", "pca", "nmf", "kmeans", "directions", "sae")
"""Ways to find concepts; `directions` and `sae` take them from a file."""
ENCODINGS = ("least_squares", "projection", "sparse")
"""Ways to split features over given directions."""
AUTO = "auto"
MAX_SAMPLES = 10_000
"""Samples of one picture; each keeps its features until the picture is done."""
MAX_BATCH, MAX_IMAGES = 4096, 10_000_000
"""Limits of what is in memory at once, and of what is drawn from a data set."""


def option(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    flag: str | None = None,
    shown: str | bool = True,
    choices: Collection[str] = (),
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """Returns a dataclass field with what the command line and the checks know of it.

    Args:
        help: one sentence for `--help`.
        metavar: the shape of the value; the choices by default.
        flag: the option where it is not named after the field.
        shown: what `--help` gives as the default where the value itself says little.
        choices: the values that `check` allows.
        least, most: the range that `check` allows.
    """
    metadata = {
        "help": help,
        "metavar": metavar or ("|".join(choices) if 0 < len(choices) < 5 else None),
        "flag": flag,
        "shown": shown,
        "choices": tuple(choices),
        "least": least,
        "most": most,
    }
    return dataclasses.field(default=default, metadata=metadata)


def nested(kind: type[T]) -> Any:
    """Returns a field that holds another settings class."""
    return dataclasses.field(default_factory=kind)


def check(settings: Any) -> None:
    """Raises `InputError` where a value is none of its field's choices, or out of its range."""
    for name, limits in _limits(type(settings)).items():
        value = getattr(settings, name)
        for number in value if isinstance(value, tuple | list) else (value,):
            if number is not None:
                _check_limits(name, number, limits)
    for field in dataclasses.fields(settings):
        value, rule = getattr(settings, field.name), field.metadata
        if getattr(value, "ndim", None) == 0:  # a scalar of NumPy or torch
            value = value.item()  # pyright: ignore[reportAttributeAccessIssue]
            object.__setattr__(settings, field.name, value)
        if value is None or not rule:
            continue
        if rule["choices"] and value not in rule["choices"]:
            hint = choices_hint(str(value), list(rule["choices"]))
            raise InputError(f"No {field.name} is named {value!r}; {hint}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{field.name} must be a finite number, got {value}.")
        for bound, words in (("least", "at least"), ("most", "at most")):
            limit = rule[bound]
            if limit is not None and (value < limit if bound == "least" else value > limit):
                shown = limit if isinstance(limit, int) else f"{limit:g}"
                raise InputError(f"{field.name} must be {words} {shown}, got {value}.")


@cache
def _limits(kind: type) -> dict[str, Meta]:
    """Returns the limits in the annotations of a class, by field."""
    found: dict[str, Meta] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        parts = (hint, *get_args(hint))
        for part in (*parts, *(inner for p in parts for inner in get_args(p))):
            if isinstance(part, Meta):
                found[name] = part
    return found


def _check_limits(name: str, number: Any, limits: Meta) -> None:
    bounds = (
        (limits.ge, operator.ge, "at least"),
        (limits.gt, operator.gt, "more than"),
        (limits.le, operator.le, "at most"),
        (limits.lt, operator.lt, "less than"),
    )
    if not isinstance(number, Real):
        raise InputError(f"{name} must be a number, got {number!r}.")
    for limit, holds, words in bounds:
        if limit is not None and not holds(number, limit):
            raise InputError(f"{name} must be {words} {limit:g}, got {number}.")


def flat_fields(kind: type) -> dict[str, dataclasses.Field[Any]]:
    """Returns the fields of a settings class and of those that it holds, by name."""
    found: dict[str, dataclasses.Field[Any]] = {}
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        is_group = isinstance(inner, type) and dataclasses.is_dataclass(inner)
        parts = flat_fields(inner) if is_group else {field.name: field}
        if twice := found.keys() & parts.keys():
            raise TypeError(f"{kind.__name__} holds two fields named {', '.join(twice)}.")
        found |= parts  # pyright: ignore[reportOperatorIssue]
    return found


def flat_types(kind: type) -> dict[str, Any]:
    """Returns the type of each of `flat_fields`."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        found |= flat_types(hint) if dataclasses.is_dataclass(hint) else {name: hint}  # pyright: ignore[reportArgumentType]
    return found


def to_flat(settings: Any) -> dict[str, Any]:
    """Returns all values by name, those of settings that it holds among them."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        values |= to_flat(value) if dataclasses.is_dataclass(value) else {field.name: value}
    return values


def from_flat(kind: type[T], values: Mapping[str, Any]) -> T:
    """Builds settings from values by name; fields without a value keep their default.

    Raises:
        InputError: a name of no field, or values that the class refuses.
    """
    known = flat_fields(kind)
    for name in values:
        if name not in known:
            raise InputError(f"No setting is named {name!r}; {choices_hint(name, list(known))}")
    hints, given = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner):
            own = flat_fields(inner)  # pyright: ignore[reportArgumentType]
            given[field.name] = from_flat(inner, {n: v for n, v in values.items() if n in own})  # pyright: ignore[reportArgumentType]
        elif field.name in values:
            given[field.name] = values[field.name]
    return kind(**given)


def changed(settings: Any, **values: Any) -> Any:
    """Returns settings with other values by name, as `dataclasses.replace` for flat names."""
    return from_flat(type(settings), {**to_flat(settings), **values})


def refined_by(n_steps: int, at: str | None) -> str:
    """Returns in words how samples were refined."""
    return (
        f"refined in the last {n_steps} steps" if at == "steps" else f"refined by {n_steps} steps"
    )


@dataclass(frozen=True)
class SampleSettings:
    """Which inverter makes the pictures, and everything else that decides them.

    A manifest records them. Of deterministic inverters only `inverter`, `stage`, `pipeline`,
    `batch_size` and `device` may be set; of `optimise` and `guided` also the backbone, the layer,
    steps, seed and samples.

    Args:
        pipeline: bundled name, folder or Hub repository of a diffusion pipeline; None takes the
            bundled pipeline of `backbone`. For the inverter `rae`, its autoencoder. For `guided`
            the text-to-image model and for `optimise` the autoencoder; None takes the bundled one.
        backbone: must be the pipeline's; None takes it, or `convnext` without a pipeline. Any for
            `optimise` and `guided`.
        layer: must be the pipeline's; None takes it.
        quality: a name of `QUALITIES`, which sets what is not set here: see `inverters.quality`.
        steps, guidance_scale, guidance, refine, refine_at, capture: see `DiffusionInverter`; None
            is what the quality says.
        scheduler: a name of `SCHEDULERS`; None is the pipeline's own.
        batch_size: samples per batch; it decides the last bits of the pictures.
        attention: `native` is PyTorch's scaled dot product; `xformers` needs that extra.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps` …
        dtype: number format of the diffusion model; the backbone always computes in float32.
        inverter: `diffusion`, or any name or folder that `load_inverter` takes.
        stage: stage that a modular inverter inverts; None is its default one.
        parametrise: what `optimise` changes: latents of an autoencoder, or pixels as waves.

    Raises:
        InputError: a value out of range, or one that the inverter has no use for.
    """

    pipeline: str | None = option(
        None,
        "Diffusion pipeline: a bundled name, a folder or a Hub repository. For the inverter rae: "
        "its autoencoder; for guided and optimise: a Stable Diffusion folder.",
        metavar="FOLDER_OR_REPO",
        shown="tiny/BACKBONE",
    )
    backbone: str | None = option(
        None,
        "Backbone whose features to invert; must be the pipeline's; any for optimise and guided.",
        shown="tiny/convnext",
    )
    layer: str | None = option(
        None, "Layer that the features come from; must be the pipeline's.", shown=OF_PIPELINE
    )
    n_samples: int = option(4, "Samples per picture.", least=1, most=MAX_SAMPLES)
    seed: Seed = option(
        0, "Random seed; the noise also depends on the file name and the sample index."
    )
    quality: str | None = option(
        None,
        "How much to spend on a picture: draft (2 steps), standard, best (refined) or published "
        "(50 steps of ddim, guidance text 1.75). Other options prevail.",
        choices=QUALITIES,
        shown="standard",
    )
    steps: int | None = option(
        None, "Denoising steps, or those of optimise.", shown=OF_PIPELINE, least=1, most=1000
    )
    scheduler: str | None = option(
        None,
        "Sampler: ddim, dpmsolver++, euler, heun, unipc …",
        shown=OF_PIPELINE,
        choices=SCHEDULERS,
    )
    guidance_scale: float | None = option(
        None, "Strength of the guidance; 1 is no guidance.", shown=OF_PIPELINE
    )
    guidance: str | None = option(
        None,
        "What the negative branch lacks: the prompt (text), or the features too (features).",
        shown=OF_PIPELINE,
        choices=GUIDANCE,
    )
    strength: float = option(1.0, "Factor on the residuals of the ControlNet.")
    refine: int | None = option(
        None,
        "Steps that move a finished sample towards the features, as its own backbone sees them.",
        shown="0, best: the pipeline's",
        least=0,
        most=1000,
    )
    refine_at: str | None = option(
        None,
        "Where refinement takes place: on the finished sample (end), or one step each in the last "
        "steps of denoising (steps).",
        shown="end, best: the pipeline's",
        choices=REFINE_AT,
    )
    capture: bool = option(
        False, "Trace the networks once, which takes seconds and speeds up many small pictures."
    )
    batch_size: int = option(8, "Samples per batch.", least=1, most=MAX_BATCH)
    attention: str = option("native", "Attention kernels.", choices=ATTENTION)
    device: str = option("auto", "Device to compute on: auto, cpu, cuda, cuda:1, mps …")
    dtype: str = option(
        "float32",
        "Number format of the diffusion model; the backbone stays in float32.",
        choices=DTYPES,
    )
    inverter: str = option(
        DIFFUSION,
        "Inverter that turns features into images; optimise and guided take any backbone, the "
        "others but diffusion imply theirs.",
        metavar="diffusion|detr|guided|optimise|rae|siglip|siglip2|vit|FOLDER",
    )
    stage: str | None = option(
        None,
        "Stage that a modular inverter inverts: backbone, encoder, decoder … of detr; patches, "
        "encoder, last of vit.",
        shown="encoder",
    )
    parametrise: str = option("latents", "What optimise changes.", choices=PARAMETRISATIONS)

    def __post_init__(self) -> None:
        check(self)
        for path in (self.inverter, self.pipeline or ""):
            expand_path(path)

    @property
    def is_deterministic(self) -> bool:
        """Whether every sample of a picture would be the same."""
        return self.inverter not in (DIFFUSION, *BY_GRADIENT)


@dataclass(frozen=True)
class Selection:
    """Which images of a data set are used.

    Args:
        n_images: drawn evenly over classes; None takes all.
        per_class: at most so many of each class.
        held_back_per_class: only the last k images of each class, which training holds back.
        selection: `random` draws by a hash of the image's id, whatever the seed is; `first` takes
            the first of each class in the order of ids.
        n_null_images: images, spread evenly, for the nulls that cost a sample each.

    Raises:
        InputError: a value out of range.
    """

    n_images: int | None = option(
        None,
        "Number of images, drawn evenly over classes.",
        shown="all",
        least=1,
        most=MAX_IMAGES,
    )
    per_class: int | None = option(
        None, "Maximum number of images of each class.", least=1, most=MAX_IMAGES
    )
    selection: str = option(
        "random",
        "Which images of a class: drawn with a fixed seed, or the first when sorted.",
        choices=("random", "first"),
    )
    held_back_per_class: int = option(
        0,
        "Use only the last k images of each class, which training holds back.",
        least=0,
        most=MAX_IMAGES,
    )
    n_null_images: int = option(
        256,
        "Images for the nulls that cost a sample each; 0 leaves these out.",
        least=0,
        most=MAX_IMAGES,
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ConceptSettings:
    """Which features concepts are found in, and how.

    Raises:
        InputError: a value out of range, or values that do not go together.
    """

    backbone: str = option(
        "tiny/convnext", "Backbone: a bundled name, a timm id, or hf/FOLDER_OR_REPOSITORY."
    )
    layer: str = option("last", "Layer that the features come from.")
    target: str | None = option(
        None,
        "Class whose concepts to find.",
        metavar="NAME_OR_INDEX",
        flag="--class",
        shown="the class of most pictures",
    )
    method: str | None = option(
        None,
        "Method that finds the concepts.",
        metavar="|".join(METHODS),
        choices=METHODS,
        shown="mcd, or directions or sae where a file is given",
    )
    n_concepts: str | None = option(
        None,
        "Number of concepts; auto takes the fewest that are half complete (mcd only).",
        metavar="K|auto",
        shown="3, all directions of a file, or 6 latents of an SAE",
    )
    directions: str | None = option(
        None,
        "File with a matrix of one direction per row (CAVs, the decoder of an SAE): .npy, or "
        ".safetensors with `directions` and perhaps `offset`.",
        metavar="FILE",
    )
    sae: str | None = option(
        None,
        "Sparse autoencoder whose latents to take: a file of overcomplete, saev or ViT-Prisma, or "
        "tiny/convnext-sae.",
        metavar="FILE",
    )
    sae_format: str = option(
        "auto",
        "Library that made the file, and what it does not say: overcomplete:top_k=8.",
        metavar="auto|overcomplete|saev|prisma[:…]",
    )
    basis: str = option(
        "auto",
        "Basis of each cluster (mcd): centred as published, uncentred through the origin, or "
        "whichever holds more energy with as many directions.",
        choices=BASES,
    )
    order: str = option(
        "energy",
        "What comes first: the concept whose part has the most energy in the pictures, or the most "
        "relevant to the class, as published.",
        choices=ORDERS,
    )
    encoding: str = option(
        "least_squares", "How features split over the directions of a file.", choices=ENCODINGS
    )
    max_cells: int = option(
        20_000, "Cells that mcd draws where there are more; 0 takes all.", least=0, most=10**9
    )
    seed: int = option(42, "Random seed of whatever the method draws.", least=0, most=2**32 - 1)
    batch_size: int = option(32, "Pictures per batch of the backbone.", least=1, most=MAX_BATCH)
    device: str = option("auto", "Device to compute on: auto, cpu, cuda, cuda:1, mps …")

    def __post_init__(self) -> None:
        check(self)
        number = self.number
        if (self.resolved_method == "sae") != (self.sae is not None):
            raise InputError(
                "The method sae and the file of an SAE go together, got the method "
                f"{self.resolved_method} with the file {self.sae or 'none'}."
            )
        if (self.resolved_method == "directions") != (self.directions is not None):
            raise InputError(
                "The method directions and a file of directions go together, got the method "
                f"{self.resolved_method} with the file {self.directions or 'none'}."
            )
        if number is None and self.resolved_method not in ("mcd", "directions"):
            raise InputError(
                f"{self.resolved_method} must be told the number of concepts; only mcd chooses it."
            )
        if number is not None and not 1 <= number <= MAX_BATCH:
            raise InputError(f"n_concepts must be from 1 to {MAX_BATCH}, got {number}.")

    @property
    def resolved_method(self) -> str:
        """The method, also where none was named."""
        given = "mcd" if self.directions is None else "directions"
        return self.method or (given if self.sae is None else "sae")

    @property
    def number(self) -> int | None:
        """The number of concepts; None lets mcd choose, and keeps all directions of a file.

        Of an SAE None keeps the 6 latents that matter most in the pictures.
        """
        if self.n_concepts is None:
            return {"directions": None, "sae": 6}.get(self.resolved_method, 3)
        if self.n_concepts == AUTO:
            return None
        try:
            return int(self.n_concepts)
        except ValueError:
            raise InputError(
                f"n_concepts must be a number or auto, got {self.n_concepts!r}."
            ) from None
