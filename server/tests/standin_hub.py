"""A hub on loopback: enough of its HTTP interface for `huggingface_hub` to make, push and fetch a repository."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit


class Hub:
    """Keeps what was committed in `files`, and the large objects that it was sent in `objects`, by SHA-256.

    refuse_after: so many large objects are taken, then every request is answered with 500. datasets: files to fetch.
    models: the files of each model, by name.
    """

    def __init__(self, refuse_after: int | None = None):
        self.files: dict[str, bytes] = {}
        self.objects: dict[str, bytes] = {}
        self.sent: list[str] = []
        self.commits = 0
        self.token: str | None = None
        self.refuse_after = refuse_after
        self.datasets: dict[str, bytes] = {}
        self.models: dict[str, dict[str, bytes]] = {}
        self.fetched: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def environment(self) -> dict[str, str]:
        return {"HF_ENDPOINT": self.address, "HF_TOKEN": "hf_standin", "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}  # fmt: skip

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.objects[value["oid"]]
        self.commits += 1


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def answer(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, content in (headers or {}).items():
                self.send_header(name, content)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def do_POST(self) -> None:
            path, data = unquote(urlsplit(self.path).path), self.body()
            hub.token = self.headers.get("Authorization")
            if path == "/api/repos/create":
                name = json.loads(data)["name"]
                self.answer({"url": f"{hub.address}/me/{name}", "name": f"me/{name}", "id": f"me/{name}"})
            elif path == "/api/validate-yaml":
                self.answer({"warnings": [], "errors": []})
            elif "/preupload/" in path:
                files = json.loads(data)["files"]
                modes = []
                for file in files:
                    large = file["path"].endswith((".safetensors", ".png"))
                    mode = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
                    modes.append({"path": file["path"], **mode})
                self.answer({"files": modes})
            elif path.endswith("/info/lfs/objects/batch"):
                objects = []
                for wanted in json.loads(data)["objects"]:
                    known = wanted["oid"] in hub.objects
                    href = f"{hub.address}/upload/{wanted['oid']}"
                    actions = {} if known else {"actions": {"upload": {"href": href}}}
                    objects.append(wanted | actions)
                self.answer({"transfer": "basic", "objects": objects})
            elif "/commit/" in path:
                hub.commit([json.loads(line) for line in data.splitlines()])
                self.answer({"commitUrl": f"{hub.address}/me/model/commit/{'0' * 40}", "commitOid": "0" * 40,
                             "pullRequestUrl": None})  # fmt: skip
            else:
                self.answer({"error": f"unexpected {path}"}, 404)

        def do_PUT(self) -> None:
            data, oid = self.body(), self.path.rsplit("/", 1)[-1]
            if hub.refuse_after is not None and len(hub.sent) >= hub.refuse_after:
                self.answer({"error": "out of order"}, 403)
                return
            assert hashlib.sha256(data).hexdigest() == oid
            hub.objects[oid] = data
            hub.sent.append(oid)
            self.answer({})

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.token = self.headers.get("Authorization")
            if path.startswith("/api/models/"):
                owner, name, what, revision = path.removeprefix("/api/models/").split("/", 3)
                self.describe(f"{owner}/{name}", what, revision)
                return
            name, _, file = path.removeprefix("/").partition("/resolve/")
            if name in hub.models:
                self.send(hub.models[name].get(file.partition("/")[2]))
                return
            name = next((name for name in hub.datasets if path.endswith(name)), None)
            if name is None:
                self.answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            self.send(hub.datasets[name])

        def describe(self, name: str, what: str, revision: str) -> None:
            """what: `revision` or `tree`, the list of files."""
            if name not in hub.models:
                self.answer({"error": "Repository not found"}, 401, {"X-Error-Code": "RepoNotFound"})
            elif revision not in ("main", "0" * 40):
                self.answer({"error": f"Invalid rev id: {revision}"}, 404, {"X-Error-Code": "RevisionNotFound"})
            elif what == "tree":
                files = hub.models[name].items()
                self.answer([{"type": "file", "path": path, "size": len(d), "oid": "0" * 40} for path, d in files])
            else:
                self.answer({"id": name, "sha": "0" * 40, "siblings": [{"rfilename": f} for f in hub.models[name]]})

        def send(self, data: bytes | None) -> None:
            if data is None:
                self.answer({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            if self.command == "GET":
                hub.fetched.append(self.path.rsplit("/", 1)[-1])
            self.answer(data, headers={"X-Repo-Commit": "0" * 40, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'})

    return Handler
