"""Figures of hand-made columns."""

from __future__ import annotations

import numpy as np
import pytest

from featinv_diffusion.evaluation.report import interval, normalised_agreement, summarise

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
    assert 0.5 <= cosine["low"] < 0.7 < cosine["high"] <= 0.9
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
