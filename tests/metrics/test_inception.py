"""The Inception of the FID with random weights, against torch-fidelity's own run and Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import feature_extractor_inceptionv3 as fidelity
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from featinv_diffusion.errors import InputError
from featinv_diffusion.metrics import extractors as inception
from featinv_diffusion.metrics.extractors import InceptionFeatures, file_sha256


def make_images(n: int = 2, size: tuple[int, int] = (64, 80), seed: int = 0) -> torch.Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    return (images * 255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch-fidelity's file of weights, but random."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = FeatureExtractorInceptionV3("random", ["2048"])
        for name, value in network.state_dict().items():
            if name.endswith("conv.weight"):  # else 90 layers would leave nothing of the image
                torch.nn.init.kaiming_normal_(value, nonlinearity="relu")
            elif name.endswith("running_mean"):
                value.normal_(std=0.1)
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize("convention", ["torch-fidelity", "adm"])
def test_legacy_conventions_are_torch_fidelity_s_own_run(weights, convention):
    reference = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
    )
    images = make_images()
    got = InceptionFeatures(convention, weights)(images)
    assert got.shape == (2, 2048)
    assert (got[0] - got[1]).abs().max() > 1e-2  # the images are told apart
    torch.testing.assert_close(got, reference(to_bytes(images))[0])


def test_the_layers_in_order_are_the_network(weights):
    """At 299 pixels torch-fidelity's resize is the identity, so both ways must agree."""
    images = make_images(1, (299, 299))
    extractor = InceptionFeatures("clean", weights)
    torch.testing.assert_close(extractor(images), extractor.network(to_bytes(images))[0])


def test_clean_resize_is_pillow_s_on_float_channels():
    # Down and up at once; clean-fid neither clips nor rounds.
    pixels = to_bytes(make_images(1, (400, 64)))
    channels = [Image.fromarray(c.astype(np.float32)) for c in pixels[0].numpy()]
    expected = np.stack(
        [np.asarray(c.resize((299, 299), Image.Resampling.BICUBIC)) for c in channels]
    )
    got = inception._resize_clean(pixels)[0].numpy()
    assert expected.min() < 0
    assert expected.max() > 255
    np.testing.assert_allclose(got, expected, atol=1e-2)  # of 255


def test_conventions_differ_and_are_told(weights):
    images = make_images()
    clean, legacy = (InceptionFeatures(name, weights) for name in ("clean", "torch-fidelity"))
    assert (clean(images[:1]) - legacy(images[:1])).abs().max() > 1e-2
    told = clean.conventions
    assert (told["convention"], told["resize_rounding"]) == ("clean", "none")
    assert told["weights_sha256"] == file_sha256(weights)
    assert told["resize"] != legacy.conventions["resize"]
    assert (clean.name, clean.distance_name) == ("inception", "fid")


def test_weights_in_the_cache_of_torch_hub(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(InputError, match=f"none at {place}.*--inception-weights"):
        InceptionFeatures()
    place.parent.mkdir(parents=True)
    place.symlink_to(weights)
    assert InceptionFeatures().conventions["weights"] == place.name


class Unpickled:
    """Its unpickling would run code."""

    def __reduce__(self):
        return (print, ("code of the weight file ran",))


def test_files_that_are_no_weights(tmp_path, capsys):
    broken = tmp_path / "weights.pth"
    with pytest.raises(InputError, match=r"none at .*missing"):
        InceptionFeatures(weights=tmp_path / "missing.pth")
    broken.write_bytes(b"<html>")
    with pytest.raises(InputError, match="cannot be read"):
        InceptionFeatures(weights=broken)
    torch.save({"fc.weight": torch.zeros(2)}, broken)
    with pytest.raises(InputError, match="as torch-fidelity names them"):
        InceptionFeatures(weights=broken)
    torch.save([1, 2], broken)
    with pytest.raises(InputError, match="holds a list"):
        InceptionFeatures(weights=broken)
    torch.save({"fc.weight": Unpickled()}, broken)
    with pytest.raises(InputError, match="cannot be read"):
        InceptionFeatures(weights=broken)
    assert "ran" not in capsys.readouterr().out


def test_unknown_convention():
    with pytest.raises(InputError, match="did you mean 'clean'"):
        InceptionFeatures("cleen")


def test_torch_fidelity_not_installed(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch_fidelity", None)
    with pytest.raises(InputError, match=r"featinv-diffusion\[evaluate\]"):
        InceptionFeatures()
