"""Who may ask the server for what: hosts, origins, sizes, and what a page of it may load."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from featinv_diffusion.errors import InputError

LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "media-src blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """Refuses requests that another site could make in a user's browser.

    A name that was pointed at this machine (DNS rebinding) is no host of this server, a request of
    another site says so in `Origin` or `Sec-Fetch-Site`.

    Args:
        hosts: names, besides those of this machine, under which the server may be asked.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] = ()):
        self.app, self.hosts = app, LOCAL | {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or hands on to the app."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if "cache-control" not in headers:
                    headers["Cache-Control"] = "no-store"
            await send(message)

        reason = self.refusal(Headers(scope=scope), scope["method"], scope["path"])
        if reason is not None:
            await JSONResponse({"error": reason}, 403)(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)

    def refusal(self, headers: Mapping[str, str], method: str, path: str) -> str | None:
        """Returns why a request is refused, a sentence; None where it is not."""
        host = headers.get("host", "")
        if _host_name(f"//{host}") not in self.hosts:
            return (
                "The app answers under the names of this machine only. Start it with --allow-host "
                "NAME to reach it under another name."
            )
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2] != host:
            return "The app takes no requests of other sites."
        site = headers.get("sec-fetch-site", "none")
        is_page = method == "GET" and not path.startswith("/api/")
        if site not in ("same-origin", "none") and not is_page:
            return "The app takes no requests of other sites."
        return None


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


async def read_body(request: Request, most: int, sentence: str) -> bytes:
    """Reads a body that may have so many bytes, and stops reading where it has more.

    Raises:
        InputError: it has more; says `sentence`.
    """
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most:
        raise InputError(sentence)
    parts, n_bytes = [], 0
    async for part in request.stream():
        n_bytes += len(part)
        if n_bytes > most:
            raise InputError(sentence)
        parts.append(part)
    return b"".join(parts)
