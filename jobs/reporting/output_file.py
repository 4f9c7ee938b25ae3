"""One file that a job writes: whole under its name, or not at all."""

from __future__ import annotations

import uuid

from pyarrow import fs

from jobs.corpus import filesystem_of
from jobs.errors import CorpusError, OutputError
from jobs.ledger import OBJECT_STORES

__all__ = ["OutputFile"]


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
