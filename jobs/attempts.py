"""Which rows of a unit kill the scorer: found by halving, over as many lives of the scoring process as it takes.

The scorer notes in a small file what it is about to do. When its process dies (a crash, the kernel's or Ray's
out-of-memory killer), Ray starts it again with the same unit; it finds its note, and knows which range of rows it died
on. That range is cut in two; a single row on which it died twice is given up. No death is counted against a row
unless that row was alone.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

from pyarrow import fs

from jobs.corpus import Unit
from jobs.errors import ScorerError
from jobs.ledger import Ledger

__all__ = ["AttemptLog", "Attempts"]

ROW_STRIKES = 2
MAX_LOAD_DEATHS = 3
MAX_UNIT_DEATHS = 100


@dataclass(slots=True)
class Attempts:
    """What is known of one unit: `ranges` of rows to score, the `current` one, rows given up, and deaths so far."""

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

    def after_death(self) -> Attempts:
        """What to do next, when the process died doing what is noted here.

        Raises:
            ScorerError: it dies while loading the model, or died too often on this unit for rows to be the cause.
        """
        if self.loading:
            self.load_deaths += 1
            if self.load_deaths >= MAX_LOAD_DEATHS:
                raise ScorerError(
                    f"the scoring process died {self.load_deaths} times while loading the model; "
                    "it probably needs more memory than there is"
                )
        elif self.current is not None:
            self.deaths += 1
            if self.deaths >= MAX_UNIT_DEATHS:
                raise ScorerError(f"the scoring process died {self.deaths} times on one unit; rows alone are not why")
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

    def __init__(self, ledger: Ledger, unit: Unit) -> None:
        self._ledger = ledger
        self._path = f"{ledger.work_folder}/{unit.id}.json"

    def read(self) -> Attempts | None:
        """What the process before this one noted, or None where there was none."""
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
