"""The page in a real browser, as a person uses it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load
from torch import Tensor

import featinv_diffusion as fi
from featinv_diffusion.app.state import State
from featinv_diffusion.app.studio import Studio
from featinv_diffusion.schema import convert

WAIT = 120_000
IDLE = "body[data-started=yes][data-busy=no]"
SAMPLES = "#results img.sample"


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(WAIT)
    opened.problems = []
    opened.on("pageerror", lambda error: opened.problems.append(str(error)))
    yield opened
    context.close()
    assert opened.problems == []


def link_of(address: str, **changed: Any) -> str:
    content = {"picture": "flower", "members": ["tiny/convnext"], "quality": "draft", **changed}
    state = convert({"n_samples": 1, **content}, State, "a test")
    return f"{address}/#s={state.to_link()}"


def open_page(page: Any, link: str) -> None:
    page.goto(link)
    page.wait_for_selector(IDLE)
    page.wait_for_selector("#concepts > *")


def wait_settled(page: Any) -> None:
    """Waits until all that a change causes is done."""
    page.wait_for_function(
        "() => document.body.dataset.busy === 'no' && document.querySelector('#status')"
        ".textContent.startsWith('Done')"
    )


def shown(page: Any) -> list[str]:
    return page.eval_on_selector_all(SAMPLES, "all => all.map(image => image.src)")


def to_pixels(source: str) -> np.ndarray:
    content = base64.b64decode(source.partition(",")[2])
    return np.asarray(Image.open(BytesIO(content)).convert("RGB"))


def drawn_picture() -> bytes:
    picture = Image.new("RGB", (120, 90), "skyblue")
    ImageDraw.Draw(picture).ellipse((30, 20, 90, 80), fill="firebrick")
    file = BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def download(page: Any, what: str) -> bytes:
    with page.expect_download() as info:
        page.click(f"a[data-what={what}]")
    return Path(info.value.path()).read_bytes()


def features_of(page: Any) -> Tensor:
    return load(download(page, "safetensors"))["features"][0].flatten(1)


def move(page: Any, selector: str, value: float) -> None:
    """Drags a slider to a value, and lets it go."""
    page.eval_on_selector(
        selector,
        "(slider, value) => { slider.value = value;"
        " for (const kind of ['input', 'change'])"
        " slider.dispatchEvent(new Event(kind, { bubbles: true })); }",
        value,
    )


def test_an_upload_becomes_the_pictures_that_sample_makes_of_it(
    page: Any, address: str, studio: Studio
) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    open_page(page, link_of(address, n_samples=2))
    file = {"name": "ball.png", "mimeType": "image/png", "buffer": drawn_picture()}
    page.set_input_files("#file", files=[file])
    page.wait_for_selector("#results img[alt*='ball.png']")
    page.wait_for_selector(IDLE)
    picture = Image.open(BytesIO(drawn_picture()))
    inverter = studio.open("tiny/convnext", "draft")
    expected = fi.sample(inverter, picture, n_samples=2, names=["ball.png"])
    made = np.stack([to_pixels(source) for source in shown(page)])
    assert np.array_equal(made, (expected.images[0] * 255).round().permute(0, 2, 3, 1).numpy())
    assert f"cosine {expected.cosine[0, 0]:.2f}" in page.inner_text("#results")
    assert re.search(r"p = 0\.\d{3}|p = 1\.000", page.inner_text("#results .facts"))
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)


def test_a_slider_makes_other_pictures_and_1_exactly_the_first(page: Any, address: str) -> None:
    open_page(page, link_of(address))
    (before,) = shown(page)
    slider = "#concepts input >> nth=0"
    move(page, slider, 0)
    page.wait_for_function(
        "before => document.querySelector('#results img.sample').src !== before", arg=before
    )
    wait_settled(page)
    assert np.abs(to_pixels(shown(page)[0]).astype(int) - to_pixels(before)).max() > 8
    assert "scale_part" in page.inner_text("#again")
    link = page.input_value("#link")
    move(page, slider, 1)
    page.wait_for_function(
        "before => document.querySelector('#results img.sample').src === before", arg=before
    )
    wait_settled(page)
    assert shown(page) == [before]
    page.goto("about:blank")
    open_page(page, link)  # the state travels with its link
    assert page.input_value(slider) == "0"
    assert shown(page) != [before]


def test_painting_changes_the_features_there_and_nowhere_else(
    page: Any, address: str, studio: Studio
) -> None:
    open_page(page, link_of(address))
    before = features_of(page)
    box = page.locator("#map").bounding_box()
    page.locator("#map").click(position={"x": box["width"] * 0.4, "y": box["height"] * 0.1})
    wait_settled(page)
    after = features_of(page)
    second = studio.encode("china", "tiny/convnext").as_subclass(Tensor)[0].flatten(1)
    expected = before.clone()
    expected[:, 3] = second[:, 3]  # row 1, column 4 of 8×8
    assert torch.equal(after, expected)
    # The same by keys: erase the cell below.
    page.check("input[name=tool][value=erase]")
    page.focus("#map")
    page.keyboard.press("ArrowDown")
    assert "Row 2 of 8, column 4 of 8: as it is." in page.inner_text("#map-cell")
    page.keyboard.press("Space")
    assert "erased" in page.inner_text("#map-cell")
    wait_settled(page)
    expected[:, 11] = 0
    assert torch.equal(features_of(page), expected)
    assert "featinv decode features.safetensors" in page.inner_text("#again")


def test_a_wrong_file_is_answered_by_one_sentence_and_the_pictures_stay(
    page: Any, address: str
) -> None:
    open_page(page, link_of(address))
    before = shown(page)
    file = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    page.set_input_files("#file", files=[file])
    page.wait_for_selector("#error:not([hidden])")
    assert re.fullmatch(r"notes\.txt is not a picture[^\n]*\.", page.inner_text("#error"))
    assert page.get_attribute("#error", "role") == "alert"
    assert shown(page) == before


def test_eight_clients_at_once_each_get_their_own_pictures(
    browser: Any, address: str, studio: Studio
) -> None:
    contexts = [browser.new_context() for _ in range(8)]
    pages = [context.new_page() for context in contexts]
    for seed, page in enumerate(pages):
        page.goto(link_of(address, seed=100 + seed % 4), wait_until="commit")
    for page in pages:
        page.wait_for_selector(IDLE, timeout=WAIT)
    made = [to_pixels(shown(page)[0]) for page in pages]
    for context in contexts:
        context.close()
    inverter, maps = studio.open("tiny/convnext", "draft"), studio.encode("flower", "tiny/convnext")
    for seed in range(4):
        expected = fi.sample(inverter, maps, n_samples=1, seed=100 + seed).images[0, 0]
        for picture in (made[seed], made[seed + 4]):
            assert np.array_equal(picture, (expected * 255).round().permute(1, 2, 0).numpy())


def test_work_is_cancelled(page: Any, address: str) -> None:
    open_page(page, link_of(address, n_samples=2))
    page.select_option("#quality", "best")
    page.wait_for_selector("#cancel:enabled")
    page.click("#cancel")
    page.wait_for_selector("#status:has-text('Cancelled.')")
    page.wait_for_selector(IDLE)
    page.select_option("#quality", "draft")
    wait_settled(page)
    assert len(shown(page)) == 2


def test_side_by_side_tokens_and_layers(page: Any, address: str) -> None:
    open_page(page, link_of(address))
    page.click("#add-model")
    page.wait_for_selector("#results section >> nth=1")
    page.wait_for_selector(IDLE)
    move(page, "#layer-0", 0)
    page.wait_for_selector("#results section[data-member='tiny/convnext-stages.1']")
    page.wait_for_selector(IDLE)
    assert page.get_attribute("#layer-0", "aria-valuetext") == "stages.1"
    page.click("#tokens-read")
    page.wait_for_selector("#tokens canvas[aria-label*='after block 6']")
    move(page, "#block", 1)
    page.wait_for_selector("#tokens canvas[aria-label*='after block 1']")


UNNAMED = """() => [...document.querySelectorAll('button, input, select, canvas, img, video, pre')]
  .filter(one => one.offsetParent !== null && one.getAttribute('aria-hidden') !== 'true')
  .filter(one => !(one.labels?.length || one.getAttribute('aria-label')
    || one.textContent.trim() || one.getAttribute('alt') !== null))
  .map(one => one.outerHTML)"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_cut_off_and_all_that_can_be_used_has_a_name(
    browser: Any, address: str, scheme: Any
) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(WAIT)
    open_page(page, link_of(address))
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate(UNNAMED) == []
    ink, paper = (
        [
            int(x)
            for x in re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{name}"))
        ]
        for name in ("color", "backgroundColor")
    )
    assert (sum(ink) < sum(paper)) == (scheme == "light")
    context.close()
