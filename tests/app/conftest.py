"""One studio of the bundled models, its server in a thread, and a real browser."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
import uvicorn

from featinv_diffusion.app.pictures import Pictures
from featinv_diffusion.app.server import make_app
from featinv_diffusion.app.studio import Studio

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def studio() -> Studio:
    return Studio(Pictures(), device="cpu")


@pytest.fixture(scope="session")
def address(studio: Studio) -> Iterator[str]:
    """Where the page is served, as `featinv app` does it."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(studio), log_level="error"))
    thread = Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=10)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright; `make browser` installs it."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    named = os.environ.get("FEATINV_BROWSER")
    path = named or next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("No Chromium is installed, so the page is not tested; `make browser` does it.")
    with sync_api.sync_playwright() as playwright:
        # The sandbox of Chromium refuses to run as root, as in containers.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        opened = playwright.chromium.launch(executable_path=path, args=arguments)
        yield opened
        opened.close()
