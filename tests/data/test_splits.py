"""Which files of a folder are a split: never those of another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from featinv_diffusion.data.sets import find_split
from featinv_diffusion.errors import InputError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def names_of(folder: Path, asked: str) -> tuple[str | None, list[str]]:
    part = find_split(folder, asked)
    return part.split, [Path(file).relative_to(folder).as_posix() for file in part.files]


def test_a_folder_without_split_names_is_taken_whole(tmp_path: Path):
    assert names_of(touch(tmp_path, "b.parquet", "a.parquet"), "validation") == (
        None,
        ["a.parquet", "b.parquet"],
    )
    part = find_split(touch(tmp_path / "photos", "cat/1.png", "trainers/2.png"), "validation")
    assert (part.folder, part.split, part.files) == (str(tmp_path / "photos"), None, ())


@pytest.mark.parametrize("asked", ["val", "validation"])
@pytest.mark.parametrize("there", ["val", "validation"])
def test_val_is_validation(tmp_path: Path, asked: str, there: str):
    files = touch(tmp_path / "files", f"{there}-0.parquet", f"{there}-1.parquet", "train-0.parquet")
    assert names_of(files, asked) == (there, [f"{there}-0.parquet", f"{there}-1.parquet"])
    folders = find_split(touch(tmp_path / "folders", f"{there}/cat/1.png", "train/x.png"), asked)
    assert (Path(folders.folder).name, folders.split) == (there, there)
    inner = touch(tmp_path / "inner", f"{there}/part-0.parquet", "train/part-0.parquet")
    assert names_of(inner, asked) == (there, [f"{there}/part-0.parquet"])


def test_the_exact_name_wins_and_the_two_never_mix(tmp_path: Path):
    both = touch(tmp_path, "val-0.parquet", "validation-0.parquet")
    assert names_of(both, "validation") == ("validation", ["validation-0.parquet"])
    assert names_of(both, "val") == ("val", ["val-0.parquet"])


@pytest.mark.parametrize(
    ("names", "listed"),
    [
        (("train-0.parquet", "test-0.parquet"), "test, train"),
        (("train-0.parquet", "more.parquet"), "train"),
        (("train/cat/1.png", "test/cat/1.png"), "train, test"),
    ],
)
def test_other_splits_are_listed_and_not_taken(tmp_path: Path, names, listed: str):
    with pytest.raises(InputError, match=rf"the split 'validation', but holds {listed}\."):
        find_split(touch(tmp_path, *names), "validation")
