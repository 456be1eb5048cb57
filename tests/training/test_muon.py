"""The quick Muon takes the steps of timm's, and goes on from its state."""

from __future__ import annotations

import copy
from typing import Any

import timm.optim
import torch
from timm.optim import muon
from torch import nn

from featinv_diffusion.training.muon import Muon, quick_dtype

SETTINGS: dict[str, Any] = {
    "lr": 0.02,
    "weight_decay": 0.1,
    "nesterov": True,
    "adjust_lr_fn": "original",
    "fallback_lr_scale": 0.1,
    "betas": (0.9, 0.99),
}


def make_network() -> nn.Module:
    """Two matrices and two kernels of one flattened shape each, one alone, and biases."""
    torch.manual_seed(0)
    layers = [nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 8)]
    return nn.ModuleList([*layers, nn.Conv2d(4, 12, 3), nn.Conv2d(4, 12, 3), nn.BatchNorm2d(12)])


def take_steps(network: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in network.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
        assert all(p.grad is not None for p in network.parameters())


def test_steps_are_those_of_timm_in_float32(monkeypatch) -> None:
    plain = muon.zeropower_via_newtonschulz
    monkeypatch.setattr("featinv_diffusion.training.muon.quick_dtype", lambda device: torch.float32)
    mine = make_network().to(memory_format=torch.channels_last)
    theirs = copy.deepcopy(mine)
    take_steps(mine, Muon(mine.parameters(), **SETTINGS), range(3))
    monkeypatch.setattr(
        muon,
        "zeropower_via_newtonschulz",
        lambda *a, **k: plain(*a, **(k | {"dtype": torch.float32})),
    )
    optimizer = timm.optim.Muon(theirs.parameters(), **SETTINGS)
    take_steps(theirs, optimizer, range(3))
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    other = Muon(mine.parameters(), **SETTINGS)
    other.load_state_dict(
        copy.deepcopy(optimizer.state_dict())
    )  # of a checkpoint that timm's Muon wrote
    take_steps(mine, other, range(3, 5))
    take_steps(theirs, optimizer, range(3, 5))
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_steps_are_near_those_of_timm_in_bfloat16() -> None:
    mine, theirs = make_network(), make_network()
    before = [p.detach().clone() for p in mine.parameters()]
    take_steps(mine, Muon(mine.parameters(), **SETTINGS), range(1))
    take_steps(theirs, timm.optim.Muon(theirs.parameters(), **SETTINGS), range(1))
    for start, a, b in zip(before, mine.parameters(), theirs.parameters(), strict=True):
        taken, wanted = (a - start).flatten(), (b - start).flatten()
        assert float(torch.cosine_similarity(taken, wanted, dim=0)) > 0.999
        assert quick_dtype(a.device) in (torch.float32, torch.bfloat16)
