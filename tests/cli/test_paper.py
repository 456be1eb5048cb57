"""`featinv paper`."""

from __future__ import annotations

import json
from pathlib import Path

from featinv_diffusion.papers.items import list_items
from featinv_diffusion.papers.page import to_lines
from tests.cli.conftest import Featinv

ITEMS = list_items()


def test_list_prints_a_line_for_each_item_and_json_holds_them(featinv: Featinv) -> None:
    done = featinv("paper", "list")
    assert done.code == 0, done.err
    assert all(item.name in done.out for item in ITEMS)
    assert to_lines(ITEMS).splitlines()[-1] in done.out
    content = json.loads(featinv("paper", "list", "--json").out)
    assert content["n_items"] == len(content["items"]) == 72
    assert {"name", "state", "command", "ours", "published", "verdict"} <= content["items"][
        0
    ].keys()


def test_a_run_that_is_refused_writes_nothing(featinv: Featinv, tmp_path: Path) -> None:
    output = tmp_path / "out"
    done = featinv("paper", "detr-figure-2", "--output", str(output))
    assert done.code == 2
    assert "boxes" in done.err
    assert not output.exists()
