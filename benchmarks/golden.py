"""Golden records: what every command and script gives on tiny inputs, to compare before and after.

    python benchmarks/golden.py record --tree CHECKOUT --output before.json
    python benchmarks/golden.py compare before.json after.json --without help

`record` runs each case as a process of its own, on the code of CHECKOUT, with one thread, no
network and no GPU, and writes what came out: exit code, text, and what is in each file (pixels and
tensors as digests, tables and JSON as values). It makes its inputs itself, always the same.
`compare` prints one line for each difference and exits with 1 if there are any.

This script imports nothing of featinv_diffusion, so that it works on any checkout: run it with the
Python of an environment in which the package is installed, and PYTHONPATH chooses the checkout.
Timings, machine-specific values and what is not deterministic are left out; see `read_file`.
Records of two machines, or of two versions of the libraries, differ in the last bits.
"""

from __future__ import annotations

import argparse
import difflib
import fnmatch
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw
from pyarrow import parquet

TIMEOUT = 300
"""Seconds that a case may take."""

SCRIPTS = {
    "autoencoder": "train/autoencoder.py",
    "classifier": "train/classifier.py",
    "contrastive": "train/contrastive.py",
    "controlnet": "train/controlnet.py",
    "detector": "train/detector.py",
    "inverter": "train/inverter.py",
    "reconstruct": "sample/reconstruct.py",
    "text_to_image": "train/text_to_image.py",
    "tiny": "train/tiny.py",
}
"""The scripts of a checkout by the names that cases call them."""
HELPED = ("reconstruct", "controlnet", "tiny")
"""Scripts whose `--help` is recorded: those in train/ share their options."""

COMMANDS = (
    *("sample", "interpolate", "compose", "variability", "concepts", "viz", "replay", "evaluate"),
    *("classemb", "analyze", "layers", "scope", "export", "push", "convert", "operator"),
    *("operator fit", "operator apply", "operator analyze"),
)

LIBRARIES = ("torch", "diffusers", "transformers", "timm", "numpy", "pillow", "datasets")


