"""What a block shows: images that inverters make of its patches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.backbones import wrap_model
from featinv_diffusion.backbones.base import LAST, Backbone
from featinv_diffusion.class_embedding.anatomy import Anatomy
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.inverters.chain import MapChain
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.types import FeatureSpec, Images


@dataclass(frozen=True, eq=False)
class BlockInverter:
    """An inverter and the block whose patches it reads.

    Args:
        block: from 1; the last one also stands for the layer `last`, after the final norm.
        backbone: the model of the anatomy at that layer.
    """

    block: int
    backbone: Backbone
    inverter: Inverter

    def reconstruct(self, images: Images, name: str, seed: int = 0) -> Float[Tensor, "b 3 h w"]:
        """Returns one image for each; noise derives from (seed, name, 0) as in `sample`."""
        generators = [make_generator(seed, name, 0) for _ in range(len(images))]
        return self.inverter.invert(self.backbone.features(images), generator=generators)


def match_inverters(anatomy: Anatomy, inverters: Sequence[Inverter]) -> dict[int, BlockInverter]:
    """Finds the block that each inverter reads.

    Raises:
        InputError: an inverter of another backbone, of no block, or two of one block.
    """
    found: dict[int, BlockInverter] = {}
    for inverter in inverters:
        matched = _match(anatomy, inverter)
        if matched.block in found:
            raise InputError(
                f"There must be one inverter per block, but two read block {matched.block}: "
                f"{found[matched.block].inverter.spec} and {inverter.spec}."
            )
        found[matched.block] = matched
    return found


def _match(anatomy: Anatomy, inverter: Inverter) -> BlockInverter:
    own, spec = anatomy.backbone, inverter.spec
    if _plain(spec.backbone) != _plain(own.name):
        raise InputError(
            f"The inverter reads a {spec}, but the tokens are those of {own.name!r}. Use an "
            "inverter that was trained on this backbone."
        )
    if isinstance(inverter, MapChain):
        return BlockInverter(_block_of_stage(anatomy, spec), inverter.backbone, inverter)
    backbone = wrap_model(own.model, name=own.name, layer=spec.layer, input_size=own.input_size)
    backbone.preprocessing = own.preprocessing
    spec.check_matches(backbone.spec)
    if spec.layer == LAST:
        return BlockInverter(len(anatomy.blocks), backbone, inverter)
    layer = own.model.get_submodule(spec.layer)
    blocks = [b for b, parts in enumerate(anatomy.blocks, start=1) if parts.block is layer]
    if not blocks:
        raise InputError(
            f"The inverter must read a block, but reads a {spec}. Use one of a block, such as the "
            "layer 'blocks.5', or of the layer 'last'."
        )
    return BlockInverter(blocks[0], backbone, inverter)


def _block_of_stage(anatomy: Anatomy, spec: FeatureSpec) -> int:
    """A chain names the blocks as `VitPath` does, and reads tokens of a model of its own."""
    last = len(anatomy.blocks)
    stages = {f"blocks.{b}": b + 1 for b in range(last)} | {"encoder": last, LAST: last}
    if spec.layer not in stages:
        raise InputError(
            f"The inverter must read a block, but reads a {spec}. Take the stage of one: "
            f"{', '.join(stages)}."
        )
    return stages[spec.layer]


def _plain(name: str) -> str:
    return name.removeprefix("tiny/").removeprefix("timm/")
