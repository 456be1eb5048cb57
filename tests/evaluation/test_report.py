"""Figures of hand-made columns, and the page that shows them."""

from __future__ import annotations

import numpy as np
import pytest

from featinv_diffusion.evaluation.report import (
    _label_lines,
    cosine_bars,
    describe,
    interval,
    normalised_agreement,
    summarise,
    to_cell,
    to_markdown,
)
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.settings import SampleSettings

NAN = float("nan")


def columns(**values) -> dict[str, np.ndarray]:
    return {name: np.array(column, dtype=np.float64) for name, column in values.items()}


def test_a_figure_stands_beside_its_nulls_and_each_says_how_many_images_it_rests_on():
    figures = summarise(
        columns(
            cosine=[0.5, 0.7, 0.9],
            other_image_cosine=[0.1, 0.2, 0.3],
            permuted_cells_cosine=[NAN, 0.4, NAN],
        )
    )
    cosine = figures["cosine"]
    assert cosine["value"] == pytest.approx(0.7)
    assert 0.2 < cosine["low"] < 0.7 < cosine["high"] < 1.2  # Student's, of three
    assert cosine["n"] == 3
    assert cosine["nulls"]["other_image"]["value"] == pytest.approx(0.2)
    assert cosine["nulls"]["permuted_cells"] == {"value": 0.4, "low": 0.4, "high": 0.4, "n": 1}
    assert cosine["nulls"]["prior_only"] is None
    assert "psnr" not in figures
    assert figures["label_accuracy"] == {"original": None, "reconstruction": None}
    assert figures["ceilings"] == {"vae_round_trip": None, "resized_original": None}


def test_other_backbones_have_nulls_too():
    figures = summarise(
        columns(
            cosine=[1, 1],
            evaluated_by_swin_cosine=[0.2, 0.4],
            prior_only_evaluated_by_swin_cosine=[0.0, 0.1],
        ),
        ["swin"],
    )
    cosine = figures["evaluated_by"]["swin"]["cosine"]
    assert cosine["value"] == pytest.approx(0.3)
    assert cosine["nulls"]["prior_only"]["value"] == pytest.approx(0.05)


def test_normalised_agreement_is_a_ratio_of_means_over_images_that_have_all_three():
    figure = normalised_agreement(
        columns(
            cosine=[0.5, 0.7, 100],
            other_image_cosine=[0.1, 0.3, NAN],
            vae_round_trip_cosine=[0.9, 0.9, 0.9],
        )
    )
    assert figure is not None
    assert figure["value"] == pytest.approx((0.6 - 0.2) / (0.9 - 0.2))
    assert figure["n"] == 2


def test_normalised_agreement_is_absent_without_an_autoencoder_or_a_span():
    assert normalised_agreement(columns(cosine=[1], other_image_cosine=[0])) is None
    flat = columns(cosine=[1, 1], other_image_cosine=[0, 0], vae_round_trip_cosine=[0, 0])
    assert normalised_agreement(flat) is None


def test_a_column_without_a_value_is_none():
    assert interval(columns(a=[NAN, NAN]), "a") is None
    assert interval(columns(a=[1.0]), "b") is None


def test_normalised_agreement_is_absent_where_the_span_may_change_its_sign():
    unsure = columns(
        cosine=[0.5, 0.5, 0.5, 0.5],
        other_image_cosine=[0.9, 0.1, 0.1, 0.1],
        vae_round_trip_cosine=[0.4, 0.6, 0.6, 0.6],  # below on some resamples, above in the mean
    )
    assert normalised_agreement(unsure) is None
    below = columns(cosine=[0.5] * 2, other_image_cosine=[0.9] * 2, vae_round_trip_cosine=[0.4] * 2)
    assert normalised_agreement(below) is None


# ---- the page ------------------------------------------------------------------------------------


def test_cells():
    assert to_cell(None) == "–"
    figure = {"value": 0.5, "low": 0.25, "high": 0.625}
    assert to_cell(figure) == "0.500 [0.250, 0.625]"
    assert to_cell(figure, "top5_match") == "50.0 % [25.0, 62.5]"
    assert to_cell({"value": 21.5, "low": 20, "high": 23}, "psnr") == "21.50 [20.00, 23.00]"


def test_a_page():
    ones = np.ones(2)
    columns = {"cosine": ones / 2, "other_image_cosine": ones / 4, "vae_round_trip_cosine": ones}
    columns |= {"evaluated_by_swin_cosine": ones / 8, "lpips": ones / 2}
    columns |= {"permuted_cells_cosine": np.array([0.25, np.nan])}
    sampling = SampleSettings(
        pipeline="p",
        backbone="convnext",
        layer="last",
        steps=5,
        scheduler="ddim",
        guidance="text",
        guidance_scale=2.0,
    )
    settings = EvaluationSettings(data="photos", evaluated_by=("swin",), sampling=sampling)
    metrics = {
        **summarise(columns, ["swin"]),
        "distribution": {
            "fid": {"value": 12.3456, "n": 2, "n_reference": None, "rank_deficient": True},
            "kid": {"value": 0.5, "n": 2, "n_reference": 3},
        },
        "partial_failures": [{"id": "b", "figure": "prior_only", "error": "NaN"}],
        "notes": ["Look out."],
        "data": {"n_classes": None},
        "n_images": 2,
        "failures": [{"id": "a", "error": "broken"}],
        "settings": settings.content(),
        "command": "featinv evaluate",
    }
    page = to_markdown(metrics)
    half = "0.500 [0.500, 0.500]"
    quarter = "0.250 [0.250, 0.250]"
    row = f"| cosine | {half} | {quarter} | {quarter}, n = 1 | – | 1.000 [1.000, 1.000] | – |"
    assert row in page
    assert f"| LPIPS, lower is better | {half} |" in page
    assert "Normalised agreement: 0.333 [0.333, 0.333]." in page
    assert f"| convnext | – | {half} | – | – | 0.333 [0.333, 0.333] |" in page
    assert "| swin | – | 0.125 [0.125, 0.125] | – | – | – |" in page
    assert "| fid | 12.35 (rank-deficient) | 2 | unknown |" in page
    assert "| kid | 0.5 | 2 | 3 |" in page
    assert "only at equal n" in page
    assert "Figures of 1 image are missing: prior_only." in page
    assert "Note: Look out." in page
    assert "Label accuracy" not in page
    assert "1 images could not be measured" not in page
    assert "1 image could not be measured." in page


def test_how_labels_were_matched_is_said():
    figure = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 2}
    labels = {"original": figure, "reconstruction": figure, "labels_matched_by": "number"}
    page = {"label_accuracy": labels, "n_images": 2, "data": {"n_classes": 3}}
    (line,) = _label_lines(page)
    assert line.endswith("labels and classes are matched by number.")
    (line,) = _label_lines({**page, "label_accuracy": {**labels, "original": None}})
    assert line.endswith("match no classes of the backbone.")


def test_what_was_not_measured_is_in_no_bar_and_no_sentence():
    ones = np.ones(2)
    figures = summarise({"cosine": ones / 2, "resized_original_cosine": ones})
    metrics = {**figures, "n_images": 1}
    assert describe(metrics) == "1 image: cosine 0.500 [0.500, 0.500]."
    heights = [bar.get_height() for bar in cosine_bars(metrics).axes[0].patches]
    assert heights == [0.5, 1]
