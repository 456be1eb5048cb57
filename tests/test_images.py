"""Reading odd but valid pictures, refusing broken ones, and writing whole files."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import featinv_diffusion
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import (
    builtin_photo,
    center_square,
    read_image,
    to_pil,
    to_tensor,
    write_png,
)

RED, WHITE = (255, 0, 0), (255, 255, 255)


def make_photo(size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Noise, which no coder makes small: a file cut in the middle lacks pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_png_header(path: Path, width: int, height: int) -> None:
    """A PNG of a few bytes that declares any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 10)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


# ---- odd but valid ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "YCbCr"])
def test_plain_modes_are_converted_without_a_word(tmp_path, caplog, mode):
    path = tmp_path / ("a.jpg" if mode == "YCbCr" else "a.png")
    Image.new("RGB", (8, 8), "white").convert(mode).save(path)
    picture = read_image(path)
    assert picture.mode == "RGB"
    assert picture.getpixel((3, 3)) == WHITE
    assert not caplog.records


def test_cmyk_is_converted_and_said(tmp_path, caplog):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    picture = read_image(tmp_path / "a.jpg")
    assert picture.mode == "RGB"
    assert np.abs(np.subtract(picture.getpixel((4, 4)), RED)).max() <= 3
    assert "CMYK" in caplog.text


def test_sixteen_bits_are_scaled_not_clipped(tmp_path, caplog):
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    picture = read_image(tmp_path / "a.png")
    assert [picture.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]
    assert "16 bits" in caplog.text


def test_transparency_is_laid_over_white_and_said(tmp_path, caplog):
    pixels = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    picture = read_image(tmp_path / "a.png")
    half = round(255 * (1 - 128 / 255))
    assert [picture.getpixel((x, 0)) for x in range(3)] == [RED, WHITE, (half, half, half)]
    assert "over white" in caplog.text


def test_opaque_alpha_is_not_worth_a_word(tmp_path, caplog):
    Image.new("RGBA", (4, 4), (255, 0, 0, 255)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == RED
    assert not caplog.records


def test_transparent_palette_is_laid_over_white(tmp_path):
    picture = Image.new("P", (2, 1))
    picture.putpalette([255, 0, 0, 0, 0, 255])
    picture.putdata([0, 1])
    picture.save(tmp_path / "a.png", transparency=1)
    read = read_image(tmp_path / "a.png")
    assert [read.getpixel((x, 0)) for x in range(2)] == [RED, WHITE]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation_is_used_and_said(tmp_path, caplog, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    picture = read_image(path)
    assert np.abs(np.subtract(picture.getpixel((4, 4)), RED)).max() <= 3
    assert "3 frames; the first one is used" in caplog.text


def test_exif_rotation_is_applied(tmp_path):
    picture = make_photo((40, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture must be turned clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    turned = np.rot90(np.asarray(picture), k=-1)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png")), turned)


def test_broken_exif_leaves_the_picture_as_it_lies(tmp_path):
    make_photo().save(tmp_path / "a.jpg", exif=b"Exif\0\0" + b"garbage" * 5)
    assert read_image(tmp_path / "a.jpg").size == (40, 30)


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), RED).save(tmp_path / "a.png")
    square = center_square(read_image(tmp_path / "a.png"), 16)
    assert square.size == (16, 16)
    assert square.getextrema() == ((255, 255), (0, 0), (0, 0))


# ---- refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix", ["jpg", "png", "gif", "webp", "bmp", "tif", "avif", "ppm", "jp2"]
)
@pytest.mark.parametrize("share", [0.9, 0.5, 0.02, 0.0])
def test_a_file_that_is_cut_off(tmp_path, suffix, share):
    path = tmp_path / f"a.{suffix}"
    make_photo((64, 64)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InputError, match=r"cut off"):
        read_image(path)


def test_a_file_that_is_no_picture(tmp_path):
    (tmp_path / "a.jpg").write_text("hello")
    with pytest.raises(InputError, match=r"a\.jpg is not a picture that can be read"):
        read_image(tmp_path / "a.jpg")


def test_postscript_is_not_run(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(InputError, match="not a picture that can be read"):
        read_image(tmp_path / "a.png")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"there is nothing at .*none\.png"):
        read_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="there is a folder at"):
        read_image(tmp_path)