# ---- cases -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One process.

    Args:
        name: `KIND:NAME`.
        command: begins with `featinv`, `script NAME` or a command of this script. In it {data} are
            the inputs, {models} random models, {run} the folder in which the training scripts run,
            {tiny} the bundled family, {done}/KIND/NAME the output folder of another case and {out}
            that of this one.
        needs: names of cases that must have run before.
        output: folder that is read afterwards.
        files: pattern of the files in it that are recorded.
        cwd: where the process runs.
        same_final: another case whose final weights must be equal to those of this one.
    """

    name: str
    command: str
    needs: tuple[str, ...] = ()
    output: str = "{out}"
    files: str = "*"
    cwd: str = "{tree}"
    same_final: str | None = None


def case(name: str, command: str, *needs: str, **others: Any) -> Case:
    """A case of `featinv`, whose output goes to its own folder unless the command says where."""
    return Case(name, f"featinv {command}", needs, **others)


PHOTO, FLOWER = "{data}/photos/china.jpg", "{data}/photos/flower.jpg"
FEW = "--n-samples 1 --steps 2 --output {out}"


def sample_cases() -> list[Case]:
    """`featinv sample` with every kind of inverter and input, and `featinv replay` of it."""
    once = f"sample {PHOTO} --output {{out}} --inverter"
    folder = "{data}/classes --n-samples 1 --steps 2 --batch-size 4"
    trained = "{run}/.checkpoints/tiny"
    return [
        case("sample:photo", f"sample {PHOTO} --n-samples 2 --steps 2 --output {{out}}"),
        case("sample:builtin", f"sample {FEW}"),
        case("sample:folder", f"sample {folder} --backbone resnet --output {{out}}"),
        case("sample:odd", f"sample {{data}}/odd {PHOTO} {FEW}"),
        case("sample:pooled", f"sample {PHOTO} --pipeline tiny/convnext-pooled {FEW}"),
        case("sample:layer", f"sample {PHOTO} --layer stages.1 {FEW}"),
        case("sample:swin", f"sample {PHOTO} --backbone swin --scheduler euler --seed 3 {FEW}"),
        case("sample:vit", f"sample {PHOTO} --backbone vit --dtype bfloat16 {FEW}"),
        case(
            "sample:ddim",
            f"sample {PHOTO} --scheduler ddim --guidance text --guidance-scale 2 --strength .8 "
            + FEW,
        ),
        case("sample:once-siglip2", f"{once} siglip2"),
        case("sample:once-vit", f"{once} vit --stage blocks.2"),
        case("sample:once-detr", f"{once} detr --stage decoder"),
        case("sample:once-rae", f"{once} rae --pipeline {{models}}/rae", "input:models"),
        case(
            "sample:once-trained",
            f"{once} {trained}/inverter-vit/final/inverter",
            "train:inverter-vit",
        ),
        case(
            "sample:once-reconstructor",
            f"{once} {trained}/reconstructor-siglip2/final/reconstructor",
            "train:reconstructor-siglip2",
        ),
        case(
            "sample:exported",
            f"sample {PHOTO} --pipeline {{done}}/export/bundled/pipeline {FEW}",
            "scope:fit",
        ),
        case("replay:sample", "replay {done}/sample/photo --output {out}", "sample:photo"),
        case(
            "replay:once",
            "replay {done}/sample/once-detr/manifest.json --output {out}",
            "sample:once-detr",
        ),
    ]


def reconstruct_cases() -> list[Case]:
    """`sample/reconstruct.py`, resumed by a second call, and resumed with other settings."""
    command = "script reconstruct {data}/classes --shard-size 5 --steps 2 --output "
    first = "{done}/reconstruct/shards"
    return [
        Case("reconstruct:shards", f"{command}{first}"),
        Case("reconstruct:again", f"{command}{first}", needs=("reconstruct:shards",), output=first),
        Case(
            "reconstruct:siglip2",
            "script reconstruct {data}/odd --inverter siglip2 --output {out}",
        ),
        Case(
            "error:reconstruct-changed",
            f"{command}{first} --seed 1",
            needs=("reconstruct:again",),
        ),
    ]


def study_cases() -> list[Case]:
    """Interpolation, composition, variability, concepts and FeatInv-Viz, and replays of them."""
    concepts = "concepts {data}/classes/goldfish --output {out}/concepts.safetensors"
    found = "{done}/concepts/mcd/concepts.safetensors"
    return [
        case(
            "interpolate:mixed",
            f"interpolate {PHOTO} {FLOWER} --weights 0,.5,1 --figure figure.svg {FEW}",
        ),
        case("compose:box", f"compose {PHOTO} {FLOWER} --box 0,.5,1,1 {FEW}"),
        case("compose:mask", f"compose {PHOTO} {FLOWER} --mask {{data}}/mask.png {FEW}"),
        case(
            "variability:photo",
            f"variability {PHOTO} --n-samples 3 --steps 2 --figure figure.pdf --output {{out}}",
        ),
        case("concepts:mcd", f"{concepts} --n-concepts 2 --max-cells 200"),
        case("concepts:auto", f"{concepts} --n-concepts auto --max-cells 200 --class goldfish"),
        case("concepts:pca", f"{concepts} --method pca --backbone tiny/resnet --class 1"),
        case("concepts:kmeans", f"{concepts} --method kmeans --layer stages.1"),
        case(
            "concepts:nmf",
            f"{concepts} --method nmf --backbone tiny/resnet --figure seen.svg",
        ),
        case(
            "concepts:directions",
            f"{concepts} --directions {{data}}/directions.npy --encoding projection",
        ),
        case(
            "viz:photo",
            f"viz {PHOTO} --concepts {found} --concept 1 --film 0,1 --n-directions 1 "
            "--n-samples 2 --steps 2 --output {out}",
            "concepts:mcd",
        ),
        case(
            "replay:concepts",
            "replay {done}/concepts/mcd/concepts.manifest.json --output {out}",
            "concepts:mcd",
        ),
        case(
            "replay:interpolate",
            "replay {done}/interpolate/mixed --output {out}",
            "interpolate:mixed",
        ),
    ]


def evaluation_cases() -> list[Case]:
    """`featinv evaluate`, `classemb` and `analyze`."""
    few = "--steps 2 --n-null-images 2 --output {out}"
    tuned = "{run}/.checkpoints/tiny/detr-lambda-0.9/final/inverter"
    return [
        case("evaluate:folder", f"evaluate --data {{data}}/classes --n-images 5 {few}"),
        case(
            "evaluate:again",
            "evaluate --data {data}/classes --n-images 5 --steps 2 --n-null-images 2 "
            "--output {done}/evaluate/folder",
            "evaluate:folder",
            output="{done}/evaluate/folder",
        ),
        case(
            "evaluate:parquet",
            "evaluate --data {data}/pictures.parquet --n-images 4 --backbone resnet "
            f"--evaluated-by convnext,vit,resnet {few}",
        ),
        case(
            "evaluate:named-parquet",
            f"evaluate --data {{data}}/named.parquet --per-class 1 --selection first {few}",
        ),
        case(
            "evaluate:tables",
            "evaluate --data {data}/tables --split train --inverter siglip --batch-size 3 "
            "--n-null-images 2 --output {out}",
        ),
        case(
            "evaluate:held-back",
            "evaluate --data {run}/.data/tiny-imagenet-200 --split train --classes "
            f"{{data}}/classes.txt --held-back-per-class 1 --save-images --shard-size 2 {few}",
        ),
        case(
            "evaluate:shipped-config",
            "evaluate --config configs/evaluation/tiny.yaml --data {data}/classes --n-images 2 "
            + few,
        ),
        case("evaluate:config", "evaluate --config {data}/evaluate.yaml --output {out}"),
        case(
            "evaluate:once-vit",
            "evaluate --data {data}/classes --n-images 3 --inverter vit --stage blocks.2 "
            "--evaluated-by tiny/convnext --n-null-images 2 --output {out}",
        ),
        case("evaluate:broken", f"evaluate --data {{data}}/odd {few}"),
        case("classemb:photo", f"classemb {PHOTO} --target goldfish --output {{out}}"),
        case(
            "classemb:folder",
            "classemb {data}/classes --ablations --null --perturbation --n-points 3 "
            "--masks {data}/masks --n-images 6 --n-figures 1 --output {out}",
        ),
        case(
            "classemb:modular",
            "classemb {run}/.data/tiny-imagenet-200 --split train --classes {data}/classes.txt "
            "--per-class 2 --inverter vit --stage blocks.2 --interpolation bilinear "
            "--n-figures 1 --output {out}",
        ),
        case(
            "analyze:stages",
            "analyze stages --inverter vit --data {data}/classes --n-images 3 --output {out}",
        ),
        case(
            "analyze:layers",
            "analyze layers --inverter detr --data {data}/classes --n-images 2 --output {out}",
        ),
        case(
            "analyze:colour",
            "analyze colour --inverter detr --data {data}/coco --split val2017 --n-images 3 "
            "--output {out}",
        ),
        case(
            "analyze:tradeoff",
            f"analyze tradeoff --inverter detr,{tuned} --split train "
            "--data {run}/.data/tiny-imagenet-200 --classes {data}/classes.txt "
            "--held-back-per-class 1 --output {out}",
            "train:inverter-tuned",
        ),
        case(
            "analyze:encoders",
            "analyze encoders --inverter siglip,vit@blocks.2,rae:{models}/rae --n-images 4 "
            "--data {data}/classes --output {out}",
            "input:models",
        ),
        case(
            "analyze:encoders-config",
            "analyze encoders --config {data}/encoders.yaml --batch-size 2 "
            "--inverter siglip2,diffusion:tiny/swin --output {out}",
        ),
    ]


def pipeline_cases() -> list[Case]:
    """Layers, scope, export, push and convert."""
    exported, trained = "{done}/export/bundled/pipeline", "{run}/.checkpoints/tiny"
    original = "{done}/convert/reverse/back"
    return [
        case("layers:convnext", "layers convnext"),
        case("layers:tiny-siglip2", "layers tiny/siglip2"),
        case(
            "layers:folder",
            f"layers hf/{trained}/siglip2/final/backbone",
            "train:contrastive-siglip2",
        ),
        case("export:bundled", "export {out}/pipeline --backbone convnext"),
        case("push:dry-run", f"push {exported} user/name --dry-run", "export:bundled"),
        case(
            "scope:fit",
            f"scope {exported} --data {{data}}/many --n-reconstructions 99 --batch-size 32",
            "export:bundled",
            "push:dry-run",
            output=exported,
            files="scope.safetensors",
        ),
        case(
            "export:trained",
            f"export {{out}}/pipeline --controlnet {trained}/controlnet-convnext/final/controlnet "
            "--base {tiny}/base",
            "train:controlnet-convnext",
        ),
        case(
            "export:sd",
            "export {out}/pipeline --controlnet {run}/outputs/sd/final/controlnet "
            "--base {models}/sd --backbone tiny/convnext",
            "train:sd",
        ),
        case(
            "convert:reverse",
            "convert {done}/export/sd/pipeline {out}/back.ckpt --reverse",
            "export:sd",
        ),
        case(
            "convert:forward",
            f"convert {original}.ckpt {{out}}/pipeline --original-config {original}.yaml "
            "--tokenizer {models}/sd/tokenizer",
            "convert:reverse",
        ),
        case(
            "convert:forward-bare",
            f"convert {original}.ckpt {{out}}/pipeline --original-config {original}.yaml "
            "--no-tokenizer --no-backbone",
            "convert:reverse",
        ),
    ]


def operator_cases() -> list[Case]:
    """Operators on features: fit, apply and analyze."""
    swap = "{done}/operator/fit-swap/swap.safetensors"
    linear = "{done}/operator/fit-linear/linear.safetensors"
    held_out = "--data {data}/classes --n-images 3 --output {out}"
    return [
        case(
            "operator:fit-swap",
            "operator fit --backbone tiny/vit --operation swap --data {data}/classes "
            "--n-images 8 --output {out}/swap.safetensors",
        ),
        case(
            "operator:fit-linear",
            "operator fit --backbone tiny/siglip2 --operation suppress --alpha .5 --channel red "
            "--method linear --ridge .01 --data {data}/named.parquet --n-images 8 "
            "--output {out}/linear.safetensors",
        ),
        case(
            "operator:apply-bundled",
            f"operator apply {PHOTO} --operator tiny/siglip2/colourise --inverter siglip2 "
            "--power 0,1,2 --output {out}",
        ),
        case(
            "operator:apply-diffusion",
            f"operator apply {PHOTO} --operator {swap} --inverter diffusion --pipeline tiny/vit "
            "--steps 2 --output {out}",
            "operator:fit-swap",
        ),
        case(
            "operator:analyze",
            f"operator analyze --operator {linear} --inverter siglip2 --power 1,2 {held_out}",
            "operator:fit-linear",
        ),
        case(
            "operator:analyze-features",
            f"operator analyze --operator {swap} {held_out}",
            "operator:fit-swap",
        ),
    ]


SHORT = (
    "data.classes={data}/classes.txt data.held_back_per_class=2 data.num_workers=0 "
    "optim.batch_size=4 optim.max_steps=2 optim.epochs=10 optim.warmup_steps=0 "
    "run.cpu=true run.tracker=none run.mixed_precision=fp32 run.checkpoint_every=2 "
    "run.validate_every=2 run.n_validation_images=2"
)
"""Settings that make a recipe of configs/tiny end after two steps."""


def recipe(name: str, script: str, config: str, output: str, *needs: str, extra: str = "") -> Case:
    """A recipe of configs/tiny, shortened; it writes where the recipe says, below {run}."""
    return Case(
        f"train:{name}",
        f"script {script} --config configs/tiny/{config}.yaml {SHORT} {extra}".strip(),
        needs=tuple(f"train:{need}" for need in needs),
        output=f"{{run}}/.checkpoints/tiny/{output}",
        cwd="{run}",
    )


def recipe_cases() -> list[Case]:
    """The recipes of configs/tiny, each on what the earlier ones trained, and their packing."""
    tracked = "run.tracker=tensorboard run.mixed_precision=bf16"
    fresh = "model.init=null model.teacher=null"
    quick = "validation.num_inference_steps=1"
    return [
        recipe("resnet-small", "classifier", "resnet-small", "resnet-small", extra=tracked),
        recipe("resnet", "classifier", "resnet", "resnet", "resnet-small"),
        recipe("convnext", "classifier", "convnext", "convnext", "resnet"),
        recipe("vit", "classifier", "vit", "vit", extra=fresh),
        recipe(
            "autoencoder",
            "autoencoder",
            "autoencoder",
            "autoencoder",
            "resnet",
            extra="model.perceptual_classifier=.checkpoints/tiny/resnet/final/classifier",
        ),
        recipe("text-to-image", "text_to_image", "text_to_image", "text-to-image", "autoencoder"),
        recipe(
            "controlnet-convnext",
            "controlnet",
            "controlnet-convnext",
            "controlnet-convnext",
            "text-to-image",
            "convnext",
            extra=quick,
        ),
        recipe("detector", "detector", "detr", "detr", "resnet"),
        recipe("inverter-detr", "inverter", "inverter-detr", "inverter-detr", "detector"),
        recipe("inverter-vit", "inverter", "inverter-vit", "inverter-vit", "vit"),
        recipe(
            "inverter-tuned",
            "inverter",
            "inverter-detr-tuned",
            "detr-lambda-0.9",
            "inverter-detr",
        ),
        recipe("contrastive-siglip2", "contrastive", "siglip2", "siglip2"),
        recipe(
            "reconstructor-siglip2",
            "inverter",
            "reconstructor-siglip2",
            "reconstructor-siglip2",
            "contrastive-siglip2",
        ),
        Case(
            "train:pack",
            "script tiny --pack-only --output {out}/family",
            needs=tuple(
                f"train:{name}"
                for name in (
                    "controlnet-convnext",
                    "inverter-detr",
                    "inverter-vit",
                    "reconstructor-siglip2",
                )
            ),
            cwd="{run}",
        ),
        Case(
            "train:dry-run",
            "script controlnet --config configs/tiny/controlnet-resnet.yaml --dry-run "
            f"{SHORT} model.base={{tiny}}/base model.backbone={{tiny}}/resnet/backbone "
            "model.warm_start={tiny}/convnext/controlnet run.output={out}",
            cwd="{run}",
        ),
    ]


CONTROLNET = (
    "script controlnet model.base={tiny}/base model.backbone=tiny/convnext "
    "model.feature_hidden_channels=16 model.statistics_images=4 data.size=64 "
    "data.num_workers=0 optim.lr=1e-3 optim.batch_size=2 optim.epochs=50 run.cpu=true "
    "run.tracker=none run.n_validation_images=2 validation.num_inference_steps=1"
)


def training_cases() -> list[Case]:
    """Training from other kinds of data, and a run in two parts."""
    folder = "data.root={data}/classes data.held_back_per_class=2"
    resumed = f"{CONTROLNET} {folder} optim.ema_decay=.9 run.allow_changed_config=true"
    parts = "run.output={done}/train/resume-parts"
    return [
        Case(
            "train:resume-whole",
            f"{resumed} optim.max_steps=4 cache.folder={{out}}/cache "
            "run.output={out} run.gradient_checkpointing=true",
        ),
        Case(
            "train:resume-parts",
            f"{resumed} optim.max_steps=2 cache.folder={{out}}/cache {parts} "
            "run.gradient_checkpointing=true",
        ),
        Case(
            "train:resume-end",
            f"{resumed} optim.max_steps=4 cache.folder={{done}}/train/resume-parts/cache {parts} "
            "run.gradient_checkpointing=true",
            needs=("train:resume-whole", "train:resume-parts"),
            output="{done}/train/resume-parts",
            same_final="train:resume-whole",
        ),
        Case(
            "train:streaming",
            f"{CONTROLNET} data.root={{data}}/pictures.tar data.streaming=true "
            "data.shuffle_buffer=4 optim.max_steps=2 run.output={out}",
        ),
        Case(
            "train:named-parquet",
            f"{CONTROLNET} data.root={{data}}/named.parquet optim.max_steps=2 model.pooled=true "
            "model.backbone={tiny}/resnet/backbone model.backbone_name=tiny/resnet "
            "model.dropout_kind=independent data.num_workers=1 run.output={out}",
        ),
        Case(
            "train:parquet-dry-run",
            f"{CONTROLNET} data.root={{data}}/pictures.parquet --dry-run run.output={{out}}",
        ),
        Case(
            "train:tar-dry-run",
            f"{CONTROLNET} data.root={{data}}/pictures.tar --dry-run run.output={{out}}",
        ),
        Case(
            "train:coco",
            "script inverter --config configs/tiny/inverter-vit.yaml data.root={data}/coco "
            f"data.split=val2017 {SHORT} data.classes=null data.in_memory=false "
            "model.weights=null run.output={out}",
        ),
        Case(
            "train:sd",
            f"{CONTROLNET} {folder} model.base={{models}}/sd model.standardise=false "
            "optim.max_steps=2 run.output={run}/outputs/sd",
            needs=("input:models",),
            output="{run}/outputs/sd",
        ),
    ]


def error_cases() -> list[Case]:
    """What a user can get wrong: the exit code and the sentence."""
    sample = f"sample {PHOTO} {FEW}"
    mix = f"{PHOTO} {FLOWER} {FEW}"
    evaluate = "evaluate --data {data}/classes --output {out}"
    swap = "tiny/siglip2/swap"
    commands = {
        "unknown-backbone": f"{sample} --backbone convnect",
        "unknown-pipeline": f"{sample} --pipeline tiny/convnex",
        "absent-repository": f"{sample} --pipeline nobody/nothing",
        "other-backbone": f"{sample} --pipeline tiny/convnext --backbone resnet",
        "missing-picture": f"sample {{data}}/nothing.jpg {FEW}",
        "empty-folder": f"sample {{data}}/empty {FEW}",
        "broken-picture": f"sample {{data}}/odd/cut.png {FEW}",
        "wrong-layer": f"{sample} --layer stages.9",
        "stage-without-inverter": f"{sample} --stage decoder",
        "wrong-stage": f"sample {PHOTO} --inverter vit --stage blocks.7 --output {{out}}",
        "steps-of-deterministic": f"{sample} --inverter siglip",
        "unknown-inverter": f"sample {PHOTO} --inverter sigclip --output {{out}}",
        "unknown-scheduler": f"{sample} --scheduler dim",
        "no-samples": f"sample {PHOTO} --n-samples 0 --output {{out}}",
        "absent-device": f"{sample} --device cuda",
        "output-is-a-file": f"sample {PHOTO} --inverter siglip --output {{data}}/text.txt",
        "box-of-two": f"compose {mix} --box 0,1",
        "no-region": f"compose {mix}",
        "weights-of-words": f"interpolate {mix} --weights half",
        "concepts-method": "concepts {data}/classes --method mdc --output {out}/c.safetensors",
        "evaluate-too-many": f"{evaluate} --n-images 99",
        "evaluate-tar": "evaluate --data {data}/pictures.tar --output {out}",
        "evaluate-split": "evaluate --data {data}/tables --split test --output {out}",
        "evaluate-fid": f"{evaluate} --fid clean --n-images 2 --steps 2",
        "replay-missing": "replay {data}/nothing --output {out}",
        "classemb-no-vit": f"classemb {PHOTO} --backbone tiny/resnet --output {{out}}",
        "analyze-name": "analyze stage --output {out}",
        "analyze-one-encoder": "analyze encoders --inverter siglip --data {data}/classes "
        "--output {out}",
        "operator-features": f"operator apply {PHOTO} --operator {swap} --inverter vit "
        "--output {out}",
        "layers-unknown": "layers convnect",
        "convert-absent": "convert {data}/nothing.ckpt {out}",
        "convert-tiny": "convert tiny/convnext {out}/tiny.ckpt --reverse",
    }
    scripts = {
        "train-unknown-key": f"{CONTROLNET} optim.rate=1 run.output={{out}}",
        "train-no-data": f"{CONTROLNET} run.output={{out}}",
        "train-no-folder": f"{CONTROLNET} data.root={{data}}/nothing run.output={{out}}",
        "train-family": "script inverter model.family=dtr run.output={out}",
    }
    return [
        *(case(f"error:{name}", command) for name, command in commands.items()),
        *(Case(f"error:{name}", command) for name, command in scripts.items()),
        case(
            "error:viz-concept",
            f"viz {PHOTO} --concepts {{done}}/concepts/mcd/concepts.safetensors --concept 9 "
            "--n-samples 2 --steps 2 --output {out}",
            "concepts:mcd",
        ),
        case(
            "error:export-base-without-index",
            "export {out}/pipeline --base {run}/.checkpoints/tiny/text-to-image/final --controlnet "
            "{run}/.checkpoints/tiny/controlnet-convnext/final/controlnet",
            "train:controlnet-convnext",
        ),
        case("error:export-not-new", "export {done}/export/bundled/pipeline", "export:bundled"),
        case("error:push-offline", "push {done}/export/bundled/pipeline a/b", "export:bundled"),
        case(
            "error:scope-too-few",
            "scope {done}/export/bundled/pipeline --data {data}/classes",
            "export:bundled",
        ),
    ]


def help_cases() -> list[Case]:
    """`--help` of every command and of some scripts."""
    commands = [case(f"help:{name.replace(' ', '-')}", f"{name} --help") for name in COMMANDS]
    scripts = [Case(f"help:script-{name}", f"script {name} --help") for name in HELPED]
    return [case("help:featinv", "--help"), case("help:version", "--version"), *commands, *scripts]


def all_cases() -> list[Case]:
    """Every case, in an order in which each comes after what it needs."""
    models = Case("input:models", "models {models}", output="{models}")
    cases = [
        models,
        *study_cases(),
        *operator_cases(),
        *recipe_cases(),
        *training_cases(),
        *pipeline_cases(),
        *sample_cases(),
        *reconstruct_cases(),
        *evaluation_cases(),
        *error_cases(),
        Case("import:benchmarks", "imports {tree}/benchmarks"),
        *help_cases(),
    ]
    seen: set[str] = set()
    for one in cases:
        assert one.name not in seen, one.name
        assert seen.issuperset(one.needs), one.name
        seen.add(one.name)
    return cases


def choose(cases: Sequence[Case], parts: Sequence[str]) -> list[Case]:
    """The cases whose name holds one of the parts, with those that they need."""
    by_name = {one.name: one for one in cases}
    wanted = [one.name for one in cases if not parts or any(part in one.name for part in parts)]
    chosen: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name not in chosen:
            chosen.add(name)
            wanted += by_name[name].needs
    return [one for one in cases if one.name in chosen]


# ---- inputs ------------------------------------------------------------------------------------

WORDNET = {
    "n01443537": "goldfish",
    "n01641577": "bullfrog",
    "n01644900": "tailed frog",
    "n01629819": "European fire salamander",
    "n01698640": "American alligator",
}
"""Five classes of the tiny family: a ControlNet's validation asks for the first five of a head."""
TWO = ("goldfish", "bullfrog")
"""Of the class folders that are no Tiny-ImageNet."""


