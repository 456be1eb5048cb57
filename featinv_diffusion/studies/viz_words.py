"""What FeatInv-Viz found, in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from featinv_diffusion.metrics.statistics import Interval

if TYPE_CHECKING:
    from featinv_diffusion.studies.featinv_viz import ConceptViz


def summarise(found: ConceptViz) -> str:
    """Returns what the samples show of the concept, of the class, and where; a line each."""
    lines = [_what(found), _null(found), _activation(found), _change(found)]
    lines += [_class(found), _where(found), _inside(found)]
    return "\n".join(line for line in lines if line)


def beside_null(found: ConceptViz, measure: str, digits: int, sign: str = "") -> str:
    """Returns how many nulls show at least as much, after their mean."""
    mean, n = found.null_mean(measure), len(found.nulls)
    p_value = found.p_value(measure)
    if mean is None:
        return "no null"
    words = f"null {mean:{sign}.{digits}f}"
    if p_value is None:
        return words
    n_above = round(p_value * (n + 1)) - 1
    return f"{words}; {n_above} of {n} show as much"


def _interval(value: Interval, digits: int, sign: str = "") -> str:
    low, high = (f"{each:{sign}.{digits}f}" for each in (value.low, value.high))
    return f"{value.value:{sign}.{digits}f} [{low}, {high}]"


def _what(found: ConceptViz) -> str:
    basis = f", {found.concept_basis}," if found.concept_basis else ""
    return (
        f"Concept {found.arguments['concept']}{basis} holds {found.part_energy:.0%} of the map's "
        f"energy; at factor {found.factor:g} the samples show the following, with 95 % intervals "
        "over seeds."
    )


def _null(found: ConceptViz) -> str:
    n = len(found.nulls)
    if not found.has_null:
        return (
            "There is no null: this part is as long as all that the map has in the span of "
            f"{found.span}, so that no random subspace of it is as long."
        )
    return f"Null: equally long parts in {n} random subspaces of {found.span}, at the same factor."


def _activation(found: ConceptViz) -> str:
    ratio = found.own_effect.interval("activation_ratio")
    if ratio is None:
        return "The concept is active in none of the unedited samples."
    return (
        "Its activation in the samples' own features, after ÷ before, is "
        f"{_interval(ratio, 2)} ({beside_null(found, 'activation_ratio', 2)})."
    )


def _change(found: ConceptViz) -> str:
    realised, arrived = map(found.own_effect.interval, ("realised_change", "arrived"))
    assert realised is not None
    assert arrived is not None
    reached = 1 - arrived.value * (1 - found.factor)
    return (
        "These features change along the direction that was asked with a cosine of "
        f"{_interval(realised, 2)} ({beside_null(found, 'realised_change', 2)}), and "
        f"{arrived.value:.0%} of the change arrives, as if the factor were {reached:.2f} "
        f"({beside_null(found, 'arrived', 2)})."
    )


def _class(found: ConceptViz) -> str:
    change = found.own_effect.interval("class_probability_change")
    if change is None:
        return ""
    index = found.class_index
    before, after = (d.mean_probability(index) for d in (found.before, found.after))
    return (
        f"Class probability of {found.class_words}: {before:.2f} before, {after:.2f} after, "
        f"{_interval(change, 2, '+')} ({beside_null(found, 'class_probability_change', 2, '+')})."
    )


def _where(found: ConceptViz) -> str:
    noise = found.other_noise
    scale = (
        "; a deterministic inverter has no other noise"
        if noise is None
        else f"; other noise without an edit moves it by {noise:.3f}"
    )
    moved = (
        f"A pixel moves by {found.own_effect.effect:.3f} on average "
        f"({beside_null(found, 'effect', 3)}{scale})"
    )
    if not found.is_above_null:
        return f"{moved}. This is not above the null, so that no pixel is marked as affected."
    return (
        f"{moved}; {found.affected.double().mean().item():.0%} of the pixels move more than with "
        f"each of the nulls ({1 / (len(found.nulls) + 1):.0%} by chance)."
    )


def _inside(found: ConceptViz) -> str:
    share = found.own_effect.interval("energy_inside")
    signed = found.own_effect.interval("signed_change")
    if not found.cells.any():
        return f"The concept is active nowhere in this picture ({found.active_rule})."
    if share is None or signed is None:
        return ""
    area = found.cells.double().mean().item()
    return (
        f"{share.value:.0%} of the change lies where the concept is active, {area:.0%} of the "
        f"picture ({beside_null(found, 'energy_inside', 2)}); there pixels change by "
        f"{_interval(signed, 3, '+')} in mean RGB ({beside_null(found, 'signed_change', 3, '+')})."
    )