def test_thirty_two_bits_have_no_range(tmp_path):
    Image.fromarray(np.full((4, 4), 0.5, dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match="32-bit"):
        read_image(tmp_path / "a.tif")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path):
    write_png_header(tmp_path / "a.png", 50_000, 50_000)
    with pytest.raises(InputError, match="million pixels"):
        read_image(tmp_path / "a.png")


def test_a_large_picture_below_the_limit_is_no_bomb(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL warns above it, raises above twice
    make_photo((40, 30)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").size == (40, 30)
    assert not recwarn.list


# ---- geometry and ranges -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [(75, 50), (50, 75), (64, 64)])
def test_center_square_is_resize_then_center_crop(size):
    picture = make_photo(size)
    scaled = [round(side * 32 / min(size)) for side in size]
    wide = picture.resize(scaled, Image.Resampling.BILINEAR)
    left, top = (wide.width - 32) // 2, (wide.height - 32) // 2
    expected = np.asarray(wide.crop((left, top, left + 32, top + 32)), dtype=int)
    got = np.asarray(center_square(picture, 32), dtype=int)
    assert got.shape == (32, 32, 3)
    assert np.abs(got - expected).max() <= 1


@pytest.mark.parametrize("size", [(301, 200), (200, 301), (37, 37)])
def test_center_square_is_centered(size):
    picture = make_photo(size)
    half_turn = np.asarray(center_square(picture.rotate(180), 32), dtype=int)[::-1, ::-1]
    assert np.abs(half_turn - np.asarray(center_square(picture, 32))).max() <= 1


def test_center_square_of_a_sliver_never_becomes_wide():
    picture = Image.new("RGB", (100_000, 1), RED)
    assert center_square(picture, 288).size == (288, 288)


def test_tensor_round_trip_is_exact():
    pictures = [make_photo((8, 8)), Image.new("RGB", (8, 8), RED)]
    tensor = to_tensor(pictures)
    assert tensor.shape == (2, 3, 8, 8)
    assert tensor.dtype == torch.float32
    assert tensor[1, :, 0, 0].tolist() == [1, 0, 0]
    for before, after in zip(pictures, to_pil(tensor), strict=True):
        np.testing.assert_array_equal(np.asarray(before), np.asarray(after))


def test_to_pil_rounds_and_clamps():
    values = torch.tensor([-1.0, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 7.0])
    (picture,) = to_pil(values.expand(3, -1)[None, :, None])
    assert [picture.getpixel((x, 0))[0] for x in range(6)] == [0, 0, 0, 1, 255, 255]


def test_nan_never_becomes_a_picture():
    with pytest.raises(InputError, match="NaN"):
        to_pil(torch.full((1, 3, 2, 2), float("nan")))


def test_batches_of_two_sizes_are_refused():
    with pytest.raises(InputError, match="40×30, RGB 20×20"):
        to_tensor([make_photo((40, 30)), make_photo((20, 20))])


def test_builtin_photo_is_there():
    assert min(read_image(builtin_photo()).size) > 256


# ---- writing -----------------------------------------------------------------------------------


def test_written_png_is_lossless_and_alone(tmp_path):
    picture = make_photo()
    write_png(picture, tmp_path / "new" / "a.png")
    np.testing.assert_array_equal(
        np.asarray(read_image(tmp_path / "new" / "a.png")), np.asarray(picture)
    )
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.png"]


WRITE = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from featinv_diffusion.images import write_png
noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
try:
    write_png(Image.fromarray(noise), Path(sys.argv[1]))
except OSError as error:
    print(error.errno)
"""


# The package need not be installed where the tests run.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(featinv_diffusion.__file__).parents[1])}


def limit_file_size() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


def test_a_write_beyond_the_limit_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.png"
    write_png(make_photo((4, 4)), path)
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=limit_file_size,
        env=ENVIRONMENT,
    )
    assert done.stdout.split() == [str(errno.EFBIG)]
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_full_disk_leaves_nothing(tmp_path):
    disk, code = tmp_path / "disk", tmp_path / "write.py"
    disk.mkdir()
    code.write_text(WRITE)
    mount = f"mount -t tmpfs -o size=64k tmpfs {disk}"
    private = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*private, mount]).returncode:
        pytest.skip("needs the right to mount a small file system of its own")
    script = f"{mount} && {sys.executable} {code} {disk}/a.png && ls -A {disk}"
    done = subprocess.run(
        [*private, script], capture_output=True, text=True, check=True, env=ENVIRONMENT
    )
    assert done.stdout.split() == [str(errno.ENOSPC)]
