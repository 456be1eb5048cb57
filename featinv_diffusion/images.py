"""Pictures on disk and in PIL ↔ `Images`; the only module that knows other ranges than [0, 1]."""

from __future__ import annotations

import logging
import struct
import unicodedata
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from featinv_diffusion.errors import InputError, what_is_at
from featinv_diffusion.files import replacing
from featinv_diffusion.types import Images, Source

logger = logging.getLogger(__name__)

# Formats that hold pixels and nothing else: PIL would run Ghostscript on an EPS file.
SUFFIXES = {
    ".avif": "AVIF",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".jfif": "JPEG",
    ".jp2": "JPEG2000",
    ".jpe": "JPEG",
    ".jpeg": "JPEG",
    ".jpg": "JPEG",
    ".mpo": "JPEG",
    ".pgm": "PPM",
    ".png": "PNG",
    ".ppm": "PPM",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
}

# What PIL's decoders raise on a file that is cut off or corrupt.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


def read_image(path: str | Path) -> Image.Image:
    """Reads any picture as 8-bit RGB, upright.

    EXIF rotation is applied, transparency is laid over white, 16 bits are scaled to 8, and of an
    animation or a multi-page file the first frame is taken. Whatever loses something is logged as
    a warning. Colour profiles are not applied, as in the training of the usual vision models.

    Raises:
        InputError: no such file, no picture, a picture that is cut off, corrupt or too large.
    """
    path = Path(path)
    if not path.is_file():
        what = "no plain file" if path.exists() and not path.is_dir() else what_is_at(path)
        raise InputError(f"A picture must be a file, but there is {what} at {path}.")
    return _decode(path, str(path))


def decode_image(content: bytes, name: str, max_pixels: int | None = None) -> Image.Image:
    """Decodes the bytes of a picture file as `read_image` does; messages call it `name`.

    Args:
        max_pixels: a limit below PIL's own, checked before any pixel is decoded.
    """
    return _decode(BytesIO(content), name, max_pixels)


def _decode(source: Path | BytesIO, name: str, max_pixels: int | None = None) -> Image.Image:
    try:
        # Between one and two times PIL's limit it only warns, and such a picture is still read.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source, formats=_formats()) as image:
                if max_pixels is not None and image.width * image.height > max_pixels:
                    raise InputError(
                        f"A picture must have at most {max_pixels / 1e6:g} million pixels, but "
                        f"{name} has {image.width}×{image.height}. Make it smaller first."
                    )
                _warn_of_frames(image, name)
                image.load()
                return _to_rgb(_upright(image), name)
    except UnidentifiedImageError:
        raise InputError(
            f"{name} is not a picture that can be read: it is empty, cut off, or none of "
            f"{', '.join(_formats())}."
        ) from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise InputError(
            f"{name} declares more than {limit // 10**6} million pixels, which is taken for a "
            "decompression bomb. Make the picture smaller first."
        ) from None
    except PermissionError:
        raise InputError(f"{name} cannot be read: permission is denied.") from None
    except InputError:
        raise
    except _DECODE_ERRORS as error:
        raise InputError(f"{name} is cut off or corrupt: {error}.") from error


@contextmanager
def without_notes() -> Iterator[None]:
    """Reads without a line for each picture that loses something, as training does."""
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def center_square(image: Image.Image, size: int) -> Image.Image:
    """Scales the shorter side to `size` pixels and cuts the centre square out, in one step.

    Bilinear with antialiasing, as Resize + CenterCrop of the FeatInv evaluation; the wide
    intermediate picture never exists, so a 1×100000 picture costs nothing.
    """
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def to_tensor(images: Image.Image | Sequence[Image.Image]) -> Images:
    """Converts RGB pictures of one size to a float32 batch in [0, 1]."""
    batch = [images] if isinstance(images, Image.Image) else images
    if len({(image.size, image.mode) for image in batch}) != 1 or batch[0].mode != "RGB":
        found = ", ".join(f"{image.mode} {image.width}×{image.height}" for image in batch)
        raise InputError(f"Pictures of a batch must be RGB and of one size, got {found}.")
    stacked = torch.from_numpy(np.stack([np.asarray(image) for image in batch]))
    return stacked.permute(0, 3, 1, 2).float() / 255


