"""Figures: text stays text, bytes repeat, borders of regions are where they are."""

from __future__ import annotations

import itertools

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from featinv_diffusion.errors import InputError
from featinv_diffusion.figures import board as figures
from featinv_diffusion.figures.board import Board


def make_figure():
    board = Board(1, 2, "A title", ["a note"], right=0.8)
    figure = board.make()
    first, second = (board.tile_axes(figure, 0, column) for column in range(2))
    figures.show_picture(first, torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)))
    figures.outline(first, torch.eye(2, dtype=torch.bool))
    figures.label(first, "a label")
    image = figures.show_map(second, torch.eye(4), 0, 1)
    figures.add_colour_bar(board, figure, 0, image, "a scale")
    return figure


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg", ".PNG"])
def test_each_suffix_is_its_format_and_bytes_repeat(tmp_path, suffix):
    for name in ("one", "two"):
        figures.write_figure(make_figure(), tmp_path / f"{name}{suffix}")
    one, two = ((tmp_path / f"{name}{suffix}").read_bytes() for name in ("one", "two"))
    assert one == two
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    assert one.startswith(starts[suffix.lower()])


def test_text_stays_text(tmp_path):
    figures.write_figure(make_figure(), tmp_path / "f.svg")
    svg = (tmp_path / "f.svg").read_text()
    for words in ("A title", "a note", "a label", "a scale"):
        assert f">{words}</text>" in svg
    figures.write_figure(make_figure(), tmp_path / "f.pdf")
    assert b"/Type3" not in (tmp_path / "f.pdf").read_bytes()


def test_a_tile_is_square_and_its_picture_fills_it(tmp_path):
    board = Board(2, 3, "", [])
    figure = board.make()
    box = board.tile_axes(figure, 1, 2).get_position()
    assert box.width * board.width == pytest.approx(board.tile)
    assert box.height * board.height == pytest.approx(board.tile)
    assert 0 < box.y0 < box.y1 < 0.55
    assert box.x1 * board.width == pytest.approx(board.width - board.margin)
    figures.write_figure(figure, tmp_path / "f.png")
    width, height = Image.open(tmp_path / "f.png").size
    assert width / height == pytest.approx(board.width / board.height, rel=0.01)


def test_the_border_of_a_region():
    mask = torch.zeros(4, 2, dtype=torch.bool)
    mask[1, 0] = True
    assert sorted(figures.border_lines(mask)) == [
        ((0, 0.25), (0, 0.5)),
        ((0, 0.25), (0.5, 0.25)),
        ((0, 0.5), (0.5, 0.5)),
        ((0.5, 0.25), (0.5, 0.5)),
    ]
    assert figures.border_lines(torch.zeros(4, 2, dtype=torch.bool)) == []
    assert len(figures.border_lines(torch.ones(4, 2, dtype=torch.bool))) == 2 * (4 + 2)


@pytest.mark.parametrize("name", ["figure", "figure.jpg", "a/figure.png", "../f.png", "", ".png"])
def test_names_that_no_figure_can_have(name):
    with pytest.raises(InputError, match="file name that ends in"):
        figures.check_name(name)


def test_a_heading_is_wrapped_to_a_narrow_figure(tmp_path):
    words = "many words that no figure of one single tile could ever hold in a single line"
    board = Board(1, 1, words, [words])
    figure = board.make()
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.texts]
    assert len(boxes) > 4
    assert max(box.x1 for box in boxes) <= figure.bbox.width
    tile = board.tile_axes(figure, 0, 0).get_window_extent(renderer)
    assert min(box.y0 for box in boxes) > tile.y1
    assert all(above.y0 >= below.y1 - 1 for above, below in itertools.pairwise(boxes))


def test_labels_are_moved_apart_and_keep_their_order():
    moved = figures.spread([0.5, 0.1, 0.5, 0.45], 0.1)
    assert moved[1] == 0.1
    assert moved[3] < moved[0] < moved[2]
    ordered = sorted(moved)
    assert min(b - a for a, b in itertools.pairwise(ordered)) > 0.0999


def test_headers_above_the_first_row_alone_take_less_room():
    all_rows, first = (Board(3, 1, "", [], headers=which) for which in ("all", "first"))
    assert first.height == pytest.approx(all_rows.height - 2 * (first.header - first.gap))
    tops = [first.tile_axes(first.make(), row, 0).get_position().y1 for row in range(3)]
    assert (tops[0] - tops[1]) * first.height == pytest.approx(first.tile + 0.2 + first.gap)


def test_long_and_odd_names_fit_under_a_tile():
    assert figures.short_name("/x/a$b$.png") == r"a\$b\$"
    short = figures.short_name("/x/" + "long" * 20 + "_end.png")
    assert len(short) <= 20
    assert short.endswith("_end")
    assert figures.number(-0.001) == "0.00"
