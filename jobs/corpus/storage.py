"""Files that a job writes: whole under their names, or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
from pyarrow import fs

from jobs.corpus.files import filesystem_of
from jobs.errors import CorpusError, OutputError
from jobs.runs.ledger import OBJECT_STORES
from jobs.scoring.scored_corpus import part_below

__all__ = ["OutputFile", "OutputFolder"]


class OutputFile:
    """A file at a path or URI; its folder is made if it is not there, what it held is replaced.

    Raises:
        OutputError: it is a folder, or no location.
    """

    def __init__(self, location: str) -> None:
        try:
            self._filesystem, self._path = filesystem_of(location)
            info = self._filesystem.get_file_info(self._path)
        except (CorpusError, OSError) as error:
            raise OutputError(f"--output {location}: {error}") from error
        if info.type == fs.FileType.Directory:
            raise OutputError(f"--output {location} is a folder; name a file in it")

    def write(self, text: str) -> int:
        """Write the text; how many bytes it has.

        Raises:
            OutputError: it cannot be written.
        """
        content = text.encode()
        folder, _, name = self._path.rpartition("/")
        # On an object store a write becomes visible as a whole when it ends, and a rename is a copy.
        direct = self._filesystem.type_name in OBJECT_STORES
        target = self._path if direct else f"{folder}/.{name}.{uuid.uuid4().hex}"
        try:
            if not direct:
                self._filesystem.create_dir(folder, recursive=True)
            with self._filesystem.open_output_stream(target) as file:
                file.write(content)
            if not direct:
                self._filesystem.move(target, self._path)
        except OSError as error:
            if not direct and self._filesystem.get_file_info(target).type == fs.FileType.File:
                self._filesystem.delete_file(target)
            raise OutputError(f"{self._path} cannot be written: {error}") from error
        return len(content)


TORSO = "_torso-"


class OutputFolder:
    """A folder, made when something is written to it.

    Args:
        location: a path or a URI that pyarrow.fs knows.

    Raises:
        OutputError: the URI is none.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        try:
            self.filesystem, self._path = filesystem_of(location)
        except CorpusError as error:
            raise OutputError(f"--output {error}") from error

    def below(self, name: str) -> str:
        """The location of `name` in this folder: a path or URI as this folder's is."""
        return part_below(self.location, name)

    def path(self, name: str) -> str:
        """The path of `name` on the filesystem."""
        return f"{self._path.rstrip('/')}/{name}"

    @contextmanager
    def create(self, name: str) -> Iterator[pa.NativeFile]:
        """A stream to write `name` with; it gets its name, in the place of what is there, when all is written.

        Raises:
            OutputError: it cannot be written.
        """
        path = self.path(name)
        folder = path.rpartition("/")[0]
        direct = self.filesystem.type_name in OBJECT_STORES  # there a file is seen when it is closed
        target = path if direct else f"{folder}/{TORSO}{uuid.uuid4().hex}"
        try:
            self.filesystem.create_dir(folder, recursive=True)
            self._remove_torsos(folder)
            with self.filesystem.open_output_stream(target) as stream:
                yield stream
            if not direct:
                self.filesystem.move(target, path)
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error}") from error

    def _remove_torsos(self, folder: str) -> None:
        """What a run left that was killed while it wrote."""
        for info in self.filesystem.get_file_info(fs.FileSelector(folder)):
            if info.base_name.startswith(TORSO):
                self.filesystem.delete_file(info.path)
