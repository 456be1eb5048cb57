"""Trains one trunk for the ControlNets of several backbones, each of which keeps a head of its own.

A FeatureControlNet is a head, its feature encoder, and a trunk, the copy of the UNet's encoder. The
heads of several pipelines and the mean of their trunks are trained together: of each batch, every
backbone reads its part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from featinv_diffusion.backbones import Backbone
from featinv_diffusion.config import to_yaml
from featinv_diffusion.data.crops import DataConfig, to_images
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.diffusion.featinv_pipeline import FeatInvPipeline
from featinv_diffusion.diffusion.folders import ENCODER
from featinv_diffusion.diffusion.hub import load_pipeline
from featinv_diffusion.errors import InputError
from featinv_diffusion.inverters.diffusion import DiffusionInverter
from featinv_diffusion.seeds import derive_seed
from featinv_diffusion.settings import Probability, Seed, check
from featinv_diffusion.training.config import OptimConfig, RunConfig
from featinv_diffusion.training.controlnet import (
    ControlNetConfig,
    ControlNetModelConfig,
    ControlNetTask,
    FrozenParts,
    ValidationConfig,
    open_data,
)
from featinv_diffusion.training.loop import fit, make_accelerator


@dataclass(frozen=True)
class SharedTrunkModelConfig:
    """Which pipelines get one trunk.

    Args:
        pipelines: names for `load_pipeline`, all of the same base and each with its backbone.
        begin_with: those of them whose trunks' mean is the beginning; None takes all. The mean of
            weights that did not come from the same beginning is of no use.
        dropout: probability of hiding the condition and the prompt together.
    """

    pipelines: tuple[str, ...] = ("tiny/convnext", "tiny/convnext-stages.1")
    begin_with: tuple[str, ...] | None = None
    dropout: Probability = 0.15

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class SharedTrunkConfig:
    seed: Seed = 0
    data: DataConfig = field(default_factory=lambda: DataConfig(held_back_per_class=1))
    model: SharedTrunkModelConfig = field(default_factory=SharedTrunkModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check(self)


class SharedTrunk(nn.Module):
    """One trunk and the heads of several FeatureControlNets.

    Args:
        controlnets: of the same base.
        begin_with: weights of the trunk, see `mean_of_trunks`.
    """

    def __init__(self, controlnets: Sequence[FeatureControlNet], begin_with: Mapping[str, Tensor]):
        super().__init__()
        self.configs = [dict(one.config) for one in controlnets]
        trunk: Any = FeatureControlNet.from_config(self.configs[0])
        trunk.feature_encoder = nn.Identity()  # the condition arrives encoded
        trunk.load_state_dict(begin_with)
        self.trunk = trunk
        self.heads = nn.ModuleList([one.feature_encoder for one in controlnets])

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        features: Sequence[Tensor],
        *,
        keep: Tensor,
        return_dict: bool = False,
    ) -> Any:
        """As `FeatureControlNet.forward`, of a batch whose parts belong to the heads in turn.

        Args:
            features: maps `[b_i, c_i, h_i, w_i]`, one tensor per head, in all as many as `sample`.
        """
        height, width = sample.shape[-2:]
        parts = keep.split([len(x) for x in features])
        conditions = [
            head(x, (height, width), kept)
            for head, x, kept in zip(self.heads, features, parts, strict=True)
        ]
        return self.trunk(
            sample,
            timestep,
            encoder_hidden_states,
            encoded_cond=torch.cat(conditions),
            return_dict=return_dict,
        )

    def controlnet(self, index: int) -> FeatureControlNet:
        """Returns a copy of the trunk with one of the heads, as a ControlNet like any other."""
        one: Any = FeatureControlNet.from_config(self.configs[index])
        weights = dict(self.trunk.state_dict())
        weights |= {ENCODER + name: x for name, x in self.heads[index].state_dict().items()}
        one.load_state_dict(weights)
        return one.to(self.trunk.device).eval()

    def set_controlnet(self, index: int, one: FeatureControlNet) -> None:
        """Takes a head, and the trunk with it."""
        self.trunk.load_state_dict(trunk_of(one))
        self.heads[index].load_state_dict(one.feature_encoder.state_dict())


def trunk_of(controlnet: FeatureControlNet) -> dict[str, Tensor]:
    """Returns the weights of a ControlNet without its head."""
    return {k: v for k, v in controlnet.state_dict().items() if not k.startswith(ENCODER)}


def mean_of_trunks(controlnets: Sequence[FeatureControlNet]) -> dict[str, Tensor]:
    """Returns the mean of the weights of trunks, which are all of the same base.

    Networks that were trained on from the same weights may be averaged; others may not.
    """
    trunks = [trunk_of(one) for one in controlnets]
    return {name: torch.stack([one[name] for one in trunks]).mean(0) for name in trunks[0]}


class SharedTrunkTask(ControlNetTask):
    """ε-prediction as in `ControlNetTask`, each backbone's on its part of the batch.

    Args:
        backbones: one per head, in the same order.
        names: of the heads, in scalars and file names.
    """

    def __init__(
        self,
        module: SharedTrunk,
        parts: FrozenParts,
        config: ControlNetConfig,
        validation: Tensor,
        backbones: Sequence[Backbone],
        names: Sequence[str],
    ):
        super().__init__(module, parts, config, validation)
        self.backbones, self.names = backbones, names

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        super().to(device, dtype)
        for backbone in self.backbones:
            backbone.to(device)

    def _features(self, batch: Mapping[str, Any]) -> Sequence[Tensor]:
        parts = to_images(batch["pixels"]).tensor_split(len(self.backbones))
        with torch.no_grad():
            return [b.features(x) for b, x in zip(self.backbones, parts, strict=True)]

    def validate(self, module: nn.Module) -> tuple[dict[str, float], dict[str, Image.Image]]:
        shared: Any = module
        scalars: dict[str, float] = {}
        pictures: dict[str, Image.Image] = {}
        for i, (name, backbone) in enumerate(zip(self.names, self.backbones, strict=True)):
            self.parts.backbone = backbone
            figures, drawn = super().validate(shared.controlnet(i))
            scalars |= {f"{name}/{key}": value for key, value in figures.items()}
            pictures |= {f"{key}-{name}": picture for key, picture in drawn.items()}
        return scalars, pictures

    def save(self, module: nn.Module, folder: Path) -> None:
        shared: Any = module
        for i, name in enumerate(self.names):
            shared.controlnet(i).save_pretrained(folder / name / "controlnet")

    def load(self, module: nn.Module, folder: Path) -> None:
        shared: Any = module
        for i, name in enumerate(self.names):
            shared.set_controlnet(
                i, FeatureControlNet.from_pretrained(folder / name / "controlnet")
            )


def train_shared_trunk(config: SharedTrunkConfig) -> Path:
    """Trains to the end and returns the folder that holds `NAME/controlnet/` per pipeline.

    NAME is the last part of the pipeline's name.

    Raises:
        InputError: pipelines of different bases or without a backbone, or a batch with no image
            for one of them.
    """
    pipelines = config.model.pipelines
    names = [Path(one).name for one in pipelines]
    if len(names) < 2 or len(set(names)) < len(names):
        raise InputError(
            "model.pipelines must name two or more pipelines whose names end differently, got "
            f"{', '.join(pipelines) or 'none'}."
        )
    if config.optim.batch_size < len(names):
        raise InputError(
            f"Each of the {len(names)} pipelines must get an image of every batch, but "
            f"optim.batch_size is {config.optim.batch_size}. Set it to {len(names)} or more."
        )
    begin_with = config.model.begin_with or pipelines
    if unknown := set(begin_with) - set(pipelines):
        raise InputError(
            f"model.begin_with must name some of model.pipelines, but {min(unknown)} is not one."
        )
    accelerator = make_accelerator(config.optim, config.run)
    torch.manual_seed(derive_seed(config.seed, "initial weights"))
    loaded = [load_pipeline(one) for one in pipelines]
    _check_same_base(dict(zip(pipelines, loaded, strict=True)))
    inverters = [DiffusionInverter(one) for one in loaded]
    backbones = [one.require_backbone() for one in inverters]
    controlnets: list[Any] = [one.controlnet for one in loaded]
    trunks = [one for one, name in zip(controlnets, pipelines, strict=True) if name in begin_with]
    module = SharedTrunk(controlnets, mean_of_trunks(trunks)).requires_grad_(True)
    if config.run.channels_last:
        for backbone in backbones:
            backbone.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if config.run.gradient_checkpointing:
        module.trunk.enable_gradient_checkpointing()
        loaded[0].unet.enable_gradient_checkpointing()
    as_one = ControlNetConfig(
        seed=config.seed,
        data=config.data,
        model=ControlNetModelConfig(dropout=config.model.dropout),
        validation=config.validation,
        optim=config.optim,
        run=config.run,
    )
    train, validation = open_data(as_one)
    parts = FrozenParts.of(inverters[0])
    task = SharedTrunkTask(module, parts, as_one, validation, backbones, names)
    return fit(task, train, accelerator, config.optim, config.run, to_yaml(config))


def _check_same_base(pipelines: Mapping[str, FeatInvPipeline]) -> None:
    (first, one), *others = pipelines.items()
    for part in ("unet", "vae"):
        weights = getattr(one, part).state_dict()
        for name, other in others:
            own = getattr(other, part).state_dict()
            if own.keys() != weights.keys() or any(
                own[k].shape != weights[k].shape or not bool((own[k] == weights[k]).all())
                for k in own
            ):
                raise InputError(
                    f"All of model.pipelines must have the same base, but the {part} of {name} is "
                    f"not that of {first}. Name pipelines that were trained on the same base."
                )
