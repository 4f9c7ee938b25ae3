"""Storage: filesystems of paths and URIs, names below a folder or URI, and files written whole or not at all."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from urllib.parse import parse_qsl, quote, unquote

import pyarrow as pa
from pyarrow import fs

from jobs.corpus.formats import format_of
from jobs.errors import CorpusError, OutputError

# On these a write becomes visible as a whole when it ends, and a rename is a copy.
OBJECT_STORES = ("s3", "gcs", "abfs")
SCHEMES = {"s3": "s3", "gcs": "gs", "abfs": "abfs", "hdfs": "hdfs"}
# Files that are read at once: of a store as many as pyarrow's S3 client has connections. A folder needs fewer, but may
# be a network's too.
REMOTE_AT_ONCE, LOCAL_AT_ONCE = 25, 16
# A store takes some 30 ms to begin an answer and sends at 30 to 100 MB/s: so much is sent in the time of one more
# request, and files of that size are read whole, also for a few of their columns.
SMALL_FILE_BYTES = 1 << 20
# Names of URI options whose values are secrets.
SECRET_OPTION = re.compile(r"secret|password|token|(^|_)key|(^|_)sig|sas")
# Beginning of the temporary names of unfinished files; a corpus passes over names that begin with a dot.
UNFINISHED = ".unfinished-"


def filesystem_of(location: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a path or URI, and the absolute path on it. In a URI `?` starts options, it is no wildcard, and
    characters may be percent-encoded or not.

    Raises:
        CorpusError: it is no location, or holds a secret.
    """
    if not _is_uri(location):
        local = unquote(location.removeprefix("file://")) if location.startswith("file://") else location
        return fs.LocalFileSystem(), _resolved(os.path.abspath(os.path.expanduser(local)))
    address, options = _cut(location)
    _refuse_secrets(address, options)
    if "//" in address.partition("://")[2].rstrip("/"):
        raise CorpusError(f"{location}: a folder in it has no name; write one / where it has //")
    plain, star, tail = address.partition("*")
    folder, _, start = plain.rpartition("/") if star else (address, "", "")
    try:
        filesystem, path = fs.FileSystem.from_uri(_encoded(folder.rstrip("/")) + options)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{location}: {error}") from error
    return filesystem, f"{path.rstrip('/')}/{unquote(start)}*{unquote(tail)}" if star else path


def told(filesystem: fs.FileSystem, path: str) -> str:
    """A path on a filesystem as a user writes it: a URI where it is not local."""
    scheme = "hf" if _is_hub(filesystem) else SCHEMES.get(filesystem.type_name)
    return f"{scheme}://{path}" if scheme else path


def files_at_once(filesystem: fs.FileSystem) -> int:
    """How many small files, or footers, of a filesystem are best read at the same time."""
    return LOCAL_AT_ONCE if isinstance(filesystem, fs.LocalFileSystem) else REMOTE_AT_ONCE


def opened(filesystem: fs.FileSystem, path: str, check: Callable[[fs.FileInfo], None]) -> pa.NativeFile:
    """A file, open to be read at any place, once `check` has passed what its filesystem says of it.

    That takes few requests: S3 tells size and time of change when a file is opened, and a small file comes whole.

    Raises:
        OSError: it cannot be opened; that it is not there is left to `check`.
    """
    source, info = _opened_with_info(filesystem, path)
    check(info)
    return whole_if_small(filesystem, filesystem.open_input_file(path) if source is None else source)


def best_whole(filesystem: fs.FileSystem, size: int | None) -> bool:
    """Whether a file of so many bytes is best read by one request: a small one that is not local."""
    return not isinstance(filesystem, fs.LocalFileSystem) and size is not None and size <= SMALL_FILE_BYTES


def whole_if_small(filesystem: fs.FileSystem, source: pa.NativeFile) -> pa.NativeFile:
    """An open file; or its content, where it is best read whole."""
    if not best_whole(filesystem, source.size()):
        return source
    with source:
        return pa.BufferReader(source.read_buffer(source.size()))


def _opened_with_info(filesystem: fs.FileSystem, path: str) -> tuple[pa.NativeFile | None, fs.FileInfo]:
    """What a filesystem says of a file, and the file where it is open for that already."""
    if filesystem.type_name != "s3":
        return None, filesystem.get_file_info(path)
    try:
        source = filesystem.open_input_file(path)
    except FileNotFoundError:
        return None, fs.FileInfo(path, fs.FileType.NotFound)
    modified = source.metadata().get("Last-Modified")
    if modified is None:  # a store that keeps it to its listings
        return source, filesystem.get_file_info(path)
    seconds = datetime.fromisoformat(modified.decode()).timestamp()
    return source, fs.FileInfo(path, fs.FileType.File, mtime_ns=int(seconds) * 10**9, size=source.size())


