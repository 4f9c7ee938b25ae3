"""Generate several responses to each prompt and keep the one that the reward model likes best.

    python -m jobs.best_of_n --prompts prompts/ --output best/ --generator internlm/internlm2-chat-7b

Prompts are in a column `prompt` (a string or messages) or `messages` (ending in a user's turn) of a Parquet file, a
folder, a glob or an s3://, gs:// or hdfs:// URI. The generator is an OpenAI-compatible endpoint (http://host:8000/v1),
or a causal model that runs in Ray actors. The output folder gets every input row with all its columns and eight more:
`response`, `finish_reason`, `score`, `num_tokens`, `truncated`, `num_candidates`, `failures` (why candidates are
missing) and `error` (why there is no response). With --keep-all there is a row for each candidate, with its `rank`.
The same command resumes a stopped job. Exit status: 0 every prompt was answered, 3 some have no
response, 1 the job stopped, 2 an option is wrong, 130 or 143 it was interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what takes a second to import, so that signals are answered meanwhile
    from jobs.command import launch

    launch("jobs.best_of_n")

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Self

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, model_validator

from cluster.connect import ClusterResources
from jobs.command import EXIT_ROW_ERRORS, OptionGroup, command_began, parse, run_command
from jobs.corpus.conversations import ConversationColumns, SystemPrompt
from jobs.corpus.files import Corpus, Plan, auto_rows_per_unit
from jobs.corpus.readings import prompt_columns_of
from jobs.corpus.sources import Source
from jobs.generation.choosing import ADDED_COLUMNS, CANDIDATE_COLUMNS, CandidateScorer, ChoosingTerms
from jobs.generation.options import GeneratorOptions, SamplingOptions
from jobs.generation.placement import Pools, plan_pools
from jobs.generation.source import HttpSource, LocalSource, source_of
from jobs.generation.stage import GENERATION_COLUMN, UnitGenerator
from jobs.generation.tiny import NAME as TINY
from jobs.options import OPTIONS, ColumnName, EngineOptions, check_model_named
from jobs.runs.ledger import Ledger, UnitStats
from jobs.runs.pipeline import Stage
from jobs.runs.progress import Progress, clock, joined
from jobs.runs.unit_run import UnitRun, rows_per_unit_of
from jobs.scoring.spec import check_model_files, check_reference, identity_of_model, record_of_model, spec_of
from jobs.scoring.stage import warnings_told
from serve_app.reward_model import ModelSpec
from serve_app.reward_model.tiny import note as embedded_note

if TYPE_CHECKING:
    from serve_app.reward_model import RewardModel

logger = logging.getLogger(__name__)
# A unit is what a restart may have to generate again, and generating takes far longer than scoring.
ROWS_SMALLER = 16
MAX_UNITS_AT_ONCE = 64


class PromptOptions(BaseModel):
    """Options of the prompts, and of where the answers go."""

    model_config = OPTIONS

    prompts: str
    """A Parquet, JSONL, CSV, TSV or Arrow file, a folder of one kind, a glob in quotes, an s3://, gs:// or hdfs:// URI,
    or a dataset of the Hub: hf://datasets/ORG/NAME[@REVISION]/PATH, or ORG/NAME with --split."""
    split: str | None = Field(default=None, min_length=1)
    """Read one split, such as train: of a dataset on the Hub as its card says, else the files that are named so."""
    config: str | None = Field(default=None, min_length=1)
    """A configuration of a dataset on the Hub that has several."""
    output: str
    """A folder or URI for the results; made if it is not there."""
    keep_all: bool = False
    """Keep every candidate, a row each, with its rank (0 is the best) and its place in the order of generation."""
    prompt_column: ColumnName | None = None
    """Column of the prompt: a string or messages."""
    messages_column: ColumnName | None = None
    """Column of messages that end in a user's turn: a list of {role, content}, or a JSON string of one."""
    reference_column: ColumnName | None = None
    """Column of the answer that responses are compared with, a string or messages: POLAR's models need it."""
    output_prefix: str = ""
    """Put in front of the names of the new columns."""

    @property
    def source(self) -> Source:
        """The prompts' files."""
        return Source((self.prompts,), split=self.split, config=self.config)


