"""`featinv app`: the page in a browser that shows what features hold and what edits mean."""

from __future__ import annotations

import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from featinv_diffusion.cli import options
from featinv_diffusion.errors import InputError

NEEDED = ("starlette", "uvicorn")
ANY = ("0.0.0.0", "::", "")


def app(
    pipeline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FOLDER_OR_REPO",
            help="Inverter to offer; may be given several times.",
            show_default="the bundled ones",
        ),
    ] = None,
    concepts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="Concepts to offer as sliders; may be given several times."
        ),
    ] = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Sample pictures; names of folders in it are their classes.",
            show_default="two photos",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 7860,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on. Others can reach the page at any but this one."),
    ] = "127.0.0.1",
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Name of this machine under which others ask for the page."
        ),
    ] = None,
    device: options.Device = "auto",
) -> None:
    """Open a page in the browser: upload a picture, move sliders, paint features, see pictures.

    The page works without a network and is reached from this machine alone, unless --host says
    otherwise. Uploads are kept in memory until the app stops. Stop it with Ctrl-C.
    """
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise InputError(
            f"The app needs {' and '.join(missing)}, which are not installed: "
            "pip install 'featinv-diffusion[app]'."
        )
    if host in ANY and not allow_host:
        raise InputError(
            f"Listening on {host or 'all addresses'} needs the name under which others ask for "
            "the page: give it with --allow-host NAME."
        )
    import asyncio

    import uvicorn

    from featinv_diffusion.app.pictures import Pictures
    from featinv_diffusion.app.server import make_app
    from featinv_diffusion.app.studio import Studio
    from featinv_diffusion.cli.exits import Stopped
    from featinv_diffusion.cli.run import quiet_libraries

    quiet_libraries()
    listening = _listen(host, port)
    with listening:
        studio = Studio(Pictures(samples), pipeline or (), concepts or (), device)
        studio.open(studio.default.name)
        names = [*(allow_host or ()), *([] if host in ANY else [host])]
        config = uvicorn.Config(
            make_app(studio, names),
            log_level="warning",
            limit_concurrency=256,
            timeout_keep_alive=10,
            timeout_graceful_shutdown=2,
            server_header=False,
        )
        shown = f"[{host}]" if ":" in host else (allow_host or [host])[0]
        print(f"The page is at http://{shown}:{listening.getsockname()[1]}/  Stop it with Ctrl-C.")
        if host not in ("127.0.0.1", "localhost", "::1"):
            print("Everybody who reaches this address can use it: there is no password.")
        try:
            asyncio.run(uvicorn.Server(config).serve(sockets=[listening]))
        except Stopped as stopped:  # the way in which it is meant to end
            if stopped.again is not None:
                stopped.again.cancel()
        print("The page is closed.")


def _listen(host: str, port: int) -> socket.socket:
    """Returns a bound socket, before models are loaded.

    Raises:
        InputError: the port is taken, or the address is none of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise InputError(
            f"The app cannot listen on port {port} of {host}: {error.strerror}. Give another one "
            "with --port, or 0 for any that is free."
        ) from None
    listening.listen(128)
    return listening