def make_inputs(data: Path, tiny_imagenet: Path) -> None:
    """Writes pictures and tables, always the same, also in their times of change."""
    data.mkdir(parents=True)
    (data / "empty").mkdir()
    (data / "text.txt").write_text("This is no picture.\n")
    copy_photos(data / "photos")
    classes = make_class_folders(data)
    make_tiny_imagenet(tiny_imagenet)
    make_odd_pictures(data / "odd")
    make_tables(data, classes)
    make_tar(data / "pictures.tar", classes)
    make_coco(data / "coco")
    for i in range(500):
        save(draw_picture(1000 + i, (16, 16)), data / f"many/{i:03d}.png")
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).ellipse((16, 8, 48, 40), fill=255)
    save(mask, data / "mask.png")
    np.save(data / "directions.npy", np.random.default_rng(3).normal(size=(3, 256)))
    write_settings(data)
    for folder in (data, tiny_imagenet):
        for path in folder.rglob("*"):  # a digest of the data has the times of files in it
            os.utime(path, (1_700_000_000, 1_700_000_000))


def draw_picture(seed: int, size: tuple[int, int], hue: int = 0) -> Image.Image:
    """A gradient between two colours with a few shapes and some noise."""
    random = np.random.default_rng(seed)
    width, height = size
    first, last = random.integers(0, 256, (2, 3))
    first[hue % 3] = 255
    slope = np.linspace(0, 1, width)[None, :, None] * np.linspace(0.3, 1, height)[:, None, None]
    picture = Image.fromarray((first + slope * (last - first)).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for shape in (draw.ellipse, draw.rectangle, draw.ellipse):
        left, top = random.integers(0, 2 * width // 3), random.integers(0, 2 * height // 3)
        right, bottom = random.integers(left, width), random.integers(top, height)
        box = (int(left), int(top), int(right), int(bottom))
        shape(box, fill=tuple(int(x) for x in random.integers(0, 256, 3)))
    noisy = np.asarray(picture) + random.normal(0, 6, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def save(picture: Image.Image, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)
    return path


def copy_photos(folder: Path) -> None:
    """The two photos of scikit-learn."""
    found = importlib.util.find_spec("sklearn")
    assert found is not None
    assert found.submodule_search_locations is not None
    images = Path(next(iter(found.submodule_search_locations))) / "datasets/images"
    folder.mkdir()
    for name in ("china.jpg", "flower.jpg"):
        shutil.copyfile(images / name, folder / name)


def make_class_folders(data: Path) -> list[tuple[Path, int]]:
    """Two folders of six pictures of several sizes, masks for one, and a list of all classes."""
    made = []
    for label, name in enumerate(TWO):
        for i in range(6):
            size = (64 + 8 * (i % 4), 64 + 8 * (i % 3))
            path = data / f"classes/{name}/{i}.{'jpg' if i % 2 else 'png'}"
            made.append((save(draw_picture(100 * label + i, size, label), path), label))
    for i in range(3):
        mask = Image.new("L", (64, 64))
        ImageDraw.Draw(mask).rectangle((8 * i, 8, 40, 48), fill=255)
        save(mask, data / f"masks/goldfish/{i}.png")
    lines = [f"{folder} {name}" for folder, name in WORDNET.items()]
    (data / "classes.txt").write_text("# Five classes.\n" + "\n".join(lines) + "\n")
    return made


def make_tiny_imagenet(root: Path) -> None:
    """The training part of Tiny-ImageNet-200 with boxes: five classes of four pictures."""
    for label, name in enumerate(WORDNET):
        rows = []
        for i in range(4):
            file = f"{name}_{i}.JPEG"
            picture = draw_picture(200 + 10 * label + i, (64, 64), label)
            save(picture, root / f"train/{name}/images/{file}", format="JPEG")
            rows.append(f"{file}\t{4 + i}\t{6 + i}\t{40 + i}\t{50 - i}\n")
        (root / f"train/{name}/{name}_boxes.txt").write_text("".join(rows))


def make_odd_pictures(folder: Path) -> None:
    """What a user may have in a folder, two of them no pictures."""
    picture = draw_picture(7, (80, 64))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    save(picture, folder / "rotated.jpg", exif=rotated)
    alpha = Image.linear_gradient("L").resize(picture.size)
    transparent = picture.copy()
    transparent.putalpha(alpha)
    save(transparent, folder / "transparent.png")
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    save(Image.fromarray(deep), folder / "deep.png")
    save(picture.convert("CMYK"), folder / "cmyk.jpg")
    frames = [draw_picture(8, (64, 64)), draw_picture(9, (64, 64))]
    save(frames[0], folder / "moving.gif", save_all=True, append_images=frames[1:])
    whole = save(picture, folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "words.jpg").write_text("This is no picture.\n")


def make_tables(data: Path, pictures: Sequence[tuple[Path, int]]) -> None:
    """Parquet files: plain structs, the same with the Hub's names of classes, and two splits."""
    images = [{"bytes": path.read_bytes(), "path": path.name} for path, _ in pictures]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    labels = pa.array([label for _, label in pictures], pa.int64())
    plain = pa.table({"image": pa.array(images, kind), "label": labels})
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(TWO), "_type": "ClassLabel"},
    }
    named = plain.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    parquet.write_table(plain, data / "pictures.parquet")
    parquet.write_table(named, data / "named.parquet")
    (data / "tables").mkdir()
    for split, rows in (("train", named.slice(2, 6)), ("validation", named.slice(0, 2))):
        parquet.write_table(rows, data / f"tables/{split}-00000-of-00001.parquet")


def make_tar(path: Path, pictures: Sequence[tuple[Path, int]]) -> None:
    """A shard of webdataset."""
    with tarfile.open(path, "w") as tar:
        for i, (picture, label) in enumerate(pictures):
            encoded = io.BytesIO()
            Image.open(picture).save(encoded, format="JPEG")
            for suffix, content in (("jpg", encoded.getvalue()), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{i:04d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def make_coco(root: Path) -> None:
    """Six pictures with an object each, as COCO has them."""
    images, annotations = [], []
    for i in range(6):
        width, height = 72 + 8 * (i % 2), 64
        save(draw_picture(300 + i, (width, height)), root / f"val2017/{i:012d}.jpg")
        images.append({"id": i, "file_name": f"{i:012d}.jpg", "width": width, "height": height})
        left, top, right, bottom = 8, 6 + i, 48, 50
        annotations.append(
            {
                "id": i,
                "image_id": i,
                "category_id": 1 + i % 2,
                "bbox": [left, top, right - left, bottom - top],
                "area": (right - left) * (bottom - top),
                "iscrowd": 0,
                "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
            }
        )
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations").mkdir()
    (root / "annotations/instances_val2017.json").write_text(json.dumps(content))


def write_settings(data: Path) -> None:
    """YAML files for `evaluate` and `analyze encoders`."""
    (data / "evaluate.yaml").write_text(
        f"data: {data}/classes\nn_images: 3\nbackbone: vit\nsteps: 2\nbatch_size: 2\n"
        "n_null_images: 1\nevaluated_by: [swin]\n"
    )
    (data / "encoders.yaml").write_text(
        f"data: {data}/classes\nn_images: 3\nscorers: [tiny/convnext, tiny/resnet]\ngrey: true\n"
    )


def make_models(folder: Path) -> None:
    """Random models: a narrow Stable Diffusion 1.x, which the original code can hold, and a RAE.

    Runs as a process of its own, for it imports the libraries.
    """
    import torch
    from diffusers import AutoencoderKL, AutoencoderRAE, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    levels = {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1}
    UNet2DConditionModel(
        **levels,
        sample_size=8,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        cross_attention_dim=128,
        attention_head_dim=4,
    ).save_pretrained(folder / "sd/unet")
    AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        sample_size=64,
    ).save_pretrained(folder / "sd/vae")
    letters = [chr(code) for code in range(256, 512)]
    tokens = [*letters, *(f"{x}</w>" for x in letters), "<|startoftext|>", "<|endoftext|>"]
    CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77
    ).save_pretrained(folder / "sd/tokenizer")
    CLIPTextModel(
        CLIPTextConfig(
            hidden_size=128,
            intermediate_size=160,
            num_attention_heads=2,
            num_hidden_layers=2,
            vocab_size=len(tokens),
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    ).save_pretrained(folder / "sd/text_encoder")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(folder / "sd/scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "sd/model_index.json").write_text(json.dumps(index))
    AutoencoderRAE(
        encoder_type="mae",
        encoder_hidden_size=64,
        encoder_patch_size=16,
        encoder_num_hidden_layers=1,
        encoder_input_size=64,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        encoder_norm_mean=[0.4, 0.5, 0.6],
        encoder_norm_std=[0.2, 0.3, 0.25],
        latents_mean=torch.randn(64, 4, 4),
        latents_std=torch.rand(64, 4, 4) + 0.5,
    ).save_pretrained(folder / "rae")


def import_all(folder: Path) -> int:
    """Imports each module of a folder and prints whether that went well.

    Runs as a process of its own, on the checkout that PYTHONPATH names.
    """
    sys.path.insert(0, str(folder))
    for path in sorted(folder.glob("*.py")):
        if path.stem != Path(__file__).stem:
            try:
                importlib.import_module(path.stem)
                print(f"{path.stem} can be imported")
            except Exception as error:
                print(f"{path.stem}: {type(error).__name__}: {error}")
    return 0


# ---- running -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Places:
    """Where a record is made."""

    tree: Path
    work: Path

    @cached_property
    def tiny(self) -> Path:
        """The bundled family, wherever the checkout keeps it."""
        found = sorted((self.tree / "featinv_diffusion").glob("**/tiny/base/unet"))
        if not found:
            sys.exit(f"Error: no bundled family lies below {self.tree / 'featinv_diffusion'}.")
        return found[0].parents[1]

    def names(self, case_name: str) -> dict[str, str]:
        """What the names in braces of a command mean."""
        kind, name = case_name.split(":")
        places = {
            "tree": self.tree,
            "work": self.work,
            "data": self.work / "data",
            "models": self.work / "models",
            "run": self.work / "run",
            "done": self.work / "out",
            "out": self.work / "out" / kind / name,
            "tiny": self.tiny,
        }
        return {key: str(path) for key, path in places.items()}

    def environment(self) -> dict[str, str]:
        """Of every process: one thread, no network, no GPU, no caches of the user's own."""
        left_out = ("HF_", "TRANSFORMERS_", "CUDA_", "ACCELERATE_", "FORCE_COLOR")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
        return kept | {
            "PYTHONPATH": str(self.tree),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.work / "cache/huggingface"),
            "TORCH_HOME": str(self.work / "cache/torch"),
            "CUDA_VISIBLE_DEVICES": "",
            "COLUMNS": "100",
            "TERM": "dumb",
            "NO_COLOR": "1",
            "LC_ALL": "C.UTF-8",
        }

    def normalise(self, text: str) -> str:
        """Replaces the folders of this machine by names."""
        replaced = {
            str(self.tiny): "TINY",
            str(self.work): "WORK",
            str(Path(sys.prefix)): "VENV",
            str(self.tree): "TREE",
        }
        for path in sorted(replaced, key=len, reverse=True):
            text = text.replace(path, replaced[path])
        return re.sub(rf"{OF_PATHS}: \w+ → \w+", f"{OF_PATHS}: DIGESTS", text)


def to_arguments(one: Case, places: Places) -> list[str]:
    """The command line of a case."""
    words = shlex.split(one.command.format_map(places.names(one.name)))
    program, *arguments = words
    if program == "featinv":
        return [sys.executable, "-m", "featinv_diffusion", *arguments]
    if program in ("models", "imports"):
        return [sys.executable, str(Path(__file__).resolve()), program, *arguments]
    name, *arguments = arguments
    script = places.tree / SCRIPTS[name]
    if not script.is_file():  # what only builds the bundled family became modules
        module = "train.tiny_family" + ("" if name == "tiny" else f".{name}")
        return [sys.executable, "-m", module, *arguments]
    return [sys.executable, str(script), *arguments]


def run_case(one: Case, places: Places) -> dict[str, Any]:
    """Runs one process and reads what it gave."""
    names = places.names(one.name)
    Path(names["out"]).parent.mkdir(parents=True, exist_ok=True)
    code: int | str
    try:
        done = subprocess.run(
            to_arguments(one, places),
            cwd=one.cwd.format_map(names),
            env=places.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        code, out, err = "timeout", late.stdout or b"", late.stderr or b""
    return {
        "exit": code,
        "stdout": to_lines(out.decode(errors="replace"), places),
        "stderr": to_lines(err.decode(errors="replace"), places),
        "files": read_folder(Path(one.output.format_map(names)), one.files, places),
    }


PROGRESS = re.compile(r"%\||it/s|s/it|━|examples/s|font cache")


def to_lines(text: str, places: Places) -> list[str]:
    """Text without paths of this machine, progress bars and the inside of tracebacks."""
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", places.normalise(text))
    lines: list[str] = []
    in_traceback = False
    for line in (part.rstrip() for part in re.split(r"[\r\n]+", plain)):
        if line.startswith("Traceback "):
            in_traceback = True
        elif in_traceback and line and not line.startswith(" "):
            in_traceback = False  # the error itself, which stays
        elif in_traceback:
            continue
        if line and not PROGRESS.search(line):
            lines.append(line)
    return lines


# ---- reading what was written ------------------------------------------------------------------

OF_PATHS = "images_sha256"
"""A digest of absolute paths, outputs and seeds; the record has all of them besides."""
VERSIONS = ("version", "_diffusers_version", "transformers_version")
TIMES = ("minutes", "seconds", "time")
MAX_ROWS = 200
"""Tables of more rows are kept as digests only."""


def read_folder(folder: Path, pattern: str, places: Places) -> dict[str, Any]:
    """What is in each file below a folder, by its path there."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    found: dict[str, Any] = {}
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if fnmatch.fnmatch(name, pattern):
            # The names of TensorBoard's files hold the time, the machine and the process.
            name = re.sub(r"events\.out\.tfevents\.\S+", "events.out.tfevents", name)
            found[name] = read_file(path, places)
    return found


def read_file(path: Path, places: Places) -> Any:
    """What is compared of a file.

    Of code that travels with a pipeline, of figures as SVG or PDF, of optimizer states, random
    states and TensorBoard's events only that they are there: code is what a refactoring changes,
    and the others hold times or have no fixed order. The code is seen by what it makes.
    """
    readers: dict[str, Callable[[Path, Places], Any]] = {
        ".png": read_picture,
        ".json": read_json,
        ".jsonl": read_json_lines,
        ".parquet": read_table,
        ".safetensors": read_tensors,
        ".ckpt": read_checkpoint,
        ".npy": read_array,
        ".npz": read_arrays,
        ".md": read_text,
        ".yaml": read_text,
        ".txt": read_text,
    }
    reader = readers.get(path.suffix)
    if reader is None:
        return "is there"
    try:
        return reader(path, places)
    except Exception as error:
        return f"cannot be read: {type(error).__name__}"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def read_picture(path: Path, places: Places) -> str:
    with Image.open(path) as picture:
        return f"{picture.mode} {picture.width}x{picture.height} {digest(picture.tobytes())}"


def read_json(path: Path, places: Places) -> Any:
    content = json.loads(path.read_text(encoding="utf-8"))
    if path.name == "environment.json":  # of a checkpoint: versions and the commit
        return sorted(content)
    return clean(content, places)


def read_json_lines(path: Path, places: Places) -> Any:
    return [clean(json.loads(line), places) for line in path.read_text().splitlines()]


def read_text(path: Path, places: Places) -> list[str]:
    """Lines without versions; in a card's tables of a training the second column is minutes."""
    text = places.normalise(path.read_text(encoding="utf-8"))
    text = re.sub(r"featinv-diffusion \d[\w.+]*", "featinv-diffusion VERSION", text)
    return [re.sub(r"^\| (\d+) \| \d+\.\d{3} \|", r"| \1 | MINUTES |", x) for x in text.split("\n")]


def read_array(path: Path, places: Places) -> str:
    return describe_array(np.load(path))


def read_arrays(path: Path, places: Places) -> dict[str, str]:
    with np.load(path) as arrays:
        return {name: describe_array(arrays[name]) for name in sorted(arrays)}


def describe_array(values: np.ndarray) -> str:
    return f"{values.dtype} {list(values.shape)} {digest(np.ascontiguousarray(values).tobytes())}"


def read_tensors(path: Path, places: Places) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        header = {key: as_json(value) for key, value in (file.metadata() or {}).items()}
        tensors = {name: describe_tensor(file.get_tensor(name)) for name in sorted(file.keys())}
    return {"header": clean(header, places), "tensors": tensors}


def read_checkpoint(path: Path, places: Places) -> Any:
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True)
    tensors = content.get("state_dict", content)
    return {
        "keys": sorted(content),
        "tensors": {name: describe_tensor(tensors[name]) for name in sorted(tensors)},
    }


def describe_tensor(tensor: Any) -> str:
    import torch

    if not isinstance(tensor, torch.Tensor):
        return repr(tensor)
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)} {digest(content)}"


