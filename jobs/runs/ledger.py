"""The output folder: which units are committed, what the run is, and the commit itself."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs
from pydantic import BaseModel

from jobs.corpus.features import described
from jobs.corpus.files import NO_PLAN, Plan, Unit
from jobs.corpus.storage import (
    OBJECT_STORES,
    check_bucket,
    files_at_once,
    identity_of,
    output_filesystem,
    told,
    whole_file,
)
from jobs.errors import OutputError

logger = logging.getLogger(__name__)
Stats = TypeVar("Stats")

WORK = "_rayward_work"
MANIFEST = "_manifest.json"
PLAN = "_plan.json"
"""The input as it was planned, so that a restart need not read it to see how it is cut into units."""
# Entries of an identity that are paths or URIs.
LOCATIONS = ("input", "prompts")
STATS_KEY = b"rayward.stats"


@dataclass(frozen=True, slots=True)
class UnitStats:
    """Counts of one or more committed units.

    Of `rows` input rows `errors` have no score; `left_out` were kept out of the output because that was asked for.
    `tokens` were scored in `seconds`, summed over actors. `counts` holds what a job counts beside; `added_rows` in it
    are those that the output has over the input's. `processors` are the kinds that scores were computed on.
    """

    rows: int = 0
    errors: int = 0
    tokens: int = 0
    seconds: float = 0.0
    left_out: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)
    processors: Sequence[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "processors", tuple(self.processors))  # a list in JSON

    def __add__(self, other: UnitStats) -> UnitStats:
        names = [*self.counts, *(name for name in other.counts if name not in self.counts)]
        return UnitStats(
            self.rows + other.rows,
            self.errors + other.errors,
            self.tokens + other.tokens,
            self.seconds + other.seconds,
            self.left_out + other.left_out,
            {name: self.counts.get(name, 0) + other.counts.get(name, 0) for name in names},
            sorted({*self.processors, *other.processors}),
        )

    @property
    def computed_tokens(self) -> int:
        """Tokens that a model read for it: those of scores that were there before are not among them."""
        return self.tokens - self.counts.get("tokens_not_computed", 0)

    @property
    def written(self) -> int:
        """Rows of the output."""
        return self.rows - self.left_out + self.counts.get("added_rows", 0)

    def figures(self) -> dict[str, Any]:
        """All counts by name, as a manifest has them."""
        own = {"rows": self.rows, "errors": self.errors, "tokens": self.tokens, "seconds": self.seconds}
        return own | dict(self.counts)


class Ledger:
    """The output folder of one run, named by its id. It travels to the workers that commit.

    Args:
        output: its path or URI.

    Raises:
        OutputError: it is no location, or is in a bucket that is not there or not open to us.
    """

    def __init__(self, output: str) -> None:
        self.filesystem, self.folder = output_filesystem(output)
        check_bucket(self.filesystem, self.folder)
        self.run = uuid.uuid4().hex

    @property
    def location(self) -> str:
        """The output folder as a user writes it."""
        return told(self.filesystem, self.folder)

    @property
    def manifest_path(self) -> str:
        return f"{self.folder}/{MANIFEST}"

    @property
    def work_folder(self) -> str:
        return f"{self.folder}/{WORK}/{self.run}"

    def path(self, unit: Unit) -> str:
        return f"{self.folder}/part-{unit.id}.parquet"

    def check(self, identity: Mapping[str, Any], units: Sequence[Unit]) -> dict[str, UnitStats]:
        """The units that are done, by id. Nothing is written.

        Args:
            identity: what decides the output; it must be that of the run which began the folder.
            units: the units of today's input.

        Raises:
            OutputError: the folder holds unit files of no run, of one with another identity, or of inputs that changed.
        """
        self._check_identity(identity)
        return self.done(units)

    def check_files(self, identity: Mapping[str, Any], paths: Sequence[str]) -> None:
        """Like `check`, for a run whose unit files have the given paths.

        Raises:
            OutputError: the folder holds unit files of no run or of one with another identity, or other unit files.
        """
        self._check_identity(identity)
        if strays := sorted(set(self._file_paths()) - set(paths)):
            stray = told(self.filesystem, strays[0])
            raise OutputError(
                f"{self.location} holds unit files of another run, such as {stray}; choose another --output"
            )

    def _check_identity(self, identity: Mapping[str, Any]) -> None:
        previous = self.read_manifest()
        if previous is None and (strays := self._file_paths()):
            raise OutputError(
                f"{self.location} holds {len(strays)} unit files but no {MANIFEST}; choose another --output"
            )
        if previous is not None:
            _refuse_other(previous["identity"], identity, self.location)

    def plan(self) -> Plan:
        """The plan of the run that began the folder: an empty one for a new folder, and for one of an earlier version,
        whose files do not share units.

        Raises:
            OutputError: it cannot be read.
        """
        path = f"{self.folder}/{PLAN}"
        try:
            with self.filesystem.open_input_stream(path) as file:
                return Plan.read(file.read())
        except FileNotFoundError:
            return Plan({}, None) if self.read_manifest() else NO_PLAN
        except (OSError, ValueError) as error:
            raise OutputError(
                f"{told(self.filesystem, path)}, which says how the input is cut into units, cannot be read: {error}"
            ) from error

    def begin(self, manifest: Mapping[str, Any], plan: Plan | None = None) -> None:
        """Make the folder, or take it over from the run before, and write the manifest and the plan.

        Raises:
            OutputError: it cannot be written.
        """
        previous = self.read_manifest() or {}
        try:
            if stale := previous.get("run"):
                self.filesystem.delete_dir_contents(f"{self.folder}/{WORK}/{stale}", missing_dir_ok=True)
                self.filesystem.delete_dir(f"{self.folder}/{WORK}/{stale}")
        except OSError:
            pass  # it was not there, or cannot go; the next lines say so where that matters
        try:
            self.filesystem.create_dir(self.work_folder, recursive=True)
        except OSError as error:
            raise OutputError(f"the output folder {self.location} cannot be written: {error}") from error
        if plan is not None:
            self._put(f"{self.folder}/{PLAN}", plan.text().encode())
        self._put(self.manifest_path, self._manifest_bytes(manifest))

    def read_manifest(self) -> dict[str, Any] | None:
        """The manifest of the run that began the folder, or None where there is none."""
        where = told(self.filesystem, self.manifest_path)
        try:
            with self.filesystem.open_input_stream(self.manifest_path) as file:
                manifest = json.loads(file.read())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise OutputError(f"{where} cannot be read: {error}") from error
        if not isinstance(manifest, dict) or not isinstance(manifest.get("identity"), dict):
            raise OutputError(f"{where} is not a manifest of rayward; choose another --output")
        return manifest

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replace the manifest; it gets this run's id.

        Raises:
            OutputError: it cannot be written, for example because another job has taken the folder over.
        """
        self.write(self.manifest_path, self._manifest_bytes(manifest))

    def _manifest_bytes(self, manifest: Mapping[str, Any]) -> bytes:
        return json.dumps({"run": self.run, **manifest}, indent=2).encode()

    def done(self, units: Sequence[Unit]) -> dict[str, UnitStats]:
        """The units, by id, whose files are there whole, for as many rows as planned.

        Raises:
            OutputError: a unit file belongs to no unit: its input file changed or went, so its rows would stand in the
                output beside those of today's input.
        """
        planned = {self.path(unit): unit for unit in units}
        files = self._file_paths()
        if strays := sorted(set(files) - planned.keys()):
            raise OutputError(
                f"{len(strays)} unit files in {self.location} come from input files that have changed or gone since, "
                f"for one {strays[0].rpartition('/')[2]}; choose another --output, or restore the input"
            )
        with ThreadPoolExecutor(files_at_once(self.filesystem)) as pool:
            stats = list(pool.map(self._stats, files))
        found = zip((planned[file] for file in files), stats, strict=True)
        return {unit.id: stat for unit, stat in found if stat is not None and stat.rows == unit.num_rows}

    def commit(self, unit: Unit, table: pa.Table, stats: UnitStats) -> None:
        """Write a unit file: whole under its final name, or not at all.

        Raises:
            OutputError: it cannot be written, or does not have the number of rows that it should.
        """
        if stats.rows != unit.num_rows or table.num_rows != stats.written:
            raise OutputError(
                f"unit {unit.id} has {unit.num_rows} rows but {stats.rows} came back, in a table of {table.num_rows} "
                f"rows where {stats.written} are counted"
            )
        self.commit_file(self.path(unit), table, stats)

    def commit_file(self, path: str, table: pa.Table, stats: Any) -> None:
        """Write a unit file, with its counts (a dataclass) in the footer: whole under its final name, or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        metadata = described(table.schema)
        metadata[STATS_KEY] = json.dumps(dataclasses.asdict(stats)).encode()
        sink = pa.BufferOutputStream()
        pq.write_table(table.replace_schema_metadata(metadata), sink)
        self.write(path, sink.getvalue())

    def stop(self, manifest: Mapping[str, Any]) -> None:
        """Like `finish`, but after a failure, which stays the one reported; another run's work is left alone."""
        try:
            if (self.read_manifest() or {}).get("run") == self.run:
                self.finish(manifest)
        except OutputError as error:
            logger.warning("the manifest does not say that the job stopped: %s", error)

    def finish(self, manifest: Mapping[str, Any]) -> None:
        """Write the closing manifest and take the working folder away."""
        self.write_manifest(manifest)
        try:
            self.filesystem.delete_dir(self.work_folder)
            selector = fs.FileSelector(f"{self.folder}/{WORK}", allow_not_found=True)
            if not self.filesystem.get_file_info(selector):
                self.filesystem.delete_dir(f"{self.folder}/{WORK}")
        except OSError as error:
            logger.warning("the working folder %s stays: %s", self.work_folder, error)

    def write(self, path: str, content: bytes | pa.Buffer) -> None:
        """Write a file of the output folder: whole under its name, or not at all.

        Raises:
            OutputError: it cannot be written, for example because another job has taken the folder over.
        """
        # A store does not tell that a folder, which is a name there, was taken away; the manifest does.
        if (self.read_manifest() or {}).get("run", self.run) != self.run:
            raise self._taken_over
        self._put(path, content)

    def _put(self, path: str, content: bytes | pa.Buffer) -> None:
        try:
            with whole_file(self.filesystem, path, scratch=self.work_folder) as file:
                file.write(content)
        except OSError as error:
            if self._work_is_gone():
                raise self._taken_over from error
            raise OutputError(f"{told(self.filesystem, path)} cannot be written: {error}") from error

    @property
    def _taken_over(self) -> OutputError:
        return OutputError(f"another job has taken over {self.location}; this one stops")

    def _work_is_gone(self) -> bool:
        if self.filesystem.type_name in OBJECT_STORES:
            return False
        return bool(self.filesystem.get_file_info(self.work_folder).type == fs.FileType.NotFound)

    def _file_paths(self) -> list[str]:
        infos = self.filesystem.get_file_info(fs.FileSelector(self.folder, allow_not_found=True))
        return sorted(
            info.path for info in infos if info.base_name.startswith("part-") and info.base_name.endswith(".parquet")
        )

    def file_stats(self, path: str, kind: type[Stats]) -> tuple[Stats, int] | None:
        """Counts in the footer of the unit file at `path`, and its rows; None where `commit_file` wrote none."""
        try:
            with self.filesystem.open_input_file(path) as source:
                footer = pq.read_metadata(source)
            return kind(**json.loads(footer.metadata[STATS_KEY])), footer.num_rows
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
            return None

    def _stats(self, path: str) -> UnitStats | None:
        found = self.file_stats(path, UnitStats)
        return found[0] if found is not None and found[0].written == found[1] else None


