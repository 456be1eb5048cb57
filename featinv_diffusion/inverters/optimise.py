"""Inversion without training: gradient descent on a picture until a backbone sees the features.

The baseline of feature inversion (Mahendran & Vedaldi 2015; with an autoencoder's latents in the
place of pixels). It needs gradients through the backbone and nothing else. What it finds agrees
with the backbone that it looked through, and often with no other: such pictures fool it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffusers import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.backbones.base import Backbone
from featinv_diffusion.diffusion.folders import (
    BASE,
    bundled_folder,
    class_name,
    list_bundled,
    load_network,
)
from featinv_diffusion.files import expand_path
from featinv_diffusion.inverters.base import Generators, Inverter
from featinv_diffusion.inverters.refine import FourierPixels, Latents, pull
from featinv_diffusion.types import Features, Images

NAME = "optimise"
STEPS = 150
PRIOR = f"tiny/{BASE}"
"""The bundled text-to-image model, whose autoencoder is the default."""


class GradientInverter(Inverter):
    """An inverter that looks through its backbone while it makes a picture.

    Its own backbone is therefore no judge of the picture; another one has to look too.

    Raises:
        InputError: a backbone that lets no gradient through to the picture.
    """

    backbone: Backbone
    n_steps: int

    def __init__(self, backbone: Backbone):
        backbone.check_gradient()
        self.backbone, self.spec = backbone, backbone.spec

    @property
    def is_deterministic(self) -> bool:
        """Noise decides where a sample starts."""
        return False

    @property
    def is_optimised(self) -> bool:
        """Each picture is pulled until the backbone agrees."""
        return True


class OptimiseInverter(GradientInverter):
    """Starts from noise and takes Adam steps, see `refine.pull`.

    Args:
        vae: the autoencoder whose latents are optimised; None optimises pixels as waves.
        n_steps, learning_rate: of Adam.
        max_shift: of the picture in each step, in pixels.
    """

    def __init__(
        self,
        backbone: Backbone,
        vae: AutoencoderKL | None = None,
        *,
        n_steps: int = STEPS,
        learning_rate: float = 0.1,
        max_shift: int = 1,
    ):
        super().__init__(backbone)
        self.n_steps, self.learning_rate, self.max_shift = n_steps, learning_rate, max_shift
        self.networks = {} if vae is None else {"vae": vae}
        self.decode = (
            FourierPixels(backbone.input_size, backbone.device)
            if vae is None
            else Latents(vae, backbone.input_size)
        )

    def _invert(self, features: Features, generator: Generators) -> Images:
        found = pull(
            self.decode.start(len(features), generator),
            features,
            self.backbone,
            self.decode,
            n_steps=self.n_steps,
            learning_rate=self.learning_rate,
            max_shift=self.max_shift,
            generator=generator,
            on_step=self._report(),
        )
        return self.decode(found).float().clamp(0, 1)

    def _report(self) -> Callable[[Float[Tensor, " b"]], None]:
        return lambda losses: self._advance(len(losses) / self.n_steps)


def load_part(kind: Any, prior: str, part: str) -> Any:
    """Loads a part of a text-to-image model in float32, or an autoencoder that lies alone.

    Args:
        kind: its class.
        prior: `tiny/base` or a bundled pipeline that stands on it, a folder of Stable Diffusion or
            of a pipeline, or a Hub repository.

    Raises:
        InputError: nothing there, or files that cannot be read.
    """
    place, options = find_part(prior, part)
    folder = expand_path(prior)
    if folder.is_dir() and class_name(folder) == kind.__name__:
        place = str(folder)
    wanted = f"a Stable Diffusion folder or Hub repository with a {part}"
    return load_network(kind, place, wanted=wanted, **options)


def find_part(prior: str, part: str) -> tuple[str, dict[str, str]]:
    """Returns where a part of a text-to-image model is loaded from, and with which options."""
    is_ours = prior in (PRIOR, *list_bundled())
    folder = bundled_folder(PRIOR) if is_ours else expand_path(prior)
    return (str(folder / part), {}) if folder.is_dir() else (prior, {"subfolder": part})
