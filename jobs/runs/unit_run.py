"""Units of a corpus through stages of actors into an output folder: begun, resumed and closed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from jobs.corpus.files import Corpus, Plan, Unit
from jobs.errors import TooManyErrorsError
from jobs.runs.ledger import Ledger, UnitStats, is_complete, recorded
from jobs.runs.pipeline import Stage, run_units
from jobs.runs.progress import Progress, ProgressStyle


@dataclass(frozen=True, slots=True)
class UnitRun:
    """Work of a job: its units, those that are done by id, and what a restart must have in common with it.

    `plan` is what a restart need not find out again. `arguments` and `facts`, such as the model, are for the manifest
    alone; `error_column` is where the reasons are, which `max_errors` counts. `watch` is called with the counts of the
    whole output, at the beginning and after each unit.
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
    watch: Callable[[UnitStats], None] | None = None

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
        with Progress(
            num_rows=sum(unit.num_rows for unit in self.units),
            done=done,
            run=self.ledger.run,
            num_units=len(self.left),
            style=self.progress,
        ) as progress:
            self._check(done)
            if self.left:
                reports = run_units(self.left, filesystem=self.corpus.filesystem, ledger=self.ledger, stages=stages)
                for report in reports:
                    progress.add(report.stats)
                    self._check(progress.total)
        return progress

    def _check(self, total: UnitStats) -> None:
        if self.watch is not None:
            self.watch(total)
        if self.max_errors is not None and total.errors > self.max_errors:
            raise TooManyErrorsError(
                f"{total.errors} rows failed, --max-errors allows {self.max_errors}; their reasons are in the column "
                f"{self.error_column} of {self.ledger.location}"
            )


def rows_per_unit_of(ledger: Ledger, chosen: int | None, *, default: int) -> int:
    """The unit size: the one `chosen`, else that of the run which began the folder, else the `default`."""
    before = (ledger.read_manifest() or {}).get("identity", {}).get("rows_per_unit")
    return chosen or (before if isinstance(before, int) else default)