def _refuse_other(previous: Mapping[str, Any], identity: Mapping[str, Any], folder: str) -> None:
    previous, identity = _located(previous), _located(identity)
    keys = [*identity, *(key for key in previous if key not in identity)]
    differing = [key for key in keys if previous.get(key) != identity.get(key)]
    if differing:
        lines = [f"  {key}: {previous.get(key)!r} there, {identity.get(key)!r} now" for key in differing]
        raise OutputError(
            f"{folder} holds the work of a run with other settings:\n" + "\n".join(lines) + "\n"
            "Restart with the settings there, or choose another --output."
        )


def _located(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity with its locations in today's form, which earlier versions wrote as they were given."""
    located = {key: value for key, value in identity.items() if key in LOCATIONS and isinstance(value, str)}
    return {**identity, **{key: identity_of(value) if "://" in value else value for key, value in located.items()}}


@contextmanager
def recorded(
    ledger: Ledger,
    *,
    identity: Mapping[str, Any],
    arguments: BaseModel,
    plan: Plan | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Iterator[dict[str, Any]]:
    """Take the output folder over for a run; what the run puts into the dictionary ends up in the manifest.

    Args:
        ledger: the output folder.
        identity: what decides the output; a restart must have the same.
        arguments: the options as they were given.
        plan: how the input is cut into units, for a restart.
        facts: what else is known when the run begins, such as its model.

    Raises:
        OutputError: the folder cannot be written.
    """
    manifest = {
        "identity": dict(identity),
        "status": "running",
        "arguments": arguments.model_dump(),
        **(facts or {}),
        "versions": {name: _version(name) for name in ("rayward", "ray", "torch", "transformers")},
    }
    ledger.begin(manifest, plan)
    started = time.monotonic()
    results: dict[str, Any] = {}
    try:
        yield results
    except BaseException as error:
        ledger.stop(manifest | {"status": "stopped", "reason": f"{type(error).__name__}: {error}"})
        raise
    results["elapsed_s"] = round(time.monotonic() - started, 3)
    ledger.finish(manifest | {"status": "complete"} | results)


def is_complete(ledger: Ledger) -> bool:
    """Whether the run that wrote the manifest came to its end."""
    return (ledger.read_manifest() or {}).get("status") == "complete"


def _version(package: str) -> str | None:
    """The version that is installed; None for rayward where it runs from its sources."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
