"""The figures of fitted concepts: as numbers, and as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from featinv_diffusion.analysis.concept_fit import Fitted
from featinv_diffusion.analysis.sampling import to_list
from featinv_diffusion.concepts.subspaces import completeness, orthonormal_rows

HEADER = ("concept", "dimensions", "relevance", "completeness", "energy")


def describe(fitted: Fitted) -> dict[str, Any]:
    """Returns all figures; those of relevance are None where it is not defined.

    `relevance` is ‖w_l‖ of the split of the class's unit direction over the concepts,
    `completeness` ‖P w‖ / ‖w‖ of one concept by itself or of all, `energy` the share of the cells'
    squared length that a part has (parts that are not orthogonal need not add up).
    """
    concepts, target = fitted.concepts, fitted.target
    direction = None if target is None else target.direction
    relevance = None if direction is None else to_list(concepts.global_relevance(direction))
    return {
        "backbone": fitted.spec.backbone,
        "layer": fitted.spec.layer,
        "kind": concepts.kind,
        "class_index": None if target is None else target.index,
        "class_name": None if target is None else target.name,
        "n_predicted": None if target is None else target.n_predicted,
        "n_images": len(fitted.images),
        "head": None if target is None or target.head is None else target.head.form,
        "completeness": None if direction is None else concepts.completeness(direction),
        "relevance_of_rest": None if relevance is None else relevance[-1],
        "energy": concepts.report.get("energy"),
        "concepts": [
            {
                "concept": k,
                "dimensions": concepts.sizes[k],
                "relevance": None if relevance is None else relevance[k],
                "completeness": None
                if direction is None
                else _completeness(concepts.basis(k), direction),
                "energy": fitted.energy[k].item(),
            }
            for k in range(concepts.n_concepts)
        ],
        "fit": concepts.report,
        "notes": list(fitted.notes),
    }


def to_table(fitted: Fitted) -> str:
    """Returns what is printed: the class, one line per concept, and the energy of each basis."""
    found = describe(fitted)
    rows = [_cells(row, row["concept"]) for row in found["concepts"]]
    total = {"dimensions": sum(fitted.concepts.sizes), "completeness": found["completeness"]}
    rows += [_cells(total, "all"), _cells({"relevance": found["relevance_of_rest"]}, "rest")]
    widths = [max(len(row[i]) for row in [HEADER, *rows]) for i in range(len(HEADER))]
    lines = [_line(row, widths) for row in [HEADER, *rows]]
    return "\n".join([_heading(found), *lines, *_energies(found), *fitted.notes])


def _heading(found: dict[str, Any]) -> str:
    pictures = f"{found['n_images']} pictures"
    if found["class_name"] is None:
        return f"{pictures}; the backbone does not classify."
    return (
        f"Class {found['class_index']}, {found['class_name']}: "
        f"{found['n_predicted']} of {pictures} are classified so."
    )


def _energies(found: dict[str, Any]) -> list[str]:
    """Says what share of the cells' energy each kind of basis holds, and by how many directions."""
    energy, fit = found["energy"], found["fit"]
    if not isinstance(energy, dict):
        return []
    sizes = {name: sum(listed) for name, listed in fit.get("dimensions", {}).items()}
    parts = [
        f"{name} {share:.3f}" + (f" in {sizes[name]} dimensions" if name in sizes else "")
        for name, share in energy.items()
    ]
    if equal := fit.get("energy_at_equal_dimensions"):
        both = ", ".join(f"{name} {share:.3f}" for name, share in equal.items())
        parts.append(f"with as many dimensions, which decides: {both}")
    return [
        f"Energy of the cells in the span of all concepts: {'; '.join(parts)}. "
        f"The {fit['basis']} basis is used."
    ]


def _completeness(basis: Tensor, direction: Tensor) -> float:
    unit = basis / basis.norm(dim=1, keepdim=True)
    return completeness(orthonormal_rows(unit), direction)


def _cells(row: dict[str, Any], name: object) -> list[str]:
    shares = [row.get(key) for key in HEADER[2:]]
    texts = ["" if share is None else f"{share:.3f}" for share in shares]
    return [str(name), str(row.get("dimensions", "")), *texts]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
