"""Score every conversation of a Parquet corpus.

    python -m jobs.score --input data/ --output scored/ --model internlm/internlm2-1_8b-reward

The input is a file, a folder, a glob or an s3://, gs:// or hdfs:// URI. Conversations are in a `messages` column (a
list of {role, content}, or a JSON string of one), or in `prompt` and `response`. The output folder gets every input
row with all its columns and four more: `score`, `num_tokens`, `truncated` and `error`. A job that was stopped is
taken up by the same command. Exit status: 0 every row was scored, 3 some rows carry an error, 1 the job stopped, 2 an
option is wrong, 130 or 143 it was interrupted.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from cluster.connect import ClusterResources, connect
from jobs.actors import ActorPool, plan_actors
from jobs.columns import ConversationColumns, columns_of
from jobs.command import run_command
from jobs.corpus import Corpus, Unit, auto_rows_per_unit, filesystem_of
from jobs.errors import TooManyErrorsError
from jobs.ledger import Ledger, UnitStats
from jobs.pipeline import run_units
from jobs.progress import Progress, clock
from jobs.scorer import ModelSource, UnitScorer
from serve_app.reward_model import RewardModel
from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.checkpoint import fingerprint, resolve
from serve_app.reward_model.model import resolve_device, resolve_dtype
from serve_app.reward_model.tiny import NAME as TINY
from serve_app.reward_model.tokenizer import Tokenizer, Truncation

__all__ = ["ScoreConfig", "main", "run"]

logger = logging.getLogger(__name__)
ColumnName = Annotated[str, Field(min_length=1)]
EXIT_ROW_ERRORS = 3


class ScoreConfig(BaseModel):
    """Score every conversation of a Parquet corpus; a stopped job is taken up by the same command."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: str
    """A Parquet file, a folder of them, a glob in quotes, or an s3://, gs:// or hdfs:// URI."""
    output: str
    """A folder or URI for the scored rows; made if it is not there."""
    model: str = TINY
    """A folder, a Hugging Face id such as internlm/internlm2-1_8b-reward, or tiny, whose scores mean nothing."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where actors score: auto is cuda where the cluster has GPUs."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the checkpoint's on cuda; on cpu bfloat16 where the processor has it, else float32."""
    token_budget: PositiveInt | None = None
    """Tokens in one forward pass; by default chosen for the device."""
    truncation: Truncation = "error"
    """A conversation over the limit: error marks its row, right keeps its start, left drops its oldest turns."""
    max_tokens: int | None = Field(default=None, ge=2)
    """A limit below the model's own."""
    messages_column: ColumnName | None = None
    """Column of messages: a list of {role, content}, or a JSON string of one."""
    prompt_column: ColumnName | None = None
    """Column of the prompt: a string or messages. Goes with --response-column."""
    response_column: ColumnName | None = None
    """Column of the response: a string."""
    output_prefix: str = ""
    """Put in front of the names of the four new columns."""
    num_actors: PositiveInt | None = None
    """Scoring actors: by default one a GPU, or one a node where there are none."""
    gpus_per_actor: PositiveFloat | None = None
    """GPUs an actor takes on cuda: 1 by default, less to share one."""
    cpus_per_actor: PositiveInt | None = None
    """CPUs an actor takes, and its torch threads: by default a node's, shared by its actors; on cuda 1."""
    rows_per_unit: PositiveInt | None = None
    """Rows that are committed together: by default from the corpus's size, 256 to 16384."""
    max_errors: NonNegativeInt | None = None
    """Stop once more rows than this have failed."""
    address: str | None = None
    """A running Ray cluster (auto, host:port or ray://host:port); without it a local one is started."""

    @property
    def columns(self) -> ConversationColumns:
        return ConversationColumns(self.messages_column, self.prompt_column, self.response_column)


@dataclass(frozen=True, slots=True)
class Plan:
    """A job, ready to run: what is there, what is left, and what a restart must have in common with it."""

    corpus: Corpus
    units: list[Unit]
    done: dict[str, UnitStats]
    columns: ConversationColumns
    model: ModelSource
    pool: ActorPool
    identity: dict[str, Any]

    @property
    def left(self) -> list[Unit]:
        return [unit for unit in self.units if unit.id not in self.done]


def main() -> int:
    """Run the command line; the exit status."""
    config = tyro.cli(ScoreConfig, description=__doc__, prog="python -m jobs.score")
    return run_command("jobs.score", lambda: EXIT_ROW_ERRORS if run(config).errors else 0)


def run(config: ScoreConfig, *, load: Callable[[ModelSource], RewardModel] = ModelSource.load) -> UnitStats:
    """Score a corpus as `config` says; the counts of the whole output.

    Args:
        config: the job.
        load: makes the model on a worker.

    Raises:
        RaywardError: the job cannot start, or stops; what is committed stays.
    """
    ledger = Ledger(config.output)
    corpus = Corpus.open(config.input, output=config.output)
    columns = columns_of(corpus, config.columns, output_prefix=config.output_prefix)
    with connect(config.address) as resources:
        plan = _plan(config, corpus, columns, ledger, resources)
        _announce(config, plan)
        if not plan.left and (ledger.read_manifest() or {}).get("status") == "complete":
            return _score(config, plan, ledger, load)
        manifest = _manifest(config, plan)
        ledger.begin(manifest)
        started = time.monotonic()
        try:
            total = _score(config, plan, ledger, load)
        except BaseException as error:
            ledger.stop(manifest | {"status": "stopped", "reason": f"{type(error).__name__}: {error}"})
            raise
    elapsed = {"elapsed_s": round(time.monotonic() - started, 3)}
    ledger.finish(manifest | {"status": "complete", "units": len(plan.units), **asdict(total), **elapsed})
    return total


