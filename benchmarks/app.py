"""How long the page of `featinv app` takes from a slider to a draft picture, alone and crowded.

    python benchmarks/app.py --machine "2-core AMD EPYC, AVX2"

Clients ask the server over HTTP as the page does, each for another factor of a concept, so that no
answer is kept from before. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from time import perf_counter, process_time
from typing import Any

import httpx
import torch
import uvicorn
from pages import table

from featinv_diffusion.app.pictures import Pictures
from featinv_diffusion.app.server import make_app
from featinv_diffusion.app.studio import Studio

MEMBER, CONCEPTS = "tiny/convnext", "tiny/convnext-sae"


def serve() -> str:
    """Starts the server in a thread, and returns its address."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(Studio(Pictures())), log_level="error"))
    Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True).start()
    return f"http://127.0.0.1:{listening.getsockname()[1]}"


def ask(client: httpx.Client, name: str, concept: int, factor: float, **changed: Any) -> float:
    """Returns the seconds from a request to its pictures."""
    state = {
        "picture": "flower",
        "members": [MEMBER],
        "quality": "draft",
        "n_samples": 1,
        "edits": [{"kind": "scale", "concepts": CONCEPTS, "factors": [[concept, factor]]}],
        **changed,
    }
    start = perf_counter()
    answer = client.post("/api/render", json=state, headers={"x-featinv-client": name})
    answer.raise_for_status()
    assert "result" in json.loads(answer.text.splitlines()[-1]), answer.text
    return perf_counter() - start


def drag(address: str, name: str, n: int, first: float) -> list[float]:
    """Asks for one factor after the other, as a slider that is dragged."""
    with httpx.Client(base_url=address, timeout=600) as client:
        return [ask(client, name, 40, first + i / 997) for i in range(n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--n", type=int, default=40, help="requests of each client")
    parser.add_argument("--machine", required=True)
    given = parser.parse_args()
    address = serve()
    drag(address, "warm", 3, 3.0)
    before = process_time()
    alone = drag(address, "one", given.n, 0.0)
    cpu = (process_time() - before) / given.n
    with ThreadPoolExecutor(given.clients) as pool:
        calls = [
            pool.submit(drag, address, f"client {i}", given.n // 4, 0.5 + i / 10)
            for i in range(given.clients)
        ]
        crowded = [seconds for call in calls for seconds in call.result()]
    with httpx.Client(base_url=address, timeout=600) as client:
        full = [
            ask(client, "one", 40, 0.9 + i / 100, quality="best", n_samples=4) for i in range(5)
        ]
    rows = [
        [what, str(len(found)), *(f"{x:.2f}" for x in (statistics.median(found), p95(found)))]
        for what, found in (
            ("draft, one client", alone),
            (f"draft, {given.clients} clients at once", crowded),
            ("settled: best, 4 samples", full),
        )
    ]
    load = os.getloadavg()[0]
    print(f"On {given.machine}, {torch.get_num_threads()} threads, load average {load:.1f}:\n")
    print(table("|requests|median, s|95th percentile, s", rows))
    print(f"\nOne draft takes {cpu:.2f} s of a core, client and server together.")


def p95(values: list[float]) -> float:
    """Returns the 95th percentile, by the nearest rank above."""
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


if __name__ == "__main__":
    main()
