"""LPIPS against equation 1 of its paper, written anew on torchvision's networks."""

from __future__ import annotations

import sys
from pathlib import Path

import lpips
import pytest
import torch
from torchvision import models

from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics.perceptual import Lpips

RELU_OUTPUTS = {
    "alex": (1, 4, 7, 9, 11),
    "squeeze": (1, 4, 7, 9, 10, 11, 12),
    "vgg": (3, 8, 15, 22, 29),
}


def make_images(n: int = 2, size: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def make_trunk(net: str, path: Path) -> torch.nn.Module:
    """Writes torchvision's file of weights, but random and without the classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if net == "vgg":
            features = models.vgg.make_layers(models.vgg.cfgs["D"])
        else:
            features = {"alex": models.AlexNet, "squeeze": models.squeezenet1_1}[net]().features
    torch.save({f"features.{k}": v for k, v in features.state_dict().items()}, path)
    return features.eval()


@pytest.fixture(scope="module")
def trunk(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lpips") / "alex.pth"
    make_trunk("alex", path)
    return path


@pytest.fixture(scope="module")
def metric(trunk) -> Lpips:
    return Lpips("alex", trunk)


def equation_1(net: str, features: torch.nn.Module, x: torch.Tensor, y: torch.Tensor):
    folder = Path(lpips.__file__).parent / "weights" / "v0.1"
    state = torch.load(folder / f"{net}.pth", map_location="cpu", weights_only=True)
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    a, b = ((2 * image - 1 - shift) / scale for image in (x, y))
    total, taps = torch.zeros(len(x)), iter(state.values())
    for i, layer in enumerate(features):
        a, b = layer(a), layer(b)
        if i in RELU_OUTPUTS[net]:
            unit_a, unit_b = (t / (t.norm(dim=1, keepdim=True) + 1e-10) for t in (a, b))
            weighted = (unit_a - unit_b).square() * next(taps).reshape(1, -1, 1, 1)
            total += weighted.sum(dim=1).mean(dim=(1, 2))
    return total


@pytest.mark.parametrize("net", ["alex", "squeeze", "vgg"])
@torch.no_grad()
def test_lpips_is_the_equation(net, tmp_path):
    features = make_trunk(net, tmp_path / "trunk.pth")
    metric = Lpips(net, tmp_path / "trunk.pth")
    x, y = make_images(), make_images(seed=1)
    got = metric(x, y)
    torch.testing.assert_close(got, equation_1(net, features, x, y), rtol=1e-4, atol=1e-7)
    assert bool((got > 0).all())
    assert metric(x, x).tolist() == [0, 0]
    assert metric.name == f"lpips_{net}"


def test_lpips_is_frozen(metric):
    assert not metric.network.training
    assert not any(p.requires_grad for p in metric.parameters())


def test_weights_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    with pytest.raises(InputError, match=f"none at {place}.*--lpips-weights"):
        Lpips()


def test_weights_of_another_network(tmp_path):
    path = tmp_path / "trunk.pth"
    torch.save({"features.0.weight": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="torchvision's weights"):
        Lpips("alex", path)


def test_unknown_network_and_package_that_is_not_installed(trunk, monkeypatch):
    with pytest.raises(InputError, match="did you mean 'alex'"):
        Lpips("alexnet")
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(InputError, match=r"featinv-diffusion\[evaluate\]"):
        Lpips("alex", trunk)


def test_images_that_cannot_be_compared(metric):
    with pytest.raises(InputError, match="at least 32×32"):
        metric(make_images(size=16), make_images(size=16))
    with pytest.raises(InputError, match="one shape"):
        metric(make_images(size=64), make_images(size=48))
