# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face Hub: a local server for downloads, its `HfApi` for uploads."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import pytest

from tests.published_heads import FILES


class Hub:
    """Repositories, as files by name, behind the part of the Hub's protocol we use."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.revisions = {"main": "1" * 40, "v1": "2" * 40}
        self.refuse: tuple[int, str | None] | None = None
        self.requests: list[str] = []

    def fetched(self) -> list[str]:
        """Name the files whose content was asked for, once each."""
        return sorted({p.split("/")[-1] for p in self.requests if p.startswith("GET")})

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        path = path.split("?")[0]
        if self.refuse:
            status, code = self.refuse
            return status, {"X-Error-Code": code} if code else {}, b""
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models/").strip("/").split("/")
        files = self.repositories.get("/".join(parts[:2]))
        if files is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        revision = self.revisions.get(parts[3], parts[3])
        if revision not in self.revisions.values():
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if api and parts[2] == "revision":
            info = {"id": "/".join(parts[:2]), "sha": revision, "siblings": []}
            return 200, {}, json.dumps(info).encode()
        if api and parts[2] == "tree":
            tree = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                for name, content in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        content = files["/".join(parts[4:])]
        self.requests.append(f"{method} {path}")
        etag = hashlib.sha1(content).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": revision}, content


@contextmanager
def serve_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Let huggingface_hub ask this Hub."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def reply(self, method: str) -> None:
            status, headers, content = hub.answer(method, self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if method == "GET":
                self.wfile.write(content)

        def do_GET(self) -> None:
            self.reply("GET")

        def do_HEAD(self) -> None:
            self.reply("HEAD")

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_cache(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """Let huggingface_hub keep downloads in a directory, as a machine of its own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(directory))


def publish(hub: Hub, heads: Path, **more: bytes | None) -> None:
    """Put a heads directory and more files into `ann/heads`; None leaves one out."""
    files: dict[str, bytes | None] = {
        path.name: path.read_bytes() for path in heads.iterdir() if path.name in FILES
    }
    files |= {name.replace("__", "."): content for name, content in more.items()}
    hub.repositories["ann/heads"] = {
        name: content for name, content in files.items() if content is not None
    }


class FakeApi:
    """Stands for `HfApi`: records, and behaves as it is told."""

    made: ClassVar[list[Any]] = []
    error: Exception | None = None
    is_private = True

    def __init__(self, **values: Any) -> None:
        self.values = values
        self.created: dict[str, Any] = {}
        self.commit: dict[str, Any] = {}
        self.files: dict[str, bytes] = {}
        self.made.append(self)

    def create_repo(self, repo_id: str, **values: Any) -> None:
        self.created = {"repo_id": repo_id, **values}

    def model_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.is_private)

    def create_commit(
        self, repo_id: str, operations: list[Any], **values: Any
    ) -> SimpleNamespace:
        if self.error:
            raise self.error
        self.commit = {"repo_id": repo_id, **values}
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()
        pull_request = "https://hub/pr/1" if values["create_pr"] else None
        return SimpleNamespace(commit_url="https://hub/commit/1", pr_url=pull_request)


def use_fake_api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    """Let uploads end at a fake, of a class that no other test knows."""

    class Api(FakeApi):
        made: ClassVar[list[Any]] = []

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return Api
