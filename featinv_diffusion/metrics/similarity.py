"""Agreement of two sets of maps image by image: retrieval of the own one, and linear CKA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics.statistics import Interval, jackknife
from featinv_diffusion.seeds import make_generator

SKETCH = 4096
"""Numbers that are kept of a map. Cosines of longer maps are then off by about 1/64."""
N_GROUPS = 20
_LEAST_CKA = 8
_ROWS = 512


def sketch(maps: Float[Tensor, "b ..."], size: int = SKETCH) -> Float[Tensor, "b k"]:
    """Returns vectors of at most `size` numbers whose inner products are about those of the maps.

    Each number is added, with a random sign, to one of `size` sums; the same for all maps of one
    shape. Shorter maps are only flattened. Unbiased, with a standard deviation of at most
    (2 / size)^½ times the norms (count sketch: Weinberger et al. 2009, lemma 2).
    """
    flat = maps.float().flatten(1)
    length = flat.shape[1]
    if length <= size:
        return flat
    generator = make_generator("sketch", length, size)
    buckets = torch.randint(size, (length,), generator=generator)
    signs = torch.randint(2, (length,), generator=generator) * 2.0 - 1
    sums = torch.zeros(len(flat), size, device=flat.device)
    return sums.index_add_(1, buckets.to(flat.device), flat * signs.to(flat.device))


def retrieval_ranks(
    originals: Float[Tensor, "n d"],
    reconstructions: Float[Tensor, "m k"],
    labels: Sequence[int | None] | None = None,
) -> Int[Tensor, " m"]:
    """Returns how many other originals are as near to each reconstruction as its own, by cosine.

    0 where the own original is found first.

    Args:
        originals: centred vectors; row i is that of reconstruction i, further rows only compete.
        reconstructions: centred vectors of the same length.
        labels: of the originals; where given, only those of the same class compete.

    Raises:
        InputError: fewer originals than reconstructions, or vectors of another length.
    """
    if len(originals) < len(reconstructions) or originals.shape[1] != reconstructions.shape[1]:
        raise InputError(
            "Retrieval needs the vector of an original for each reconstruction, of the same "
            f"length, got shapes {list(originals.shape)} and {list(reconstructions.shape)}."
        )
    a = F.normalize(originals.float())
    b = F.normalize(reconstructions.float())
    classes = None if labels is None else torch.tensor([-1 if x is None else x for x in labels])
    ranks = []
    for rows in torch.arange(len(b)).split(_ROWS):
        near = b[rows] @ a.T
        own = near[torch.arange(len(rows)), rows]
        beats = near >= own[:, None]
        beats[torch.arange(len(rows)), rows] = False
        if classes is not None:
            beats &= classes[rows][:, None] == classes
        ranks.append(beats.sum(dim=1))
    return torch.cat(ranks)


def linear_cka(x: Float[Tensor, "n d"], y: Float[Tensor, "n k"]) -> Interval | None:
    """Returns the centred kernel alignment of linear kernels, without the bias of small n.

    1 where the images lie to each other in one set of vectors as in the other, up to rotation and
    scale; 0 in the mean where the sets have nothing to do with each other. With the plain estimate
    any two sets of few long vectors look alike. The interval is that of a jackknife in groups.

    Source: Kornblith et al. 2019, equation 4, with the estimate of Song et al. 2012, equation 4.

    Args:
        x, y: row i of both belongs to image i.

    Returns:
        None with fewer than 8 images, or where all vectors of a set are the same.
    """
    n = len(x)
    if n < _LEAST_CKA:
        return None
    grams = [_gram(rows) for rows in (x, y)]
    value = _cka(*grams)
    groups = torch.arange(n) % min(N_GROUPS, n // 2)
    without = []
    for group in range(int(groups.max()) + 1):
        kept = (groups != group).nonzero().flatten()
        without.append(_cka(*(gram[kept][:, kept] for gram in grams)))
    if value is None or None in without:
        return None
    return jackknife(value, torch.tensor(without), n)


def _gram(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    centred = rows.float() - rows.float().mean(dim=0)
    return (centred @ centred.T).fill_diagonal_(0)


def _cka(k: Tensor, m: Tensor) -> float | None:
    """Returns the alignment of two kernels with zero diagonals; None where one has no spread."""
    own = _independence(k, k) * _independence(m, m)
    return _independence(k, m) / own**0.5 if own > 0 else None


def _independence(k: Tensor, m: Tensor) -> float:
    """Returns n (n − 3) HSIC₁ of two kernels with zero diagonals."""
    n = len(k)
    rows = k.sum(dim=1, dtype=torch.float64), m.sum(dim=1, dtype=torch.float64)
    both = (k * m).sum(dtype=torch.float64)
    outer = rows[0].sum() * rows[1].sum() / ((n - 1) * (n - 2))
    return float(both + outer - 2 / (n - 2) * (rows[0] * rows[1]).sum())