class BestOfNConfig(EngineOptions, GeneratorOptions, SamplingOptions, PromptOptions):
    """Generate several responses to each prompt and keep the best; the same command resumes a stopped job."""

    system_prompt: str | None = None
    """A system message for the reward model alone, put in front of what it reads: the text, or @FILE that holds it."""
    rows_per_unit: PositiveInt | None = None
    """Prompts that are committed together: by default from the number of prompts, 16 to 1024."""
    max_errors: NonNegativeInt | None = None
    """Stop once more prompts than this have no response."""

    option_groups: ClassVar = (
        OptionGroup("generator", "What writes the candidates.", tuple(GeneratorOptions.model_fields)),
        OptionGroup("sampling", "How candidates are drawn.", tuple(SamplingOptions.model_fields)),
    )

    @model_validator(mode="after")
    def _names_a_model(self) -> Self:
        check_model_named(self.model)
        return self

    @property
    def added_columns(self) -> list[str]:
        """The names of the columns that the output has beside the input's."""
        names = [*ADDED_COLUMNS, *(CANDIDATE_COLUMNS if self.keep_all else ())]
        return [self.output_prefix + name for name in names]


def main(args: Sequence[str] | None = None, *, prog: str = "python -m jobs.best_of_n") -> int:
    """Run the command line; the exit status."""
    config = parse(BestOfNConfig, args, prog=prog, description=__doc__)
    return run_command(prog, lambda: EXIT_ROW_ERRORS if run(config).errors else 0)


def run(config: BestOfNConfig, *, load: Callable[[ModelSpec], RewardModel] = ModelSpec.load) -> UnitStats:
    """Answer the prompts as `config` says; the counts of the whole output.

    Args:
        config: the job.
        load: makes the reward model on a worker.

    Raises:
        RaywardError: the job cannot start, or stops; what is committed stays.
    """
    began_at = command_began() or time.time()
    inputs = _Inputs.of(config)
    with joined(config.address, config.progress) as resources:
        plan = _plan(config, inputs, resources)
        _announce(config, plan)
        if plan.unit_run.left:
            plan.generator.check()
        progress = plan.unit_run.run(_stages(config, inputs, plan, load))
    print(_summary(config, progress, time.time() - began_at))
    return progress.total


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Inputs and outputs; mistakes in it show before Ray starts."""

    ledger: Ledger
    plan: Plan
    corpus: Corpus
    columns: ConversationColumns
    system_prompt: SystemPrompt

    @classmethod
    def of(cls, config: BestOfNConfig) -> _Inputs:
        system_prompt = SystemPrompt.of(
            config.system_prompt, config.system_prompt_column, replaces=config.replace_system_prompt
        )
        ledger = Ledger(config.output)
        plan = ledger.plan()
        corpus = Corpus.open(config.source, output=config.output, plan=plan)
        columns = prompt_columns_of(
            corpus,
            ConversationColumns(
                messages=config.messages_column, prompt=config.prompt_column, reference=config.reference_column
            ),
            added=[*config.added_columns, GENERATION_COLUMN],
            system_prompt_column=config.system_prompt_column,
        )
        check_model_files(config)
        return cls(ledger, plan, corpus, columns, system_prompt)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Generator, model and actors of a run, and the units left to do."""

    unit_run: UnitRun
    generator: HttpSource | LocalSource
    model: ModelSpec
    pools: Pools


