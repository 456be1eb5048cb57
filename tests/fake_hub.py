"""A small Hub on localhost: serves repositories from folders, and takes uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "a" * 40
TOKEN = "hf_test"


class FakeHub:
    """Serves `root/<user>/<name>/` as the repository `user/name`; uploads need `TOKEN`.

    Use as a context manager; set `HF_ENDPOINT` of a subprocess to `endpoint`.
    """

    def __init__(self, root: Path):
        self.root = root
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo: str) -> dict[str, Path]:
        folder = self.root / repo
        return {
            path.relative_to(folder).as_posix(): path
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            hub.requests.append(format % args)

        def do_GET(self) -> None:
            path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/")
            parts = path.split("/")
            if parts[:2] == ["api", "models"]:
                self._api("/".join(parts[2:4]), parts[4:])
            elif len(parts) > 4 and parts[2] == "resolve":
                self._file("/".join(parts[:2]), "/".join(parts[4:]))
            else:
                self._json({"error": "no such page"}, 404)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urllib.parse.urlparse(self.path).path.strip("/")
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self._json({"error": "Invalid username or password."}, 401)
            if path == "api/repos/create":
                return self._create(json.loads(body))
            if path == "api/validate-yaml":
                return self._json({"errors": [], "warnings": []})
            repo = "/".join(path.split("/")[2:4])
            if path.endswith("/preupload/main"):
                return self._preupload(json.loads(body))
            if path.endswith("/commit/main"):
                return self._commit(repo, body)
            return self._json({"error": "no such page"}, 404)

        def _api(self, repo: str, rest: list[str]) -> None:
            if not (hub.root / repo).is_dir():
                return self._json({"error": "Repository not found"}, 404, "RepoNotFound")
            files = hub.files(repo)
            if rest[:1] == ["tree"]:
                return self._json(
                    [
                        {"type": "file", "path": n, "size": p.stat().st_size, "oid": _digest(p)}
                        for n, p in files.items()
                    ]
                )
            siblings = [{"rfilename": name} for name in files]
            info = {"_id": "1", "id": repo, "modelId": repo, "sha": COMMIT, "private": False}
            return self._json(info | {"siblings": siblings, "tags": [], "downloads": 0})

        def _file(self, repo: str, name: str) -> None:
            path = hub.files(repo).get(name)
            if path is None:
                return self._json({"error": "Entry not found"}, 404, "EntryNotFound")
            self._send(200, path.read_bytes(), {"ETag": f'"{_digest(path)}"'})

        def _create(self, request: dict[str, Any]) -> None:
            user = request.get("organization") or "user"
            repo = f"{user}/{request['name']}"
            if user == "stranger":
                return self._json({"error": "You may not create repositories here."}, 403)
            (hub.root / repo).mkdir(parents=True, exist_ok=True)
            return self._json({"url": f"{hub.endpoint}/{repo}", "name": repo, "id": "1"})

        def _preupload(self, request: dict[str, Any]) -> None:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in request["files"]
            ]
            self._json({"files": files, "commitOid": COMMIT})

        def _commit(self, repo: str, body: bytes) -> None:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    target = hub.root / repo / entry["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(entry["value"]["content"]))
            url = f"{hub.endpoint}/{repo}/commit/{COMMIT}"
            self._json({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

        def _json(self, content: Any, status: int = 200, error_code: str = "") -> None:
            headers = {"Content-Type": "application/json"}
            if error_code:
                headers["X-Error-Code"] = error_code
            self._send(status, json.dumps(content).encode(), headers)

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


def _digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
