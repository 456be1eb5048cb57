"""`Backbone`: a frozen vision model that reads images and shows one of its layers as a map."""

from __future__ import annotations

import hashlib
import logging
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from featinv_diffusion.errors import InputError
from featinv_diffusion.images import Pictures, read_batch
from featinv_diffusion.types import FeatureMaps, Features, FeatureSpec, Images, Source

logger = logging.getLogger(__name__)

# ---- Differentiable preprocessing of images by the statistics that a model was trained with ----

INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocessing:
    """Resizes to `size` and normalises to (images − mean) / std.

    The whole image is squashed to `size`, never cropped, so that the feature map covers all of it.

    Args:
        size: (h, w) in pixels.
        mean: per channel, of RGB in [0, 1].
        std: per channel, of RGB in [0, 1].
        interpolation: `bilinear` or `bicubic`, both with antialiasing, as Pillow computes them.
        through: (h, w) in pixels that images are brought to before `size`, so that a model for
            large images sees no more of a picture than small ones show; None leaves them.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    through: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(
                f"Images are resized with one of {', '.join(INTERPOLATIONS)}, "
                f"but the model's configuration says {self.interpolation!r}."
            )

    def __call__(self, images: Images) -> Float[Tensor, "b 3 h w"]:
        """Returns the model's input in float32; gradients flow to `images`."""
        _check_images(images)
        resized = self._resize(self._resize(images.float(), self.picture_size), self.size)
        mean = torch.tensor(self.mean, device=images.device)[:, None, None]
        std = torch.tensor(self.std, device=images.device)[:, None, None]
        return (resized - mean) / std

    @property
    def picture_size(self) -> tuple[int, int]:
        """(h, w) in pixels of all that is seen of a picture: `through`, else `size`."""
        return self.through or self.size

    def _resize(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(images.shape[-2:]) == size:
            return images
        resized = F.interpolate(
            images, size, mode=self.interpolation, align_corners=False, antialias=True
        )
        return resized.clamp(0, 1)  # bicubic overshoots; Pillow clips to the range of its integers


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise InputError(
            "Images must be a float tensor [batch, 3, height, width] in [0, 1], "
            f"got {images.dtype} of shape {list(images.shape)}."
        )


LAST = "last"
"""The layer name of the last spatial map before pooling."""


LayerEdit: TypeAlias = Callable[[Tensor], Tensor]
"""A function of a layer's own output that returns a tensor of the same shape."""


class Backbone(nn.Module, ABC):
    """A frozen model with its preprocessing; gradients flow to images, never to weights.

    Args:
        model: the model itself.
        name: what the backbone is called in specs and messages.
        preprocessing: from images in [0, 1] to the model's input.

    Attributes:
        spec: where the features come from and their shape.
    """

    spec: FeatureSpec

    def __init__(self, model: nn.Module, *, name: str, preprocessing: Preprocessing):
        super().__init__()
        self.model, self.name, self.preprocessing = model, name, preprocessing
        self.train(False)

    @property
    @abstractmethod
    def has_head(self) -> bool:
        """Whether the model classifies."""

    @property
    def head_reads_map(self) -> bool:
        """Whether the class scores are a function of the features."""
        return False

    def features(self, pictures: Pictures) -> Features:
        """Returns the feature maps of pictures, `[b, c, h, w]` as `spec` says.

        Args:
            pictures: one or several paths, PIL images, arrays or tensors, see `images.read_batch`.
                A float tensor is taken as it is, `[b, 3, h, w]` in [0, 1], with its gradients.

        Raises:
            InputError: a picture that cannot be read.
        """
        images, sources = self.read(pictures)
        maps = self._features(images)
        return maps if sources is None else FeatureMaps.of(maps, sources)

    def read(self, pictures: Pictures) -> tuple[Images, list[Source] | None]:
        """Returns pictures as images on the backbone's device, and what is known of them.

        The second is None for a float tensor, which is passed through.
        """
        if isinstance(pictures, Tensor) and pictures.is_floating_point() and pictures.ndim == 4:
            return pictures, None
        images, sources = read_batch(pictures, max(self.picture_size))
        return images.to(self.device), sources

    @abstractmethod
    def _features(self, images: Images) -> Features:
        """Returns the map of `spec`, of images in [0, 1] of any size."""

    @abstractmethod
    def features_and_logits(self, images: Images) -> tuple[Features, Float[Tensor, "b k"] | None]:
        """Returns `features` and `classify` (None without a head) of one forward pass."""

    @abstractmethod
    def layers(self) -> list[FeatureSpec]:
        """Returns every layer that holds a map, in the model's order."""

    def layout(self, layer: str = LAST) -> Any:
        """Returns the `Layout` of a layer's output, whose `to_map` and `from_map` convert it.

        Raises:
            InputError: no such layer, one without a map, or a model whose layers are not known.
        """
        raise InputError(f"{self.name!r} does not tell how its layer {layer!r} holds a map.")

    @contextmanager
    def intervene(self, edits: Mapping[str, LayerEdit]) -> Iterator[Backbone]:
        """Edits what layers put out, in every forward pass inside the block.

            with backbone.intervene({"blocks.2": lambda tokens: 0.5 * tokens}):
                features = backbone.features("a.jpg")

        An edit sees what a forward hook of PyTorch would see: the layer's own output, tokens with
        their prefix; `layout(layer)` converts it to a map and back. It must return a tensor of the
        same shape. A layer behind the one that `features` reads is not reached by it.

        Args:
            edits: by dotted module path.

        Raises:
            InputError: no such layer, an edit that changes the shape, or a layer without a tensor.
        """
        modules = dict(self.model.named_modules())
        if unknown := [path for path in edits if path not in modules or not path]:
            raise InputError(
                f"An edit must be of a module inside {self.name!r}, but {unknown[0]!r} is none; "
                f"`featinv layers {self.name}` lists those that hold maps."
            )
        reached: set[str] = set()

        def hook_of(path: str, edit: LayerEdit) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
                reached.add(path)
                return _with_first_tensor(output, edit, path)

            return hook

        handles = [
            modules[path].register_forward_hook(hook_of(path, e)) for path, e in edits.items()
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
        for path in edits.keys() - reached:
            logger.warning("No forward pass reached %r, so its edit did nothing.", path)

    def check_gradient(self) -> None:
        """Raises `InputError` unless gradients flow from the map to the image."""
        generator = torch.Generator().manual_seed(0)
        image = torch.rand(1, 3, *self.input_size, generator=generator).to(self.device)
        image.requires_grad_()
        gradient = None
        with torch.enable_grad():
            total = self._features(image).float().square().sum()
            if total.requires_grad:
                (gradient,) = torch.autograd.grad(total, image, allow_unused=True)
        if gradient is None or not bool(gradient.isfinite().all()) or not bool(gradient.any()):
            raise InputError(
                f"Gradients must flow from the map of {self.name!r} to the image, but none does. "
                "Look for detach, no_grad, rounding or NumPy in preprocess and in the model."
            )

    @abstractmethod
    def _run(self, pixels: Tensor) -> Any:
        """Runs the whole model; returns class scores where there is a head."""

    @abstractmethod
    def _class_names(self) -> tuple[str, ...] | None:
        """Returns the names of the classes where the model has a head and knows them."""

    @property
    def input_size(self) -> tuple[int, int]:
        """(h, w) in pixels of the model's input."""
        return self.preprocessing.size

    @property
    def picture_size(self) -> tuple[int, int]:
        """(h, w) in pixels that pictures are read at: more of them is not seen."""
        return self.preprocessing.picture_size

    @cached_property
    def labels(self) -> tuple[str, ...] | None:
        """The names of the classes; None where there are none or they are not known."""
        return self._class_names() if self.has_head else None

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.model.parameters()), torch.float32)

    @property
    def device(self) -> torch.device:
        held = (*self.model.parameters(), *self.model.buffers())
        return held[0].device if held else torch.device("cpu")

    def train(self, mode: bool = True) -> Backbone:
        """Does nothing but keep the model in evaluation mode: a backbone is frozen."""
        return super().train(False)

    def preprocess(self, images: Images) -> Float[Tensor, "b 3 h w"]:
        """Squashes images to `input_size` and normalises them, in float32, then casts."""
        return self.preprocessing(images).to(self.dtype)

    def forward(self, images: Pictures) -> Features:
        """As `features`."""
        return self.features(images)

    def logits(self, features: Features) -> Float[Tensor, "b k"]:
        """Returns the class scores of a feature map, equal to the model's own on its own maps.

        Raises:
            InputError: the head does not read this map, or the features do not fit `spec`.
        """
        self._require_head()
        raise InputError(
            f"Class scores must be a function of the {self.spec}, "
            "but the head of the model reads something else. Use classify(images) instead."
        )

    def classify(self, pictures: Pictures) -> Float[Tensor, "b k"]:
        """Returns the model's own class scores, before softmax, of what `features` takes.

        Raises:
            InputError: the model has no classification head.
        """
        self._require_head()
        return self._run(self.preprocess(self.read(pictures)[0]))

    def _require_head(self) -> None:
        if not self.has_head:
            raise InputError(
                f"The backbone must have a classification head, but {self.name!r} has none. "
                "Choose a backbone that classifies, or leave out what needs class scores."
            )

    def __repr__(self) -> str:
        size = "×".join(map(str, self.input_size))
        through = self.preprocessing.through
        way = f" through {'×'.join(map(str, through))}" if through else ""
        return f"{type(self).__name__}({self.spec}, reads {size} pixels{way})"


