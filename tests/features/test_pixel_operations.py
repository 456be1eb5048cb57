"""Operations on pixels, worked by hand, and the identities that they keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featinv_diffusion.errors import InputError
from featinv_diffusion.features.pixel_operations import (
    OPERATIONS,
    PixelOperation,
    make_operation,
    suppress_channel,
    swap_channels,
    to_grey,
)


def make_images(seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))


def one_pixel(*rgb: float) -> torch.Tensor:
    return torch.tensor(rgb)[None, :, None, None]


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("swap", {}, (0.6, 0.4, 0.2)),
        ("suppress", {"alpha": 0.5}, (0.2, 0.4, 0.3)),
        ("suppress", {"alpha": 0.25, "channel": "red"}, (0.05, 0.4, 0.6)),
        ("suppress", {}, (0.2, 0.4, 0.54)),
        ("grey", {}, (0.2989 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6,) * 3),
        ("colourise", {}, (0.2, 0.4, 0.6)),
    ],
)
def test_by_hand(name, parameters, expected):
    operation = make_operation(name, **parameters)
    found = operation.target(one_pixel(0.2, 0.4, 0.6))
    torch.testing.assert_close(found, one_pixel(*expected))


def test_colourise_is_given_grey_and_others_the_image_itself():
    images = make_images()
    assert make_operation("colourise").source(images).equal(to_grey(images))
    assert make_operation("colourise").repeated(images, 3).equal(images)
    for name in ("swap", "suppress", "grey"):
        assert make_operation(name).source(images).equal(images)


def test_values_are_not_rounded_to_8_bits():
    found = make_operation("suppress", alpha=0.9).repeated(one_pixel(0.0, 0.0, 1.0), 12)
    assert found[0, 2].item() == pytest.approx(0.9**12, rel=1e-6)
    assert abs(found[0, 2].item() * 255 - round(found[0, 2].item() * 255)) > 1e-3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 1), st.sampled_from(["red", "green", "blue"]))
def test_identities(seed, alpha, channel):
    images = make_images(seed)
    assert swap_channels(swap_channels(images)).equal(images)
    assert suppress_channel(images, 1, channel).equal(images)
    torch.testing.assert_close(to_grey(to_grey(images)), to_grey(images) * 0.9999)
    suppressed = suppress_channel(images, alpha, channel)
    assert suppressed.min() >= 0
    assert suppressed.max() <= images.max()
    both = suppress_channel(suppressed, alpha, channel)
    torch.testing.assert_close(both, suppress_channel(images, alpha * alpha, channel))


def test_the_input_stays_as_it_was():
    images = make_images()
    before = images.clone()
    for name in OPERATIONS:
        make_operation(name).repeated(images, 2)
    assert images.equal(before)


def test_any_function_is_an_operation():
    darken = PixelOperation("darken", lambda images: images * images)
    images = make_images()
    torch.testing.assert_close(darken.repeated(images, 2), images**4)
    assert darken.repeated(images, 0).equal(images)
    assert (str(darken), str(make_operation("suppress"))) == (
        "darken",
        "suppress (alpha 0.9, channel blue)",
    )


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("swop", {}, "did you mean 'swap'"),
        ("swap", {"alpha": 0.5}, "takes no parameters, got alpha"),
        ("suppress", {"beta": 1}, "takes only alpha, channel, got beta"),
        ("suppress", {"channel": "blu"}, "did you mean 'blue'"),
        ("suppress", {"alpha": 1.5}, "must lie in 0 … 1"),
        ("suppress", {"alpha": float("nan")}, "must lie in 0 … 1"),
    ],
)
def test_what_does_not_fit_is_refused(name, parameters, words):
    with pytest.raises(InputError, match=words):
        make_operation(name, **parameters)


def test_a_power_below_zero_is_refused():
    with pytest.raises(InputError, match="at least 0"):
        make_operation("swap").repeated(make_images(), -1)
