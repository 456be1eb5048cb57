"""FeatInv-Viz: where a picture changes when a concept of its features is attenuated.

Algorithm 1 of FeatInv (section 4.2), with two nulls that the paper does not have, so that a map
shows an effect and not merely the noise of sampling or what any edit does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from featinv_diffusion.analysis.sampling import backbone_of, sample_all
from featinv_diffusion.errors import InputError
from featinv_diffusion.features import scale_part
from featinv_diffusion.inverters.base import Inverter
from featinv_diffusion.seeds import make_generator
from featinv_diffusion.types import Features, Images


@dataclass(frozen=True, eq=False)
class Dose:
    """The samples of one strength of the concept.

    Args:
        factor: of the concept's part; 1 is the map as it is.
        features: the edited map.
        images: one per seed.
        cosine: of each sample's features to the edited map.
        probability: that the backbone gives the class in each sample; None without a head.
    """

    factor: float
    features: Float[Tensor, "1 c h w"]
    images: Float[Tensor, "seeds 3 height width"]
    cosine: Float[Tensor, " seeds"]
    probability: Float[Tensor, " seeds"] | None


@dataclass(frozen=True, eq=False)
class ConceptEffect:
    """What one concept does to the samples of a map, beside what noise and other edits do.

    Distances are ‖x − x'‖ over the three channels, in units where a channel is 0 … 1.

    Args:
        doses: by rising factor; one of them is 1 and one is `factor`.
        factor: of the edit that the map shows.
        distance: between the samples before and after it, of the same seed.
        seed_noise: between samples before it, of each seed and the next one.
        random: as `distance`, after edits of the same size along random directions.
        random_doses: the samples of these edits.
    """

    doses: list[Dose]
    factor: float
    distance: Float[Tensor, "seeds height width"]
    seed_noise: Float[Tensor, "seeds height width"]
    random: Float[Tensor, "directions seeds height width"]
    random_doses: list[Dose]

    def dose(self, factor: float) -> Dose:
        """Returns the samples of one of the factors."""
        return next(dose for dose in self.doses if dose.factor == factor)

    @property
    def before(self) -> Dose:
        """The samples of the map as it is."""
        return self.dose(1.0)

    @property
    def after(self) -> Dose:
        """The samples of the edited map."""
        return self.dose(self.factor)

    @property
    def map(self) -> Float[Tensor, "height width"]:
        """The output of algorithm 1, not normalised: the median over seeds."""
        return median(self.distance)

    @property
    def null_map(self) -> Float[Tensor, "height width"]:
        """The same of unpaired seeds and no edit."""
        return median(self.seed_noise)

    @property
    def random_map(self) -> Float[Tensor, "height width"]:
        """The same of random directions, mean over them."""
        return torch.stack([median(distance) for distance in self.random]).mean(dim=0)


def measure_concept(
    inverter: Inverter,
    features: Features,
    part: Features,
    factor: float,
    seeds: Sequence[int],
    *,
    film: Sequence[float] = (),
    n_directions: int = 3,
    class_index: int | None = None,
    batch_size: int = 8,
) -> ConceptEffect:
    """Samples a map with a part of it scaled, and what the nulls need, all with the same seeds.

    Args:
        features: `[1, c, h, w]`.
        part: the concept's part of it, such as `dictionary.part(features, 0)`.
        factor: see `features.scale_part`; the paper takes 0.25.
        film: further factors to sample.
        n_directions: random directions; they derive from the first seed.
        class_index: whose probability is read off; None leaves it out.

    Raises:
        InputError: fewer than two seeds, no direction, a factor that is not finite.
    """
    if len(seeds) < 2 or n_directions < 1:
        raise InputError(
            "The nulls need at least 2 samples and 1 random direction, "
            f"but {len(seeds)} and {n_directions} came."
        )

    def sample(part: Features, factor: float) -> Dose:
        edited = scale_part(features, part, factor)
        done = sample_all(inverter, edited, seeds, batch_size)
        cosine = done.cosine.mean(dim=(1, 2)).cpu()
        probability = _probability(inverter, done.images, class_index, batch_size)
        return Dose(factor, edited, done.images, cosine, probability)

    doses = [sample(part, dose) for dose in sorted({1.0, factor, *film})]
    generators = [make_generator(seeds[0], "direction", k) for k in range(n_directions)]
    random_doses = [sample(turn_part(part, generator), factor) for generator in generators]
    by_factor = {dose.factor: dose.images for dose in doses}
    before, after = by_factor[1.0], by_factor[factor]
    return ConceptEffect(
        doses=doses,
        factor=factor,
        distance=rgb_distance(after, before),
        seed_noise=rgb_distance(before, before.roll(-1, dims=0)),
        random=torch.stack([rgb_distance(dose.images, before) for dose in random_doses]),
        random_doses=random_doses,
    )


def turn_part(part: Features, generator: torch.Generator) -> Features:
    """Turns the directions of a part to random ones, and leaves all else as it is.

    Each cell keeps its norm, and any two cells the angle between them, so that a concept of one
    dimension becomes one random direction with the concept's own coefficients.

    Args:
        part: `[1, c, h, w]`.
        generator: on the CPU.
    """
    cells = part[0].flatten(1).T.cpu().double()
    codes, lengths, _ = torch.linalg.svd(cells, full_matrices=False)
    noise = torch.randn(cells.shape[1], len(lengths), generator=generator, dtype=torch.float64)
    frame = torch.linalg.qr(noise).Q
    return ((codes * lengths) @ frame.T).T.reshape(part.shape).to(part)


def rgb_distance(
    images: Float[Tensor, "b 3 height width"], others: Float[Tensor, "b 3 height width"]
) -> Float[Tensor, "b height width"]:
    """Returns the Euclidean distance over RGB of each pixel, 0 … √3."""
    return (images - others).norm(dim=1)


def median(values: Float[Tensor, "n height width"]) -> Float[Tensor, "height width"]:
    """Returns the median over the first axis; of an even number the mean of the middle two."""
    ordered = values.sort(dim=0).values
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


@torch.no_grad()
def _probability(
    inverter: Inverter, images: Images, class_index: int | None, batch_size: int
) -> Float[Tensor, " seeds"] | None:
    if class_index is None:
        return None
    backbone = backbone_of(inverter)
    scores = [backbone.classify(part.to(backbone.device)) for part in images.split(batch_size)]
    return torch.cat(scores).float().softmax(dim=1)[:, class_index].cpu()
