"""`featinv encode` and `featinv decode`: pictures to files of feature maps, and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featinv_diffusion.cli import options, terminal
from featinv_diffusion.cli.command_line import command_line
from featinv_diffusion.errors import InputError
from featinv_diffusion.settings import SampleSettings

if TYPE_CHECKING:
    from featinv_diffusion.backbones import Backbone
    from featinv_diffusion.data.sets import ImageSet
    from featinv_diffusion.processes import Worker
    from featinv_diffusion.types import FeatureSpec

STRIP, FILM = "strip.png", "film.gif"


def encode(
    images: options.Images = None,
    backbone: Annotated[
        str, typer.Option(help="Name of the backbone, as `featinv layers` takes it.")
    ] = "tiny/convnext",
    layer: Annotated[str, typer.Option(help="Layer of the backbone.")] = "last",
    inverter: Annotated[
        str | None,
        typer.Option(help="Take backbone and layer of an inverter or pipeline instead."),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="File to write: .safetensors, .npy or .parquet.",
        ),
    ] = Path("outputs/maps.safetensors"),
    trust_code: Annotated[
        bool, typer.Option("--trust-code", help="Run the module that --backbone names.")
    ] = False,
    device: options.Device = "auto",
    worker: options.WorkerOption = None,
) -> None:
    """Write the feature maps of pictures to a file that `featinv decode` reads.

    The file holds the maps [b, c, h, w] in float32, the spec of the features and the names of the
    pictures; numpy, safetensors and parquet read it without this package. Many pictures can be
    shared among workers that never talk, with --worker; `featinv merge FILE` then writes the file.
    """
    import torch

    from featinv_diffusion.cli.run import quiet_libraries, say_notes
    from featinv_diffusion.data.sets import open_pictures
    from featinv_diffusion.features.maps import check_maps_path, write_maps
    from featinv_diffusion.images import builtin_photo
    from featinv_diffusion.processes import find_worker
    from featinv_diffusion.runs.record import reserved
    from featinv_diffusion.runs.sampling import encode_pictures

    quiet_libraries()
    options.check_file(output)
    check_maps_path(output)
    found = open_pictures(images or [builtin_photo()])
    say_notes(found)
    encoder = Encoder(backbone, layer, inverter, device)
    if (one := find_worker(worker)) is not None:
        raise typer.Exit(_work(one, encoder, list(images or []), found, output, trust_code))
    with reserved(output, is_file=True), torch.no_grad():
        model = encoder.open(trust_code=trust_code)
        maps = encode_pictures(model, found)
        write_maps(output, maps, model.spec)
    say_maps(len(maps), model.spec, output)


@dataclass(frozen=True)
class Encoder:
    """A backbone at a layer, or that of an inverter, by name."""

    backbone: str
    layer: str
    inverter: str | None
    device: str

    def open(self, *, trust_code: bool = False) -> Backbone:
        """Loads it."""
        from featinv_diffusion.backbones import load_backbone
        from featinv_diffusion.devices import find_device

        if self.inverter is not None:
            from featinv_diffusion.inverters.open import load_inverter

            return load_inverter(self.inverter, device=self.device).require_backbone()
        model = load_backbone(self.backbone, self.layer, trust_code=trust_code)
        return model.to(find_device(self.device))


def say_maps(n_maps: int, spec: FeatureSpec, output: Path) -> None:
    """Prints what a file of maps holds."""
    print(f"Wrote {output}: {n_maps} maps, each a {spec}.")
    terminal.finish({"n_maps": n_maps, "spec": asdict(spec)}, output)


def _work(
    worker: Worker,
    encoder: Encoder,
    images: list[str],
    found: ImageSet,
    output: Path,
    trust_code: bool,
) -> int:
    """Does a worker's share of the pictures; returns the exit code."""
    from featinv_diffusion.cli.run import end_worker
    from featinv_diffusion.runs.many import encode_units
    from featinv_diffusion.runs.parts import units_of
    from featinv_diffusion.runs.record import reserved
    from featinv_diffusion.runs.workers import Call

    folder = units_of(output)
    n_workers, line = worker.num_processes, command_line()
    call = Call("encode", n_workers, asdict(encoder), images, line=line)
    with reserved(folder, worker=worker):
        model = encoder.open(trust_code=trust_code)
        encode_units(worker, model, found, output, call)
    return end_worker(worker, folder, output)


@options.with_settings(SampleSettings, n_samples=1)
def decode(
    maps: Annotated[
        Path, typer.Argument(metavar="MAPS", help="A .safetensors, .npy, .npz or .parquet file.")
    ],
    film: Annotated[
        bool, typer.Option("--film", help=f"Also write the maps in order as {FILM}.")
    ] = False,
    *,
    settings: SampleSettings,
    output: options.Output = Path("outputs/decode"),
) -> None:
    """Turn the feature maps of a file into pictures.

    They are the very pictures that `featinv sample` makes of the pictures that were encoded, with
    the same settings. Several maps also give strip.png, the first sample of each in their order.
    """
    from featinv_diffusion.features.maps import is_maps_file

    options.check_folder(output)
    if not is_maps_file(maps):
        raise InputError(
            f"{maps} must be a file of feature maps (.safetensors, .npy, .npz or .parquet). "
            "`featinv encode` writes one."
        )
    decode_maps(settings, maps, output, film=film)


def decode_maps(
    settings: SampleSettings,
    maps: Path,
    output: Path,
    *,
    film: bool = False,
    certainty: bool = False,
) -> None:
    """Samples the maps of a file as `featinv sample` samples pictures, and writes everything."""
    from featinv_diffusion.cli.run import named_by, quiet_libraries, report
    from featinv_diffusion.features.maps import load_maps, spec_of
    from featinv_diffusion.figures.grid import make_strip, write_film
    from featinv_diffusion.images import write_png
    from featinv_diffusion.inverters.open import open_inverter
    from featinv_diffusion.runs.record import reserved
    from featinv_diffusion.runs.samples import sample

    quiet_libraries()
    with reserved(output):
        inverter = open_inverter(named_by(settings, spec_of(maps), maps))
        found = sample(
            inverter,
            load_maps(maps, inverter.spec),
            n_samples=settings.n_samples,
            seed=settings.seed,
            batch_size=settings.batch_size,
            progress=True,
            certainty=certainty,
        )
        found.save(output)
        firsts = [done.samples[0] for done in found.reconstructions]
        if len(firsts) > 1:
            write_png(make_strip(firsts), output / STRIP)
        if film:
            write_film(firsts, output / FILM)
    report(found.manifest, output)
