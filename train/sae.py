"""Trains a TopK sparse autoencoder on the cells of a backbone's feature maps; minutes on a CPU.

    python train/sae.py --data .data/tiny-imagenet-200 --classes configs/tiny/classes.txt \
        --output sae.safetensors
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.backbones import load_backbone
from featinv_diffusion.backbones.base import Backbone, weights_sha256
from featinv_diffusion.concepts import SAEConcepts, SparseAutoencoder
from featinv_diffusion.concepts.base import to_cells
from featinv_diffusion.data.crops import split_held_back
from featinv_diffusion.data.sets import ImageSet, open_images
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import center_square, to_tensor
from featinv_diffusion.runs.progress import progress_bar
from featinv_diffusion.runs.sampling import batched

DEAD_AFTER = 200
"""Steps without any cell, after which a latent counts as dead."""


def train_sae(
    cells: Float[Tensor, "n c"],
    *,
    n_latents: int = 512,
    k: int = 8,
    n_steps: int = 4000,
    batch_size: int = 1024,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
) -> SparseAutoencoder:
    """Trains an SAE of Gao et al. (2024): the k greatest of each cell's codes, after a ReLU.

    Latents start at cells; dead ones are pulled to what the living miss (their auxiliary loss).

    Raises:
        InputError: fewer cells than latents, or more codes than latents.
    """
    if not 1 <= k <= n_latents <= len(cells):
        raise InputError(
            f"There must be 1 ≤ k ≤ n_latents ≤ cells, got k {k}, {n_latents} latents and "
            f"{len(cells)} cells."
        )
    generator = torch.Generator().manual_seed(seed)
    mean = cells.mean(dim=0)
    scale = (cells - mean).square().mean().sqrt()
    start = (cells[torch.randperm(len(cells), generator=generator)[:n_latents]] - mean) / scale
    decoder = F.normalize(start, dim=1).requires_grad_()
    encoder = decoder.detach().clone().requires_grad_()
    bias = torch.zeros(n_latents, requires_grad=True)
    optimizer = torch.optim.Adam([encoder, decoder, bias], lr=learning_rate)
    idle = torch.zeros(n_latents)
    with progress_bar(n_steps, progress, "training", "steps") as advance:
        for step in range(n_steps):
            optimizer.param_groups[0]["lr"] = learning_rate * min(1.0, 5 * (1 - step / n_steps))
            drawn = torch.randint(len(cells), (batch_size,), generator=generator)
            batch = (cells[drawn] - mean) / scale
            before = batch @ encoder.T + bias
            values, places = before.relu().topk(k, dim=1)
            left = batch - _combine(values, places, decoder)
            loss = left.square().mean()
            idle += 1
            idle[places[values > 0]] = 0
            if bool((dead := idle > DEAD_AFTER).any()):
                aux = before.masked_fill(~dead, -torch.inf).topk(min(2 * k, int(dead.sum())), dim=1)
                missed = left.detach() - _combine(aux.values.relu(), aux.indices, decoder)
                loss = loss + missed.square().mean() / 32
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                decoder.copy_(F.normalize(decoder, dim=1))
            advance(1)
    tensors = {
        "pre_bias": mean,
        "post_bias": mean,
        "encoder.0.weight": encoder.detach() / scale,
        "encoder.0.bias": bias.detach(),
        "decoder": decoder.detach() * scale,
    }
    return SparseAutoencoder(tensors, {"activation": "top_k", "k": k})


def _combine(
    values: Float[Tensor, "b k"], places: Int[Tensor, "b k"], decoder: Float[Tensor, "m c"]
) -> Float[Tensor, "b c"]:
    codes = torch.zeros(len(values), len(decoder)).scatter(1, places, values)
    return codes @ decoder


@torch.no_grad()
def read_cells(backbone: Backbone, images: ImageSet, batch_size: int = 64) -> Tensor:
    """Returns the cells of all maps, `[n, c]`."""
    size, found = max(backbone.input_size), []
    with progress_bar(len(images), True, "encoding", "pictures") as advance:
        for chosen in batched(range(len(images)), batch_size):
            squares = [center_square(images.read(i), size) for i in chosen]
            maps = backbone.features(to_tensor(squares).to(backbone.device))
            found.append(to_cells(maps.cpu(), backbone.spec.channels))
            advance(len(chosen))
    return torch.cat(found)


def main(
    data: Annotated[str, typer.Option(help="Pictures: a folder, parquet file or Hub name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File of concepts to write.")],
    split: Annotated[str, typer.Option(help="Split of the data, if they have any.")] = "train",
    classes: Annotated[str | None, typer.Option(help="Text file of class folders.")] = None,
    held_back_per_class: Annotated[
        int, typer.Option(help="Leave out the last K images of each class.")
    ] = 0,
    backbone: Annotated[str, typer.Option(help="Backbone of the maps.")] = "tiny/convnext",
    layer: Annotated[str, typer.Option(help="Layer of the maps.")] = "last",
    n_images: Annotated[
        int, typer.Option(help="Pictures, drawn at random; the last tenth is for the report.")
    ] = 5000,
    n_latents: Annotated[int, typer.Option(help="Latents.")] = 512,
    k: Annotated[int, typer.Option(help="Codes of a cell that are not zero.")] = 8,
    n_steps: Annotated[int, typer.Option(help="Steps of 1,024 cells.")] = 4000,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
) -> None:
    """Train a TopK SAE on a backbone's maps, and write it in half precision."""
    try:
        images = open_images(data, split, classes)
        chosen = list(range(len(images)))
        if held_back_per_class and images.labels is not None:
            chosen = split_held_back(images.labels, held_back_per_class)[0]
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(seed))
        chosen = [chosen[i] for i in order[:n_images].tolist()]
        model = load_backbone(backbone, layer)
        cells = read_cells(model, images.pick(chosen))
        held_out = cells[-(len(chosen) // 10) * (len(cells) // len(chosen)) :]
        sae = train_sae(
            cells[: -len(held_out)],
            n_latents=n_latents,
            k=k,
            n_steps=n_steps,
            seed=seed,
            progress=True,
        )
        half = {name: tensor.half() for name, tensor in sae.tensors.items()}
        concepts = SAEConcepts.of(SparseAutoencoder(half, sae.settings), model.spec)
        concepts.fit(held_out.T[None, :, :, None])
        concepts.origin = {
            "weights_sha256": weights_sha256({"backbone": model.model}),
            "n_images": len(chosen),
            "n_steps": n_steps,
            "seed": seed,
        }
        concepts.save(output)
    except InputError as error:
        raise SystemExit(f"Error: {error}") from error
    codes = concepts.encode(held_out.T[None, :, :, None])[0, :, :, 0]
    share = (codes > 0).any(dim=1).double().mean().item()
    print(
        f"Wrote {output}: {concepts.report['energy']:.3f} of the energy of "
        f"{len(held_out)} cells that were not trained on comes back, "
        f"with {concepts.report['codes_per_cell']:.1f} codes; {share:.0%} of the latents are used."
    )


if __name__ == "__main__":
    typer.run(main)
