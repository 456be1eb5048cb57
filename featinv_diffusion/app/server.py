"""The web page's server: a few addresses, each a thin layer over the studio."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.resources import files
from io import BytesIO
from typing import Any

from msgspec import Struct
from PIL import Image
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from featinv_diffusion import __version__
from featinv_diffusion.app import pictures as limits
from featinv_diffusion.app.export import DOWNLOADS, to_download, to_shown
from featinv_diffusion.app.guard import Guard, read_body
from featinv_diffusion.app.line import Busy, Cancelled, Line, Work
from featinv_diffusion.app.pictures import Stored
from featinv_diffusion.app.state import Key, read_link, read_state
from featinv_diffusion.app.studio import Studio
from featinv_diffusion.app.tokens import read_class_maps
from featinv_diffusion.errors import InputError
from featinv_diffusion.schema import parse_json

logger = logging.getLogger(__name__)

SCRIPTS = ("api", "camera", "concepts", "dom", "main", "models", "paint", "results", "tokens")
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    **{f"/{name}.js": (f"{name}.js", "text/javascript") for name in SCRIPTS},
}
"""All files that the server gives, by address; they are read once, when it starts."""

MAX_BODY = 256 << 10
TICK = 0.25
"""Seconds after which a client that waits hears that it still does."""
MAX_DECODING = 2


class Asked(Struct, frozen=True, forbid_unknown_fields=True):
    """What the page asks of a picture."""

    picture: Key
    member: str = ""
    target: str | None = None


def make_app(studio: Studio, hosts: Collection[str] = ()) -> Starlette:
    """Returns the server as an ASGI application.

    Args:
        hosts: names, besides those of this machine, under which it may be asked.
    """
    return Server(studio).to_app(hosts)


class Server:
    """Answers requests; whatever touches a model goes through one line.

    Args:
        studio: makes the pictures.
    """

    def __init__(self, studio: Studio):
        self.studio, self.line = studio, Line()
        folder = files("featinv_diffusion.app") / "static"
        self.page = {at: ((folder / name).read_bytes(), kind) for at, (name, kind) in PAGE.items()}
        self.decoding = asyncio.Semaphore(MAX_DECODING)

    def to_app(self, hosts: Collection[str]) -> Starlette:
        """Returns the application."""

        @asynccontextmanager
        async def lifespan(_app: Starlette) -> AsyncIterator[None]:
            yield
            self.line.close()

        return Starlette(
            routes=[
                *(Route(at, self.give_page, methods=["GET"]) for at in PAGE),
                Route("/api/start", self.start, methods=["GET"]),
                Route("/api/pictures", self.upload, methods=["POST"]),
                Route("/api/pictures/{key}", self.thumbnail, methods=["GET"]),
                Route("/api/render", self.render, methods=["POST"]),
                Route("/api/concepts", self.concepts, methods=["POST"]),
                Route("/api/tokens", self.tokens, methods=["POST"]),
                Route("/api/download/{what}", self.download, methods=["GET"]),
            ],
            middleware=[Middleware(Guard, hosts=hosts)],
            exception_handlers={InputError: _refuse, Exception: _fail},
            lifespan=lifespan,
        )

    async def give_page(self, request: Request) -> Response:
        """Gives a file of the page."""
        content, kind = self.page[request.url.path]
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    async def start(self, _request: Request) -> Response:
        """Says what there is to choose from."""
        studio = self.studio
        return JSONResponse(
            {
                "version": __version__,
                "pictures": [_describe(one) for one in studio.pictures.samples.values()],
                "members": [member.to_content() for member in studio.members],
                "default": studio.default.name,
                "limits": {"megabytes": limits.MAX_BYTES >> 20},
            }
        )

    async def upload(self, request: Request) -> Response:
        """Keeps a picture; its file is the body, and its name stands in the address."""
        sentence = f"A picture's file must have at most {limits.MAX_BYTES >> 20} MiB."
        content = await read_body(request, limits.MAX_BYTES, sentence)
        name = request.query_params.get("name", "picture.png")[:1000]
        async with self.decoding:
            add = partial(self.studio.pictures.add, content, name)
            stored = await asyncio.get_running_loop().run_in_executor(None, add)
        return JSONResponse(_describe(stored))

    async def thumbnail(self, request: Request) -> Response:
        """Gives the small picture of a picture."""
        stored = self.studio.pictures.get(request.path_params["key"])
        async with self.decoding:
            content = await asyncio.get_running_loop().run_in_executor(None, stored.thumbnail)
        return Response(content, media_type="image/png")

    async def render(self, request: Request) -> Response:
        """Makes the pictures of a state, one inverter after the other."""
        state = read_state(await _read_json(request))

        def do(work: Work) -> list[dict[str, Any]]:
            shares = 1 / len(state.members)
            return [
                to_shown(
                    self.studio.render(state, name, lambda n: work.advance(n * shares)), _to_url
                )
                for name in state.members
            ]

        return self._stream(request, do)

    async def concepts(self, request: Request) -> Response:
        """Finds the concepts that matter in a picture."""
        asked = parse_json(await _read_json(request), Asked, "the request")
        return self._stream(
            request, lambda _: self.studio.find_concepts(asked.picture, asked.member)
        )

    async def tokens(self, request: Request) -> Response:
        """Reads what the tokens of a ViT say of a class."""
        asked = parse_json(await _read_json(request), Asked, "the request")
        stored = self.studio.pictures.get(asked.picture)

        def do(_work: Work) -> dict[str, Any]:
            found = read_class_maps(stored, asked.target, self.studio.device)
            return {**found, "picture": _to_url(found["picture"])}

        return self._stream(request, do)

    async def download(self, request: Request) -> Response:
        """Gives a file of a state's pictures, which are made again where they are not kept."""
        what, link = request.path_params["what"], request.query_params.get("state", "")
        if what not in DOWNLOADS:
            raise InputError(f"A download must be one of {', '.join(DOWNLOADS)}, got {what!r}.")
        state = read_link(link)
        (name,) = state.members[:1]

        def do(work: Work) -> tuple[str, bytes]:
            return to_download(self.studio.render(state, name, work.advance), what)

        work, changed = self._add(request, do)
        try:
            while not work.finished.is_set():
                await _wait(changed)
                if await request.is_disconnected():
                    work.cancel()
        finally:
            work.cancel()
        if work.error is not None:
            raise work.error
        file, content = work.result
        quoted = json.dumps(file.encode("ascii", "replace").decode())
        headers = {"Content-Disposition": f"attachment; filename={quoted}"}
        return Response(content, media_type=DOWNLOADS[what][0], headers=headers)

    # ---- Work that takes a while

    def _add(self, request: Request, do: Callable[[Work], Any]) -> tuple[Work, asyncio.Event]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def on_change() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(changed.set)

        client = request.headers.get("x-featinv-client", "")[:64]
        return self.line.add(client, do, on_change), changed

    def _stream(self, request: Request, do: Callable[[Work], Any]) -> Response:
        """Answers with lines of JSON: the place in the line, the share that is done, the result.

        Who goes away cancels the work.
        """
        work, changed = self._add(request, do)

        async def lines() -> AsyncIterator[bytes]:
            try:
                while not work.finished.is_set():
                    if work.is_started:
                        yield _line({"done": round(work.done, 3)})
                    else:
                        yield _line({"place": self.line.place_of(work)})
                    await _wait(changed)
                    if await request.is_disconnected():
                        return
                yield _line(_outcome(work))
            finally:
                work.cancel()

        return StreamingResponse(lines(), media_type="application/x-ndjson")


async def _wait(changed: asyncio.Event) -> None:
    with suppress(TimeoutError):
        await asyncio.wait_for(changed.wait(), TICK)
    changed.clear()


async def _read_json(request: Request) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise InputError("The request must hold JSON, and say so.")
    return await read_body(request, MAX_BODY, "The request must have at most 256 KiB.")


def _outcome(work: Work) -> dict[str, Any]:
    if work.error is None:
        return {"result": work.result}
    if isinstance(work.error, InputError):
        return {"error": str(work.error)}
    if isinstance(work.error, Cancelled):
        return {"error": "The work was cancelled."}
    return {"error": "Something failed that should not; the terminal of the app says what."}


def _line(content: dict[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False).encode() + b"\n"


def _describe(stored: Stored) -> dict[str, Any]:
    return {
        "key": stored.key,
        "name": stored.name,
        "label": stored.label,
        "is_sample": stored.is_sample,
    }


def _to_url(picture: Image.Image) -> str:
    file = BytesIO()
    picture.save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


async def _refuse(_request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 429 if isinstance(error, Busy) else 400)


async def _fail(_request: Request, _error: Exception) -> Response:
    sentence = "Something failed that should not; the terminal of the app says what."
    return JSONResponse({"error": sentence}, 500)
