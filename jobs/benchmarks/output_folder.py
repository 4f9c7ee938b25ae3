"""The folder of a benchmark's run: files appear in it whole or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
from pyarrow import fs

from jobs.corpus import filesystem_of
from jobs.errors import CorpusError, OutputError
from jobs.ledger import OBJECT_STORES
from jobs.scored_input import part_below

__all__ = ["OutputFolder"]

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