def to_pil(images: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """Converts a batch in [0, 1] to 8-bit pictures; values beyond are clamped."""
    if not bool(images.isfinite().all()):
        raise InputError("Images must be finite, got NaN or infinite values.")
    pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(p) for p in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def write_png(image: Image.Image, path: str | Path) -> None:
    """Writes a PNG, whole or not at all; makes the folder where it is missing."""
    with replacing(Path(path)) as partial:
        image.save(partial, format="PNG")


def builtin_photo(name: str = "flower.jpg") -> Path:
    """Returns the photo that commands use where none is given, a flower that scikit-learn ships."""
    package = find_spec("sklearn")  # only found: to import it would take seconds
    assert package is not None
    assert package.submodule_search_locations is not None
    return Path(package.submodule_search_locations[0], "datasets", "images", name)


def _formats() -> list[str]:
    Image.init()  # else PIL knows of a few formats only
    return sorted(set(SUFFIXES.values()) & Image.OPEN.keys())


def _warn_of_frames(image: Image.Image, name: str) -> None:
    # A camera's MPO holds one photo and its previews, which is no animation.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        n_frames = getattr(image, "n_frames", 1)
        logger.warning("%s holds %d frames; the first one is used.", name, n_frames)


def _upright(image: Image.Image) -> Image.Image:
    # PIL warns of broken metadata and leaves the picture as it lies.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode.startswith("I;16"):
        logger.warning("%s has 16 bits per pixel, which are scaled to 8.", name)
        grey = np.asarray(image, dtype=np.uint32) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError(
            f"{name} has 32-bit pixels, whose range no file format declares. "
            "Save it with 8 or 16 bits per channel."
        )
    if image.mode == "CMYK":
        logger.warning("%s is CMYK; it is converted to RGB without its colour profile.", name)
    return _over_white(image, name) if image.has_transparency_data else image.convert("RGB")


def to_upright_rgb(picture: Image.Image) -> Image.Image:
    """Returns a PIL image as `read_image` gives that of a file: 8-bit RGB, upright.

    Raises:
        InputError: pixels of 32 bits.
    """
    return _to_rgb(_upright(picture), "the picture")


def _over_white(image: Image.Image, name: str) -> Image.Image:
    rgba = image.convert("RGBA")
    if rgba.getchannel("A").getextrema() != (255, 255):
        logger.warning("%s is transparent in parts; it is laid over white.", name)
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


Picture: TypeAlias = "str | Path | Image.Image | np.ndarray | Tensor"
"""A picture: a path, a PIL image, an array `[h, w, 3]` or a tensor `[3, h, w]` in [0, 1]."""

Pictures: TypeAlias = "Picture | Sequence[Picture]"
"""One picture or several; arrays `[b, h, w, 3]` and tensors `[b, 3, h, w]` hold several."""


def read_batch(pictures: Pictures, size: int) -> tuple[Images, list[Source]]:
    """Reads pictures of any kind as one batch.

    Paths and PIL images become centre squares of `size` pixels, as in every command. Arrays and
    tensors of floats are taken as they are, in [0, 1]; those of bytes are divided by 255.

    Raises:
        InputError: a picture that cannot be read, or of another shape.
    """
    if isinstance(pictures, np.ndarray | Tensor):
        images = _from_array(pictures)
        return images, [Source("")] * len(images)
    if isinstance(pictures, str | Path | Image.Image):
        pictures = [pictures]
    if not pictures:
        raise InputError("There must be at least one picture, got none.")
    parts, sources = zip(*(_read_one(picture, size) for picture in pictures), strict=True)
    if len({part.shape[2:] for part in parts}) > 1:
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise InputError(f"Pictures of one batch must have one size, got {shapes}.")
    return torch.cat(parts), [source for part in sources for source in part]


def _read_one(picture: object, size: int) -> tuple[Images, list[Source]]:
    if isinstance(picture, np.ndarray | Tensor):
        images = _from_array(picture)
        return images, [Source("")] * len(images)
    name, location = "", None
    if isinstance(picture, str | Path):
        name, location = picture_id(Path(picture).name), str(Path(picture).absolute())
    whole = as_picture(picture)
    square = center_square(whole, size)
    return to_tensor(square), [Source(name, location, square, whole.size)]


def as_picture(picture: object) -> Image.Image:
    """Returns a picture of any kind as `read_image` does, whole; floats are rounded to 8 bits.

    Raises:
        InputError: a file that cannot be read, or no picture.
    """
    if isinstance(picture, str | Path):
        return read_image(picture)
    if isinstance(picture, Image.Image):
        return to_upright_rgb(picture)
    if isinstance(picture, np.ndarray | Tensor):
        return to_pil(_from_array(picture))[0]
    raise InputError(
        "A picture must be a path, a PIL image, an array or a tensor, got "
        f"{type(picture).__name__}."
    )


def _from_array(values: np.ndarray | Tensor) -> Images:
    tensor = torch.as_tensor(values)
    tensor = tensor[None] if tensor.ndim == 3 else tensor
    if isinstance(values, np.ndarray) and tensor.ndim == 4 and tensor.shape[-1] == 3:
        tensor = tensor.permute(0, 3, 1, 2)
    if tensor.ndim != 4 or tensor.shape[1] != 3:
        raise InputError(
            "Pictures must be arrays [b, h, w, 3] or tensors [b, 3, h, w], got the shape "
            f"{list(values.shape)}."
        )
    if tensor.dtype == torch.uint8:
        return tensor.float() / 255
    if not tensor.is_floating_point():
        raise InputError(f"Pictures must be floats in [0, 1] or bytes, got {tensor.dtype}.")
    if not bool(tensor.isfinite().all()) or tensor.min() < -0.001 or tensor.max() > 1.001:
        raise InputError(
            "Pictures of floats must lie in [0, 1], got values from "
            f"{tensor.min().item():g} to {tensor.max().item():g}. Divide bytes by 255."
        )
    return tensor if isinstance(values, Tensor) else tensor.float()


def picture_id(name: str) -> str:
    """Returns a file name in one spelling of accents; bytes that are no UTF-8 stay distinct."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)
