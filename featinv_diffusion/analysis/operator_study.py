"""The study of `featinv operator analyze`: an operator's eigenvalues, and what it does held out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from featinv_diffusion.analysis.operator_figures import (
    write_measures,
    write_pictures,
    write_powers,
    write_spectra,
)
from featinv_diffusion.analysis.operator_fit import Advance, Drawn
from featinv_diffusion.analysis.operator_measures import (
    CEILING,
    FLOOR,
    OPERATOR,
    HeldOut,
    check_powers,
    measure_held_out,
    summarise_power,
)
from featinv_diffusion.analysis.operator_spectrum import measure_spectrum
from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.evaluation.fingerprints import weights_sha256
from featinv_diffusion.evaluation.selection import digest
from featinv_diffusion.features.operator_methods import LINEAR
from featinv_diffusion.features.operators import Operator
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.metrics.statistics import Interval
from featinv_diffusion.pixel_operations import PixelOperation, make_operation

POWERS = {"suppress": (1, 4, 8, 12), "swap": (1, 2)}
"""Powers that are measured unless others are asked for; of other operations 1 alone."""


def operation_of(operator: Operator) -> PixelOperation:
    """Returns the operation on pixels that an operator was fitted for.

    Raises:
        InputError: it was none of `pixel_operations.OPERATIONS`; pass it to `study_operator`.
    """
    return make_operation(operator.record.operation, **operator.record.parameters)


def default_powers(operation: PixelOperation) -> tuple[int, ...]:
    """Returns the powers that are measured unless others are asked for."""
    return POWERS.get(operation.name, (1,))


def study_operator(
    operator: Operator,
    operation: PixelOperation,
    backbone: Backbone,
    drawn: Iterable[Drawn],
    folder: Path,
    *,
    inverter: Inverter | None = None,
    powers: Sequence[int] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    advance: Advance = lambda n: None,
) -> dict[str, Any]:
    """Measures an operator on images of no part in its fit, writes figures, returns the numbers.

    Args:
        drawn: images that the operator was not fitted on.
        inverter: of the backbone's features; it was never used in the fit. None leaves pixels out.
        powers: default by operation, see `POWERS`; of the first, pictures and measures are drawn.

    Raises:
        InputError: an operator of other features or weights, and as `measure_held_out`.
    """
    operator.check(backbone.spec, weights_sha256({"": backbone.model}))
    powers = default_powers(operation) if powers is None else powers
    check_powers(powers)
    spectra = [measure_spectrum(operator, n) for n in powers]  # refuses powers before the work
    found = measure_held_out(
        operator,
        operation,
        backbone,
        drawn,
        inverter=inverter,
        powers=powers,
        batch_size=batch_size,
        seed=seed,
        advance=advance,
    )
    summaries = {n: summarise_power(found.columns[n]) for n in powers}
    title = f"{operation} on {operator.spec.backbone}, {operator.record.method} operator"
    write_spectra(spectra, title, folder / "eigenvalues.png")
    write_measures(summaries[powers[0]], powers[0], title, folder / "measures.png")
    _write_pictures(found, title, folder)
    record = asdict(operator.record)
    record["n_images"] = len(record.pop("image_digests"))
    return {
        "operator": {**record, "spec": asdict(operator.spec)},
        "spectrum": [spectrum.figures() for spectrum in spectra],
        "n_images": len(found.ids),
        "ids_sha256": digest(found.ids),
        "seed": seed,
        "held_out": {str(n): _to_dicts(summaries[n]) for n in powers},
    }


def _write_pictures(found: HeldOut, title: str, folder: Path) -> None:
    if not found.is_inverted:
        return
    note = f"Of {len(found.ids)} images that the operator was not fitted on; R is the inverter."
    first = next(iter(found.columns))
    write_pictures(found.pictures, first, title, [note], folder / "pictures.png")
    if len(found.columns) > 1:
        write_powers(found.pictures, title, [note], folder / "powers.png")


def _to_dicts(summary: Mapping[str, Interval | None]) -> dict[str, Any]:
    return {k: None if value is None else asdict(value) for k, value in summary.items()}


def to_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Returns what the terminal says: the fit, the eigenvalues, and the measures of each power."""
    lines = []
    for spectrum in metrics["spectrum"]:
        moduli = spectrum["modulus"]
        lines.append(
            f"Power {spectrum['power']}: {spectrum['n_near_plus_one']} eigenvalues near +1 and "
            f"{spectrum['n_near_minus_one']} near −1 (within {spectrum['tolerance']:g}), "
            f"{spectrum['n_negative_real']} with a negative real part, of "
            f"{spectrum['n_eigenvalues']}; moduli {moduli['min']:.3f} … {moduli['max']:.3f}, "
            f"twice is {spectrum['twice_from_identity']:.3f} from the identity."
        )
    for power, held in metrics["held_out"].items():
        parts = [f"cosine {_cell(held['cosine'])}, doing nothing {_cell(held['cosine_nothing'])}"]
        for metric, name in (("delta_e", "ΔE2000"), ("mse", "MSE")):
            if f"{metric}_floor" in held:
                parts.append(_between(held, metric, name))
        lines.append(f"Held out, power {power}: {'; '.join(parts)}.")
    if metrics["operator"]["method"] == LINEAR:
        lines.append("Eigenvalues are of Q alone; features are scaled to unit norm after it.")
    return lines


def _between(held: Mapping[str, Any], metric: str, name: str) -> str:
    values = [held[f"{metric}_{role}"]["value"] for role in (FLOOR, OPERATOR, CEILING)]
    floor, found, ceiling = (f"{value:.4g}" for value in values)
    stands = f"{found} between" if values == sorted(values) else f"{found}, beside"
    position = held[f"{metric}_position"]
    where = _why_none(held[f"{metric}_room"]) if position is None else f"position {_cell(position)}"
    return f"{name} {stands} {floor} (floor) and {ceiling} (doing nothing), {where}"


def _why_none(room: Mapping[str, float]) -> str:
    if room["high"] < 0:
        return "no position: the floor is above doing nothing"
    return "no position: floor and doing nothing do not differ"


def _cell(interval: Mapping[str, float]) -> str:
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
