"""The page of Markdown, from made-up figures."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from featinv_diffusion.evaluation.report import to_cell, to_markdown
from featinv_diffusion.evaluation.settings import EvaluationSettings
from featinv_diffusion.evaluation.summary import summarise


def test_cells():
    assert to_cell(None) == "–"
    figure = {"value": 0.5, "low": 0.25, "high": 0.625}
    assert to_cell(figure) == "0.500 [0.250, 0.625]"
    assert to_cell(figure, "top5_match") == "50.0 % [25.0, 62.5]"
    assert to_cell({"value": 21.5, "low": 20, "high": 23}, "psnr") == "21.50 [20.00, 23.00]"


def test_a_page():
    ones = np.ones(2)
    columns = {"cosine": ones / 2, "other_image_cosine": ones / 4, "vae_round_trip_cosine": ones}
    columns |= {"evaluated_by_swin_cosine": ones / 8}
    settings = EvaluationSettings(
        data="photos",
        pipeline="p",
        backbone="convnext",
        layer="last",
        steps=5,
        scheduler="ddim",
        guidance="text",
        guidance_scale=2.0,
        evaluated_by=("swin",),
    )
    metrics = {
        **summarise(columns, ["swin"]),
        "distribution": {"fid": {"value": 12.3456, "n": 2, "n_reference": None}},
        "n_images": 2,
        "failures": [{"id": "a", "error": "broken"}],
        "settings": asdict(settings),
        "command": "featinv evaluate",
    }
    page = to_markdown(metrics)
    half = "0.500 [0.500, 0.500]"
    row = f"| cosine | {half} | 0.250 [0.250, 0.250] | – | – | 1.000 [1.000, 1.000] | – |"
    assert row in page
    assert "Normalised agreement: 0.333 [0.333, 0.333]." in page
    assert f"| convnext | {half} | – | – |" in page
    assert "| swin | 0.125 [0.125, 0.125] | – | – |" in page
    assert "| fid | 12.35 | 2 | unknown |" in page
    assert "1 images could not be measured" not in page
    assert "1 image could not be measured." in page
