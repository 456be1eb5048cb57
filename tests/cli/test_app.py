"""`featinv app`: what it refuses before anything is loaded; it serves until it is stopped."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import pytest

from featinv_diffusion.cli import page
from tests.cli.conftest import Featinv


def test_listening_on_all_addresses_needs_a_name(featinv: Featinv) -> None:
    outcome = featinv("app", "--host", "0.0.0.0")
    assert outcome.code == 2
    assert "--allow-host NAME" in outcome.err


def test_a_port_that_is_taken_is_said(featinv: Featinv) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        outcome = featinv("app", "--port", taken.getsockname()[1])
    assert outcome.code == 2
    assert "--port, or 0 for any that is free" in outcome.err


def test_without_the_extra_it_says_what_to_install(
    featinv: Featinv, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(page, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    outcome = featinv("app")
    assert outcome.code == 2
    assert "featinv-diffusion[app]" in outcome.err


@pytest.mark.slow
def test_it_serves_the_page_until_it_is_stopped(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "featinv_diffusion", "app", "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as running:
        try:
            assert running.stdout is not None
            address = re.search(r"http://127\.0\.0\.1:\d+/", running.stdout.readline())
            assert address is not None
            with urlopen(address[0], timeout=60) as answer:
                assert b"See what features hold" in answer.read()
            running.send_signal(signal.SIGINT)
            assert "closed" in running.stdout.read()
            assert running.wait(timeout=60) == 0
        finally:
            running.kill()
