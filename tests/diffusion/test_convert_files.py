"""Checkpoint files: what is read, what is refused, and that nothing half-written stays."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from featinv_diffusion.diffusion.convert.folder import read_checkpoint, write_checkpoint
from featinv_diffusion.errors import InputError
from featinv_diffusion.files import new_folder

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3000)}


class RunsCode:
    """Creates a file when unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Plain:
    pass


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt", ".pth"])
def test_round_trip(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    write_checkpoint(path, TENSORS)
    read = read_checkpoint(path)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
def test_layouts_of_pytorch_files(tmp_path, wrapped, zipped):
    content = {"state_dict": TENSORS, "epoch": 3, "callbacks": {}} if wrapped else TENSORS
    torch.save(content, tmp_path / "m.ckpt", _use_new_zipfile_serialization=zipped)
    assert read_checkpoint(tmp_path / "m.ckpt").keys() == TENSORS.keys()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_refused_and_never_run(tmp_path, zipped):
    path, trace = tmp_path / "m.ckpt", tmp_path / "trace"
    torch.save(
        {"state_dict": TENSORS, "callbacks": RunsCode(trace)},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(InputError, match=r"holds a pickled object \(posix\.mkdir\)"):
        read_checkpoint(path)
    assert not trace.exists()
    torch.save({"state_dict": TENSORS, "extra": Plain()}, path)
    with pytest.raises(InputError, match=r"test_convert_files\.Plain\), which could run code"):
        read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kept", [0, 5, 5000])
def test_truncated_files(tmp_path, suffix, kept):
    path = tmp_path / f"m{suffix}"
    write_checkpoint(path, TENSORS)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match="is truncated or no"):
        read_checkpoint(path)


def test_other_content(tmp_path):
    for content, sentence in (
        ([1], "it holds a list"),
        (torch.ones(2), "it holds a Tensor"),
        ({"state_dict": {"x": 1}}, "but holds none"),
        ({"state_dict": [1]}, "holds a dict"),
    ):
        torch.save(content, tmp_path / "m.pt")
        with pytest.raises(InputError, match=sentence):
            read_checkpoint(tmp_path / "m.pt")
    with pytest.raises(InputError, match="must be a file"):
        read_checkpoint(tmp_path / "absent.ckpt")
    (tmp_path / "m.bin").write_bytes(b"x")
    with pytest.raises(InputError, match=r"\.safetensors, \.ckpt, \.pt, \.pth, got 'm\.bin'"):
        read_checkpoint(tmp_path / "m.bin")


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(TENSORS, path)
    with pytest.raises(InputError, match="must not exist yet"):
        write_checkpoint(path, {"c": torch.zeros(1)})
    assert load_file(path).keys() == TENSORS.keys()
    with pytest.raises(InputError, match="must not exist yet"), new_folder(tmp_path):
        pass


def write_half(target: Path, error: Exception) -> None:
    with new_folder(target) as folder:
        (folder / "half.bin").write_bytes(b"x")
        raise error


def test_a_full_disk_leaves_nothing(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(InputError, match=r"could not be written: .*No space left on device"):
        write_half(tmp_path / "out", full)
    assert not list(tmp_path.iterdir())


def test_an_error_in_the_block_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_half(tmp_path / "out", ZeroDivisionError())
    assert not list(tmp_path.iterdir())


def test_a_new_folder_has_the_permissions_of_mkdir(tmp_path):
    (tmp_path / "plain").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole.txt").write_text("x")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["whole.txt"]
