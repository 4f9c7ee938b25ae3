"""Sources: the files of one or more inputs, their names below them, and the columns that their folders stand for."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs

from jobs.corpus.formats import format_of
from jobs.corpus.hub import HUB, HubDataset, HubLocation, glob, hub_errors, is_of_split, splits_of
from jobs.corpus.storage import filesystem_of, identity_of, same_store, told
from jobs.errors import CorpusError

logger = logging.getLogger(__name__)

NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_PARTITION = re.compile(r"([^=/]+)=([^/]*)")
_WHOLE_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,17})")


@dataclass(frozen=True, slots=True)
class Source:
    """Inputs of a job: `locations` on one store, each a file, folder, glob or URI, or a dataset's id on the Hub.

    With `partition_columns` folders such as `lang=en/` become columns. Of several splits one may be chosen; `config` is
    a configuration of a dataset on the Hub.
    """

    locations: tuple[str, ...]
    partition_columns: bool = True
    split: str | None = None
    config: str | None = None

    @classmethod
    def of(cls, source: str | Source) -> Source:
        """The source that one location is; a source as it is."""
        return source if isinstance(source, Source) else cls((source,))

    @property
    def title(self) -> str:
        """The inputs as a user names them."""
        return " and ".join(self.locations)

    @property
    def identity(self) -> dict[str, Any]:
        """The entries of a run's identity that say what it reads."""
        places = [self.hub_location(location) for location in self.locations]
        located = [
            identity_of(location) if place is None or location.startswith(HUB) else f"{HUB}datasets/{location}"
            for location, place in zip(self.locations, places, strict=True)
        ]
        chosen = {"split": self.split, "config": self.config}
        return {
            "input": located[0] if len(located) == 1 else located,
            **{name: value for name, value in chosen.items() if value is not None},
        }

    def hub_location(self, location: str) -> HubLocation | None:
        """The place on the Hub that a location names: a URI, or, with a split or a configuration, an id that is no
        path here; else None.

        Raises:
            CorpusError: it is a URI of the Hub, and no dataset's.
        """
        if location.startswith(HUB):
            return HubLocation.of(location)
        is_chosen = self.split is not None or self.config is not None
        if not is_chosen or os.path.exists(location):
            return None
        try:
            return HubLocation.of(location)
        except CorpusError:
            return None


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file of an input: what the listing tells of it, its name, and the values that its folders' names have."""

    info: fs.FileInfo
    name: str
    partitions: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True, slots=True)
class Listing:
    """Files, in order, and the filesystem they are on; `commits` are those of datasets on the Hub, by what they were
    named."""

    filesystem: fs.FileSystem
    files: Sequence[FoundFile]
    commits: Mapping[str, str]


def found_files(source: Source, own: Sequence[str] = (), commits: Mapping[str, str] | None = None) -> Listing:
    """The files of a source, in the order of its locations and of their names.

    With several locations a name begins with the place of its location, so that names differ and keep that order.

    Args:
        source: the inputs.
        own: folders of the job itself, paths or URIs, which are passed over.
        commits: those at which datasets on the Hub are read again.

    Raises:
        CorpusError: nothing is found, or it cannot be listed; two inputs are on different stores or share a file; an
            input is inside one of the job's folders.
    """
    found: dict[str, FoundFile] = {}
    pinned = dict(commits or {})
    filesystem: fs.FileSystem | None = None
    for place, location in enumerate(source.locations):
        on_hub = source.hub_location(location)
        its, files = _files_of(location, own, source) if on_hub is None else _hub_files(on_hub, source, pinned)
        if filesystem is not None and not its.equals(filesystem):
            raise CorpusError(f"the inputs {source.title} are on different stores; run the job on each by itself")
        filesystem = its
        if len(source.locations) > 1:
            width = len(str(len(source.locations) - 1))
            files = [FoundFile(file.info, f"{place:0{width}d}/{file.name}", file.partitions) for file in files]
        if twice := [file.info.path for file in files if file.info.path in found]:
            raise CorpusError(f"{told(its, twice[0])} is in two of the inputs {source.title}")
        found |= {file.info.path: file for file in files}
    assert filesystem is not None, "a source has a location"
    every = list(found.values())
    _say_splits(source, every)
    return Listing(filesystem, every, pinned)


def partition_fields(files: Sequence[FoundFile]) -> list[pa.Field]:
    """The columns that the folders of files stand for: whole numbers where all values are, else strings."""
    values: dict[str, list[str]] = {}
    for file in files:
        for name, value in file.partitions:
            values.setdefault(name, []).extend([] if value is None else [value])
    return [
        pa.field(name, pa.int64() if found and all(map(_WHOLE_NUMBER.fullmatch, found)) else pa.string())
        for name, found in values.items()
    ]


def _say_splits(source: Source, files: Sequence[FoundFile]) -> None:
    found = splits_of([file.name for file in files])
    if len(found) > 1:
        counts = " and ".join(f"{split} ({count} file{'s' * (count > 1)})" for split, count in found.items())
        logger.warning(
            "the input %s has files of several splits, %s: all are read; --split chooses one",
            source.title,
            counts,
        )


