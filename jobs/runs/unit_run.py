"""Units of a corpus through stages of actors into an output folder: begun, resumed and closed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from jobs.corpus.files import Corpus, Plan, Unit
from jobs.errors import TooManyErrorsError
from jobs.runs.ledger import Ledger, UnitStats, is_complete, recorded
from jobs.runs.pipeline import Stage, run_units
from jobs.runs.progress import Progress, ProgressStyle

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class UnitRun:
    """Work of a job: its units, those that are done by id, and what a restart must have in common with it.

    `plan` is what a restart need not find out again. `arguments` and `facts`, such as the model, are for the manifest
    alone; `error_column` is where the reasons are, which `max_errors` counts. `reused_processors` are
    the kinds of processors whose scores may be reused.
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
    progress: ProgressStyle = "auto"
    reused_processors: frozenset[str] = frozenset()

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
            results["processors"] = list(progress.total.processors)
        return progress

    def _work(self, stages: Sequence[Stage]) -> Progress:
        done = sum(self.done.values(), UnitStats())
        with Progress(
            num_rows=sum(unit.num_rows for unit in self.units),
            done=done,
            run=self.ledger.run,
            num_units=len(self.left),
            style=self.progress,
        ) as progress:
            watch = _ProcessorWatch(self.reused_processors)
            watch(progress)
            self._check_errors(done)
            if self.left:
                reports = run_units(self.left, filesystem=self.corpus.filesystem, ledger=self.ledger, stages=stages)
                for report in reports:
                    progress.add(report.stats)
                    watch(progress)
                    self._check_errors(progress.total)
        return progress

    def _check_errors(self, total: UnitStats) -> None:
        if self.max_errors is not None and total.errors > self.max_errors:
            raise TooManyErrorsError(
                f"{total.errors} rows failed, --max-errors allows {self.max_errors}; their reasons are in the column "
                f"{self.error_column} of {self.ledger.location}"
            )


class _ProcessorWatch:
    """Warns of what a job's processors mean for its scores, once, as soon as its units tell.

    `reused` are the kinds of processors whose scores may be reused; empty where none are, or they are not known.
    """

    def __init__(self, reused: frozenset[str]) -> None:
        self._reused = reused
        self._told: set[str] = set()

    def __call__(self, progress: Progress) -> None:
        every, own = progress.total.processors, progress.stats.processors
        if len(every) > 1:
            what = "the output has scores of several kinds of processors, which may differ in the last bits"
            self._warn(what, ", ".join(every))
        if own and self._reused and self._reused.isdisjoint(own):
            told = f"{', '.join(sorted(self._reused))} there, {', '.join(own)} here"
            self._warn("--reuse has scores of other kinds of processors alone, so that all are computed again", told)

    def _warn(self, what: str, which: str) -> None:
        if what not in self._told:
            self._told.add(what)
            logger.warning("%s: %s", what, which)


def rows_per_unit_of(ledger: Ledger, chosen: int | None, *, default: int) -> int:
    """The unit size: the one `chosen`, else that of the run which began the folder, else the `default`."""
    before = (ledger.read_manifest() or {}).get("identity", {}).get("rows_per_unit")
    return chosen or (before if isinstance(before, int) else default)
