"""Units of a corpus through stages of actors into an output folder: begun, resumed, watched and closed."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TextIO

from pydantic import BaseModel
from tqdm import tqdm

from jobs.corpus.files import Corpus, Plan, Unit
from jobs.errors import TooManyErrorsError
from jobs.runs.ledger import Ledger, UnitStats, is_complete, recorded
from jobs.runs.pipeline import Stage, run_units

logger = logging.getLogger(__name__)
LOG_EVERY_S = 10.0


class Progress:
    """Counts rows, tokens and errors of a run, and shows them until it is left."""

    def __init__(self, *, num_rows: int, done: UnitStats, stream: TextIO = sys.stderr) -> None:
        self.stats = UnitStats()
        self._num_rows = num_rows
        self._done = done
        self._started = time.monotonic()
        self._bar = tqdm(
            total=num_rows,
            initial=done.rows,
            unit="row",
            file=stream,
            dynamic_ncols=True,
            disable=not stream.isatty(),
            smoothing=0.1,
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._log_now_and_then, daemon=True)

    def __enter__(self) -> Progress:
        if self._bar.disable:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._bar.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def total(self) -> UnitStats:
        """This run's counts and those of the runs before it."""
        return self._done + self.stats

    def add(self, stats: UnitStats) -> None:
        self.stats += stats
        self._bar.set_postfix_str(f"{self._rate}, {self.total.errors} errors", refresh=False)
        self._bar.update(stats.rows)

    @property
    def tokens_per_s(self) -> float:
        return self.stats.tokens / max(self.seconds, 1e-9)

    @property
    def _rate(self) -> str:
        if self.stats.tokens:
            return f"{self.tokens_per_s:,.0f} tokens/s"
        return f"{self.stats.rows / max(self.seconds, 1e-9):,.0f} rows/s"

    def line(self) -> str:
        """One line: rows, tokens or rows per second, errors and the time left."""
        rows = self.stats.rows
        left = self._num_rows - self.total.rows
        remaining = clock(left * self.seconds / rows) if rows else "?"
        done = f"{self.total.rows:,} of {self._num_rows:,} rows"
        return f"{done}, {self._rate}, {self.total.errors} errors, {remaining} left"

    def _log_now_and_then(self) -> None:
        while not self._stop.wait(LOG_EVERY_S):
            logger.info(self.line())


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass(frozen=True, slots=True)
class UnitRun:
    """Work of a job: its units, those that are done by id, and what a restart must have in common with it.

    `plan` is what a restart need not find out again. `arguments` and `facts`, such as the model, are for the manifest
    alone; `error_column` is where the reasons are, which `max_errors` counts.
    """

    ledger: Ledger
    corpus: Corpus
    units: list[Unit]
    done: dict[str, UnitStats]
    identity: dict[str, Any]
    arguments: BaseModel
    plan: Plan
    max_errors: int | None
    error_column: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> list[Unit]:
        return [unit for unit in self.units if unit.id not in self.done]

    def run(self, stages: Sequence[Stage]) -> Progress:
        """Pass what is left through the stages on the connected Ray, and commit it; the counts, of this run and in all.

        Raises:
            RaywardError: the job cannot start, or stops; what is committed stays.
        """
        if not self.left and is_complete(self.ledger):
            return self._work(stages)
        with recorded(
            self.ledger, identity=self.identity, arguments=self.arguments, plan=self.plan, facts=self.facts
        ) as results:
            progress = self._work(stages)
            results |= {"units": len(self.units), **progress.total.figures()}
        return progress

    def _work(self, stages: Sequence[Stage]) -> Progress:
        done = sum(self.done.values(), UnitStats())
        with Progress(num_rows=sum(unit.num_rows for unit in self.units), done=done) as progress:
            self._check_errors(done)
            if self.left:
                reports = run_units(self.left, filesystem=self.corpus.filesystem, ledger=self.ledger, stages=stages)
                for report in reports:
                    progress.add(report.stats)
                    self._check_errors(progress.total)
        return progress

    def _check_errors(self, total: UnitStats) -> None:
        if self.max_errors is not None and total.errors > self.max_errors:
            raise TooManyErrorsError(
                f"{total.errors} rows failed, --max-errors allows {self.max_errors}; their reasons are in the column "
                f"{self.error_column} of {self.ledger.location}"
            )


def rows_per_unit_of(ledger: Ledger, chosen: int | None, *, default: int) -> int:
    """The unit size: the one `chosen`, else that of the run which began the folder, else the `default`."""
    before = (ledger.read_manifest() or {}).get("identity", {}).get("rows_per_unit")
    return chosen or (before if isinstance(before, int) else default)
