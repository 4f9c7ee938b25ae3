"""Storage: paths and URIs, names below a folder, files that are written whole or not at all."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from pyarrow import fs

from jobs.corpus import storage
from jobs.corpus.storage import (
    OutputFile,
    OutputFolder,
    below,
    beside,
    filesystem_of,
    folder_of,
    identity_of,
    whole_file,
)
from jobs.errors import CorpusError, OutputError


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def break_off(folder: OutputFolder, name: str) -> None:
    with contextlib.suppress(RuntimeError), folder.create(name) as stream:
        stream.write(b"half")
        raise RuntimeError


def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path: Path) -> None:
    folder = OutputFolder(str(tmp_path / "out"))
    break_off(folder, "sub/file")
    assert contents(tmp_path / "out" / "sub") == {}
    with folder.create("sub/file") as stream:
        stream.write(b"whole")
    break_off(folder, "sub/file")
    assert contents(tmp_path / "out" / "sub") == {"file": b"whole"}


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / f"{storage.UNFINISHED}1").write_bytes(b"half")
    with OutputFolder(str(tmp_path)).create("file") as stream:
        stream.write(b"whole")
    assert contents(tmp_path) == {"file": b"whole"}


def test_a_file_is_replaced_only_once_it_is_written(tmp_path: Path) -> None:
    file = OutputFile(str(tmp_path / "deep" / "page.html"))
    assert file.write("one") == 3
    assert OutputFile(str(tmp_path / "deep" / "page.html")).write("fünf") == 5
    assert contents(tmp_path / "deep") == {"page.html": "fünf".encode()}
    with pytest.raises(OutputError, match="is a folder"):
        OutputFile(str(tmp_path / "deep"))


def test_an_object_store_gets_one_put_and_no_half_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Handler(fs.FSSpecHandler):  # type: ignore[misc]
        def __init__(self) -> None:
            self.opened: list[str] = []
            self.local = fs.LocalFileSystem()

        def get_type_name(self) -> str:
            return "store"

        def open_output_stream(self, path: str, metadata: object) -> object:
            self.opened.append(path)
            return self.local.open_output_stream(path)

    handler = Handler()
    store = fs.PyFileSystem(handler)
    monkeypatch.setattr(storage, "OBJECT_STORES", (store.type_name,))
    path = str(tmp_path / "object")
    with contextlib.suppress(RuntimeError), whole_file(store, path) as stream:
        stream.write(b"half")
        raise RuntimeError
    assert handler.opened == []
    with whole_file(store, path) as stream:
        stream.write(b"who")
        stream.write(b"le")
    assert handler.opened == [path]
    assert contents(tmp_path) == {"object": b"whole"}


def test_what_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match="cannot be written"), OutputFolder(str(tmp_path / "taken")).create("x"):
        pass
    with pytest.raises(OutputError, match="cannot be written"):
        OutputFile(str(tmp_path / "taken" / "x.html")).write("")
    for kind in (OutputFolder, OutputFile):
        with pytest.raises(OutputError, match="--output nowhere://x"):
            kind("nowhere://x")


def test_names_below_a_folder_or_uri() -> None:
    assert below("out/", "scores") == OutputFolder("out").below("scores") == "out/scores"
    assert below("file:///tmp/out", "scores") == "file:///tmp/out/scores"
    assert below("s3://bucket/out/?region=x", "scores") == "s3://bucket/out/scores?region=x"


def test_folders_of_files_and_globs() -> None:
    assert folder_of("scored/") == "scored/"
    assert folder_of("scored/part-0.parquet") == folder_of("scored/*.parquet") == "scored"
    assert folder_of("part-0.parquet") == "."
    with pytest.raises(CorpusError, match="nowhere://x"):
        folder_of("nowhere://x/a.parquet")


def test_paths_are_taken_from_where_the_user_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert filesystem_of("in")[1] == filesystem_of("./in/")[1] == identity_of("in") == str(tmp_path / "in")
    assert identity_of("s3://bucket/in") == "s3://bucket/in"


def test_a_companion_is_beside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert beside("out/", "_scored") == beside(f"file://{tmp_path}/out", "_scored") == f"{tmp_path}/_out_scored"
    assert beside("s3://bucket/deep/out/?region=x", "_scored") == "s3://bucket/deep/_out_scored?region=x"
    with pytest.raises(OutputError, match="a whole bucket"):
        beside("s3://bucket/", "_scored")
