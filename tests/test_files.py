"""Files are whole or absent."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from featinv_diffusion import files
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import holding, replacing, write_text


def test_a_file_appears_at_the_end_only(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with replacing(path) as partial:
        partial.write_text("half")
        assert not path.exists()
        assert partial.parent == path.parent  # else the move would be a copy
    assert path.read_text() == "half"
    assert list(path.parent.iterdir()) == [path]


def write_half(path: Path) -> None:
    with replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError("boom")


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old ü")
    with pytest.raises(RuntimeError, match="boom"):
        write_half(path)
    assert path.read_text(encoding="utf-8") == "old ü"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_names_the_file_itself(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, replacing(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.txt")
    assert caught.value.filename2 is None


def test_a_lock_follows_no_link(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("keep me")
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / ".lock-owner").symlink_to(precious)
    with holding(folder):
        assert "on" in (folder / ".lock-owner").read_text()
    assert precious.read_text() == "keep me"
    (folder / ".lock").symlink_to(precious)
    with pytest.raises(InputError, match="is a link"), holding(folder):
        pass
    assert precious.read_text() == "keep me"


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    """safetensors itself draws the order of the metadata anew in each write."""
    tensors = {"b": torch.arange(4.0), "a": torch.ones(2, 3, dtype=torch.float16)}
    header = {"names": ["ä", 'a "quoted" name\n'], "spec": None}
    written = []
    for i in range(12):
        files.write_tensors(tmp_path / f"{i}.safetensors", tensors, header, "some format")
        written.append((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(set(written)) == 1
    found, read = files.read_tensors(tmp_path / "0.safetensors", "some format", "")
    assert read == header
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