def read_table(path: Path, places: Places) -> dict[str, Any]:
    """Columns, a digest of each column's values, and the values where there are few rows."""
    table = parquet.read_table(path)
    header = {
        key.decode(): as_json(value.decode())
        for key, value in (table.schema.metadata or {}).items()
        if key not in (b"ARROW:schema", b"pandas", b"huggingface")
    }
    values = {name: clean(table[name].to_pylist(), places) for name in table.column_names}
    columns = {
        name: f"{table.schema.field(name).type} {digest(json.dumps(column).encode())}"
        for name, column in values.items()
    }
    found: dict[str, Any] = {"rows": table.num_rows, "columns": columns}
    if header:
        found["header"] = clean(header, places)
    if table.num_rows < MAX_ROWS:
        found["values"] = values
    return found


def as_json(text: str) -> Any:
    """The value where a text is JSON, else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def clean(value: Any, places: Places) -> Any:
    """JSON without paths, versions and times of this machine; NaN and bytes become text."""
    if isinstance(value, dict):
        return {
            key: clean_entry(key, item, places) for key, item in value.items() if key not in TIMES
        }
    if isinstance(value, (list, tuple)):
        return [clean(item, places) for item in value]
    if isinstance(value, str):
        return places.normalise(value)
    if isinstance(value, bytes):
        return f"bytes {digest(value)}"
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


def clean_entry(key: str, value: Any, places: Places) -> Any:
    if key in VERSIONS and isinstance(value, str):
        return "VERSION"
    if key == "environment" and isinstance(value, dict):
        return sorted(value)
    if key == OF_PATHS:
        return "DIGEST"
    return clean(value, places)


# ---- record ------------------------------------------------------------------------------------


def record(arguments: argparse.Namespace) -> int:
    """Runs the chosen cases and writes the record after each."""
    places = Places(arguments.tree.resolve(), arguments.work.resolve())
    output = arguments.output.resolve()
    chosen = choose(all_cases(), arguments.only)
    if not chosen:
        sys.exit(f"Error: no case has {' or '.join(arguments.only)} in its name.")
    prepare(places)
    start = time.monotonic()
    about = {
        "tree": str(places.tree),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    content: dict[str, Any] = {"about": about, "seconds": {}, "cases": {}}
    for one, result, seconds in run_all(chosen, places, arguments.jobs):
        content["cases"][one.name] = result
        content["seconds"][one.name] = round(seconds, 1)
        done = f"[{len(content['cases'])}/{len(chosen)}] {seconds:5.1f} s  "
        print(f"{done}exit {result['exit']}  {one.name}", flush=True)
        write_record(content, [one.name for one in chosen], output)
    for one in chosen:
        if one.same_final is not None:
            content["cases"][one.name]["same_final"] = have_same_final(content["cases"], one)
    write_record(content, [one.name for one in chosen], output)
    (places.work / "running").unlink()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{len(chosen)} cases in {time.monotonic() - start:.0f} s, "
        f"{used.ru_utime + used.ru_stime:.0f} s of the CPU: {output}"
    )
    return 0


def prepare(places: Places) -> None:
    """Empties the work folder, unless another record is being made in it, and fills it anew."""
    marker = places.work / "running"
    if marker.is_file() and Path(f"/proc/{marker.read_text()}").exists():
        sys.exit(f"Error: process {marker.read_text()} is at work in {places.work}; wait for it.")
    if places.work.exists() and any(places.work.iterdir()) and not marker_of(places).is_file():
        sys.exit(f"Error: {places.work} holds other things; name a new folder with --work.")
    shutil.rmtree(places.work, ignore_errors=True)
    run = places.work / "run"
    run.mkdir(parents=True)
    marker_of(places).write_text("The work folder of benchmarks/golden.py, emptied by each run.\n")
    marker.write_text(str(os.getpid()))
    for name in ("configs", "train"):  # the recipes name files from the folder they run in
        (run / name).symlink_to(places.tree / name)
    make_inputs(places.work / "data", run / ".data/tiny-imagenet-200")


def marker_of(places: Places) -> Path:
    return places.work / "GOLDEN"


def run_all(
    cases: Sequence[Case], places: Places, n_jobs: int
) -> Iterator[tuple[Case, dict[str, Any], float]]:
    """Yields each case with its result and seconds; those that it needs are run before it."""
    futures: dict[str, Future[tuple[dict[str, Any], float]]] = {}

    def run(one: Case) -> tuple[dict[str, Any], float]:
        for need in one.needs:  # these were handed in before, so that they run or have run
            futures[need].result()
        start = time.monotonic()
        return run_case(one, places), time.monotonic() - start

    with ThreadPoolExecutor(n_jobs) as pool:
        for one in cases:
            futures[one.name] = pool.submit(run, one)
        for one in cases:
            yield one, *futures[one.name].result()


def have_same_final(results: dict[str, Any], one: Case) -> bool:
    """Whether two trainings ended with the same weights."""

    def final(name: str | None) -> dict[str, Any]:
        files = results[name]["files"]
        return {path: files[path] for path in files if path.startswith("final/")}

    mine = final(one.name)
    return bool(mine) and mine == final(one.same_final)


def write_record(content: dict[str, Any], order: Sequence[str], output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.part")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    partial.replace(output)


# ---- compare -----------------------------------------------------------------------------------


def compare(arguments: argparse.Namespace) -> int:
    """Prints each difference and the counts of cases."""
    before, after = (json.loads(path.read_text()) for path in (arguments.before, arguments.after))
    for name in LIBRARIES:
        if before["about"].get(name) != after["about"].get(name):
            print(f"Note: {name} {before['about'].get(name)} → {after['about'].get(name)}")
    names = [
        name
        for name in {**before["cases"], **after["cases"]}
        if is_compared(name, arguments.only, arguments.without)
    ]
    n_different = 0
    for name in names:
        lines = list(compare_case(before["cases"].get(name), after["cases"].get(name)))
        n_different += bool(lines)
        shown = lines if arguments.limit is None else lines[: arguments.limit]
        for line in shown:
            print(f"{name}: {line}")
        if len(lines) > len(shown):
            print(f"{name}: … and {len(lines) - len(shown)} more differences")
    print(f"{len(names) - n_different} cases are equal, {n_different} differ.")
    return 1 if n_different else 0


def is_compared(name: str, only: Sequence[str], without: Sequence[str]) -> bool:
    if any(name == part or name.startswith(f"{part}:") for part in without):
        return False
    return not only or any(part in name for part in only)


def compare_case(before: Any, after: Any) -> Iterator[str]:
    if before is None or after is None:
        yield f"is only in the record {'after' if before is None else 'before'}"
    else:
        yield from differences("", before, after)


def differences(key: str, before: Any, after: Any) -> Iterator[str]:
    """Yields a line for each value that is not the same."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in {**before, **after}:
            inner = f"{key}/{name}" if key else name
            if name not in before or name not in after:
                where, value = ("after", after) if name not in before else ("before", before)
                yield f"{inner} is only there {where}: {shorten(value[name])}"
            else:
                yield from differences(inner, before[name], after[name])
    elif is_text(before) and is_text(after):
        yield from text_differences(key, before, after)
    elif isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            yield f"{key}: {len(before)} items → {len(after)} items"
        for i, (x, y) in enumerate(zip(before, after, strict=False)):  # of what both have
            yield from differences(f"{key}[{i}]", x, y)
    elif before != after or type(before) is not type(after):
        yield f"{key}: {shorten(before)} → {shorten(after)}"


