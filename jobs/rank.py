"""Rank the rows of a scored corpus within their groups.

    python -m jobs.rank --input scored/ --output ranked/ --top-k 1

Rows group by the prompt of their conversation, or by a column (--group-by). The output folder gets every row with all
its columns, in input order, and three more: `rank` (0 the best; equal scores in input order), `group_size`, and
`margin`, what the best of the group scores more. A row without a score has no rank and no margin. A row with several
candidates (`scores`, a list, as jobs.score writes it) becomes a row of each, ranked within their list. With --model the
input is scored first, prompts shared, into _OUTPUT_scored beside it. The same command resumes a stopped job.
Exit status: 0 every row has a rank, 3 some have none, 1 the job stopped, 2 an option is wrong, 130 or 143 it was
interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what takes a second to import, so that signals are answered meanwhile
    from jobs.command import launch

    launch("jobs.rank")

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import PositiveInt, model_validator

from jobs.command import EXIT_ROW_ERRORS, parse, run_command
from jobs.corpus.candidates import CandidateColumns
from jobs.corpus.files import MAX_UNIT_ROWS, Corpus, Plan
from jobs.corpus.readings import ReadingChoice, columns_of
from jobs.errors import CorpusError
from jobs.grouping.candidate_ranks import CandidateRankStage
from jobs.grouping.keys import GroupKeys
from jobs.grouping.quantiles import quantiles
from jobs.grouping.ranks import RANK_COLUMNS, RankStage, Stretch, Summary, stretches
from jobs.options import ColumnName
from jobs.runs.ledger import Ledger, UnitStats, is_complete, recorded
from jobs.runs.progress import Progress, ProgressStyle, clock, joined
from jobs.scoring.scored_corpus import ScoredInput, ScoredOptions
from serve_app.reward_model import ModelSpec

if TYPE_CHECKING:
    from serve_app.reward_model import RewardModel


class RankConfig(ScoredOptions):
    """Rank the rows of a scored corpus within their groups."""

    group_by: ColumnName | None = None
    """Column whose equal values make a group, null for none; by default rows group by their prompt."""
    top_k: PositiveInt | None = None
    """Keep the best this many rows of each group, and no others."""
    global_top_k: PositiveInt | None = None
    """Keep the best this many rows of the whole corpus, ranked as one group."""
    output_prefix: str = ""
    """Put in front of the names of the three new columns."""

    @model_validator(mode="after")
    def _one_kind_of_group(self) -> RankConfig:
        if self.global_top_k is not None and (self.top_k is not None or self.group_by is not None):
            raise ValueError("--global-top-k ranks the whole corpus: leave --top-k and --group-by out")
        return self


@dataclass(frozen=True, slots=True)
class RankTotals:
    """Counts of a ranked corpus: `unscored` rows have no score, `ungrouped` ones no group."""

    rows: int
    written: int
    unscored: int
    ungrouped: int


def main(args: Sequence[str] | None = None, *, prog: str = "python -m jobs.rank") -> int:
    """Run the command line; the exit status."""
    config = parse(RankConfig, args, prog=prog, description=__doc__)

    def work() -> int:
        total = run(config)
        return EXIT_ROW_ERRORS if total.unscored or total.ungrouped else 0

    return run_command(prog, work)


def run(config: RankConfig, *, load: Callable[[ModelSpec], RewardModel] = ModelSpec.load) -> RankTotals:
    """Rank a corpus as `config` says; the counts of the whole output.

    Args:
        config: the job.
        load: makes the model on a worker, where one is named.

    Raises:
        RaywardError: the job cannot start, or stops; what is committed stays.
    """
    source = ScoredInput(config, takes_candidates=True, load=load)
    ledger = Ledger(config.output)
    listed = _candidate_stage(config, source, ledger)
    keys = _group_keys(config, source) if listed is None else None
    if listed is None:
        _check_names(config, source.corpus)
    with joined(config.address, config.progress) as resources:
        corpus = source.scored(resources)
        shared = ledger.plan().shared
        units = corpus.shared_units(config.rows_per_unit or MAX_UNIT_ROWS, shared)
        identity = {
            "job": "rank",
            **source.identity,
            **corpus.identity,
            "input_fingerprint": corpus.fingerprint,
            "group_by": _identity_of(keys) if listed is None else {"candidates": listed.columns.identity},
            **config.model_dump(include={"score_column", "top_k", "global_top_k", "output_prefix"}),
            "rows_per_unit": config.rows_per_unit,
        }
        done = ledger.check(identity, units)
        if len(done) == len(units) and is_complete(ledger):
            manifest = ledger.read_manifest() or {}
            total = RankTotals(*(manifest[name] for name in RankTotals.__dataclass_fields__))
            print(f"{_counts(config, total)}; all of it before")
            return total
        stage: RankStage | CandidateRankStage = RankStage(
            corpus.filesystem,
            ledger,
            keys,
            config.score_column,
            config.output_prefix,
            config.top_k or config.global_top_k,
        )
        if listed is not None:
            stage = replace(listed, filesystem=corpus.filesystem)
        plan = Plan.of(corpus, units, shares=shared is not None)
        with recorded(ledger, identity=identity, arguments=config, plan=plan) as results:
            work = stretches(units, set(done))
            total = _rank(stage, work, corpus, sum(done.values(), UnitStats()), results, config.progress)
        print(f"{_counts(config, total)}; this run took {clock(results['elapsed_s'])}")
    return total


def _rank(
    stage: RankStage | CandidateRankStage,
    work: list[Stretch],
    corpus: Corpus,
    done: UnitStats,
    results: dict[str, Any],
    style: ProgressStyle,
) -> RankTotals:
    summaries = []
    with Progress(num_rows=corpus.num_rows, done=done, style=style) as progress:
        for made in stage.run(work, num_rows=corpus.num_rows):
            if isinstance(made, Summary):
                summaries.append(made)
            else:
                progress.add(made)
    total = RankTotals(
        rows=progress.total.counts.get("candidates", progress.total.rows),
        written=progress.total.written,
        unscored=sum(summary.unscored for summary in summaries),
        ungrouped=sum(summary.ungrouped for summary in summaries),
    )
    results |= asdict(total)
    results["score_quantiles"] = quantiles([summary.scores for summary in summaries])
    return total


def _candidate_stage(config: RankConfig, source: ScoredInput, ledger: Ledger) -> CandidateRankStage | None:
    """The stage of a corpus whose rows hold several candidates and their scores; None for another."""
    if source.candidate_scores is None:
        return None
    if config.group_by is not None or config.global_top_k is not None:
        raise CorpusError(
            f"the input has candidates, with their scores in {source.candidate_scores!r}, which are ranked within "
            "their row: leave --group-by and --global-top-k out; they take the output of this job"
        )
    corpus = source.corpus
    columns = columns_of(corpus, ReadingChoice(config.columns, reads="candidates", responses=config.responses_column))
    assert isinstance(columns, CandidateColumns)
    stage = CandidateRankStage(
        corpus.filesystem, ledger, columns, source.candidate_scores, config.output_prefix, config.top_k
    )
    for file, schema in zip(corpus.files, corpus.schemas, strict=True):
        kept = set(schema.names) - stage.dropped(schema)
        if taken := [name for name in stage.added(schema) if name in kept]:
            raise CorpusError(
                f"{file.path} already has the columns {taken}, and a row of each candidate gets its own; rename them, "
                "or name the ranks apart with --output-prefix"
            )
    return stage


def _group_keys(config: RankConfig, source: ScoredInput) -> GroupKeys | None:
    if config.global_top_k is not None:
        return None
    if config.group_by is None:
        return GroupKeys(None, replace(source.conversations(), reference=None))
    corpus = source.corpus
    for file, schema in zip(corpus.files, corpus.schemas, strict=True):
        if config.group_by not in schema.names:
            raise CorpusError(
                f"{file.path} has no column {config.group_by!r} for --group-by; it has {', '.join(schema.names)}"
            )
    return GroupKeys(config.group_by, None)


def _identity_of(keys: GroupKeys | None) -> dict[str, Any] | None:
    if keys is None:
        return None
    return asdict(keys) | {"conversation": keys.conversation.identity if keys.conversation else None}


def _check_names(config: RankConfig, corpus: Corpus) -> None:
    names = [config.output_prefix + name for name in RANK_COLUMNS]
    for file, schema in zip(corpus.files, corpus.schemas, strict=True):
        if taken := [name for name in names if name in schema.names]:
            raise CorpusError(
                f"{file.path} already has the columns {taken}; name the new ones apart with --output-prefix"
            )


def _counts(config: RankConfig, total: RankTotals) -> str:
    kept = f"{total.written:,} of {total.rows:,} rows" if total.written < total.rows else f"{total.rows:,} rows"
    missing = [
        f"{count:,} without {what}"
        for count, what in ((total.unscored, "a score"), (total.ungrouped, "a group"))
        if count
    ]
    return f"{kept} in {config.output}" + (f" ({', '.join(missing)})" if missing else "")