def _score(config: ScoreConfig, plan: Plan, ledger: Ledger, load: Callable[[ModelSource], RewardModel]) -> UnitStats:
    make_scorer = partial(
        UnitScorer,
        partial(load, plan.model),
        ledger,
        columns=plan.columns,
        truncation=config.truncation,
        max_tokens=config.max_tokens,
        prefix=config.output_prefix,
    )
    done = sum(plan.done.values(), UnitStats())
    with Progress(num_rows=plan.corpus.num_rows, done=done) as progress:
        _check_errors(config, done)
        if plan.left:
            reports = run_units(
                plan.left, filesystem=plan.corpus.filesystem, ledger=ledger, make_scorer=make_scorer, pool=plan.pool
            )
            for report in reports:
                progress.add(report.stats)
                _check_errors(config, progress.total)
    print(_summary(config, progress))
    return progress.total


def _check_errors(config: ScoreConfig, total: UnitStats) -> None:
    if config.max_errors is not None and total.errors > config.max_errors:
        raise TooManyErrorsError(
            f"{total.errors} rows failed, --max-errors allows {config.max_errors}; their reasons are in the column "
            f"{config.output_prefix}error of {config.output}"
        )


def _plan(
    config: ScoreConfig, corpus: Corpus, columns: ConversationColumns, ledger: Ledger, resources: ClusterResources
) -> Plan:
    model = _model_source(config, resources)
    previous = ledger.read_manifest() or {}
    rows_per_unit = config.rows_per_unit or previous.get("identity", {}).get("rows_per_unit")
    if not isinstance(rows_per_unit, int):
        rows_per_unit = auto_rows_per_unit(corpus.num_rows)
    units = corpus.units(rows_per_unit)
    identity = {
        "input": filesystem_of(config.input)[1] if _is_local(config.input) else config.input,
        "model_fingerprint": model.fingerprint,
        "device": model.device,
        "dtype": model.dtype,
        "truncation": config.truncation,
        "max_tokens": config.max_tokens,
        "columns": asdict(columns),
        "output_prefix": config.output_prefix,
        "rows_per_unit": rows_per_unit,
    }
    pool = plan_actors(
        resources,
        device=model.device,
        num_actors=config.num_actors,
        cpus_per_actor=config.cpus_per_actor,
        gpus_per_actor=config.gpus_per_actor,
    )
    return Plan(corpus, units, ledger.check(identity, units), columns, model, pool, identity)


def _is_local(location: str) -> bool:
    return "://" not in location or location.startswith("file://")


def _manifest(config: ScoreConfig, plan: Plan) -> dict[str, Any]:
    return {
        "identity": plan.identity,
        "status": "running",
        "arguments": config.model_dump(),
        "versions": {name: importlib.metadata.version(name) for name in ("rayward", "ray", "torch", "transformers")},
    }


def _model_source(config: ScoreConfig, resources: ClusterResources) -> ModelSource:
    """The model as the driver sees it: read here so that mistakes show before anything is started on a worker."""
    folder = resolve(config.model, config.revision)
    decoder = DecoderConfig.from_folder(folder)
    Tokenizer.from_pretrained(folder, config=decoder)
    device = config.device if config.device != "auto" else "cuda" if resources.num_gpus else "cpu"
    dtype = resolve_dtype(config.dtype, decoder, resolve_device(device))
    is_folder = Path(config.model).expanduser().is_dir()
    return ModelSource(
        model=str(folder.resolve()) if is_folder else config.model,  # workers stand in another working folder
        revision=config.revision,
        fingerprint=fingerprint(folder),
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        token_budget=config.token_budget,
    )


def _announce(config: ScoreConfig, plan: Plan) -> None:
    if config.model == TINY:
        logger.warning("the model is tiny: random weights, its scores mean nothing; name a real one with --model")
    logger.info(
        "%s rows, files: %d, units left: %d of %d; %s on %s in %s, actors: %d",
        f"{plan.corpus.num_rows:,}",
        len(plan.corpus.files),
        len(plan.left),
        len(plan.units),
        config.model,
        plan.model.device,
        plan.model.dtype,
        plan.pool.num_actors,
    )


def _summary(config: ScoreConfig, progress: Progress) -> str:
    total, new = progress.total, progress.stats
    before = f" ({total.rows - new.rows:,} of them before)" if total.rows > new.rows else ""
    return (
        f"{total.rows:,} rows in {config.output}{before}: {total.rows - total.errors:,} scored, {total.errors:,} with "
        f"errors, {total.tokens:,} tokens; this run {new.rows:,} rows in {clock(progress.seconds)}, "
        f"{progress.tokens_per_s:,.0f} tokens/s with start-up"
    )


if __name__ == "__main__":
    sys.exit(main())
