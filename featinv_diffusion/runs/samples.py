"""`sample`: pictures or feature maps → samples, with their figure, numbers and manifest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from msgspec import Meta
from PIL import Image
from torch import Tensor

from featinv_diffusion import __version__
from featinv_diffusion.errors import InputError
from featinv_diffusion.figures.grid import Grid, GridRow, draw_map
from featinv_diffusion.images import to_tensor
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.open import open_inverter
from featinv_diffusion.metrics.certainty import Certainty
from featinv_diffusion.runs.certainty import (
    DETERMINED,
    DRAWN,
    PIXEL_PARTS,
    CertaintyCalibration,
    CertaintyJudge,
    open_certainty,
)
from featinv_diffusion.runs.progress import advancing
from featinv_diffusion.runs.record import (
    Environment,
    RunFolder,
    Seeds,
    check_output_name,
    count,
    from_values,
    path_of,
    read_content,
    read_environment,
    reserved,
    to_png,
)
from featinv_diffusion.runs.sampling import (
    Job,
    Reconstruction,
    output_stems,
    read_maps,
    reconstruct,
    reconstruct_maps,
)
from featinv_diffusion.runs.scope import open_scope, scope_line
from featinv_diffusion.runs.second_eye import open_second_eye, second_eye_line
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.settings import (
    BY_GRADIENT,
    DIFFUSION,
    LATER,
    MAX_SAMPLES,
    SampleSettings,
    refined_by,
    to_flat,
)

GRID = "grid.png"
MAX_GRID_ROWS = 100
PER_SAMPLE = ("seed", "cosine", "cosine_shuffled", "top1_match", "top5_match")


def sample(
    inverter: Inverter,
    features: Any,
    *,
    n_samples: int = 4,
    seed: int = 0,
    names: Sequence[str] | None = None,
    batch_size: int = 8,
    progress: bool = False,
    certainty: bool | CertaintyCalibration = False,
) -> Samples:
    """Turns feature maps back into images, several for each map.

    The noise of a sample depends on the seed, on the file name of its picture and on its index,
    never on its place, so `featinv sample` gives the same images of the same pictures.

    Args:
        features: what `inverter.encode` gives; a tensor or array `[b, c, h, w]` of other maps; or
            pictures, which are encoded first.
        n_samples: images per map; deterministic inverters make one.
        seed: random seed.
        names: what the noise of each map depends on instead of the file name.
        batch_size: samples per batch; it decides the last bits.
        progress: show a progress bar on stderr.
        certainty: also judge what the features determine of each picture, by the calibration in the
            inverter's pipeline or by this one of `fit_certainty`.

    Raises:
        InputError: pictures that cannot be read, features of another shape or not finite, samples
            that are not finite, or certainty of samples that are not calibrated.
    """
    maps = read_maps(inverter, features, names)
    n_samples = 1 if inverter.is_deterministic else n_samples
    if n_samples < 1:
        raise InputError(f"n_samples must be at least 1, got {n_samples}.")
    judge = _judge_of(inverter, certainty, n_samples)
    stems = output_stems([s.name or f"map-{i}" for i, s in enumerate(maps.sources)])
    jobs = [
        Job(
            source.location or "",
            tuple(f"{stem}_{j}.png" for j in range(n_samples)),
            tuple(derive_seed(seed, source.name, j) for j in range(n_samples)),
        )
        for source, stem in zip(maps.sources, stems, strict=True)
    ]
    scope = open_scope(inverter)

    def fail(job: Job, error: str) -> None:
        raise InputError(error)

    with advancing(inverter, len(jobs) * n_samples, progress):
        done = list(reconstruct_maps(inverter, maps, jobs, batch_size, fail, scope.p_value))
    done = [_judged(one, judge) for one in done]
    eye = open_second_eye(inverter)
    if eye is not None:
        for one in done:
            eye.look(one)
    settings = inverter.settings
    if settings is not None:
        settings = replace(settings, n_samples=n_samples, seed=seed, batch_size=batch_size)
    seen = None if eye is None else eye.content()
    return Samples(settings, done, scope.basis, str(inverter.spec), seen)


def _judge_of(
    inverter: Inverter, certainty: bool | CertaintyCalibration, n_samples: int
) -> CertaintyJudge | None:
    """Returns who judges certainty where it is asked for.

    Raises:
        InputError: samples that are not calibrated.
    """
    if certainty is False:
        return None
    judge = open_certainty(inverter, None if certainty is True else certainty)
    judge.require(n_samples)
    return judge


def _judged(done: Reconstruction, judge: CertaintyJudge | None) -> Reconstruction:
    if judge is None:
        return done
    return replace(done, certainty=judge.judge(to_tensor(done.samples), done.features))


@dataclass(frozen=True, eq=False, repr=False)
class Samples:
    """Samples of feature maps.

    Args:
        settings: those of the inverter and of `sample`.
        reconstructions: one per map.
        scope_basis: what the p-values of the scope rest on; None where it is not known.
        of: the features that were inverted, in words.
        second_eye: what the own backbone and another one see, of inverters that look through their
            backbone.

    Attributes:
        images: in [0, 1], in steps of 1/255.
        features: what the backbone sees in the images.
        cosine: of those features to the map, mean over cells.
    """

    settings: SampleSettings | None
    reconstructions: list[Reconstruction]
    scope_basis: str | None
    of: str
    second_eye: dict[str, Any] | None = None

    @cached_property
    def images(self) -> Float[Tensor, "b n 3 height width"]:
        return torch.stack([to_tensor(done.samples) for done in self.reconstructions])

    @cached_property
    def features(self) -> Float[Tensor, "b n c h w"]:
        return torch.stack([done.features for done in self.reconstructions])

    @cached_property
    def cosine(self) -> Float[Tensor, "b n"]:
        return torch.tensor([done.cosine for done in self.reconstructions])

    @property
    def certainty(self) -> list[Certainty] | None:
        """What the features determine of each picture; None where it was not asked for."""
        found = [done.certainty for done in self.reconstructions if done.certainty is not None]
        return found or None

    @property
    def manifest(self) -> Manifest:
        """What `manifest.json` holds."""
        device = "cpu" if self.settings is None else self.settings.device
        manifest = Manifest(self.settings, environment=read_environment(device))
        manifest.scope_basis = self.scope_basis
        manifest.second_eye = self.second_eye
        manifest.certainty = self.certainty is not None
        for done in self.reconstructions:
            manifest.add(done)
        return manifest

    def figure(self) -> Image.Image:
        """Draws original | samples, with the cosine under each, as `grid.png`."""
        return make_grid(list(map(to_row, self.reconstructions)), self.manifest).image()

    def rows(self) -> list[dict[str, Any]]:
        """Returns one dict per sample."""
        return self.manifest.rows()

    def summary(self) -> str:
        """Returns how well the features come back, in one sentence."""
        return self.manifest.summary()

    def save(self, folder: str | Path) -> Path:
        """Writes the samples as PNGs, `grid.png` and `manifest.json`, as `featinv sample` does."""
        run = SampleFolder(folder, self.manifest)
        for done in self.reconstructions:
            run.write(done)
        run.complete()
        return Path(folder)

    def _repr_png_(self) -> bytes:
        return to_png(self.figure())

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.images.shape[:2]))
        return f"Samples({shape} of {self.of}): {self.summary()}"


# ---- The manifest --------------------------------------------------------------------------------


@dataclass
class Manifest:
    """The settings of a run and one entry per image, in the order in which they were given.

    Args:
        settings: resolved, of the inverter; None where it was built by hand.
        images: dicts with `input`, `outputs`, `scope_p_value`, and the lists `PER_SAMPLE`.
        failures: dicts with `input` and `error`.
        environment: what the last bits of a picture depend on besides the settings.
        scope_basis: what the images' `scope_p_value`s rest on; None where there are none.
        second_eye: see `Samples`.
        certainty: whether the images have `certainty`, what the features determine of each.
    """

    settings: SampleSettings | None
    images: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    scope_basis: str | None = None
    second_eye: dict[str, Any] | None = None
    certainty: bool = False

    def add(self, done: Reconstruction) -> None:
        """Adds the entry of one image."""
        self.images.append(to_entry(done))

    def fail(self, job: Job, error: str) -> None:
        """Notes an image that could not be used."""
        self.failures.append({"input": job.input, "error": error})

    def mean(self, name: str) -> float | None:
        """Mean of one of `PER_SAMPLE` over all samples; None where it has no values."""
        values = [v for entry in self.images for v in entry[name] if v is not None]
        return sum(values) / len(values) if values else None

    def rows(self) -> list[dict[str, Any]]:
        """Returns one dict per sample."""
        return [
            {
                "input": entry["input"],
                "output": output,
                "sample": j,
                **{name: entry[name][j] for name in PER_SAMPLE},
                "scope_p_value": entry["scope_p_value"],
            }
            for entry in self.images
            for j, output in enumerate(entry["outputs"])
        ]

    def summary(self) -> str:
        """Returns how well the features come back, in one sentence."""
        n_samples = sum(len(entry["outputs"]) for entry in self.images)
        shares = [e["certainty"]["determined_share"] for e in self.images if "certainty" in e]
        light, colour = (
            f"{sum(share[part] for share in shares) / max(1, len(shares)):.0%}"
            for part in PIXEL_PARTS
        )
        determined = (
            f" Determined by the features: {light} of the variance of light and {colour} of that "
            "of colour at a pixel, on average."
        )
        match = self.mean("top5_match")
        matched = "" if match is None else f", top-5 match {match:.0%}"
        if self.second_eye is not None:  # the backbone was asked until it agreed
            matched += ", for which the pictures were optimised"
        return (
            f"{count(n_samples, 'sample')} of {count(len(self.images), 'picture')}: "
            f"mean cosine {self.mean('cosine'):.2f} "
            f"(cells shuffled: {self.mean('cosine_shuffled'):.2f}){matched}."
            + (determined if shares else "")
        )

    def scope_line(self) -> str:
        """Returns whether the maps are like natural ones, in one sentence."""
        p_values = [p for entry in self.images if (p := entry.get("scope_p_value")) is not None]
        of_pipeline = self.settings is None or self.settings.inverter == DIFFUSION
        return scope_line(p_values or None, self.scope_basis, of_pipeline=of_pipeline)

    def content(self) -> dict[str, Any]:
        """Returns what the file holds."""
        return {
            "version": __version__,
            **({} if self.settings is None else to_flat(self.settings)),
            "environment": self.environment,
            "scope_basis": self.scope_basis,
            **({} if self.second_eye is None else {"second_eye": self.second_eye}),
            **({"certainty": True} if self.certainty else {}),
            "images": self.images,
            "failures": self.failures,
        }


def to_entry(done: Reconstruction) -> dict[str, Any]:
    """Returns the entry of one image in a manifest."""
    known = {} if done.certainty is None else {"certainty": done.certainty.numbers()}
    return {
        "input": done.job.input,
        "outputs": list(done.job.outputs),
        "seed": list(done.job.seeds),
        "cosine": done.cosine,
        "cosine_shuffled": done.cosine_shuffled,
        "top1_match": done.top1_match,
        "top5_match": done.top5_match,
        "scope_p_value": done.scope_p_value,
        **known,
    }


def read_manifest(path: Path) -> Manifest:
    """Reads a manifest of samples, from the file or the folder that holds it.

    Raises:
        InputError: no such file, no JSON, keys missing or of a wrong kind.
    """
    path = path_of(path)
    content = read_content(path)
    names = [f.name for f in fields(SampleSettings)]
    if missing := sorted({*names, "images"}.difference(LATER) - content.keys()):
        raise InputError(f"{path} is no manifest of featinv sample; it lacks {', '.join(missing)}.")
    from_values(_Content, content, path)
    return Manifest(
        from_values(
            SampleSettings, {name: content[name] for name in names if name in content}, path
        ),
        content["images"],
        content.get("failures", []),
        content.get("environment", {}),
        content.get("scope_basis"),
        certainty=content.get("certainty", False),
    )


def to_jobs(manifest: Manifest) -> list[Job]:
    """Returns the jobs that make the same pictures again."""
    return [
        Job(entry["input"], tuple(entry["outputs"]), tuple(entry["seed"]))
        for entry in manifest.images
    ]


@dataclass(frozen=True)
class _Planned:
    """The schema of what must be known of an image to make its samples again."""

    input: str
    outputs: Annotated[list[str], Meta(min_length=1, max_length=MAX_SAMPLES)]
    seed: Seeds

    def __post_init__(self) -> None:
        if len(self.outputs) != len(self.seed):
            raise InputError(
                f"An image must have as many outputs as seeds, got {len(self.outputs)} and "
                f"{len(self.seed)}"
            )
        for name in self.outputs:
            check_output_name(name, [".png"])


@dataclass(frozen=True)
class Entry(_Planned):
    """The schema of `to_entry`."""

    cosine: list[float]
    cosine_shuffled: list[float]
    top1_match: list[bool | None]
    top5_match: list[bool | None]
    scope_p_value: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in PER_SAMPLE:
            if len(getattr(self, name)) != len(self.outputs):
                raise InputError(f"{name} must have one value for each of the outputs")


@dataclass(frozen=True)
class _Failed:
    """The schema of an image that could not be used."""

    input: str
    error: str


@dataclass(frozen=True)
class _Content:
    """The schema of what a manifest holds besides the settings."""

    images: Annotated[list[_Planned], Meta(min_length=1)]
    failures: list[_Failed] = field(default_factory=list)
    environment: Environment = field(default_factory=Environment)
    scope_basis: str | None = None
    certainty: bool = False


# ---- The folder ----------------------------------------------------------------------------------


class SampleFolder:
    """The folder of a run of samples, which grows picture by picture.

    Args:
        manifest: that `complete` writes; `write` adds nothing to it.
    """

    def __init__(self, folder: str | Path, manifest: Manifest):
        self.run, self.manifest = RunFolder(folder), manifest
        self.shown: list[GridRow] = []

    def write(self, done: Reconstruction) -> None:
        """Writes the samples of one image, and keeps the first ones for the grid."""
        for name, picture in zip(done.job.outputs, done.samples, strict=True):
            self.run.picture(name, picture)
        if len(self.shown) < MAX_GRID_ROWS:
            self.shown.append(to_row(done))

    def complete(self) -> None:
        """Writes the grid, then the manifest."""
        self.run.figure(GRID, make_grid(self.shown, self.manifest))
        self.run.complete(self.manifest.content())


def run_jobs(
    settings: SampleSettings, jobs: Sequence[Job], output: Path, *, certainty: bool = False
) -> Manifest:
    """Samples the jobs picture by picture and writes everything; the manifest comes last.

    Args:
        certainty: also judge what the features determine of each picture.

    Raises:
        InputError: bad settings, no image that could be reconstructed, or certainty of samples that
            are not calibrated.
    """
    with reserved(output):
        return _run_jobs(settings, jobs, output, certainty)


def _run_jobs(
    settings: SampleSettings, jobs: Sequence[Job], output: Path, certainty: bool
) -> Manifest:
    inverter = open_inverter(settings)
    resolved = inverter.settings
    assert resolved is not None
    scope, eye = open_scope(inverter), open_second_eye(inverter)
    judge = _judge_of(inverter, certainty, min(len(job.seeds) for job in jobs))
    manifest = Manifest(
        resolved,
        environment=read_environment(resolved.device),
        scope_basis=scope.basis,
        certainty=certainty,
    )
    folder = SampleFolder(output, manifest)
    with advancing(inverter, sum(len(job.seeds) for job in jobs), progress=True):
        for done in reconstruct(inverter, jobs, resolved.batch_size, manifest.fail, scope.p_value):
            done = _judged(done, judge)
            folder.write(done)
            manifest.add(done)
            if eye is not None:
                eye.look(done)
    if not folder.shown:
        reasons = "\n".join(failure["error"] for failure in manifest.failures)
        raise InputError(reasons if len(jobs) == 1 else f"No picture could be used.\n{reasons}")
    manifest.second_eye = None if eye is None else eye.content()
    folder.complete()
    return manifest


def to_row(done: Reconstruction) -> GridRow:
    """Returns the row of one image in the grid; maps of what is determined follow the samples."""
    original = done.original or Image.new("RGB", done.samples[0].size, "white")
    samples, captions = list(done.samples), to_captions(done.cosine)
    if done.certainty is not None:
        for part in PIXEL_PARTS:
            samples.append(draw_map(done.certainty.determined(part), samples[0].size))
            captions.append(f"{done.certainty.share(part):.0%} determined")
    return GridRow(original, done.job.name, samples, captions)


def to_captions(cosines: Sequence[float]) -> list[str]:
    """Returns the words under each sample."""
    return [f"cosine {round(value, 2) + 0.0:.2f}" for value in cosines]  # and never -0.00


def make_grid(rows: Sequence[GridRow], manifest: Manifest) -> Grid:
    """Puts the rows under a heading that tells the settings and the shuffled null."""
    parts = [] if manifest.settings is None else _setting_parts(manifest.settings)
    if len(rows) < len(manifest.images):
        parts.append(f"first {len(rows)} of {len(manifest.images)} pictures")
    null = manifest.mean("cosine_shuffled")
    name = "" if manifest.settings is None else f"{manifest.settings.backbone} "
    headers, explained = [], ""
    if manifest.certainty:
        n_samples = len(rows[0].samples) - len(PIXEL_PARTS)
        headers = [f"sample {j}" for j in range(n_samples)] + [DRAWN[p] for p in PIXEL_PARTS]
        explained = f"\n{DETERMINED}"
    eye = "" if manifest.second_eye is None else f"\n{second_eye_line(manifest.second_eye)}"
    return Grid(
        rows,
        title=f"From {name}features back to pictures",
        subtitle=f"{' · '.join(parts)}\nUnder each sample: cosine of its features to the "
        f"original's, mean over cells. With the original's cells shuffled: {null:.2f} on average."
        f"{explained}{eye}",
        headers=headers,
    )


def _setting_parts(s: SampleSettings) -> list[str]:
    if s.is_deterministic:
        weights = [_short(s.pipeline)] if s.pipeline else []
        return [f"inverter {_short(s.inverter)}", *weights, f"stage {s.stage}"]
    if s.inverter in BY_GRADIENT:
        what = _short(s.pipeline) if s.pipeline else s.parametrise
        layer, steps = f"layer {s.layer}", f"{s.steps} steps"
        return [f"inverter {s.inverter}", what, layer, steps, f"seed {s.seed}"]
    return [
        _short(s.pipeline or ""),
        f"layer {s.layer}",
        f"{s.steps} steps" + (f" of {s.scheduler}" if s.scheduler else ""),
        f"guidance {s.guidance} {s.guidance_scale:g}",
        f"strength {s.strength:g}",
        *([refined_by(s.refine, s.refine_at)] if s.refine else []),
        f"seed {s.seed}",
    ]


def _short(name: str) -> str:
    return Path(name).name if Path(name).is_absolute() else name
