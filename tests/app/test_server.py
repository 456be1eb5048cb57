"""The server without a browser: who may ask it for what, and exact pictures by its commands."""

from __future__ import annotations

import json
import runpy
import struct
import sys
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

import featinv_diffusion as fi
from featinv_diffusion.app.export import to_command, to_download
from featinv_diffusion.app.members import at_quality
from featinv_diffusion.app.pictures import MAX_BYTES, MAX_UPLOADS, Pictures
from featinv_diffusion.app.server import make_app
from featinv_diffusion.app.state import State
from featinv_diffusion.app.studio import Studio
from featinv_diffusion.cli import main
from featinv_diffusion.errors import InputError
from featinv_diffusion.images import builtin_photo
from featinv_diffusion.inverters.open import load_inverter
from featinv_diffusion.schema import convert

DRAFT = {"picture": "flower", "members": ["tiny/convnext"], "quality": "draft", "n_samples": 1}
SAE = "tiny/convnext-sae"


@pytest.fixture(scope="module")
def client(studio: Studio) -> Iterator[TestClient]:
    with TestClient(make_app(studio), base_url="http://localhost:7860") as opened:
        yield opened


def png(side: int = 8, colour: str = "teal") -> bytes:
    file = BytesIO()
    Image.new("RGB", (side, side), colour).save(file, format="PNG")
    return file.getvalue()


def ask(client: TestClient, path: str, content: Any) -> dict[str, Any]:
    """Returns the last line of an answer."""
    return json.loads(client.post(path, json=content).text.splitlines()[-1])


def featinv(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Runs a command in this process, on the CPU."""
    monkeypatch.setattr(sys, "argv", ["featinv", *arguments])
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)


def to_state(**changed: Any) -> State:
    return convert({**DRAFT, **changed}, State, "a test")


# ---- Who may ask


@pytest.mark.parametrize(
    ("method", "path", "headers"),
    [
        ("GET", "/", {"host": "evil.example"}),
        ("GET", "/api/start", {"host": "127.0.0.1.evil.example:7860"}),
        ("GET", "/", {"host": ""}),
        ("POST", "/api/render", {"origin": "http://evil.example"}),
        ("POST", "/api/render", {"origin": "null"}),
        ("POST", "/api/render", {"origin": "http://localhost:3000"}),
        ("POST", "/api/pictures", {"sec-fetch-site": "cross-site"}),
        ("GET", "/api/pictures/flower", {"sec-fetch-site": "same-site"}),
        ("GET", "/api/download/png", {"sec-fetch-site": "cross-site"}),
    ],
)
def test_other_sites_and_other_names_are_refused(
    client: TestClient, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = client.request(method, path, headers=headers)
    assert answer.status_code == 403
    assert answer.json()["error"].startswith("The app ")


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "[::1]:7860", "LOCALHOST"])
def test_this_machine_may_ask_under_its_names(client: TestClient, host: str) -> None:
    headers = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
    assert client.get("/api/start", headers=headers).status_code == 200


def test_a_link_from_elsewhere_opens_the_page_and_nothing_else_may_be_loaded_in_it(
    client: TestClient,
) -> None:
    answer = client.get("/", headers={"sec-fetch-site": "cross-site"})
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "http" not in answer.text.replace(
        "http-equiv", ""
    )  # neither fonts nor scripts of others


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/static/main.js",
        "/server.py",
        "/main.js/../../server.py",
        "/api/pictures/..%2f..%2fserver.py",
        "/api/download/..%2fserver.py",
    ],
)
def test_no_file_but_those_of_the_page_can_be_had(client: TestClient, path: str) -> None:
    assert client.get(path).status_code in (400, 404)


@pytest.mark.parametrize(
    "changed",
    [
        {"members": ["/etc"]},
        {"members": ["someone/pipeline"]},
        {"members": ["tiny/convnext@/etc/passwd"]},
        {"edits": [{"kind": "scale", "concepts": "/etc/passwd", "factors": [[0, 0]]}]},
        {
            "edits": [
                {"kind": "steer", "concepts": "x.pt", "factor": 1, "cells": [0], "grid": [8, 8]}
            ]
        },
        {"picture": "nothere"},
    ],
)
def test_nothing_is_opened_that_the_app_was_not_started_with(
    client: TestClient, changed: dict[str, Any]
) -> None:
    error = ask(client, "/api/render", {**DRAFT, **changed})["error"]
    assert "was started without" in error or "not on this server" in error


def test_requests_must_be_json_of_a_limited_size(client: TestClient) -> None:
    plain = client.post(
        "/api/render", content=json.dumps(DRAFT), headers={"content-type": "text/plain"}
    )
    assert plain.status_code == 400
    large = client.post("/api/render", json={**DRAFT, "more": "x" * 300_000})
    assert "256 KiB" in large.json()["error"]


# ---- Uploads


def bomb() -> bytes:
    """A PNG of a few hundred bytes that declares 400 million pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a picture"),
        (b"hello", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "not a picture"),
        (png(64)[:60], "cut off"),
        (bomb(), "million pixels"),
        (b"\x89PNG" + bytes(MAX_BYTES), "20 MiB"),
    ],
)
def test_what_is_no_picture_is_refused_in_one_sentence(
    client: TestClient, content: bytes, words: str
) -> None:
    answer = client.post("/api/pictures?name=x.png", content=content)
    assert answer.status_code == 400
    assert words in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_a_picture_of_60_million_pixels_is_refused_before_it_is_decoded() -> None:
    file = BytesIO()
    Image.new("1", (10_000, 6_000)).save(file, format="PNG")
    with pytest.raises(InputError, match="at most 50 million pixels"):
        Pictures().add(file.getvalue(), "large.png")