def _is_hub(filesystem: fs.FileSystem) -> bool:
    """Whether a filesystem is one of fsspec's: of these `hub.py` alone makes any."""
    return isinstance(filesystem, fs.PyFileSystem) and isinstance(filesystem.handler, fs.FSSpecHandler)


def same_store(one: str, other: str) -> bool:
    """Whether two locations are URIs of one object store, whatever options say of its region and the like."""
    if not (_is_uri(one) and _is_uri(other)):
        return False
    return _store(one) == _store(other)


def check_bucket(filesystem: fs.FileSystem, path: str) -> None:
    """Refuse a path on an object store whose bucket is not there, or not open to us.

    Raises:
        OutputError: so it is.
    """
    if filesystem.type_name not in OBJECT_STORES:
        return
    bucket = path.partition("/")[0]
    where = told(filesystem, path)
    try:
        info = filesystem.get_file_info(bucket)
    except (pa.ArrowException, OSError) as error:
        raise OutputError(f"--output {where}: its bucket {bucket} cannot be used: {error}") from error
    if info.type == fs.FileType.NotFound:
        raise OutputError(f"--output {where}: there is no bucket {bucket}; make it first, or check the endpoint")


def output_filesystem(location: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a job's output and the absolute path on it.

    Raises:
        OutputError: it is no location.
    """
    if location.startswith("hf://"):
        raise OutputError(f"--output {location}: the Hub is read here, not written; name a folder or a bucket")
    try:
        return filesystem_of(location)
    except CorpusError as error:
        raise OutputError(f"--output {error}") from error


def identity_of(location: str) -> str:
    """The form of a location that a run's identity has: the same from any working folder, however a URI is written, and
    without its options and secrets, which say how a store is reached."""
    if not _is_uri(location):
        return filesystem_of(location)[1]
    scheme, _, rest = _cut(location)[0].partition("://")
    return f"{scheme}://{unquote(_without_secret(rest)).rstrip('/')}"


def below(folder: str, name: str) -> str:
    """The location of `name` inside `folder`, which is a path, or a URI with or without options."""
    address, options = _cut(folder)
    return f"{address.rstrip('/')}/{name}{options}"


def beside(folder: str, suffix: str) -> str:
    """The location of a companion of `folder`, in the same folder as it: its name between `_` and `suffix`. A corpus
    passes over names that begin so.

    Raises:
        OutputError: it is a whole bucket, which nothing can be beside.
    """
    if not _is_uri(folder):
        parent, _, name = output_filesystem(folder)[1].rpartition("/")
        return f"{parent}/_{name}{suffix}"
    address, options = _cut(folder)
    parent, _, name = address.rstrip("/").rpartition("/")
    if parent.endswith("/"):
        raise OutputError(f"--output {folder} is a whole bucket; name a folder in it")
    return f"{parent}/_{name}{suffix}{options}"


def folder_of(location: str) -> str:
    """The folder of a location that may be a data file, a glob, or a folder itself.

    Raises:
        CorpusError: it is no location.
    """
    address, options = _cut(location)
    if "*" in address or format_of(address.rpartition("/")[2]) is not None:
        filesystem_of(location)
        address = address.partition("*")[0].rpartition("/")[0] or "."
    return address + options


@contextmanager
def whole_file(filesystem: fs.FileSystem, path: str, *, scratch: str | None = None) -> Iterator[pa.NativeFile]:
    """A stream to write the file at `path` with, which gets its name, in the place of what is there, when all is
    written; after an error there is nothing new under it.

    Args:
        filesystem: where it is. On an object store the content is held in memory and sent by one PUT.
        path: its path there; the folder must be there.
        scratch: the folder of the temporary file, on the same filesystem; by default that of `path`.

    Raises:
        OSError: it cannot be written.
    """
    if filesystem.type_name in OBJECT_STORES:
        content = pa.BufferOutputStream()
        yield content
        with filesystem.open_output_stream(path) as stream:
            stream.write(content.getvalue())
        return
    target = f"{path.rpartition('/')[0] if scratch is None else scratch}/{UNFINISHED}{uuid.uuid4().hex}"
    try:
        with filesystem.open_output_stream(target) as stream:
            yield stream
        filesystem.move(target, path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            if filesystem.get_file_info(target).type == fs.FileType.File:
                filesystem.delete_file(target)
        raise


class OutputFile:
    """A file at a path or URI; its folder is made if it is not there, what it held is replaced.

    Raises:
        OutputError: it is a folder, or no location.
    """

    def __init__(self, location: str) -> None:
        self._filesystem, self._path = output_filesystem(location)
        try:
            info = self._filesystem.get_file_info(self._path)
        except OSError as error:
            raise OutputError(f"--output {location}: {error}") from error
        if info.type == fs.FileType.Directory:
            raise OutputError(f"--output {location} is a folder; name a file in it")

    def write(self, text: str) -> int:
        """Write the text; how many bytes it has.

        Raises:
            OutputError: it cannot be written.
        """
        content = text.encode()
        with _created(self._filesystem, self._path) as stream:
            stream.write(content)
        return len(content)


class OutputFolder:
    """A folder of one job at a time, made when something is written to it.

    Args:
        location: a path or a URI that pyarrow.fs knows.

    Raises:
        OutputError: it is no location.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self.filesystem, self._path = output_filesystem(location)

    def below(self, name: str) -> str:
        """The location of `name` in this folder: a path or URI as this folder's is."""
        return below(self.location, name)

    def path(self, name: str) -> str:
        """The path of `name` on the filesystem."""
        return f"{self._path.rstrip('/')}/{name}"

    @contextmanager
    def create(self, name: str) -> Iterator[pa.NativeFile]:
        """A stream to write `name` with, as `whole_file` gives it; what a killed run left unfinished is removed.

        Raises:
            OutputError: it cannot be written.
        """
        path = self.path(name)
        try:
            leftovers = fs.FileSelector(path.rpartition("/")[0], allow_not_found=True)
            for info in self.filesystem.get_file_info(leftovers):
                if info.base_name.startswith(UNFINISHED):
                    self.filesystem.delete_file(info.path)
        except OSError as error:
            raise OutputError(f"{told(self.filesystem, path)} cannot be written: {error}") from error
        with _created(self.filesystem, path) as stream:
            yield stream


@contextmanager
def _created(filesystem: fs.FileSystem, path: str) -> Iterator[pa.NativeFile]:
    try:
        if filesystem.type_name not in OBJECT_STORES:  # there a folder is a name
            filesystem.create_dir(path.rpartition("/")[0], recursive=True)
        with whole_file(filesystem, path) as stream:
            yield stream
    except OSError as error:
        raise OutputError(f"{told(filesystem, path)} cannot be written: {error}") from error


def _is_uri(location: str) -> bool:
    """Whether it is a URI of something other than the local filesystem."""
    return "://" in location and not location.startswith("file://")


def _cut(location: str) -> tuple[str, str]:
    """The address of a location, and the options of a URI with their question mark."""
    address, mark, options = location.partition("?") if "://" in location else (location, "", "")
    return address, mark + options


def _encoded(address: str) -> str:
    """The address of a URI with what may not stand in it percent-encoded."""
    scheme, _, rest = address.partition("://")
    stray = re.sub(r"%(?![0-9A-Fa-f]{2})", "%25", rest)
    return f"{scheme}://{quote(stray, safe='/%:@!$&()*+,;=~')}"


def _refuse_secrets(address: str, options: str) -> None:
    """Raise where a URI holds a secret: it would be in manifests, reports and the list of processes."""
    user = address.partition("://")[2].partition("/")[0].rpartition("@")[0]
    secret = [name for name, _ in parse_qsl(options.removeprefix("?")) if SECRET_OPTION.search(name)]
    if ":" in user or secret or "@" in options:
        where = f"{address.partition('://')[0]}://{_without_secret(address.partition('://')[2])}"
        raise CorpusError(
            f"{where}: there is a password or key in this URI, which would be written to manifests and reports; leave "
            "it out and set the environment of the store, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def _without_secret(rest: str) -> str:
    """The part of a URI after `://` without user and password, where it has a password."""
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    return f"{host}{slash}{path}" if at and ":" in user else rest


def _store(location: str) -> tuple[str, str]:
    """Scheme and endpoint of a URI."""
    address, options = _cut(location)
    endpoint = dict(parse_qsl(options.removeprefix("?"))).get("endpoint_override")
    endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return address.partition("://")[0], endpoint.rpartition("://")[2].rstrip("/")


def _resolved(path: str) -> str:
    """The path with its symbolic links followed, as far as it has no wildcards."""
    plain, star, _ = path.partition("*") if "?" not in path else path.partition("?")
    folder = os.path.dirname(plain) if star else path
    return os.path.realpath(folder) + path[len(folder) :]
