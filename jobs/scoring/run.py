"""A corpus scored into a folder: planned, run, resumed. `score.py` is this alone; other jobs begin with it."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from cluster.connect import ClusterResources
from jobs.command import command_began
from jobs.corpus.candidates import CandidateColumns
from jobs.corpus.conversations import ConversationColumns, SystemPrompt
from jobs.corpus.files import Corpus, Plan, auto_rows_per_unit, sampled
from jobs.corpus.preferences import PreferenceColumns
from jobs.corpus.readings import Reading, check_output, columns_of, conversation_columns
from jobs.corpus.sources import Source
from jobs.corpus.stepped import StepColumns, step_columns
from jobs.errors import CorpusError
from jobs.options import ScoringOptions
from jobs.runs.ledger import Ledger, UnitStats
from jobs.runs.pipeline import Stage
from jobs.runs.placement import ActorPool, plan_actors, shortage, split_actors
from jobs.runs.progress import Progress, clock
from jobs.runs.unit_run import UnitRun, rows_per_unit_of
from jobs.scoring.candidate_stage import CANDIDATE_SCORE_COLUMNS, CandidateListScorer, candidates_told
from jobs.scoring.estimate import estimate
from jobs.scoring.pair_stage import PAIR_ATTRIBUTES, PAIR_SCORE_COLUMNS, PairScorer, accuracy_told
from jobs.scoring.preview import preview
from jobs.scoring.remembered import EarlierScores
from jobs.scoring.score_memory import REPEATED, REUSED, SharedScores, remembering
from jobs.scoring.spec import (
    Model,
    check_model_files,
    check_reference,
    check_steps,
    identity_of_model,
    record_of_model,
    spec_of,
)
from jobs.scoring.stage import ATTRIBUTES, SCORE_COLUMNS, ConversationScorer, TableScorer, UnitScorer, warnings_told
from jobs.scoring.step_stage import AGGREGATED, STEP_COLUMNS, StepScorer, steps_told
from jobs.scoring.turn_stage import TURN_COLUMNS, TurnScorer, turns_told
from jobs.scoring.via_serve import UNITS_AT_ONCE, ServedModelSource
from serve_app.reward_model import ModelSpec
from serve_app.reward_model.tiny import note as embedded_note

if TYPE_CHECKING:
    from serve_app.reward_model import RewardModel

logger = logging.getLogger(__name__)
SAMPLE_STRETCHES = 64
REUSING_UNIT_ROWS = 1024
ScoredReading: TypeAlias = Reading | StepColumns
"""What a row is scored as."""


class ScoringRun:
    """One run of scoring `source` into `output`; mistakes in either show when it is made, before Ray starts.

    Args:
        options: the model, the columns, the actors.
        source: the input: a file, folder, glob or URI, or several.
        output: the folder of scored parts; `jobs/runs/ledger.py` says what is in it.
        prefix: put in front of the names of the four score columns.
        load: makes the model on a worker.
        corpus: the input, where its footers are read already.
        limit: score the first so many rows alone.
        sample: score this share of the rows alone, in stretches that are spread over the corpus.

    Raises:
        CorpusError: the input is not there, or has no conversations.
        CheckpointError: a file of the model is missing or broken.
    """

    def __init__(
        self,
        options: ScoringOptions,
        *,
        source: str | Source,
        output: str,
        prefix: str = "",
        corpus: Corpus | None = None,
        limit: int | None = None,
        sample: float | None = None,
        load: Callable[[ModelSpec], RewardModel] = ModelSpec.load,
    ) -> None:
        self._options = options
        self._source, self._output, self._prefix, self._load = Source.of(source), output, prefix, load
        self._system_prompt = SystemPrompt.of(
            options.system_prompt, options.system_prompt_column, replaces=options.replace_system_prompt
        )
        self._ledger = Ledger(output)
        self._limit, self._sample = limit, sample
        self._plan = self._ledger.plan()
        self._whole = corpus or Corpus.open(source, output=output, plan=self._plan)
        self._corpus = self._whole.limited(limit)
        self._columns = _columns(self._corpus, options)
        if options.via_serve is None:
            model_config, _tokenizer = check_model_files(options)
            embedding = model_config.vocab_size * model_config.hidden_size
            self._weight_bytes = 4 * (model_config.num_parameters + embedding)  # in float32, the most they take
            self._check_room(model_config.head.attributes)
        else:
            self._check_room(())
        self._earlier = EarlierScores.of(options.reuse)
        self._progress: Progress | None = None
        self._began_at = command_began() or time.time()

    @property
    def reading(self) -> Reading:
        """How rows are read."""
        assert not isinstance(self._columns, StepColumns), "no command that ranks scores steps"
        return self._columns

    def _check_room(self, attributes: Sequence[str]) -> None:
        """Refuse files that have a column of a name that is to be added."""
        options = self._options
        if isinstance(self._columns, StepColumns):
            added = STEP_COLUMNS + (AGGREGATED,) * (options.step_aggregate is not None)
        else:
            added = columns_added(self._columns, bool(attributes), with_turns=options.scores_turns)
        names = [self._prefix + name for name in added]
        check_output(self._corpus, added=names, system_prompt_column=self._options.system_prompt_column)

    def estimate(self, tokens_per_s: float | None) -> Iterator[str]:
        """What scoring the corpus would take; see `estimate.py`."""
        assert not isinstance(self._columns, StepColumns), "options refuse that"
        share = 1.0 if self._sample is None else self._sample
        return estimate(
            self._corpus, self._columns, self._system_prompt, self._options, share=share, tokens_per_s=tokens_per_s
        )

    def preview(self, num_rows: int) -> Iterator[str]:
        """The first rows as the model would read them; see `preview.py`."""
        assert not isinstance(self._columns, StepColumns), "options refuse that"
        return preview(self._corpus, self._columns, self._system_prompt, self._options, num_rows=num_rows)

    def run(self, resources: ClusterResources) -> UnitStats:
        """Score what is left on the connected Ray; the counts of the whole output. `summary` tells of it afterwards.

        Raises:
            RaywardError: the job cannot start, or stops; what is committed stays.
        """
        options = self._options
        if options.via_serve is not None:
            served = ServedModelSource.of(options)
            check_reference(served.facts, options.reference_column)
            check_steps(options, served.facts.model, served.facts.scores_steps)
            self._check_room(served.facts.attributes)
            return self._score(self._unit_run(served.facts, served), served.facts, served.load, served.pool, served)
        model = spec_of(options, resources)
        check_reference(model, options.reference_column)
        pool = plan_actors(
            resources,
            device=model.device,
            num_actors=options.num_actors,
            cpus_per_actor=options.cpus_per_actor,
            gpus_per_actor=options.gpus_per_actor,
        )
        model = model.on_gpus(pool.gpus_per_actor)
        run = self._unit_run(model)
        if model.device == "cpu" and options.num_actors is None and options.cpus_per_actor is None:
            pool = split_actors(pool, resources, num_units=len(run.left), weight_bytes=self._weight_bytes)
        return self._score(run, model, partial(self._load, model), pool)

    def _score(
        self,
        run: UnitRun,
        model: Model,
        load: Callable[[], ConversationScorer],
        pool: ActorPool,
        served: ServedModelSource | None = None,
    ) -> UnitStats:
        self._announce(run, model, pool, served)
        units_at_once = 1 if served is None else UNITS_AT_ONCE
        with self._with_memory(load, run, model, pool) as load_remembering:
            stage = Stage(self._make_scorer(load_remembering, model.attributes), pool, units_at_once)
            self._progress = run.run([stage])
        return self._progress.total

    @contextmanager
    def _with_memory(
        self, load: Callable[[], ConversationScorer], run: UnitRun, model: Model, pool: ActorPool
    ) -> Iterator[Callable[[], ConversationScorer]]:
        """What makes the model with a memory of what was scored before; without one where none is of use."""
        if not self._options.remember_scores or not run.left:
            yield load
            return
        identity = identity_of_model(model)
        indexes = self._earlier.index(identity), EarlierScores.before(self._ledger).index(identity)
        with SharedScores.among(pool.num_actors) as shared:
            yield partial(remembering, load, *indexes, shared)

    @property
    def summary(self) -> str:
        """What the run did, in a line, and how long it took from the command's start until now."""
        return _summary(self._output, self._progress, self._began_at) if self._progress else ""

    @property
    def next_command(self) -> str | None:
        """What is usually done next with the output, as it is typed; None for steps, which no command reads yet."""
        if isinstance(self._columns, StepColumns):
            return None
        job = "pairs" if isinstance(self._columns, PreferenceColumns) else "rank"
        made = "pairs" if job == "pairs" else "ranked"
        return f"next: rayward {job} --input {shlex.quote(self._output)} --output {made}"

    def _make_scorer(
        self, load: Callable[[], ConversationScorer], attributes: tuple[str, ...]
    ) -> Callable[[], TableScorer[Any, Any]]:
        return partial(
            scorer_of,
            self._columns,
            load,
            self._ledger,
            options=self._options,
            system_prompt=self._system_prompt,
            prefix=self._prefix,
            attributes=attributes,
        )

    def _unit_run(self, model: Model, served: ServedModelSource | None = None) -> UnitRun:
        options = self._options
        default = auto_rows_per_unit(self._corpus.num_rows)
        if options.reuse:  # what takes time then is what each unit costs beside its scores
            default = max(default, REUSING_UNIT_ROWS)
        if self._sample is not None:  # small enough for stretches from all over the corpus
            default = max(1, min(default, int(self._corpus.num_rows * self._sample) // SAMPLE_STRETCHES))
        rows_per_unit = rows_per_unit_of(self._ledger, options.rows_per_unit, default=default)
        cut = self._corpus.shared_units(rows_per_unit, self._plan.shared)
        units = sampled(cut, self._sample)
        identity = {
            **self._source.identity,
            **self._corpus.identity,
            **identity_of_model(model),
            "truncation": options.truncation,
            "max_tokens": options.max_tokens,
            _kind(self._columns): self._columns.identity,
            "output_prefix": self._prefix,
            "rows_per_unit": rows_per_unit,
        }
        if self._system_prompt != SystemPrompt():
            identity["system_prompt"] = asdict(self._system_prompt)
        for name, is_set in {"strict": options.strict, "every_turn": options.scores_turns}.items():
            if is_set:
                identity[name] = True
        parts = {"limit": self._limit, "sample": self._sample, "aggregate": options.step_aggregate}
        identity |= {name: value for name, value in parts.items() if value is not None}
        return UnitRun(
            ledger=self._ledger,
            corpus=self._corpus,
            units=units,
            done=self._ledger.check(identity, units),
            identity=identity,
            arguments=options,
            plan=Plan.of(self._whole, cut, shares=self._plan.shared is not None),
            max_errors=options.max_errors,
            error_column=f"{self._prefix}error",
            facts=record_of_model(model) | ({} if served is None else served.record),
            progress=options.progress,
            reused_processors=self._earlier.processors,
        )

    def _announce(self, run: UnitRun, model: Model, pool: ActorPool, served: ServedModelSource | None) -> None:
        import ray

        if line := embedded_note(model.model):
            logger.warning("%s; name a real model with --model", line)
        doer = "actors" if served is None else f"the app {served.app}, senders"
        logger.info(
            "%s rows, files: %d, units left: %d of %d; %s on %s in %s, %s: %d",
            f"{sum(unit.num_rows for unit in run.units):,}",
            len(self._corpus.files),
            len(run.left),
            len(run.units),
            self._options.model or model.model,
            model.device,
            model.dtype,
            doer,
            pool.num_actors,
        )
        if run.left and (lacking := shortage(pool, ray.available_resources)):
            logger.warning("%s: the job waits until others leave them (--cpus-per-actor, --gpus-per-actor)", lacking)


def _columns(corpus: Corpus, options: ScoringOptions) -> ScoredReading:
    """The columns of what is scored, as the options have it. Raises `CorpusError` where they do not fit the files."""
    if options.scored_steps is not None:
        return step_columns(corpus, options.columns, options.scored_steps)
    if options.choice is None:
        return conversation_columns(corpus, options.columns)
    return columns_of(corpus, options.choice)


def scorer_of(
    columns: ScoredReading,
    load: Callable[[], ConversationScorer],
    ledger: Ledger | None,
    *,
    options: ScoringOptions,
    system_prompt: SystemPrompt,
    prefix: str,
    attributes: tuple[str, ...],
) -> TableScorer[Any, Any]:
    """The scorer of tables that are read so."""
    terms: dict[str, Any] = {
        "system_prompt": system_prompt,
        "truncation": options.truncation,
        "max_tokens": options.max_tokens,
        "prefix": prefix,
        "strict": options.strict,
        "attributes": attributes,
    }
    if isinstance(columns, StepColumns):
        del terms["truncation"], terms["attributes"]
        return StepScorer(load, ledger, columns=columns, truncation="error", aggregate=options.step_aggregate, **terms)
    if isinstance(columns, PreferenceColumns):
        return PairScorer(load, ledger, columns=columns, **terms)
    if isinstance(columns, CandidateColumns):
        return CandidateListScorer(load, ledger, columns=columns, **terms)
    return (TurnScorer if options.scores_turns else UnitScorer)(load, ledger, columns=columns, **terms)


def _kind(columns: ScoredReading) -> str:
    """The entry of a run's identity that has the columns."""
    if isinstance(columns, StepColumns):
        return "steps"
    if isinstance(columns, PreferenceColumns):
        return "pairs"
    return "candidates" if isinstance(columns, CandidateColumns) else "columns"


def columns_added(columns: Reading, has_attributes: bool, *, with_turns: bool = False) -> tuple[str, ...]:
    """Names of the columns that scoring adds.

    Raises:
        CorpusError: turns are asked for, and rows are no conversations.
    """
    if with_turns and not isinstance(columns, ConversationColumns):
        kind = "pairs: --messages-column chosen reads one side" if isinstance(columns, PreferenceColumns) else "lists"
        raise CorpusError(f"--every-turn is for conversations, and the rows of the input are {kind}")
    if isinstance(columns, PreferenceColumns):
        return PAIR_SCORE_COLUMNS + PAIR_ATTRIBUTES * has_attributes
    own = CANDIDATE_SCORE_COLUMNS if isinstance(columns, CandidateColumns) else SCORE_COLUMNS
    return own + (ATTRIBUTES,) * has_attributes + TURN_COLUMNS * with_turns


def _summary(output: str, progress: Progress, began_at: float) -> str:
    total, new = progress.total, progress.stats
    before = f" ({total.rows - new.rows:,} of them before)" if total.rows > new.rows else ""
    told = (
        accuracy_told(total.counts)
        + candidates_told(total.counts)
        + turns_told(total.counts)
        + steps_told(total.counts)
        + warnings_told(total.counts)
        + _remembered_told(total.counts)
    )
    return (
        f"{total.rows:,} rows in {output}{before}: {total.rows - total.errors:,} scored, {total.errors:,} with "
        f"errors, {total.tokens:,} tokens{told}; this run {new.rows:,} rows in {_times(progress, began_at)}"
    )


def _remembered_told(counts: Mapping[str, int]) -> str:
    found = [
        f"{counts[name]:,} scores {words}"
        for name, words in ((REUSED, "reused"), (REPEATED, "of repeated conversations"))
        if counts.get(name)
    ]
    return f"; {', '.join(found)}" if found else ""


def _times(progress: Progress, began_at: float) -> str:
    whole = clock(time.time() - began_at)
    timing = progress.timing(began_at)
    if timing is None or not progress.stats.rows:
        return whole
    spent = f"start {clock(timing.start_s)}, load {clock(timing.load_s)}, score {clock(timing.score_s)}"
    return f"{whole} ({spent}), {progress.tokens_per_s:,.0f} tokens/s while scoring"