def is_text(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(line, str) for line in value)


def text_differences(key: str, before: list[str], after: list[str]) -> Iterator[str]:
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for tag, i, i_end, j, j_end in matcher.get_opcodes():
        if tag != "equal":
            for x, y in zip_longest(before[i:i_end], after[j:j_end]):
                yield f"{key}: {shorten(x)} → {shorten(y)}"


def shorten(value: Any, limit: int = 240) -> str:
    """A value as one line of readable length."""
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text)} characters)"


# ---- command line ------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("record", help="Run the cases and write what they gave.")
    made.add_argument(
        "--tree",
        type=Path,
        default=Path(__file__).resolve().parents[1],
        help="Checkout whose code is run; default: the one that this script lies in.",
    )
    made.add_argument("--output", type=Path, required=True, help="JSON file to write.")
    made.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "featinv-golden",
        help="Folder for inputs and outputs, emptied at the start; default: %(default)s.",
    )
    made.add_argument(
        "--only",
        nargs="*",
        default=[],
        metavar="NAME_PART",
        help="Only cases with one of these in their name, and those that they need.",
    )
    made.add_argument("--jobs", type=int, default=1, help="Cases that run at a time; default: 1.")
    made.set_defaults(run=record)
    compared = commands.add_parser("compare", help="Print how two records differ.")
    compared.add_argument("before", type=Path, metavar="BEFORE")
    compared.add_argument("after", type=Path, metavar="AFTER")
    compared.add_argument(
        "--only", nargs="*", default=[], metavar="NAME_PART", help="Only cases with one of these."
    )
    compared.add_argument(
        "--without",
        nargs="*",
        default=[],
        metavar="KIND_OR_NAME",
        help="Leave out cases of these kinds or names, such as help.",
    )
    compared.add_argument(
        "--limit", type=int, help="Print at most so many differences of a case; default: all."
    )
    compared.set_defaults(run=compare)
    listed = commands.add_parser("list", help="Print the names of all cases.")
    listed.set_defaults(run=lambda _: print("\n".join(one.name for one in all_cases())) or 0)
    models = commands.add_parser("models", help="Write the random models that cases need.")
    models.add_argument("folder", type=Path)
    models.set_defaults(run=lambda given: make_models(given.folder) or 0)
    imports = commands.add_parser("imports", help="Import the modules of a folder.")
    imports.add_argument("folder", type=Path)
    imports.set_defaults(run=lambda given: import_all(given.folder))
    arguments = parser.parse_args()
    return arguments.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
