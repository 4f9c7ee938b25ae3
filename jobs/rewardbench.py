"""Evaluate a reward model on RewardBench or RewardBench 2.

    python -m jobs.rewardbench --input filtered.parquet --model internlm/internlm2-1_8b-reward

The input is a benchmark's dataset as Parquet, or a part of it; its columns tell which one it is. RewardBench has
`prompt`, `chosen`, `rejected` and `subset`; a row counts when the chosen answer scores strictly higher. RewardBench 2
has `id`, `prompt`, the lists `chosen` and `rejected`, `num_correct` and `subset`; the right answer must score highest.
Every answer is scored whole, unless --truncation or --leaderboard says otherwise. A row with an answer that cannot be
scored counts as wrong, and is named.

--leaderboard cuts as the benchmark's own scripts do by default (github.com/allenai/reward-bench): at 2,048 tokens,
keeping the end for RewardBench (scripts/run_rm.py) and the start for RewardBench 2 (scripts/run_v2.py), and nothing for
InternLM2-Reward (rewardbench/models/internlm.py). The dtype stays yours to choose: those scripts load a model in
float16 by default, and the first one many models in 8 bits.

The output folder gets `rewardbench.json`, `rows.parquet` with the scores of each row, and the stages `conversations/`
and `scores/`, from which the same command resumes a stopped job. Exit status: 0 every answer was scored, 3 some were
not, 1 the job stopped, 2 an option is wrong, 130 or 143 it was interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what takes a second to import, so that signals are answered meanwhile
    from jobs.command import launch

    launch("jobs.rewardbench")

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, model_validator

from jobs.benchmarks import rewardbench1, rewardbench2, table
from jobs.benchmarks.conversation_file import ConversationFile
from jobs.benchmarks.dataset import Benchmark, Dataset
from jobs.benchmarks.leaderboard import LeaderboardCut, leaderboard_cut
from jobs.benchmarks.outcome import AnsweredRow, Outcome
from jobs.benchmarks.table import read_rows, table_of
from jobs.command import EXIT_ROW_ERRORS, parse, run_command
from jobs.corpus.conversations import SystemPrompt
from jobs.corpus.files import Corpus
from jobs.corpus.storage import OutputFolder
from jobs.errors import CorpusError
from jobs.options import EngineOptions, ScoringOptions, check_model_named
from jobs.runs.ledger import Ledger
from jobs.runs.progress import joined
from jobs.scoring.run import ScoringRun
from jobs.scoring.spec import check_model_files
from serve_app.reward_model import ModelSpec

if TYPE_CHECKING:
    from serve_app.reward_model import RewardModel

logger = logging.getLogger(__name__)


class _BenchmarkOptions(BaseModel):
    """Options of what is read and where the results go."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: str
    """The benchmark's dataset: a Parquet file, a folder of them, a glob in quotes, or a URI."""
    output: str | None = None
    """A folder or URI for the results: by default rewardbench-INPUT-MODEL here."""


class RewardBenchConfig(EngineOptions, _BenchmarkOptions):
    """Evaluate a reward model on RewardBench or RewardBench 2; the same command resumes a stopped job."""

    leaderboard: bool = False
    """Cut conversations at 2,048 tokens as the benchmark's own script does, in place of --truncation and
    --max-tokens."""

    @model_validator(mode="after")
    def _names_a_model(self) -> Self:
        check_model_named(self.model)
        return self

    @model_validator(mode="after")
    def _leaderboard_alone_says_what_is_cut(self) -> Self:
        given = {"--truncation": self.truncation != "error", "--max-tokens": self.max_tokens is not None}
        if self.leaderboard and any(given.values()):
            flags = " and ".join(flag for flag, is_given in given.items() if is_given)
            raise ValueError(f"{flags} cannot be set with --leaderboard, which says what is cut")
        return self


def main(args: Sequence[str] | None = None, *, prog: str = "python -m jobs.rewardbench") -> int:
    """Run the command line; the exit status."""
    config = parse(RewardBenchConfig, args, prog=prog, description=__doc__)
    return run_command(prog, lambda: _exit_status(run(config)))


