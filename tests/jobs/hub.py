"""A stand-in for the Hugging Face Hub: datasets with commits in memory, as much of the HTTP API as reading takes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

API = re.compile(r"/api/datasets/([^/]+/[^/]+)/(revision|tree|paths-info)/([^/]+)(?:/(.*))?")
RESOLVE = re.compile(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Hub:
    """Files of each commit by repository, the branches, and how often each kind of request came."""

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    requests: Counter[str] = field(default_factory=Counter)

    def push(self, repo: str, files: dict[str, bytes], *, branch: str = "main") -> str:
        """A new commit with these files and no others."""
        sha = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        self.commits.setdefault(repo, {})[sha] = files
        self.branches.setdefault(repo, {})[branch] = sha
        return sha

    def files(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a revision and its files."""
        sha = self.branches.get(repo, {}).get(revision, revision)
        files = self.commits.get(repo, {}).get(sha)
        return None if files is None else (sha, files)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if match := API.fullmatch(url.path):
            repo, kind, revision, path = match[1], match[2], unquote(match[3]), unquote(match[4] or "")
            self.hub.requests[kind] += 1
            self._api(repo, kind, revision, path, parse_qs(url.query), body)
        elif match := RESOLVE.fullmatch(url.path):
            self.hub.requests["resolve"] += 1
            self._resolve(match[1], unquote(match[2]), unquote(match[3]))
        else:
            self._answer(404)

    do_GET = do_HEAD = do_POST = _serve

    def _api(self, repo: str, kind: str, revision: str, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if repo not in self.hub.commits:
            self._answer(401, X_Error_Code="RepoNotFound")
            return
        found = self.hub.files(repo, revision)
        if found is None:
            self._answer(404, X_Error_Code="RevisionNotFound")
            return
        sha, files = found
        if kind == "revision":
            self._json({"id": repo, "sha": sha})
        elif kind == "tree":
            recursive = query.get("recursive", ["False"])[0].lower() == "true"
            self._json([entry for entry in _entries(files) if _is_in(entry["path"], path, recursive)])
        else:
            form = parse_qs(body.decode())
            wanted = form.get("paths") or json.loads(body or b"{}").get("paths", [])
            self._json([entry for entry in _entries(files) if entry["path"] in wanted])

    def _json(self, content: object) -> None:
        self._answer(200, json.dumps(content).encode(), Content_Type="application/json")

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        found = self.hub.files(repo, revision)
        if found is None or path not in found[1]:
            self._answer(404, X_Error_Code="EntryNotFound")
            return
        content = found[1][path]
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is None:
            self._answer(200, content, ETag='"tag"', X_Repo_Commit=found[0])
            return
        first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
        self._answer(206, content[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(content)}")


def _entries(files: dict[str, bytes]) -> list[dict[str, object]]:
    folders = {name[: place.start()] for name in files for place in re.finditer("/", name)}
    entries: list[dict[str, object]] = [
        {"type": "directory", "path": folder, "size": 0, "oid": "0"} for folder in sorted(folders)
    ]
    for name, content in files.items():
        entries.append({"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()})
    return entries


def _is_in(path: object, folder: str, recursive: bool) -> bool:
    own = str(path)
    rest = own.removeprefix(f"{folder}/") if folder else own
    return (not folder or own.startswith(f"{folder}/")) and (recursive or "/" not in rest)


@contextmanager
def hub(environment: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub without datasets, which HF_ENDPOINT of this process and its children names."""
    content = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": content}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    environment.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    try:
        yield content
    finally:
        server.shutdown()
        server.server_close()
