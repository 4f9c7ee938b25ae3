"""Datasets of the Hugging Face Hub as inputs: `hf://datasets/ORG/NAME[@REVISION][/PATH]`, each at one commit.

They are read through `huggingface_hub`'s filesystem, where they are; nothing is downloaded first. `HF_ENDPOINT` and
`HF_TOKEN` of the environment are used, on the workers too.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs

from jobs.corpus.formats import format_of
from jobs.errors import CorpusError

HUB = "hf://"
_LOCATION = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.*))?")
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PINNED = re.compile(r"^datasets/[^/]+/[^/@]+@([0-9a-f]{40})/")
CARD = "README.md"
TIMEOUT_S = 30.0
# Names that a file or folder of a split has, by split: https://huggingface.co/docs/datasets/repository_structure
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORDS = re.compile(r"[A-Za-z]+")


@dataclass(frozen=True, slots=True)
class HubLocation:
    """A place in a dataset's repository: its id, a branch, tag or commit, and a path, which may be empty or a glob."""

    repo: str
    revision: str = "main"
    path: str = ""

    @classmethod
    def of(cls, location: str) -> HubLocation:
        """The place that a URI or an id names.

        Raises:
            CorpusError: it is neither.
        """
        match = _LOCATION.fullmatch(location)
        if match is None and not cls.is_id(location):
            raise CorpusError(f"{location} is no dataset of the Hub: write hf://datasets/ORG/NAME[@REVISION]/PATH")
        if match is None:
            return cls(location)
        return cls(match[1], unquote(match[2] or "main"), unquote(match[3] or "").strip("/"))

    @staticmethod
    def is_id(location: str) -> bool:
        """Whether a text could be a dataset's id: `ORG/NAME`."""
        return _ID.fullmatch(location) is not None

    @property
    def key(self) -> str:
        """The repository and the revision as they were named."""
        return f"{self.repo}@{self.revision}"


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A dataset at a commit: the filesystem, and the path of its `root` there."""

    filesystem: fs.FileSystem
    root: str
    commit: str

    @classmethod
    def open(cls, location: HubLocation, commit: str | None = None) -> HubDataset:
        """The dataset at the commit given, or at the one that its revision is at now.

        Raises:
            CorpusError: it is not there, not open to us, or the Hub cannot be reached.
        """
        from huggingface_hub import HfApi, HfFileSystem

        endpoint = os.environ.get("HF_ENDPOINT")
        if commit is None:
            with hub_errors(location.key):
                info = HfApi(endpoint=endpoint).dataset_info(
                    location.repo, revision=location.revision, timeout=TIMEOUT_S
                )
                commit = str(info.sha)
        handler = fs.FSSpecHandler(HfFileSystem(endpoint=endpoint))
        return cls(fs.PyFileSystem(handler), f"datasets/{location.repo}@{commit}", commit)

    def split_files(self, split: str | None, config: str | None) -> list[fs.FileInfo]:
        """The files of a split, as the dataset's card says, or else as their names do; all splits for None.

        Raises:
            CorpusError: there is no such configuration or split, or several configurations to choose from.
        """
        with hub_errors(self.root):
            infos = self.filesystem.get_file_info(fs.FileSelector(self.root, recursive=True))
        files = {info.path[len(self.root) + 1 :]: info for info in infos if info.type == fs.FileType.File}
        card = self._card() if CARD in files else {}
        files = {name: info for name, info in files.items() if format_of(name) is not None}
        chosen = _configured(card, self.root, config)
        if chosen is None:
            return self._by_names(files, split, config)
        patterns = _patterns(chosen)
        if split is not None and split not in patterns:
            raise CorpusError(f"{self.root} has no split {split}; its card names {', '.join(patterns)}")
        wanted = [pattern for name, own in patterns.items() if split in (None, name) for pattern in own]
        return [info for name, info in sorted(files.items()) if any(glob(one).fullmatch(name) for one in wanted)]

    def _by_names(self, files: Mapping[str, fs.FileInfo], split: str | None, config: str | None) -> list[fs.FileInfo]:
        if config is not None:
            folders = sorted({name.partition("/")[0] for name in files if "/" in name})
            if config not in folders:
                raise CorpusError(
                    f"{self.root} has no configuration {config}; its folders are {', '.join(folders) or 'none'}"
                )
            files = {name: info for name, info in files.items() if name.startswith(f"{config}/")}
        found = [info for name, info in sorted(files.items()) if split is None or is_of_split(name, split)]
        if split is not None and not found:
            there = ", ".join(sorted(splits_of(list(files)))) or "none"
            raise CorpusError(f"{self.root} has no file of the split {split}; there are {there}")
        return found

    def _card(self) -> Mapping[str, Any]:
        """What the YAML at the beginning of the dataset's card says."""
        import yaml

        with hub_errors(self.root), self.filesystem.open_input_stream(f"{self.root}/{CARD}") as stream:
            text = stream.read().decode("utf-8", errors="replace")
        match = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        try:
            card = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            raise CorpusError(f"{self.root}/{CARD}: its YAML cannot be read: {str(error).splitlines()[0]}") from error
        return card if isinstance(card, dict) else {}


