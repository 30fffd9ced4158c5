"""A hub on this machine that answers as the Hugging Face hub documents it: for tests of loading, without a network."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_API = re.compile(r"^/api/models/(?P<repo>[^/]+/[^/]+?)(?:/revision/(?P<revision>[^/]+))?$")
_FILE = re.compile(r"^/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)$")


@dataclass
class FakeRepo:
    """One repository.

    Attributes:
        files: content by name.
        revisions: what ``main`` is called besides its commit.
        gated: files are only given with ``token``.
        private: to anyone without ``token`` it does not exist.
        api_status: status that every question about it is answered with.
        file_status: status that every file is answered with.
        parameters: what the hub says of the weights; None where it says nothing.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    revisions: tuple[str, ...] = ("main",)
    gated: bool = False
    private: bool = False
    token: str = "hf_right"
    api_status: int | None = None
    file_status: int | None = None
    parameters: dict[str, int] | None = None

    @classmethod
    def of(cls, folder: Path, **options: Any) -> FakeRepo:
        """A repository with the files of a folder."""
        return cls(files={path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}, **options)


class FakeHub:
    """Serves ``repos`` on 127.0.0.1 while a ``with`` lasts; ``requests`` lists method and path of what was asked.

    Setting ``hanging`` makes it accept requests and answer none.
    """

    def __init__(self) -> None:
        self.repos: dict[str, FakeRepo] = {}
        self.requests: list[str] = []
        self.hanging = False
        self._release = threading.Event()
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT would be."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._release.set()
        self._server.shutdown()
        self._server.server_close()

    def wait(self) -> None:
        """Hold a request back until the hub closes."""
        self._release.wait(30)


class _Handler(BaseHTTPRequestHandler):
    owner: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Silence."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.owner.requests.append(f"{self.command} {path}")
        if self.owner.hanging:
            self.owner.wait()
            return
        for pattern, method in ((_API, self._describe), (_FILE, self._serve)):
            found = pattern.match(path)
            if found is not None:
                method(**found.groupdict())
                return
        self._refuse(404, "")

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _repo(self, name: str, revision: str | None) -> FakeRepo | None:
        """The repository, or None once a refusal is sent."""
        repo = self.owner.repos.get(name)
        if repo is None or (repo.private and self._token() != repo.token):
            self._refuse(401 if not self._token() else 404, "RepoNotFound", "Repository not found")
            return None
        if revision is not None and revision not in (*repo.revisions, COMMIT):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo

    def _describe(self, repo: str, revision: str | None) -> None:
        broken = getattr(self.owner.repos.get(repo), "api_status", None)
        if broken is not None:
            self._refuse(broken, "")
            return
        found = self._repo(repo, revision)
        if found is None:
            return
        about: dict[str, Any] = {
            "_id": "1",
            "id": repo,
            "modelId": repo,
            "sha": COMMIT,
            "private": found.private,
            "gated": "auto" if found.gated else False,
            "siblings": [
                {"rfilename": name, "size": len(content), "blobId": "b"} for name, content in found.files.items()
            ],
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        if found.parameters is not None:
            about["safetensors"] = {"parameters": found.parameters, "total": sum(found.parameters.values())}
        self._send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def _serve(self, repo: str, revision: str, file: str) -> None:
        found = self._repo(repo, revision)
        if found is None:
            return
        if found.gated and self._token() != found.token:
            self._refuse(403 if self._token() else 401, "GatedRepo", f"Access to model {repo} is restricted.")
        elif found.file_status is not None:
            self._refuse(found.file_status, "")
        elif file not in found.files:
            self._refuse(404, "EntryNotFound", "Entry not found")
        else:
            content = found.files[file]
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            self._send(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {}
        self._send(status, json.dumps({"error": message}).encode(), {**headers, "X-Repo-Commit": COMMIT})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    """Point huggingface_hub of this process at an endpoint, an empty cache and no token."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