def _files_of(location: str, own: Sequence[str], source: Source) -> tuple[fs.FileSystem, list[FoundFile]]:
    if source.config is not None:
        raise CorpusError(f"--config is for datasets of the Hub, and {location} is none")
    filesystem, path = filesystem_of(location)
    if HubLocation.is_id(location) and not os.path.exists(path):
        raise CorpusError(
            f"input {path} does not exist; a dataset of the Hub needs --split, as in --input {location} --split train"
        )
    excluded = tuple(start for folder in own if (start := _below(folder, location, filesystem)) is not None)
    base = _base(path)
    if (base + "/").startswith(excluded):
        raise CorpusError(f"the input {location} is inside the output folder {own[0]}; choose another --output")
    infos = _find(filesystem, path, excluded)
    return filesystem, _of_split([_found(info, base) for info in infos], location, source.split)


def _hub_files(place: HubLocation, source: Source, commits: dict[str, str]) -> tuple[fs.FileSystem, list[FoundFile]]:
    """The files of a dataset on the Hub, at the commit in `commits`, which gets it where it has none."""
    dataset = HubDataset.open(place, commits.get(place.key))
    commits[place.key] = dataset.commit
    if place.path:
        path = f"{dataset.root}/{place.path}"
        with hub_errors(place.key):
            infos = _find(dataset.filesystem, path, ())
        found = [_found(info, _base(path)) for info in infos]
        return dataset.filesystem, _of_split(found, place.key, source.split)
    infos = dataset.split_files(source.split, source.config)
    return dataset.filesystem, _of_split([_found(info, dataset.root) for info in infos], place.key, None)


def _of_split(files: list[FoundFile], location: str, split: str | None) -> list[FoundFile]:
    """The files whose names say that they are of a split; all of them for None.

    Raises:
        CorpusError: there are none.
    """
    if not files:
        raise CorpusError(
            f"no Parquet files (*.parquet) in {location}, nor *.jsonl, *.csv, *.tsv (or those with .gz or .zst), nor "
            "*.arrow"
        )
    if split is None:
        return files
    found = [file for file in files if is_of_split(file.name, split)]
    if not found:
        there = ", ".join(sorted(splits_of([file.name for file in files]))) or "none"
        raise CorpusError(f"no file in {location} is named as one of {split}; splits there: {there}")
    return found


def _found(info: fs.FileInfo, base: str) -> FoundFile:
    name = info.path[len(base) :].strip("/") if info.path != base else info.base_name
    folders = [_PARTITION.fullmatch(folder) for folder in name.split("/")[:-1]]
    values = {match[1]: match[2] for match in folders if match}
    partitions = ((key, None if value == NULL_PARTITION else unquote(value)) for key, value in values.items())
    return FoundFile(info, name, tuple(partitions))


def _below(output: str, source: str, filesystem: fs.FileSystem) -> str | None:
    """The beginning of paths below the output folder, if it is in the store of `source`."""
    output_filesystem, folder = filesystem_of(output)
    shared = output_filesystem.equals(filesystem) or same_store(output, source)
    return folder.rstrip("/") + "/" if shared else None


def _find(filesystem: fs.FileSystem, path: str, excluded: tuple[str, ...]) -> list[fs.FileInfo]:
    pattern = glob(path) if re.search(r"[*?]", path) else None
    base = _base(path)
    try:
        root = filesystem.get_file_info(base if pattern else path)
        if root.type == fs.FileType.NotFound:
            raise CorpusError(f"input {told(filesystem, path)} does not exist")
        if root.type == fs.FileType.File:
            return [root]
        infos = filesystem.get_file_info(fs.FileSelector(root.path, recursive=True))
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"input {told(filesystem, path)} cannot be listed: {error}") from error

    def wanted(info: fs.FileInfo) -> bool:
        place = os.path.realpath(info.path) if isinstance(filesystem, fs.LocalFileSystem) else info.path
        if info.type != fs.FileType.File or place.startswith(excluded):
            return False
        if pattern:
            return pattern.fullmatch(info.path) is not None
        below = info.path[len(root.path) :].strip("/").split("/")
        return format_of(below[-1]) is not None and not any(_is_passed_over(part) for part in below)

    found = sorted((info for info in infos if wanted(info)), key=lambda info: info.path)
    if isinstance(filesystem, fs.LocalFileSystem):  # a link to a file that is found too, or a loop of links
        found = list({os.path.realpath(info.path): info for info in reversed(found)}.values())[::-1]
    return found


def _base(path: str) -> str:
    """The folder that unit names are relative to: the part of a glob before its first wildcard, or the path."""
    wild = re.search(r"[*?]", path)
    return path[: wild.start()].rpartition("/")[0] or "/" if wild else path.rstrip("/")


def _is_passed_over(name: str) -> bool:
    """Whether a folder's file or folder of this name is no data: hidden, or what `datasets` keeps beside its own."""
    return name.startswith(("_", ".")) or (name.startswith("cache-") and name.endswith(".arrow"))
