"""The site: it builds without a warning, and its folder stands by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import featinv_diffusion

ROOT = Path(__file__).parents[1]


class Links(HTMLParser):
    """Collects what a page loads, where it leads, and the places in it that can be led to."""

    def __init__(self, page: Path):
        super().__init__()
        self.loads: list[str] = []
        self.leads: list[str] = []
        self.places: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.places.add(values.get("id", ""))
        if "src" in values:
            self.loads.append(values["src"])
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(values["href"])
        if tag == "a" and "href" in values:
            self.leads.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built folder; a warning of MkDocs, such as a link that leads nowhere, is an error."""
    pytest.importorskip("mkdocs", reason="the extra docs is not installed")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
        config.plugins.on_shutdown()
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Links]:
    return {path: Links(path) for path in site.rglob("*.html") if path.name != "404.html"}


def _inside(page: Path, links: list[str]) -> Iterator[tuple[Path, str]]:
    for link in links:
        parts = urlsplit(link)
        if not parts.scheme:
            target = page if not parts.path else page.parent / unquote(parts.path)
            yield target.resolve(), parts.fragment


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Links]) -> None:
    for page, links in pages.items():
        assert links.loads
        for link in links.loads:
            assert not urlsplit(link).netloc, f"{page.name} loads {link}"
        for target, _ in _inside(page, links.loads):
            assert target.is_file(), f"{page.name} loads {target}"


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Links]) -> None:
    for page, links in pages.items():
        for target, place in _inside(page, links.leads):
            assert target.is_file(), f"{page.name} leads to {target}"
            if place and target in pages:
                assert place in pages[target].places, f"{page.name} leads to {target.name}#{place}"


def test_every_public_name_is_described(site: Path, pages: dict[Path, Links]) -> None:
    described = {place for page, links in pages.items() for place in links.places}
    for name in dir(featinv_diffusion):
        if not name.startswith("_"):
            assert f"featinv_diffusion.{name}" in described


def test_every_command_is_described(site: Path) -> None:
    from featinv_diffusion.cli import COMMANDS, GROUPS

    text = (site / "reference/commands.html").read_text()
    for name in (*COMMANDS, *GROUPS):
        assert re.search(rf"<h2[^>]*>featinv {name}\b", text), name


def test_every_notebook_is_shown_with_its_pictures(site: Path) -> None:
    names = [path.stem for path in (ROOT / "examples").glob("*.ipynb")]
    assert names
    for name in names:
        text = (site / f"notebooks/{name}.html").read_text()
        assert re.search(rf'<img[^>]*src="{name}-\d+-\d+\.png"', text), name
