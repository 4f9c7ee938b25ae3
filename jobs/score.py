"""Score every conversation of a Parquet corpus.

    python -m jobs.score --input data/ --output scored/ --model internlm/internlm2-1_8b-reward

The input is a file, a folder, a glob or an s3://, gs:// or hdfs:// URI. Conversations are in a `messages` column (a
list of {role, content}, or a JSON string of one), or in `prompt` and `response`. The output folder gets every input
row with all its columns and four more: `score`, `num_tokens`, `truncated` and `error`. A job that was stopped is
taken up by the same command. Exit status: 0 every row was scored, 3 some rows carry an error, 1 the job stopped.
"""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt

from cluster.connect import ClusterResources, connect
from jobs.columns import ConversationColumns
from jobs.corpus import Corpus, Unit, auto_rows_per_unit, filesystem_of
from jobs.errors import CorpusError, OutputError, TooManyErrorsError
from jobs.ledger import Ledger, UnitStats
from jobs.pipeline import ActorPool, run_units
from jobs.progress import Progress, clock
from jobs.scorer import ModelSource, UnitScorer
from serve_app.reward_model import RewardModel
from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.checkpoint import fingerprint, resolve
from serve_app.reward_model.errors import RaywardError
from serve_app.reward_model.model import resolve_device, resolve_dtype
from serve_app.reward_model.tiny import NAME as TINY
from serve_app.reward_model.tokenizer import Tokenizer, Truncation

__all__ = ["ScoreConfig", "main", "run"]

logger = logging.getLogger(__name__)
OUTPUT_COLUMNS = ("score", "num_tokens", "truncated", "error")
EXIT_STOPPED, EXIT_ROW_ERRORS, EXIT_INTERRUPTED = 1, 3, 130


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
    messages_column: str | None = None
    """Column of messages: a list of {role, content}, or a JSON string of one."""
    prompt_column: str | None = None
    """Column of the prompt: a string or messages. Goes with --response-column."""
    response_column: str | None = None
    """Column of the response: a string."""
    output_prefix: str = ""
    """Put in front of the names of the four new columns."""
    num_actors: PositiveInt | None = None
    """Scoring actors: by default one a GPU, or one a node where there are none."""
    gpus_per_actor: PositiveFloat | None = None
    """GPUs an actor takes: 1 on cuda by default, less to share one."""
    cpus_per_actor: PositiveInt | None = None
    """CPUs an actor takes, and its torch threads on cpu: by default all but one of a node's, on cuda 1."""
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
    """A job, ready to run: what is there, what is left, and the identity a restart must have."""

    corpus: Corpus
    units: list[Unit]
    done: dict[str, UnitStats]
    columns: ConversationColumns
    model: ModelSource
    pool: ActorPool
    manifest: dict[str, Any]

    @property
    def left(self) -> list[Unit]:
        return [unit for unit in self.units if unit.id not in self.done]


