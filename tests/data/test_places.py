"""What is listed below a folder, on disk and behind a URL, and what a pattern means."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from featinv_diffusion.data.places import expand, list_pictures, read_bytes, to_place
from featinv_diffusion.errors import InputError

FILES = ["b/2.JPG", "b/10.png", "a.jpeg", "notes.txt", ".hidden.png", ".cache/x.png"]
FILES += ["._a.jpeg", "__MACOSX/b/10.png", "b/.ipynb_checkpoints/2.JPG", "b/table.csv"]


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = str(tmp_path) if request.param == "disk" else f"memory://{tmp_path.name}"
    files, path = fsspec.core.url_to_fs(root)
    for name in FILES:
        files.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
        files.pipe_file(f"{path}/{name}", b"x")
    return root


def test_a_listing_is_sorted_recursive_and_by_suffix_without_hidden_ones(folder: str) -> None:
    listing = list_pictures(folder)
    assert listing.names == ["a.jpeg", "b/10.png", "b/2.JPG"]
    assert listing.left_out.notes() == (
        "Left out 7 files: 5 hidden, 2 with another suffix (.csv, .txt).",
    )


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="holds no picture; looked for"):
        list_pictures(tmp_path)
    with pytest.raises(InputError, match="there is nothing"):
        list_pictures(tmp_path / "nowhere")


def test_linked_folders_are_followed_but_not_into_themselves(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real/a.png").touch()
    (tmp_path / "real/loop").symlink_to(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    listing = list_pictures(tmp_path)
    assert listing.names == ["link/a.png", "real/a.png"]
    assert listing.has_links


def test_patterns(tmp_path: Path) -> None:
    for name in ("a-008.tar", "a-009.tar", "a-010.tar", "b.tar"):
        (tmp_path / name).touch()
    assert expand(f"{tmp_path}/a-{{008..010}}.tar") == [
        f"{tmp_path}/a-{i}.tar" for i in ("008", "009", "010")
    ]
    names = ("b", "a-008", "a-009", "a-010")
    assert expand(f"{tmp_path}/{{b,a-*}}.tar") == [f"{tmp_path}/{name}.tar" for name in names]
    assert expand(f"{tmp_path}/b.tar") is None


def test_a_url_keeps_its_slashes_in_a_path() -> None:
    assert to_place(Path("s3://bucket/a.png")) == "s3://bucket/a.png"
    assert to_place("file:///tmp/a.png") == "/tmp/a.png"


def test_a_place_that_cannot_be_read_is_named() -> None:
    with pytest.raises(InputError, match=r"memory://none/a\.png cannot be read"):
        read_bytes("memory://none/a.png")
    with pytest.raises(InputError, match="nosuch://a cannot be read"):
        read_bytes("nosuch://a")
