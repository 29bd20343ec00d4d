"""The Hugging Face Hub as a folder, into which uploads are copied; and as a server, from which models are fetched."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest


def copy_uploads(patch: pytest.MonkeyPatch, hub: Path) -> None:
    """Let the published methods of huggingface_hub copy what they upload to ``hub / "owner" / "name"``."""

    def upload_folder(self, *, repo_id, folder_path, **_):
        shutil.copytree(folder_path, hub / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}"

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo, **_):
        (hub / repo_id).mkdir(parents=True, exist_ok=True)
        shutil.copy(path_or_fileobj, hub / repo_id / path_in_repo)
        return f"https://hub/{repo_id}"

    def create_commit(self, repo_id, operations, **_):
        for one in operations:
            upload_file(self, repo_id=repo_id, path_or_fileobj=one.path_or_fileobj, path_in_repo=one.path_in_repo)

    made = lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id)  # noqa: E731
    for method in (upload_folder, upload_file, create_commit):
        patch.setattr(f"huggingface_hub.HfApi.{method.__name__}", method)
    patch.setattr("huggingface_hub.HfApi.create_repo", made)


@dataclass
class Hub:
    """Repositories that a local server offers as the Hub does.

    Attributes:
        commits: the folder of each revision of a repository, by its name, its commit and its branch or tag.
        gated, private: names that need the token "good".
        broken: how many of the next transfers of a file end in its middle.
        status: of every answer, if it is not None.
        requests: the method, the path and the range of each request.
    """

    address: str = ""
    commits: dict[str, dict[str, Path]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    broken: dict[str, int] = field(default_factory=dict)
    status: int | None = None
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def add(self, name: str, folder: Path, revision: str = "main") -> str:
        """Add a folder as a revision of a repository; return its commit."""
        commit = hashlib.sha1(f"{name} {revision} {len(self.commits.get(name, {}))}".encode()).hexdigest()
        self.commits.setdefault(name, {})[revision] = self.commits.setdefault(name, {})[commit] = folder
        return commit

    def fetched(self) -> list[str]:
        """Return the names of the files that were sent, sorted."""
        sent = [path for method, path, _ in self.requests if method == "GET" and "/resolve/" in path]
        return sorted({path.rpartition("/")[2] for path in sent})

    def environment(self, home: Path) -> dict[str, str]:
        """Return variables by which a process takes the server for the Hub, and a cache of its own."""
        return {"HF_ENDPOINT": self.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.hub, unquote(urlsplit(self.path).path).strip("/")
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if hub.status is not None:
            return self._send(hub.status, b"")
        parts = path.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        is_trusted = self.headers.get("Authorization") == "Bearer good"
        if name not in hub.commits or (name in hub.private and not is_trusted):
            return self._send(401 if not is_trusted else 404, b"", code="RepoNotFound")
        if rest and rest[0] == "resolve" and name in hub.gated and not is_trusted:
            return self._send(401, b"", code="GatedRepo")
        revision = rest[1] if len(rest) > 1 else "main"
        revisions = hub.commits[name]
        if revision not in revisions:
            return self._send(404, b"", code="RevisionNotFound")
        folder = revisions[revision]
        commit = next(key for key, value in revisions.items() if value == folder and len(key) == 40)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = [file.relative_to(folder).as_posix() for file in files]
        if not rest or rest[0] == "revision":
            return self._send_json({"id": name, "sha": commit, "siblings": [{"rfilename": one} for one in names]})
        if rest[0] == "tree":
            rows = [
                {"type": "file", "path": one, "size": file.stat().st_size, "oid": _etag(file)}
                for one, file in zip(names, files, strict=True)
            ]
            return self._send_json(rows)
        file = folder.joinpath(*rest[2:])
        if not file.is_file():
            return self._send(404, b"", code="EntryNotFound")
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        return self._send_file(file, headers)

    def _send_file(self, file: Path, headers: dict[str, str]) -> None:
        content, start = file.read_bytes(), 0
        if (wanted := self.headers.get("Range")) is not None:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        is_cut = self.command == "GET" and self.hub.broken.get(file.name, 0) > 0
        self._send(200 if wanted is None else 206, body, headers=headers, cut=is_cut)
        if is_cut:
            self.hub.broken[file.name] -= 1

    def _send_json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), headers={"Content-Type": "application/json"})

    def _send(self, status, body, *, code=None, headers=None, cut=False) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), **({} if code is None else {"X-Error-Code": code})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Run a server for the block, which answers as the Hub does, as far as models are read."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (_Answers,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(patch: pytest.MonkeyPatch, hub: Hub, home: Path) -> None:
    """Let this process take the server for the Hub, as one that starts with ``hub.environment(home)`` does."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", hub.address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.delenv("HF_TOKEN", raising=False)