def run(config: RewardBenchConfig, *, load: Callable[[ModelSpec], RewardModel] = ModelSpec.load) -> Outcome:
    """Score the answers of a benchmark, compute its figures, write and print them.

    Args:
        config: the job.
        load: makes the model on a worker.

    Raises:
        RaywardError: the job cannot start, or stops; what is committed stays.
    """
    SystemPrompt.of(config.system_prompt, config.system_prompt_column, replaces=config.replace_system_prompt)
    folder = OutputFolder(config.output or _default_output(config))
    corpus = Corpus.open(config.input, output=folder.location)
    if not corpus.num_rows:
        raise CorpusError(f"{config.input} has no rows")
    dataset = Dataset.of(corpus, system_prompt_column=config.system_prompt_column)
    model_config, tokenizer = check_model_files(config)
    if tokenizer.takes_reference:
        raise CorpusError(
            f"{config.model} is a POLAR model, which compares each response with a reference, and a benchmark's rows "
            "have none: score conversations that have one with jobs.score --reference-column"
        )
    num_answers = ConversationFile(folder).make(corpus, dataset)
    logger.info("%s: %s rows, %s answers", dataset.benchmark.value, f"{corpus.num_rows:,}", f"{num_answers:,}")
    cut = leaderboard_cut(dataset.benchmark, model_config.architecture) if config.leaderboard else None
    _score(config, folder, load, cut)
    scored = Corpus.open(folder.below("scores"))
    rows = read_rows(scored, num_rows=corpus.num_rows, num_answers=num_answers)
    return _finish(config, folder, dataset, rows, cut)


def _default_output(config: RewardBenchConfig) -> str:
    names = (Path(config.input).name.removesuffix(".parquet"), Path(str(config.model)).name)
    return "-".join(["rewardbench", *(re.sub(r"[^\w.-]+", "_", name) for name in names)])


def _score(
    config: RewardBenchConfig,
    folder: OutputFolder,
    load: Callable[[ModelSpec], RewardModel],
    cut: LeaderboardCut | None,
) -> None:
    shared = {name: getattr(config, name) for name in EngineOptions.model_fields}
    if cut is not None:
        shared |= {"truncation": cut.truncation, "max_tokens": cut.max_tokens}
    if config.system_prompt_column is not None:
        shared["system_prompt_column"] = "system_prompt"
    scoring = ScoringRun(
        ScoringOptions(**shared, messages_column="messages"),
        source=folder.below("conversations"),
        output=folder.below("scores"),
        load=load,
    )
    with joined(config.address, config.progress) as resources:
        scoring.run(resources)
    logger.info(scoring.summary)


def _finish(
    config: RewardBenchConfig,
    folder: OutputFolder,
    dataset: Dataset,
    rows: Sequence[AnsweredRow],
    cut: LeaderboardCut | None,
) -> Outcome:
    is_first = dataset.benchmark is Benchmark.REWARDBENCH
    outcome = rewardbench1.evaluate(rows) if is_first else rewardbench2.evaluate(rows)
    with folder.create("rows.parquet") as stream:
        pq.write_table(table_of(rows, rewardbench1.accuracy if is_first else rewardbench2.accuracy), stream)
    named = None if cut is None else asdict(cut)
    data = table.as_data(outcome, rows=rows) | {"leaderboard": named, "run": _run(config, folder)}
    with folder.create("rewardbench.json") as stream:
        stream.write(json.dumps(data, indent=2, allow_nan=False).encode())
    print(table.table(outcome, model=Path(str(config.model)).name, rows=rows))
    if cut is not None:
        print(cut)
    print(f"in {folder.location}: rewardbench.json, rows.parquet")
    return outcome


def _run(config: RewardBenchConfig, folder: OutputFolder) -> dict[str, Any]:
    """Model, settings and versions that the figures were made with."""
    manifest = Ledger(folder.below("scores")).read_manifest() or {}
    kept = ("identity", "model", "versions", "tokens", "seconds")
    return {"arguments": config.model_dump(), **{name: manifest.get(name) for name in kept}}


def _exit_status(outcome: Outcome) -> int:
    return EXIT_ROW_ERRORS if any(subset.num_unscored for subset in outcome.subsets) else 0
