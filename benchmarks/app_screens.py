"""The pictures of docs/app.md: the page in Chromium, with scikit-learn's photos.

python benchmarks/app_screens.py --output docs/figures
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from app import MEMBER, serve
from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from featinv_diffusion.images import write_png

IDLE = "body[data-started=yes][data-busy=no]"
WAIT = 300_000
COLOURS = 160


@contextmanager
def opened(
    browser: Browser, address: str, width: int, height: int, scheme: str = "light"
) -> Iterator[Any]:
    """Yields the page when its first pictures are there."""
    size = {"width": width, "height": height}
    context = browser.new_context(viewport=size, color_scheme=scheme)  # pyright: ignore
    page = context.new_page()
    page.set_default_timeout(WAIT)
    page.goto(address)
    wait(page)
    page.wait_for_selector("#concepts .slider")
    yield page
    context.close()


def wait(page: Any) -> None:
    """Waits until the pictures are settled."""
    page.wait_for_selector(IDLE)
    page.wait_for_selector("#status:has-text('Done')")


def shot(place: Any) -> Image.Image:
    """Returns a screenshot in few colours, which makes it a small file."""
    picture = Image.open(BytesIO(place.screenshot())).convert("RGB")
    return picture.quantize(COLOURS, dither=Image.Dither.NONE).convert("RGB")


def beside(*pictures: Image.Image, gap: int = 24) -> Image.Image:
    """Returns pictures side by side on white."""
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(p.height for p in pictures)), "white")
    x = 0
    for picture in pictures:
        canvas.paste(picture, (x, 0))
        x += picture.width + gap
    return canvas


def save(picture: Image.Image, path: Path) -> None:
    """Writes a PNG with a palette."""
    write_png(picture.quantize(COLOURS, dither=Image.Dither.NONE), path)
    print(path, picture.size, f"{path.stat().st_size >> 10} KiB")


def paint(page: Any, rows: range, columns: range) -> None:
    """Paints cells of the map, which has 8×8, by pressing them."""
    canvas = page.locator("#map")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for y in rows:
        for x in columns:
            at = {"x": box["width"] * (x + 0.5) / 8, "y": box["height"] * (y + 0.5) / 8}
            canvas.click(position=at)
    wait(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    address = serve()
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=arguments
        )
        with opened(browser, address, 1180, 1000) as page:
            save(shot(page), given.output / "app.png")
            paint(page, range(0, 3), range(0, 8))
            results = shot(page.locator(f"#results section[data-member='{MEMBER}'] .pictures"))
            save(beside(shot(page.locator("#map")), results), given.output / "app-paint.png")
            page.click("#tokens-read")
            page.wait_for_selector("#tokens canvas")
            page.wait_for_selector(IDLE)
            tokens = page.locator("section[aria-labelledby=h-tokens]")
            save(shot(tokens), given.output / "app-tokens.png")
        phones = []
        for scheme in ("light", "dark"):
            with opened(browser, address, 390, 844, scheme) as page:
                phones.append(shot(page))
                page.locator("section[aria-labelledby=h-concepts]").scroll_into_view_if_needed()
                page.wait_for_timeout(300)
                phones.append(shot(page))
        save(beside(*phones), given.output / "app-phone.png")
        browser.close()


if __name__ == "__main__":
    main()
