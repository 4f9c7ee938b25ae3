"""Attempts at units of which some rows kill a process: found by halving, over as many lives of it as that takes.

The process, which scores or generates, notes in a small file what it is about to do. When it dies (a crash, the
kernel's or Ray's out-of-memory killer), Ray starts it again with the same unit; it finds its note, and knows which
range of rows it died on. That range is cut in two; a single row on which it died twice is given up. No death is
counted against a row unless that row was alone.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pyarrow import fs

from jobs.corpus.files import Unit
from jobs.errors import JobError, ScorerError
from jobs.runs.ledger import Ledger
from jobs.runs.notes import note

M = TypeVar("M")
R = TypeVar("R")

ROW_STRIKES = 2
TELL_EVERY_S = 1.0
MAX_LOAD_DEATHS = 3
MAX_UNIT_DEATHS = 100


@dataclass(slots=True)
class Attempts:
    """Attempts at one unit: `ranges` of rows to score, the `current` one, rows given up, and deaths so far."""

    ranges: list[tuple[int, int]]
    current: int | None = None
    loading: bool = False
    load_deaths: int = 0
    deaths: int = 0
    strikes: dict[int, int] = field(default_factory=dict)
    given_up: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, num_rows: int) -> Attempts:
        return cls(ranges=[(0, num_rows)] if num_rows else [])

    def after_death(self, work: str = "scoring", error: type[JobError] = ScorerError) -> Attempts:
        """The next attempts, when the process died doing what is noted here.

        Raises:
            JobError: of the class `error`: it dies while loading the model, or died too often on this unit for rows
                to be the cause. `work` is what the message calls the process.
        """
        if self.loading:
            self.load_deaths += 1
            if self.load_deaths >= MAX_LOAD_DEATHS:
                raise error(
                    f"the {work} process died {self.load_deaths} times while loading the model; "
                    "it probably needs more memory than there is"
                )
        elif self.current is not None:
            self.deaths += 1
            if self.deaths >= MAX_UNIT_DEATHS:
                raise error(f"the {work} process died {self.deaths} times on one unit; rows alone are not why")
            self._suspect(self.current)
        self.current, self.loading = None, False
        return self

    def _suspect(self, index: int) -> None:
        first, stop = self.ranges[index]
        middle = (first + stop) // 2
        if stop - first > 1:
            self.ranges[index : index + 1] = [(first, middle), (middle, stop)]
            return
        self.strikes[first] = self.strikes.get(first, 0) + 1
        if self.strikes[first] >= ROW_STRIKES:
            self.given_up.append(first)
            del self.ranges[index]


class AttemptLog:
    """The note of one unit, as a file in the run's working folder: notes of an earlier, killed run do not count."""

    def __init__(self, ledger: Ledger, unit: Unit, work: str = "scoring") -> None:
        self._ledger = ledger
        self._path = f"{ledger.work_folder}/{unit.id}.{work}.json"

    def read(self) -> Attempts | None:
        """The note of the process before this one, or None where there was none."""
        try:
            with self._ledger.filesystem.open_input_stream(self._path) as file:
                noted = json.loads(file.read())
        except (FileNotFoundError, ValueError):
            return None
        noted["ranges"] = [(first, stop) for first, stop in noted["ranges"]]
        noted["strikes"] = {int(row): strikes for row, strikes in noted["strikes"].items()}
        return Attempts(**noted)

    def write(self, attempts: Attempts) -> None:
        self._ledger.write(self._path, json.dumps(dataclasses.asdict(attempts)).encode())

    def remove(self) -> None:
        if self._ledger.filesystem.get_file_info(self._path).type == fs.FileType.File:
            self._ledger.filesystem.delete_file(self._path)


@dataclass(frozen=True, slots=True)
class UnitAttempt(Generic[M]):
    """One unit in the hands of a loaded model."""

    model: M
    num_rows: int
    _attempts: Attempts
    _log: AttemptLog
    guard: GuardedModel[M]

    def results(self, work: Callable[[M, int, int], Sequence[R]], *, given_up: Callable[[int], R]) -> list[R]:
        """One result a row, in row order.

        Args:
            work: called with the model and a range of rows (first, stop); what is about to be touched is noted before.
            given_up: makes the result of a row on which the process died alone, from the number of times it did.
        """
        found = {row: given_up(self._attempts.strikes[row]) for row in self._attempts.given_up}
        for index, (first, stop) in enumerate(self._attempts.ranges):
            self._attempts.current = index
            self._log.write(self._attempts)
            found |= enumerate(work(self.model, first, stop), start=first)
        self._log.remove()
        self.guard.end(self.num_rows)
        return [found[row] for row in range(self.num_rows)]


class GuardedModel(Generic[M]):
    """A model whose process may die on some rows. Units may be begun from several threads.

    Args:
        load: makes the model. It runs with the first unit, inside that unit's attempt, so that a process which dies
            while loading is noticed like one that dies at work.
        ledger: where deaths are noted.
        work: what the process does, in one word, for messages and the names of notes.
        error: raised when the process keeps dying.
    """

    def __init__(
        self, load: Callable[[], M], ledger: Ledger, *, work: str = "scoring", error: type[JobError] = ScorerError
    ) -> None:
        self._load = load
        self._model: M | None = None
        self._loading = threading.Lock()
        self._ledger = ledger
        self._work = work
        self._error = error
        self._num_units = self._num_rows = self._num_tokens = 0
        self._told: dict[str, float] = {}
        self._told_at = 0.0

    def begin(self, unit: Unit, num_rows: int) -> UnitAttempt[M]:
        """The unit with what earlier lives of the process learnt of it, and the model, loaded.

        Raises:
            JobError: of the class given: the process keeps dying.
            RaywardError: the model cannot be loaded.
        """
        log = AttemptLog(self._ledger, unit, self._work)
        noted = log.read()
        attempts = noted.after_death(self._work, self._error) if noted else Attempts.of(num_rows)
        with self._loading:
            if self._model is None:
                attempts.loading = True
                log.write(attempts)
                started = time.monotonic()
                self._model = self._load()
                self._told = {"loaded_at": time.time(), "load_s": time.monotonic() - started}
                self._tell()
                attempts.loading = False
            return UnitAttempt(self._model, num_rows, attempts, log, self)

    def end(self, num_rows: int) -> None:
        """Count a unit of so many rows that is worked through."""
        with self._loading:
            self._num_units += 1
            self._num_rows += num_rows
            self._tell()

    def tell_inside(self, num_rows: float, num_tokens: int) -> None:
        """Tell, now and then, how many rows of a unit are worked through, and count the tokens that were read since."""
        self._num_tokens += num_tokens
        if time.monotonic() - self._told_at > TELL_EVERY_S:
            self._tell(num_rows)

    def _tell(self, num_rows: float = 0.0) -> None:
        self._told_at = time.monotonic()
        rows = self._num_rows + num_rows
        counted = {"units": self._num_units, "rows": rows, "tokens": self._num_tokens}
        note(self._ledger.run, work=self._work, **counted, **self._told)
