"""Does `compare` name what a fine-tuning dropped, and how often does it raise a false alarm?

    python benchmarks/differencing.py --train DATA/train --data HELD_OUT [--steps 150]

Fine-tunes tiny/convnext four times: to give a picture the features of its grey version (the planted
case), and to its classes with three orders of the images (the nulls). Prints the table of the
planted case against the nulls, and how often one null is an alarm against the two others,
over random halves of the pictures. `--figure` draws the planted case on crops of two photos.
"""

from __future__ import annotations

import argparse
import copy
import json

import torch
from pages import crops
from torch.nn import functional as F

import featinv_diffusion as fi
from featinv_diffusion.data.sets import open_images
from featinv_diffusion.images import center_square, to_tensor


def read(data: str, n: int, seed: int, classes: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    found = open_images(data, "train", classes)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:n].tolist()
    images = torch.cat([to_tensor(center_square(found.read(i), 64)) for i in order])
    labels = torch.tensor([-1 if found.labels is None else found.labels[i] for i in order])
    return images, labels


def fine_tune(
    backbone: fi.Backbone,
    images: torch.Tensor,
    labels: torch.Tensor,
    steps: int,
    seed: int,
    grey: bool,
) -> fi.Backbone:
    model = copy.deepcopy(backbone.model)
    own = fi.wrap_model(model, name=f"{'grey' if grey else 'seed'}-{seed}", input_size=64)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(images), (32,), generator=generator)
        batch = images[rows]
        if grey:
            with torch.no_grad():
                wanted = backbone.features(batch.mean(1, keepdim=True).expand_as(batch))
            loss = F.mse_loss(own.features(batch), wanted)
        else:
            loss = F.cross_entropy(own.classify(batch), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(own.name, "loss", round(loss.item(), 4), flush=True)
    return fi.wrap_model(model, name=own.name, input_size=64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--classes", default="configs/tiny/classes.txt")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--n-images", type=int, default=64)
    parser.add_argument("--n-halves", type=int, default=20)
    parser.add_argument("--output", default=None)
    parser.add_argument("--figure", default=None)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    inverter = fi.load_inverter("tiny/convnext")
    backbone = inverter.require_backbone()
    images, labels = read(arguments.train, 4000, 0, arguments.classes)
    grey = fine_tune(backbone, images, labels, arguments.steps, 0, grey=True)
    nulls = [
        fine_tune(backbone, images, labels, arguments.steps, seed, grey=False) for seed in (1, 2, 3)
    ]
    held, _ = read(arguments.data, arguments.n_images, 1, None)
    found = fi.compare_models(inverter, grey, held, fit_on=images[:200], nulls=nulls)
    print(found.summary())
    for row in found.metrics["attributes"]:
        print(json.dumps(row))
    if arguments.output:
        found.save(arguments.output)
    if arguments.figure:
        photos = [crop for _, crop in crops(4)]
        shown = fi.compare_models(inverter, grey, photos, fit_on=images[:200], nulls=nulls)
        shown.figure().savefig(arguments.figure)
    alarms = 0
    for k in range(arguments.n_halves):
        half = torch.randperm(len(held), generator=torch.Generator().manual_seed(k))
        part = held[half[: len(held) // 2]]
        null = fi.compare_models(inverter, nulls[2], part, fit_on=images[:200], nulls=nulls[:2])
        alarms += any(row["alarm"] for row in null.metrics["attributes"])
    print(f"False alarms: {alarms} of {arguments.n_halves} halves.")


if __name__ == "__main__":
    main()
