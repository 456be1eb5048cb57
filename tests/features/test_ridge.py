"""A ridge that is fitted on a stream, against scikit-learn and a planted map."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn import functional as F

from featinv_diffusion.errors import InputError
from featinv_diffusion.features.ridge import HELD_OUT, PENALTIES, RidgeFit, to_windows


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fit(features, target, batch: int):
    made = RidgeFit(tuple(features.shape[1:]), {"it": tuple(target.shape[1:]), "cells": (1, 2, 2)})
    for rows in torch.arange(len(features)).split(batch):
        made.add(features[rows], {"it": target[rows], "cells": features[rows, :1, :2, :2]})
    return made


def test_it_is_the_ridge_of_scikit_learn_and_the_penalty_the_best_on_held_out_images():
    features = noise(40, 5, 2, 2) + 2
    target = noise(40, 3, 4, 4, seed=1) + F.interpolate(features[:, :3], scale_factor=2)
    found = fit(features, target, 7).solve()["it"]
    rows = to_windows(features, (2, 2), 3).double()
    patches = F.unfold(target, 2, stride=2).movedim(1, 2).flatten(0, 1).double()
    held = (torch.arange(40) % HELD_OUT == HELD_OUT - 1).repeat_interleave(4)
    errors = {}
    for penalty in PENALTIES:
        scale = rows[~held].var(dim=0, correction=0).mean() * int((~held).sum())
        ridge = Ridge(alpha=float(penalty * scale)).fit(rows[~held], patches[~held])
        errors[penalty] = ((ridge.predict(rows[held]) - patches[held].numpy()) ** 2).mean()
        if penalty == found.penalty:
            torch.testing.assert_close(
                found.weight, torch.from_numpy(ridge.coef_.T), atol=1e-4, rtol=1e-3
            )
            predicted = torch.from_numpy(ridge.predict(rows)).float()
    assert found.penalty == min(errors, key=errors.__getitem__) > PENALTIES[0]
    unfolded = F.unfold(found(features), 2, stride=2).movedim(1, 2).flatten(0, 1)
    torch.testing.assert_close(unfolded, predicted, atol=1e-3, rtol=1e-3)


def test_a_planted_linear_map_comes_back_whatever_the_batches():
    features = noise(30, 4, 2, 2)
    target = F.interpolate(features[:, 1:2] - 2 * features[:, 2:3] + 1, scale_factor=2)
    for batch in (1, 30):
        found = fit(features, target, batch).solve()["it"]
        assert found.n_images == 30
        torch.testing.assert_close(found(features), target, atol=1e-3, rtol=0)


def test_cells_that_do_not_divide_the_picture_are_resized_and_many_channels_stand_alone():
    made = RidgeFit((300, 3, 3), {"it": (1, 8, 8), "more": (2, 4, 4)})
    assert (made.window, made.grid) == (1, (4, 4))
    made.add(noise(10, 300, 3, 3), {"it": noise(10, 1, 8, 8), "more": noise(10, 2, 4, 4)})
    found = made.solve()
    shapes = {name: ridge(noise(2, 300, 3, 3)).shape for name, ridge in found.items()}
    assert shapes == {"it": (2, 1, 8, 8), "more": (2, 2, 4, 4)}


def test_too_few_images():
    with pytest.raises(InputError, match="at least 10 images, got 4"):
        fit(noise(4, 2, 2, 2), noise(4, 1, 4, 4), 2).solve()
