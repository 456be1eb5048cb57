"""The page of Markdown, from made-up figures."""

from __future__ import annotations

import numpy as np

from featinv_diffusion.evaluation.report import _label_lines, summarise, to_cell, to_markdown
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.settings import SampleSettings


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
    assert f"| convnext | {half} | – | – |" in page
    assert "| swin | 0.125 [0.125, 0.125] | – | – |" in page
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