def main() -> int:
    """Run the command line; the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config = tyro.cli(ScoreConfig, description=__doc__, prog="python -m jobs.score")
    try:
        total = run(config)
    except RaywardError as error:
        print(f"jobs.score stopped: {error}", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        print("jobs.score interrupted; the same command takes it up again", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_ROW_ERRORS if total.errors else 0


def run(config: ScoreConfig, *, load: Callable[[ModelSource], RewardModel] = ModelSource.load) -> UnitStats:
    """Score a corpus as `config` says; the counts of the whole output.

    Args:
        config: the job.
        load: makes the model on a worker.

    Raises:
        RaywardError: the job cannot start, or stops; what is committed stays.
    """
    started = time.monotonic()
    ledger = Ledger(config.output)
    corpus = Corpus.open(config.input, exclude=ledger.folder)
    columns = _columns(corpus, config)
    with connect(config.address) as resources:
        plan = _plan(config, corpus, columns, ledger, resources)
        _announce(config, plan)
        make_scorer = partial(
            UnitScorer,
            partial(load, plan.model),
            ledger,
            run=uuid.uuid4().hex,
            columns=columns,
            truncation=config.truncation,
            max_tokens=config.max_tokens,
            prefix=config.output_prefix,
        )
        total = _score(config, plan, ledger, make_scorer)
    ledger.finish(
        plan.manifest
        | {"status": "complete", **asdict(total), "units": len(plan.units), "elapsed_s": time.monotonic() - started}
    )
    return total


def _score(config: ScoreConfig, plan: Plan, ledger: Ledger, make_scorer: Callable[[], UnitScorer]) -> UnitStats:
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


def _columns(corpus: Corpus, config: ScoreConfig) -> ConversationColumns:
    """The conversation columns, which every file must have, and room for the new ones."""
    columns = ConversationColumns()
    for file, schema in zip(corpus.files, corpus.schemas, strict=True):
        try:
            columns = ConversationColumns.detect(schema, config.columns)
        except CorpusError as error:
            raise CorpusError(f"{file.path}: {error}") from None
        if taken := [name for name in OUTPUT_COLUMNS if config.output_prefix + name in schema.names]:
            raise CorpusError(
                f"{file.path} already has the columns {[config.output_prefix + name for name in taken]}; "
                "name the new ones apart with --output-prefix, such as --output-prefix second_"
            )
    return columns


def _plan(
    config: ScoreConfig, corpus: Corpus, columns: ConversationColumns, ledger: Ledger, resources: ClusterResources
) -> Plan:
    model = _model_source(config, resources)
    previous = ledger.read_manifest() or {}
    rows_per_unit = config.rows_per_unit or previous.get("identity", {}).get("rows_per_unit")
    rows_per_unit = rows_per_unit or auto_rows_per_unit(corpus.num_rows)
    units = corpus.units(rows_per_unit)
    identity = {
        "input": config.input if "://" in config.input else filesystem_of(config.input)[1],
        "model_fingerprint": model.fingerprint,
        "device": model.device,
        "dtype": model.dtype,
        "truncation": config.truncation,
        "max_tokens": config.max_tokens,
        "columns": asdict(columns),
        "output_prefix": config.output_prefix,
        "rows_per_unit": rows_per_unit,
    }
    manifest = {
        "identity": identity,
        "status": "running",
        "arguments": config.model_dump(),
        "versions": {name: importlib.metadata.version(name) for name in ("rayward", "ray", "torch", "transformers")},
    }
    ledger.begin(identity, manifest)
    return Plan(corpus, units, ledger.done(units), columns, model, _pool(config, model, resources), manifest)


def _model_source(config: ScoreConfig, resources: ClusterResources) -> ModelSource:
    """The model as the driver sees it: read here so that mistakes show before anything is started on a worker."""
    folder = resolve(config.model, config.revision)
    decoder = DecoderConfig.from_folder(folder)
    Tokenizer.from_pretrained(folder, reward_token_id=decoder.reward_token_id, max_tokens=decoder.max_tokens)
    device = config.device if config.device != "auto" else "cuda" if resources.num_gpus else "cpu"
    if device == "cuda" and not resources.num_gpus:
        raise OutputError("--device cuda, but Ray sees no GPU")
    dtype = resolve_dtype(config.dtype, decoder, resolve_device(device))
    return ModelSource(
        model=config.model,
        revision=config.revision,
        fingerprint=fingerprint(folder),
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        token_budget=config.token_budget,
        num_threads=config.cpus_per_actor or max(1, resources.node_cpus - 1),
    )


def _pool(config: ScoreConfig, model: ModelSource, resources: ClusterResources) -> ActorPool:
    if model.device == "cuda":
        gpus = config.gpus_per_actor or 1.0
        return ActorPool(
            num_actors=config.num_actors or max(1, int(resources.num_gpus / gpus)),
            cpus_per_actor=config.cpus_per_actor or 1,
            gpus_per_actor=gpus,
        )
    return ActorPool(config.num_actors or resources.num_nodes, model.num_threads, 0.0)


def _announce(config: ScoreConfig, plan: Plan) -> None:
    if config.model == TINY:
        logger.warning("the model is tiny: random weights, its scores mean nothing; name a real one with --model")
    logger.info(
        "%s rows in %d files, %d of %d units left; %s on %s in %s with %d actor(s)",
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
    resumed = f" ({total.rows - new.rows:,} were there)" if total.rows > new.rows else ""
    return (
        f"{total.rows:,} rows scored into {config.output}{resumed}: {total.errors:,} with errors, {total.tokens:,} "
        f"tokens; {new.rows:,} rows in {clock(progress.seconds)}, {progress.tokens_per_s:,.0f} tokens/s"
    )


if __name__ == "__main__":
    sys.exit(main())