def _with_first_tensor(output: Any, edit: LayerEdit, path: str) -> Any:
    """Returns a layer's output with its first tensor edited."""
    if isinstance(output, Tensor):
        edited = edit(output)
        if not isinstance(edited, Tensor) or edited.shape != output.shape:
            got = list(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
            raise InputError(
                f"The edit of {path!r} must return a tensor of the shape {list(output.shape)}, "
                f"but gives {got}."
            )
        return edited
    if isinstance(output, dict) and output:
        first = next(iter(output))
        copy = type(output)(**output)
        copy[first] = _with_first_tensor(output[first], edit, path)
        return copy
    if isinstance(output, list | tuple) and output:
        items = [_with_first_tensor(output[0], edit, path), *output[1:]]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    raise InputError(f"The layer {path!r} must put out a tensor to be edited, but does not.")


def weights_sha256(modules: Mapping[str, nn.Module]) -> str:
    """Returns one digest of names, types, shapes and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for part in sorted(modules):
        for name, value in sorted(modules[part].state_dict().items()):
            if not isinstance(value, Tensor):
                digest.update(f"{part}.{name} {value!r}\n".encode())
                continue
            digest.update(f"{part}.{name} {value.dtype} {list(value.shape)}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- Loading without the progress bars of the libraries ------------------------------------------

_LIBRARIES = ("diffusers", "transformers")


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hides the libraries' bars over components and tensors, which take little time.

    A library that is not imported shows none, and is not imported for it.
    """
    libraries = [sys.modules.get(f"{name}.utils.logging") for name in _LIBRARIES]
    shown = [library for library in libraries if library and library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()