def _configured(card: Mapping[str, Any], root: str, config: str | None) -> Mapping[str, Any] | None:
    """The configuration of a card that is meant; None where the card says nothing of files."""
    known = [one for one in card.get("configs") or [] if isinstance(one, dict) and one.get("data_files")]
    names = [str(one.get("config_name", "default")) for one in known]
    if not known:
        return None
    if config is not None and config not in names:
        raise CorpusError(f"{root} has no configuration {config}; its card names {', '.join(names)}")
    if config is None and len(known) > 1:
        defaults = [one for one, name in zip(known, names, strict=True) if one.get("default") or name == "default"]
        if len(defaults) != 1:
            raise CorpusError(f"{root} has several configurations; name one with --config: {', '.join(names)}")
        return defaults[0]
    return known[names.index(config)] if config is not None else known[0]


def _patterns(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """The globs of each split of a configuration, relative to the repository."""
    data_files, folder = config["data_files"], str(config.get("data_dir") or "").strip("/")
    if isinstance(data_files, str) or all(isinstance(one, str) for one in data_files):
        data_files = [{"split": "train", "path": data_files}]
    elif isinstance(data_files, dict):
        data_files = [{"split": name, "path": path} for name, path in data_files.items()]
    found: dict[str, list[str]] = {}
    for entry in data_files:
        paths = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
        found.setdefault(str(entry["split"]), []).extend(f"{folder}/{path}".strip("/") for path in paths)
    return found


def splits_of(names: Sequence[str]) -> Counter[str]:
    """How many names tell that they are of a split, by split."""
    found = Counter[str]()
    for name in names:
        words = [word.lower() for word in _WORDS.findall(name)]
        own = [split for split, known in SPLITS.items() if set(known) & set(words)]
        if len(own) == 1:
            found[own[0]] += 1
    return found


def is_of_split(name: str, split: str) -> bool:
    """Whether a file's name tells that it is of a split: by one of the `SPLITS`' names, or by the split's own, as in
    `train_prefs-00000-of-00001.parquet`."""
    own = re.search(rf"(^|[/._-]){re.escape(split)}([/._-]|$)", name)
    return own is not None or split in splits_of([name])


def glob(pattern: str) -> re.Pattern[str]:
    """The paths that a glob with `*`, `?` and `**` stands for."""
    kinds = {"**/": r"(?:.*/)?", "**": r".*", "*": r"[^/]*", "?": r"[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    return re.compile("".join(kinds.get(part, re.escape(part)) for part in parts))


def pinned_commit(path: str) -> str | None:
    """The commit in a path on the Hub's filesystem."""
    match = _PINNED.match(path)
    return match[1] if match else None


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Errors of the Hub as one line.

    Raises:
        CorpusError: in place of theirs.
    """
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise CorpusError(f"the dataset {what} is gated: accept its terms on the Hub and set HF_TOKEN") from error
    except errors.RepositoryNotFoundError as error:
        raise CorpusError(f"there is no dataset {what} on the Hub, or it is private: set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise CorpusError(f"the dataset {what} has no such revision on the Hub") from error
    except errors.OfflineModeIsEnabled as error:
        raise CorpusError(f"the dataset {what} is on the Hub, and HF_HUB_OFFLINE is set") from error
    except (OSError, errors.HTTPError, pa.ArrowException) as error:  # type: ignore[attr-defined]  # its HTTP library's
        raise CorpusError(f"the dataset {what} cannot be read from the Hub: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
