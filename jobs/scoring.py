"""A corpus scored into a folder: planned, run, taken up again. `score.py` is this alone; other jobs begin with it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from cluster.connect import ClusterResources
from jobs.actors import ActorPool, plan_actors
from jobs.columns import columns_of
from jobs.corpus import Corpus, Unit, auto_rows_per_unit, identity_of
from jobs.errors import TooManyErrorsError
from jobs.ledger import Ledger, UnitStats
from jobs.manifest import is_complete, recorded
from jobs.model_source import ModelSource
from jobs.options import ScoringOptions
from jobs.pipeline import run_units
from jobs.progress import Progress, clock
from jobs.scorer import UnitScorer
from jobs.system_prompt import SystemPrompt
from serve_app.reward_model import RewardModel
from serve_app.reward_model.tiny import NAME as TINY

__all__ = ["ScoringRun"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is there, what is left, and what a restart must have in common with this run."""

    units: list[Unit]
    done: dict[str, UnitStats]
    model: ModelSource
    pool: ActorPool
    identity: dict[str, Any]

    @property
    def left(self) -> list[Unit]:
        return [unit for unit in self.units if unit.id not in self.done]


class ScoringRun:
    """One run of scoring `source` into `output`; mistakes in either show when it is made, before Ray starts.

    Args:
        options: the model, the columns, the actors.
        source: the input: a file, folder, glob or URI.
        output: the folder of scored parts; `jobs/ledger.py` says what is in it.
        prefix: put in front of the names of the four score columns.
        load: makes the model on a worker.

    Raises:
        CorpusError: the input is not there, or has no conversations.
    """

    def __init__(
        self,
        options: ScoringOptions,
        *,
        source: str,
        output: str,
        prefix: str = "",
        load: Callable[[ModelSource], RewardModel] = ModelSource.load,
    ) -> None:
        self._options = options
        self._source, self._output, self._prefix, self._load = source, output, prefix, load
        self._system_prompt = SystemPrompt.of(
            options.system_prompt, options.system_prompt_column, replaces=options.replace_system_prompt
        )
        self._ledger = Ledger(output)
        self._corpus = Corpus.open(source, output=output)
        self._columns = columns_of(
            self._corpus, options.columns, output_prefix=prefix, system_prompt_column=options.system_prompt_column
        )
        self.summary = ""

    def run(self, resources: ClusterResources) -> UnitStats:
        """Score what is left on the connected Ray; the counts of the whole output. `summary` tells of it afterwards.

        Raises:
            RaywardError: the job cannot start, or stops; what is committed stays.
        """
        plan = self._plan(resources)
        self._announce(plan)
        if not plan.left and is_complete(self._ledger):
            return self._score(plan)
        with recorded(self._ledger, identity=plan.identity, arguments=self._options) as results:
            total = self._score(plan)
            results |= {"units": len(plan.units), **asdict(total)}
        return total

    def _score(self, plan: _Plan) -> UnitStats:
        make_scorer = partial(
            UnitScorer,
            partial(self._load, plan.model),
            self._ledger,
            columns=self._columns,
            system_prompt=self._system_prompt,
            truncation=self._options.truncation,
            max_tokens=self._options.max_tokens,
            prefix=self._prefix,
        )
        done = sum(plan.done.values(), UnitStats())
        with Progress(num_rows=self._corpus.num_rows, done=done) as progress:
            self._check_errors(done)
            if plan.left:
                reports = run_units(
                    plan.left,
                    filesystem=self._corpus.filesystem,
                    ledger=self._ledger,
                    make_scorer=make_scorer,
                    pool=plan.pool,
                )
                for report in reports:
                    progress.add(report.stats)
                    self._check_errors(progress.total)
        self.summary = _summary(self._output, progress)
        return progress.total

    def _check_errors(self, total: UnitStats) -> None:
        allowed = self._options.max_errors
        if allowed is not None and total.errors > allowed:
            raise TooManyErrorsError(
                f"{total.errors} rows failed, --max-errors allows {allowed}; their reasons are in the column "
                f"{self._prefix}error of {self._output}"
            )

    def _plan(self, resources: ClusterResources) -> _Plan:
        options = self._options
        model = ModelSource.of(options, resources)
        previous = self._ledger.read_manifest() or {}
        rows_per_unit = options.rows_per_unit or previous.get("identity", {}).get("rows_per_unit")
        if not isinstance(rows_per_unit, int):
            rows_per_unit = auto_rows_per_unit(self._corpus.num_rows)
        units = self._corpus.units(rows_per_unit)
        identity = {
            "input": identity_of(self._source),
            "model_fingerprint": model.fingerprint,
            "device": model.device,
            "dtype": model.dtype,
            "truncation": options.truncation,
            "max_tokens": options.max_tokens,
            "columns": asdict(self._columns),
            "output_prefix": self._prefix,
            "rows_per_unit": rows_per_unit,
        }
        if self._system_prompt != SystemPrompt():
            identity["system_prompt"] = asdict(self._system_prompt)
        pool = plan_actors(
            resources,
            device=model.device,
            num_actors=options.num_actors,
            cpus_per_actor=options.cpus_per_actor,
            gpus_per_actor=options.gpus_per_actor,
        )
        return _Plan(units, self._ledger.check(identity, units), model, pool, identity)

    def _announce(self, plan: _Plan) -> None:
        name = self._options.model or TINY
        if name == TINY:
            logger.warning("the model is tiny: random weights, its scores mean nothing; name a real one with --model")
        logger.info(
            "%s rows, files: %d, units left: %d of %d; %s on %s in %s, actors: %d",
            f"{self._corpus.num_rows:,}",
            len(self._corpus.files),
            len(plan.left),
            len(plan.units),
            name,
            plan.model.device,
            plan.model.dtype,
            plan.pool.num_actors,
        )


def _summary(output: str, progress: Progress) -> str:
    total, new = progress.total, progress.stats
    before = f" ({total.rows - new.rows:,} of them before)" if total.rows > new.rows else ""
    return (
        f"{total.rows:,} rows in {output}{before}: {total.rows - total.errors:,} scored, {total.errors:,} with "
        f"errors, {total.tokens:,} tokens; this run {new.rows:,} rows in {clock(progress.seconds)}, "
        f"{progress.tokens_per_s:,.0f} tokens/s with start-up"
    )
