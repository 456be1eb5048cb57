"""The grid: every picture stands where its header says, whatever the sizes and names."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from featinv_diffusion.errors import InputError
from featinv_diffusion.figures import grid as viz
from featinv_diffusion.figures.board import plain_figure
from featinv_diffusion.figures.formats import figure_formats
from featinv_diffusion.figures.grid import GridRow, make_grid
from featinv_diffusion.runs.record import RunFolder

COLOURS = ("red", "lime", "blue", "yellow")


def make_row(n_samples: int = 3, size: int = 64, label: str = "a.jpg", first: int = 0) -> GridRow:
    pictures = [Image.new("RGB", (size, size), COLOURS[(first + i) % 4]) for i in range(4)]
    captions = [f"cosine 0.{i}" for i in range(n_samples)]
    return GridRow(pictures[0], label, pictures[1 : n_samples + 1], captions)


def tile_origins(grid: Image.Image, colour: str) -> list[tuple[int, int, int]]:
    """Left, top and width of the block of a colour, per row of the grid that has it."""
    wanted = np.array(Image.new("RGB", (1, 1), colour).getpixel((0, 0)))
    mask = (np.asarray(grid) == wanted).all(axis=2)
    rows = np.flatnonzero(mask.any(axis=1))
    starts = rows[np.flatnonzero(np.diff(rows, prepend=-2) > 1)]
    blocks = []
    for top in starts:
        columns = np.flatnonzero(mask[top])
        blocks.append((int(columns[0]), int(top), int(columns[-1] - columns[0] + 1)))
    return blocks


def test_every_picture_is_in_its_place_and_large_enough_to_label():
    grid = make_grid([make_row(), make_row(first=1)], title="Title", subtitle="sub")
    tile = 192  # 64 px, times the least whole number that makes it 160 or more
    lefts = [viz.MARGIN + column * (tile + viz.GAP) for column in range(4)]
    for column, colour in enumerate(COLOURS):
        (left, top, width), (left2, top2, _) = tile_origins(grid, colour)
        assert (left, width) == (lefts[column], tile)
        assert left2 == lefts[(column - 1) % 4]
        assert top2 - top > tile
    assert grid.width == 2 * viz.MARGIN + 4 * tile + 3 * viz.GAP


def test_below_each_tile_there_is_text():
    row = make_row()
    with_text = np.asarray(make_grid([row]))
    without = np.asarray(make_grid([GridRow(row.original, "", row.samples, ["", "", ""])]))
    assert with_text.shape == without.shape
    (_, top, tile), *_ = tile_origins(make_grid([row]), "red")
    changed = (with_text != without).any(axis=2)
    assert not changed[: top + tile].any()
    below = changed[top + tile :]
    for column in range(4):
        left = viz.MARGIN + column * (tile + viz.GAP)
        assert below[:, left : left + tile].any()


def test_headers_name_the_first_columns():
    plain, named = make_grid([make_row()]), make_grid([make_row()], headers=["convnext"])
    assert plain.size == named.size
    changed = (np.asarray(plain) != np.asarray(named)).any(axis=(0, 2)).nonzero()[0]
    left = viz.MARGIN + 192 + viz.GAP
    assert left < changed.min() < changed.max() < left + 192
    assert make_grid([make_row()], headers=["sample 0"]).tobytes() == plain.tobytes()


def test_pictures_of_256_pixels_keep_their_pixels():
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    grid = make_grid([GridRow(Image.new("RGB", (288, 288)), "a", [Image.fromarray(noise)], ["c"])])
    left = viz.MARGIN + 256 + viz.GAP
    window = np.lib.stride_tricks.sliding_window_view(np.asarray(grid)[:, left], 256, axis=0)
    assert (window == noise[:, 0].T[None]).all(axis=(1, 2)).any()


def test_rows_may_differ_in_their_number_of_samples():
    grid = make_grid([make_row(3), make_row(1)])
    assert len(tile_origins(grid, "lime")) == 2
    assert len(tile_origins(grid, "yellow")) == 1


def test_long_and_foreign_names_fit_their_tile():
    label = "a_very_long_file_name_that_would_run_into_the_next_picture_ñ_写真.JPEG"
    row = make_row(1, label=label)
    grid, empty = make_grid([row]), make_grid([make_row(1, label="")])
    changed = (np.asarray(grid) != np.asarray(empty)).any(axis=(0, 2))
    columns = np.flatnonzero(changed)
    assert columns[0] >= viz.MARGIN
    assert columns[-1] < viz.MARGIN + 192
    assert viz._shortened("0123456789", viz.load_font(15), 60)[-2:] == "89"


def test_letters_without_a_glyph_are_replaced():
    assert viz._drawable("naïve · 写真 …") == "naïve · ?? …"


@pytest.mark.parametrize("suffix", [".pdf", ".svg"])
def test_a_grid_is_drawn_on_the_board_too(tmp_path, suffix):
    """With the same words, as text that can be searched."""
    grid = viz.Grid([make_row(2), make_row(1)], title="Title", subtitle="one\ntwo", headers=["Q"])
    grid.write(tmp_path / f"grid{suffix}")
    written = (tmp_path / f"grid{suffix}").read_bytes()
    assert written.startswith({".pdf": b"%PDF", ".svg": b"<?xml"}[suffix])
    if suffix == ".svg":
        for words in ("Title", "one", "two", "original", "Q", "sample 1", "a", "cosine 0.1"):
            assert f">{words}</text>" in written.decode()


def test_figures_are_written_in_all_formats_that_are_asked_for(tmp_path):
    with figure_formats("svg", "png"):
        RunFolder(tmp_path).figure("grid.png", viz.Grid([make_row()]))
        RunFolder(tmp_path).figure("bars.pdf", plain_figure(2, 2)[0])
    RunFolder(tmp_path).figure("later.pdf", plain_figure(2, 2)[0])
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"grid.png", "grid.svg", "bars.pdf", "bars.svg", "bars.png", "later.pdf"}
    with pytest.raises(InputError, match="png, pdf, svg"), figure_formats("jpg"):
        pass


def test_many_rows():
    grid = make_grid([make_row(1) for _ in range(24)])
    assert len(tile_origins(grid, "red")) == 24


def test_no_rows_and_missing_captions():
    with pytest.raises(InputError, match="at least one row"):
        make_grid([])
    row = make_row()
    with pytest.raises(ValueError, match="shorter"):
        make_grid([GridRow(row.original, "a", row.samples, ["only one"])])
