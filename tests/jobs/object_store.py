"""A stand-in for an S3 service: one process, in memory, as much of the API as pyarrow uses."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

KEY, SECRET = "the-key-id", "the-secret"


@dataclass
class Store:
    """Objects by `bucket/key` with their times, how often each kind of request came, and how many at most at one time.

    Listings have milliseconds, as those of MinIO; a HEAD request has whole seconds. Each answer comes `latency_s` late;
    requests of several connections wait at the same time.
    """

    objects: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    buckets: set[str] = field(default_factory=lambda: {"bucket"})
    requests: Counter[str] = field(default_factory=Counter)
    uploads: dict[str, dict[int, bytes]] = field(default_factory=dict)
    latency_s: float = 0.0
    most_at_once: int = 0
    sent_bytes: int = 0
    _running: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def wait(self, kind: str) -> None:
        """Count a request and let it wait."""
        with self._lock:
            self.requests[kind] += 1
            self._running += 1
            self.most_at_once = max(self.most_at_once, self._running)
        time.sleep(self.latency_s)
        with self._lock:
            self._running -= 1

    def put(self, path: str, content: bytes) -> None:
        self.objects[path] = (content, time.time() // 1 + 0.123)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A client's connections all come at once; one that finds no room tries again a second later.
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the body waits until the client has acknowledged the headers
    store: Store

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.store.sent_bytes += len(body)
            self.wfile.write(body)

    def _fail(self, status: int, code: str) -> None:
        self._answer(status, f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return _signed_chunks(body) if self.headers.get("Content-Encoding") == "aws-chunked" else body

    def _serve(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path).strip("/"), parse_qs(url.query, keep_blank_values=True)
        path += "/" if url.path.endswith("/") and "/" in path else ""
        body = self._body()
        self.store.wait(self.command)
        if f"Credential={KEY}/" not in self.headers.get("Authorization", ""):
            self._fail(403, "InvalidAccessKeyId")
        elif path.partition("/")[0] not in self.store.buckets:
            self._fail(404, "NoSuchBucket")
        elif "/" not in path.rstrip("/") and self.command != "POST":
            self._list(path.strip("/"), query) if self.command == "GET" else self._answer(200)
        else:
            getattr(self, f"_{self.command.lower()}")(path, query, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _serve

    def _list(self, bucket: str, query: dict[str, list[str]]) -> None:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        found, folders = "", set()
        for path, (content, changed) in sorted(self.store.objects.items()):
            own, _, key = path.partition("/")
            rest = key.removeprefix(prefix)
            if own != bucket or not key.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
                continue
            when = time.strftime("%Y-%m-%dT%H:%M:%S.123Z", time.gmtime(changed))
            found += f"<Contents><Key>{escape(key)}</Key><LastModified>{when}</LastModified>"
            found += f"<Size>{len(content)}</Size></Contents>"
        found += "".join(f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>" for one in sorted(folders))
        count = f"<KeyCount>{found.count('</Key>') + len(folders)}</KeyCount>"
        self._answer(
            200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{count}{found}</ListBucketResult>".encode()
        )

    def _head(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if path not in self.store.objects:
            self._fail(404, "NoSuchKey")
            return
        content, changed = self.store.objects[path]
        self._answer(200, Content_Length=str(len(content)), Last_Modified=formatdate(changed, usegmt=True))

    def _get(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if path not in self.store.objects:
            self._fail(404, "NoSuchKey")
            return
        content = self.store.objects[path][0]
        wanted = self.headers.get("Range")
        if not wanted:
            self._answer(200, content)
            return
        first, last = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
        span = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
        self._answer(206, content[first : last + 1], Content_Range=span)

    def _put(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if "uploadId" in query:
            self.store.uploads[query["uploadId"][0]][int(query["partNumber"][0])] = body
        else:
            self.store.put(path, body)
        self._answer(200, ETag='"tag"')

    def _post(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if "uploads" in query:
            name = str(len(self.store.uploads))
            self.store.uploads[name] = {}
            answer = f"<InitiateMultipartUploadResult><UploadId>{name}</UploadId></InitiateMultipartUploadResult>"
        elif "uploadId" in query:
            parts = self.store.uploads[query["uploadId"][0]]
            self.store.put(path, b"".join(parts[number] for number in sorted(parts)))
            answer = "<CompleteMultipartUploadResult><ETag>tag</ETag></CompleteMultipartUploadResult>"
        else:  # the deletion of several
            for key in body.decode().split("<Key>")[1:]:
                self.store.objects.pop(f"{path.strip('/')}/{key.partition('<')[0]}", None)
            answer = "<DeleteResult></DeleteResult>"
        self._answer(200, answer.encode())

    def _delete(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        self.store.objects.pop(path, None)
        self._answer(204)


def _signed_chunks(body: bytes) -> bytes:
    """What a body in chunks of the service's own kind holds."""
    content = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        length = int(size.partition(b";")[0], 16)
        if not length:
            break
        content, body = content + body[:length], body[length + 2 :]
    return content


@contextmanager
def object_store(environment: pytest.MonkeyPatch, *, latency_s: float = 0.0) -> Iterator[Store]:
    """A service with the bucket `bucket`, which s3:// URIs of this process and its children reach."""
    store = Store(latency_s=latency_s)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"store": store}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    environment.setenv("AWS_ACCESS_KEY_ID", KEY)
    environment.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
    environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