def _plan(config: BestOfNConfig, inputs: _Inputs, resources: ClusterResources) -> _Plan:
    generator = source_of(config, config.sampling, resources)
    model = spec_of(config, resources)
    check_reference(model, config.reference_column)
    pools = plan_pools(
        resources,
        config,
        config,
        scoring_device=model.device,
        generating_device=generator.device if isinstance(generator, LocalSource) else None,
    )
    default = auto_rows_per_unit(inputs.corpus.num_rows) // ROWS_SMALLER
    rows_per_unit = rows_per_unit_of(inputs.ledger, config.rows_per_unit, default=default)
    units = inputs.corpus.shared_units(rows_per_unit, inputs.plan.shared)
    identity = {
        **{"prompts" if name == "input" else name: value for name, value in config.source.identity.items()},
        **inputs.corpus.identity,
        **generator.identity,
        "sampling": asdict(config.sampling),
        **identity_of_model(model),
        "truncation": config.truncation,
        "max_tokens": config.max_tokens,
        "system_prompt": asdict(inputs.system_prompt),
        "columns": inputs.columns.identity,
        "keep_all": config.keep_all,
        "output_prefix": config.output_prefix,
        "rows_per_unit": rows_per_unit,
    }
    if config.strict:
        identity["strict"] = True
    unit_run = UnitRun(
        ledger=inputs.ledger,
        corpus=inputs.corpus,
        units=units,
        done=inputs.ledger.check(identity, units),
        identity=identity,
        arguments=config,
        plan=Plan.of(inputs.corpus, units, shares=inputs.plan.shared is not None),
        max_errors=config.max_errors,
        error_column=f"{config.output_prefix}error",
        progress=config.progress,
        facts=record_of_model(model),
    )
    return _Plan(unit_run, generator, model.on_gpus(pools.scoring.gpus_per_actor), pools)


def _stages(
    config: BestOfNConfig, inputs: _Inputs, plan: _Plan, load: Callable[[ModelSpec], RewardModel]
) -> list[Stage]:
    make_generator = partial(UnitGenerator, plan.generator.load, inputs.ledger, columns=inputs.columns)
    terms = ChoosingTerms(
        columns=inputs.columns,
        system_prompt=inputs.system_prompt,
        truncation=config.truncation,
        max_tokens=config.max_tokens,
        prefix=config.output_prefix,
        keep_all=config.keep_all,
        strict=config.strict,
    )
    make_scorer = partial(CandidateScorer, partial(load, plan.model), inputs.ledger, terms)
    return [
        Stage(make_generator, plan.pools.generating, _units_at_once(config, plan)),
        Stage(make_scorer, plan.pools.scoring),
    ]


def _units_at_once(config: BestOfNConfig, plan: _Plan) -> int:
    """An endpoint is asked for several units, so that it is busy while the last prompts of one are answered."""
    if isinstance(plan.generator, LocalSource):
        return 1
    largest = max((unit.num_rows for unit in plan.unit_run.left), default=1)
    return min(MAX_UNITS_AT_ONCE, 1 + math.ceil(config.concurrency / max(1, largest)))


def _announce(config: BestOfNConfig, plan: _Plan) -> None:
    if config.generator == TINY:
        logger.warning(
            "the generator is tiny, a toy that answers what the reward model tiny knows, some of it right; name a real "
            "one with --generator"
        )
    if line := embedded_note(config.model or ""):
        logger.warning("%s; name a real model with --model", line)
    if config.temperature == 0 and config.n > 1:
        logger.warning("a temperature of 0 gives %d equal candidates", config.n)
    logger.info(
        "%s prompts with %d candidates each, units left: %d of %d; generator: %s, actors: %d; model: %s on %s in %s, "
        "actors: %d",
        f"{plan.unit_run.corpus.num_rows:,}",
        config.n,
        len(plan.unit_run.left),
        len(plan.unit_run.units),
        plan.generator.title,
        plan.pools.generating.num_actors,
        config.model,
        plan.model.device,
        plan.model.dtype,
        plan.pools.scoring.num_actors,
    )


def _summary(config: BestOfNConfig, progress: Progress, seconds: float) -> str:
    total, new = progress.total, progress.stats
    before = f" ({total.rows - new.rows:,} of them before)" if total.rows > new.rows else ""
    return (
        f"{total.rows:,} prompts in {config.output}{before}: {total.rows - total.errors:,} answered, "
        f"{total.counts.get('answered_in_part', 0):,} of them with fewer candidates than asked for, {total.errors:,} "
        f"without a response; {total.counts.get('candidates', 0):,} candidates, {total.tokens:,} tokens scored"
        f"{warnings_told(total.counts)}; "
        f"this run {new.rows:,} prompts in {clock(seconds)} with start-up"
    )
