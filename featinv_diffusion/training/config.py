"""What training runs are told: every one, and one for a new backbone in a given time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from featinv_diffusion.settings import (
    Beta,
    Count,
    Depth,
    NotNegative,
    Number,
    Pictures,
    Positive,
    PositiveOrInfinite,
    Size,
    check,
    option,
)


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule; `batch_size` is per process and accumulated micro-batch.

    Args:
        optimizer: `adamw`, or `muon`, which orthogonalises the updates of matrices and kernels
            (Jordan et al. 2024) and gives all else to AdamW at a tenth of `lr`; small networks
            learn several times faster with it, at rates about 0.02.
        epochs: passes over the data; `max_steps` optimizer steps end the run earlier.
        schedule: after `warmup_steps` of linear warm-up, to zero by a cosine, a line, or constant;
            or `one_cycle`: from lr / 25 in a line to lr over the first 5 % of the steps, then by a
            cosine to lr / 250,000.
        ema_decay: keep an exponential moving average of the weights, and save that.
    """

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Positive = 1e-5
    weight_decay: NotNegative = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    batch_size: Size = 8
    gradient_accumulation_steps: Depth = 1
    max_grad_norm: PositiveOrInfinite = 1.0
    epochs: Count = 3
    max_steps: Count | None = None
    warmup_steps: Number = 0
    schedule: Literal["constant", "cosine", "linear", "one_cycle"] = "constant"
    ema_decay: Beta | None = None

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes, how often, and on what it runs.

    Only `mixed_precision`, `compile` and `n_validation_images` can change the result.

    Args:
        output: folder for checkpoints, the loss log, tracker files and the final weights.
        resume: continue from the newest checkpoint in `output`; False refuses to touch one.
            `elastic` continues with another number of processes or batch size too: each image is
            still seen once per epoch, but the run no longer equals an uninterrupted one.
        allow_changed_config: resume although any setting changed; includes what `elastic` allows.
        checkpoints_total_limit: keep this many, delete older ones.
        tracker: `auto` is tensorboard where it is installed, else none.
        validate_every: optimizer steps between reconstructions of the fixed validation images.
        compile: run the trained network, and the frozen UNet of a ControlNet, by `torch.compile`.
        dry_run: print the config, parameter counts, memory and batch shapes, then stop.
    """

    output: str = "outputs/train"
    resume: bool | Literal["elastic"] = True
    allow_changed_config: bool = False
    checkpoint_every: Count = 500
    checkpoints_total_limit: Count = 2
    validate_every: Count = 500
    n_validation_images: Pictures = 16
    log_every: Count = 10
    tracker: Literal["auto", "tensorboard", "wandb", "none"] = "auto"
    mixed_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    cpu: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        check(self)


# ---- A new backbone in a given time ----

HEAD = ("feature_encoder.*",)
ADAPTED = (*HEAD, "controlnet_*", "conv_in.*", "down_blocks.0.*", "*norm*")
"""What is trained: the head; and of the trunk, what reads it first and what hands its work on."""
TRAINED = {"frozen": HEAD, "adapted": ADAPTED, "thawed": ("*",)}


@dataclass(frozen=True)
class NewBackboneSettings:
    """What is made, of what and in which time."""

    data: str = option("", "Images: a folder, parquet file, tar files or a Hub data set.")
    split: str = option("train", "Split of the images, or the folder below that holds the classes.")
    layer: str = option("last", "Layer whose map is inverted: last, or a dotted path of a module.")
    minutes: float = option(60.0, "Minutes that all of it may take.", least=0.01, most=100_000)
    trunk: str = option("tiny/swin", "Pipeline whose ControlNet is the trunk.")
    trunk_is: str = option(
        "adapted",
        "What is trained beside the head: nothing, the trunk's first block and zero convolutions, "
        "or all of it.",
        choices=tuple(TRAINED),
    )
    batch_size: int = option(24, "Images per step.", least=1, most=4096)
    mixed_precision: str = option(
        "fp32",
        "Number format of training. With bf16 newer GPUs, and CPUs that have units for it, are "
        "faster.",
        choices=("fp32", "bf16", "fp16"),
    )
    features_dtype: str = option(
        "float16",
        "Number format in which maps are kept while it runs. float32 takes twice the disk and the "
        "memory, and holds numbers beyond 65,504.",
        choices=("float16", "float32"),
    )
    n_evaluated: int = option(
        64, "Images that are held back for the figures.", least=2, most=10_000
    )
    seed: int = option(0, "Seed of everything random.")

    def __post_init__(self) -> None:
        check(self)