def test_the_last_uploads_are_kept_and_names_are_made_safe() -> None:
    pictures = Pictures()
    first = pictures.add(png(), "..\\../a/--my: photo?.PNG")
    assert first.name == "my photo.PNG"
    assert pictures.add(png(), "noise").name == "noise.png"
    for i in range(MAX_UPLOADS):
        pictures.add(png(), f"{i}.png")
    with pytest.raises(InputError, match="Upload it again"):
        pictures.get(first.key)
    assert pictures.get("flower").is_sample


def test_sample_pictures_of_a_folder_have_the_classes_of_its_folders(tmp_path: Path) -> None:
    for name in ("bee/1.png", "bee/2.png", "cup/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(8, "red" if "1" in name else "blue"))
    found = Pictures(tmp_path).samples.values()
    assert sorted((one.label, one.name) for one in found) == [
        ("bee", "1.png"),
        ("bee", "2.png"),
        ("cup", "1.png"),
    ]


# ---- Pictures


def test_qualities_share_weights_and_have_the_settings_of_the_command(studio: Studio) -> None:
    for quality in ("draft", "standard", "best"):
        ours = studio.open("tiny/convnext", quality)
        assert (
            ours.settings == load_inverter("tiny/convnext", quality=quality, device="cpu").settings
        )
    one, other = (studio.open("tiny/convnext", quality) for quality in ("draft", "best"))
    assert one.networks["unet"] is other.networks["unet"]
    chain = studio.open("vit@blocks.2")
    assert at_quality(chain, "draft") is chain


EDITED = {
    "second": "china",
    "n_samples": 2,
    "edits": [
        {"kind": "scale", "concepts": SAE, "factors": [[3, 0.25], [40, 2]]},
        {"kind": "mirror", "cells": [56, 57], "grid": [8, 8]},
        {"kind": "paint", "cells": [0, 1, 8, 9], "grid": [8, 8]},
        {"kind": "steer", "cells": [30], "grid": [8, 8], "factor": 1.5},
    ],
}


@pytest.mark.parametrize(
    ("name", "changed"),
    [("tiny/convnext", {"quality": "best"}), ("tiny/convnext", EDITED), ("vit@blocks.2", {})],
    ids=["sample", "edited", "modular"],
)
def test_the_command_and_the_lines_of_python_make_the_pictures_bit_for_bit(
    studio: Studio,
    name: str,
    changed: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rendered = studio.render(to_state(members=[name], **changed), name)
    assert rendered.notes == []
    _, content = to_download(rendered, "zip")
    ZipFile(BytesIO(content)).extractall(tmp_path)
    before = {p.name: p.read_bytes() for p in (tmp_path / "pictures").glob("*_?.png")}
    assert len(before) == len(rendered.samples.images[0])
    monkeypatch.chdir(tmp_path)
    command = (tmp_path / "command.txt").read_text().split()
    assert command == to_command(rendered).split()
    featinv(monkeypatch, *command[1:-1], "by-command")
    runpy.run_path("again.py")
    for folder in ("by-command", "out"):
        after = {p.name: p.read_bytes() for p in (tmp_path / folder).glob("*_?.png")}
        differ = [n for n in before if after[n] != before[n]]
        assert differ == [], folder


def test_an_unedited_manifest_replays_in_the_folder_of_the_download(
    studio: Studio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    rendered = studio.render(to_state(), "tiny/convnext")
    ZipFile(BytesIO(to_download(rendered, "zip")[1])).extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    featinv(monkeypatch, "replay", "pictures", "--output", "replayed")
    assert "1 of 1 pictures are identical" in capsys.readouterr().out


def test_side_by_side_what_one_inverter_cannot_take_is_said(client: TestClient) -> None:
    content = {**DRAFT, "members": ["tiny/convnext", "siglip2"], **EDITED, "n_samples": 1}
    ours, other = ask(client, "/api/render", content)["result"]
    assert ours["notes"] == []
    assert other["notes"] == [f"{SAE} is of other features, so these pictures are without it."]
    assert other["quality"] is None
    assert len(other["pictures"]) == 1


def test_concepts_that_hold_most_of_a_map_come_first(studio: Studio, client: TestClient) -> None:
    found = ask(client, "/api/concepts", {"picture": "flower", "member": "tiny/convnext"})["result"]
    maps, dictionary = studio.encode("flower", "tiny/convnext"), fi.load_concepts(SAE)
    plain = maps.as_subclass(torch.Tensor)
    shares = torch.stack(
        [dictionary.part(plain, i).square().sum() / plain.square().sum() for i in range(512)]
    )
    best = shares.topk(8)
    assert [one["concept"] for one in found] == best.indices.tolist()
    torch.testing.assert_close(torch.tensor([one["share"] for one in found]), best.values)


def test_tokens_say_what_the_study_says(client: TestClient) -> None:
    found = ask(client, "/api/tokens", {"picture": "flower"})["result"]
    backbone = fi.load_backbone("tiny/vit")
    reading = fi.read_tokens(backbone, [builtin_photo("flower.jpg")], inverters=[])
    means = torch.tensor(found["maps"]).mean(dim=(1, 2))
    expected = torch.tensor(reading.metrics["identifiability_by_block"])
    torch.testing.assert_close(means, expected, atol=1e-5, rtol=0)
    assert (
        "No class is named"
        in ask(client, "/api/tokens", {"picture": "flower", "target": "nosuch"})["error"]
    )


@pytest.mark.parametrize(
    ("what", "start"),
    [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("picture", b"\xff\xd8"), ("manifest", b"{")],
)
def test_downloads_are_what_they_are_called(client: TestClient, what: str, start: bytes) -> None:
    answer = client.get(f"/api/download/{what}?state={to_state().to_link()}")
    assert answer.status_code == 200
    assert answer.content.startswith(start)
    assert answer.headers["content-disposition"].startswith("attachment")
