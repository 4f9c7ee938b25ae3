"""The jobs as functions, for notebooks and schedulers: the same options as the commands have, by the same names.

    from jobs.api import score

    result = score("data/", "scored/", model="internlm/internlm2-1_8b-reward", dtype="bfloat16")
    print(result.summary, result.counts["errors"])

An option is a keyword: `--rows-per-unit 1024` is `rows_per_unit=1024`. What is wrong raises; nothing exits. A job that
was stopped resumes when the same call is made again. `RewardScorer` and `score_dataset` are for Ray Data pipelines.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, TypeAlias

from jobs.runs.ledger import Ledger, UnitStats
from jobs.scoring.reward_scorer import RewardScorer as RewardScorer
from jobs.scoring.reward_scorer import score_dataset as score_dataset

Inputs: TypeAlias = str | tuple[str, ...]
"""One input or several, on one store."""


@dataclass(frozen=True, slots=True)
class JobResult:
    """What a job did: the location of its output, its counts by name, its manifest, and the line it has for people."""

    output: str
    counts: Mapping[str, Any]
    manifest: Mapping[str, Any]
    summary: str


def score(input: Inputs, output: str, *, model: str, **options: Any) -> JobResult:  # noqa: A002, the option's name
    """Score every row of a corpus: `jobs.score`.

    Args:
        input: a file, folder, glob or URI, or several.
        output: the folder of the results.
        model: a folder, a Hugging Face id, or `tiny`, a toy model.
        options: those of the command, such as `reads="pairs"`.

    Raises:
        ValueError: an option is not there, or is wrong.
        RaywardError: the job cannot start, or stops; what is committed stays.
    """
    from jobs.score import ScoreConfig, run

    return _run(run, ScoreConfig(input=input, output=output, model=model, **options), output)


def rank(input: Inputs, output: str, **options: Any) -> JobResult:  # noqa: A002
    """Rank the rows of a scored corpus within their groups: `jobs.rank`. Arguments and errors are those of `score`."""
    from jobs.rank import RankConfig, run

    return _run(run, RankConfig(input=input, output=output, **options), output)


def pairs(input: Inputs, output: str, **options: Any) -> JobResult:  # noqa: A002
    """Make preference pairs of a scored corpus: `jobs.pairs`. Arguments and errors are those of `score`."""
    from jobs.pairs import PairsConfig, run

    return _run(run, PairsConfig(input=input, output=output, **options), output)


def best_of_n(prompts: str, output: str, *, model: str, generator: str, **options: Any) -> JobResult:
    """Generate several responses to each prompt and keep the best: `jobs.best_of_n`.

    Args:
        prompts: a file, folder, glob or URI.
        output: the folder of the results.
        model: the reward model.
        generator: an endpoint, a causal model, or `tiny`.
        options: those of the command.

    Raises:
        ValueError: an option is not there, or is wrong.
        RaywardError: the job cannot start, or stops; what is committed stays.
    """
    from jobs.best_of_n import BestOfNConfig, run

    return _run(run, BestOfNConfig(prompts=prompts, output=output, model=model, generator=generator, **options), output)


def report(input: str, output: str = "report.html", **options: Any) -> JobResult:  # noqa: A002
    """Make an HTML report of a scored corpus: `jobs.report`. It has no manifest, and its counts are in the summary."""
    from jobs.report import ReportConfig, run

    config = ReportConfig(input=input, output=output, **options)
    printed = io.StringIO()
    with redirect_stdout(printed):
        run(config)
    return JobResult(output, {}, {}, printed.getvalue().strip())


def _run(run: Any, config: Any, output: str) -> JobResult:
    printed = io.StringIO()
    with redirect_stdout(printed):
        total = run(config)
    counts = total.figures() if isinstance(total, UnitStats) else asdict(total) if is_dataclass(total) else {}  # type: ignore[arg-type]
    return JobResult(output, counts, Ledger(output).read_manifest() or {}, printed.getvalue().strip())
