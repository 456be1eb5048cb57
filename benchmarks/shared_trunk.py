"""What one trunk for all pipelines of the tiny family costs them, for docs/real-backbone.md.

    OMP_NUM_THREADS=1 python benchmarks/shared_trunk.py --data validation.parquet \
        --trained .checkpoints/tiny/shared-trunk/final

The same images and noise with the pipeline's own ControlNet, with its head on the mean of the
trunks before any training, and with what `featinv train shared-trunk` made; where `--adapted` holds
one, also with what configs/tiny/adapted.yaml made of that. Differences are paired
over images; steps and guidance are the pipeline's own.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import table
from quality import OUTSIDE, words
from torch import Tensor

from featinv_diffusion import load_backbone, load_pipeline
from featinv_diffusion.config import load_config
from featinv_diffusion.data.selection import select_items
from featinv_diffusion.data.sets import open_images
from featinv_diffusion.diffusion.featinv_controlnet import FeatureControlNet
from featinv_diffusion.diffusion.folders import load_controlnet
from featinv_diffusion.evaluation.evaluator import noise_of
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.inverters import DiffusionInverter
from featinv_diffusion.metrics import feature_cosine
from featinv_diffusion.metrics.statistics import bootstrap_mean
from featinv_diffusion.runs.sampling import batched
from featinv_diffusion.settings import Selection
from featinv_diffusion.training.shared_trunk import SharedTrunkConfig, mean_of_trunks

BATCH, SECOND = 10, "tiny/convnext"
CONFIG = "configs/tiny/shared-trunk.yaml"
OWN, MEAN, SHARED, ADAPTED = "own trunk", "mean of trunks", "shared trunk", "shared, adapted"


@torch.no_grad()
def measure(inverter: DiffusionInverter, images: Tensor, items: list[Any], eye: Any) -> np.ndarray:
    """Returns rows of own cosine, that of another image, and the cosine of the eye."""
    own = inverter.require_backbone()
    rows = []
    for part in batched(range(len(items)), BATCH):
        features = own.features(images[part])
        made = inverter.invert(features, generator=noise_of([items[i] for i in part]))
        made = torch.round(made * 255) / 255
        again = own.features(made)
        seen = feature_cosine(eye.features(images[part]), eye.features(made))
        values = (feature_cosine(features, again), feature_cosine(features.roll(1, 0), again), seen)
        rows.append(torch.stack(values, 1))
    return torch.cat(rows).double().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--trained", type=Path, required=True)
    parser.add_argument("--adapted", type=Path, help="folder with PIPELINE/final/controlnet")
    parser.add_argument("--pipelines", nargs="+", help="of those that share it; all by default")
    parser.add_argument("--n-images", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("outputs/shared-trunk"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    model = load_config(SharedTrunkConfig, CONFIG).model
    images = open_images(options.data, "validation", None)
    items = select_items(images, Selection(n_images=options.n_images), 0)
    squares = to_tensor([center_square(images.read(item.index), 64) for item in items])
    pipelines = {name: load_pipeline(name) for name in model.pipelines}
    trunks: list[Any] = [pipelines[name].controlnet for name in model.begin_with or pipelines]
    mean = mean_of_trunks(trunks)
    rows, kept = [], {}
    for name in options.pipelines or pipelines:
        pipeline = pipelines[name]
        pipeline.set_progress_bar_config(disable=True)
        own: Any = pipeline.controlnet
        eye = load_backbone(SECOND if "efficientnet" in name else OUTSIDE)
        on_mean: Any = FeatureControlNet.from_config(own.config)
        on_mean.load_state_dict(own.state_dict() | mean)
        trained = load_controlnet(options.trained / Path(name).name / "controlnet")
        controlnets = {OWN: own, MEAN: on_mean.eval(), SHARED: trained}
        if options.adapted and (options.adapted / Path(name).name).exists():
            folder = options.adapted / Path(name).name / "final" / "controlnet"
            controlnets[ADAPTED] = load_controlnet(folder)
        found = {}
        for label, controlnet in controlnets.items():
            pipeline.register_modules(controlnet=controlnet)
            found[label] = measure(DiffusionInverter(pipeline), squares, items, eye)
            difference = found[label] - found[OWN]
            change = "–" if label == OWN else words(difference[:, 0], 3)
            eye_change = "–" if label == OWN else words(difference[:, 2], 3)
            seen = [f"{bootstrap_mean(column).value:.3f}" for column in found[label].T]
            rows.append([name, label, seen[0], change, seen[1], seen[2], eye_change])
            print(rows[-1], file=sys.stderr, flush=True)
        kept[name] = {label: values.tolist() for label, values in found.items()}
    (options.output / "shared_trunk.json").write_text(json.dumps(kept))
    header = "pipeline|ControlNet|own cosine|change|another image|outside eye|change"
    print(table(header, rows))


if __name__ == "__main__":
    main()
