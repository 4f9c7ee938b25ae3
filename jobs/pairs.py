"""Make preference pairs of a scored corpus, for DPO or for training reward models.

    python -m jobs.pairs --input scored/ --output pairs/ --min-margin 0.5

Candidates of one prompt are paired: the best with the worst, the best with others at random, or all. The output folder
gets a row for each pair, in the layout that TRL calls conversational: `prompt`, `chosen` and `rejected` are lists of
messages; `score_chosen`, `score_rejected` and `margin` are theirs. Rows that are scored pairs already (`chosen_score`
and `rejected_score`, as jobs.score writes them) are filtered by their margin, or flipped with --disagreement flip.
With --model the input is scored first, prompts shared, into _OUTPUT_scored beside it. The same command resumes a
stopped job. Exit status: 0 done, 1 the job stopped, 2 an option is wrong, 130 or 143 it was interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what takes a second to import, so that signals are answered meanwhile
    from jobs.command import launch

    launch("jobs.pairs")

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from pydantic import Field, NonNegativeFloat

from jobs.command import parse, run_command
from jobs.corpus.files import MAX_UNIT_ROWS, Corpus, Plan
from jobs.corpus.preferences import PreferenceColumns
from jobs.corpus.readings import ReadingChoice, columns_of
from jobs.errors import CorpusError
from jobs.grouping.pair_filter import Disagreement, PairFilterStage
from jobs.grouping.pairs import PairStage, PairStats, Strategy
from jobs.grouping.ranks import num_partitions, stretches
from jobs.runs.ledger import Ledger, UnitStats, is_complete, recorded
from jobs.runs.progress import clock, joined
from jobs.scoring.scored_corpus import ScoredInput, ScoredOptions
from serve_app.reward_model import ModelSpec

if TYPE_CHECKING:
    from serve_app.reward_model import RewardModel

MAX_PAIRS = 64
DEFAULT_PAIRS_OF_ALL = 8
BYTES_PER_SHARE = 256 << 20


class PairsConfig(ScoredOptions):
    """Make preference pairs of a scored corpus."""

    strategy: Strategy = "best-worst"
    """The best candidate against the worst, against others at random, or all pairs, widest margin first."""
    min_margin: NonNegativeFloat = 0.0
    """Pairs whose scores differ by this or less are left out; equal scores never make a pair."""
    max_pairs: int | None = Field(default=None, ge=1, le=MAX_PAIRS)
    """Pairs of one prompt at most: by default 1, with all 8."""
    seed: int = Field(default=0, ge=0)
    """Decides what is drawn at random."""
    disagreement: Disagreement | None = None
    """A scored pair whose rejected side scores more: drop it (the default), keep it as it is labelled, or flip it."""

    @property
    def pairs_per_prompt(self) -> int:
        """The most pairs of a prompt: `max_pairs`, or its default for the strategy."""
        return self.max_pairs or (DEFAULT_PAIRS_OF_ALL if self.strategy == "all" else 1)


def main(args: Sequence[str] | None = None, *, prog: str = "python -m jobs.pairs") -> int:
    """Run the command line; the exit status."""
    config = parse(PairsConfig, args, prog=prog, description=__doc__)

    def work() -> int:
        run(config)
        return 0

    return run_command(prog, work)


def run(config: PairsConfig, *, load: Callable[[ModelSpec], RewardModel] = ModelSpec.load) -> PairStats:
    """Make the pairs of a corpus as `config` says; the counts of the whole output.

    Args:
        config: the job.
        load: makes the model on a worker, where one is named.

    Raises:
        RaywardError: the job cannot start, or stops; what is committed stays.
    """
    source = ScoredInput(config, takes_pairs=True, load=load)
    if source.pair_scores is not None:
        return _filter(config, source, source.pair_scores)
    _refuse(config, ("disagreement", "chosen_column", "rejected_column"), "are for rows that are scored pairs already")
    columns = replace(source.conversations(), reference=None)  # pairs have none
    with joined(config.address, config.progress) as resources:
        corpus = source.scored(resources)
        stage = PairStage(
            corpus.filesystem,
            Ledger(config.output),
            columns,
            config.score_column,
            config.strategy,
            config.min_margin,
            config.pairs_per_prompt,
            config.seed,
        )
        num_shares = _num_shares(corpus)
        identity = {
            "job": "pairs",
            **source.identity,
            **corpus.identity,
            "input_fingerprint": corpus.fingerprint,
            "columns": columns.identity,
            **config.model_dump(include={"score_column", "strategy", "min_margin", "seed"}),
            "max_pairs": config.pairs_per_prompt,
            "shares": num_shares,
        }
        return _run(config, stage, corpus, identity, num_shares)


def _run(
    config: PairsConfig, stage: PairStage, corpus: Corpus, identity: dict[str, object], num_shares: int
) -> PairStats:
    ledger = stage.ledger
    paths = [stage.file_path(share, num_shares) for share in range(num_shares)]
    ledger.check_files(identity, paths)
    done = stage.done(num_shares)
    total = sum(done.values(), PairStats())
    if len(done) == num_shares and is_complete(ledger):
        print(f"{_counts(config, total)}; all of it before")
        return total
    work = stretches(corpus.units(config.rows_per_unit or MAX_UNIT_ROWS), set())
    shares = [share for share in range(num_shares) if share not in done]
    with recorded(ledger, identity=identity, arguments=config) as results:
        for stats in stage.run(work, shares=shares, num_shares=num_shares):
            total += stats
        results |= asdict(total)
    print(f"{_counts(config, total)}; this run took {clock(results['elapsed_s'])}")
    return total


def _filter(config: PairsConfig, source: ScoredInput, scores: tuple[str, str]) -> PairStats:
    """Filter the pairs of a corpus that has them, with their scores or before they are scored."""
    _refuse(config, ("strategy", "max_pairs", "seed"), "choose among candidates, and each row is a pair already")
    named = PreferenceColumns(
        config.chosen_column or "chosen", config.rejected_column or "rejected", config.prompt_column
    )
    is_named = config.chosen_column is not None or config.rejected_column is not None
    choice = ReadingChoice(config.columns, named if is_named else None, reads="pairs")
    columns = columns_of(source.corpus, choice)
    assert isinstance(columns, PreferenceColumns)
    with ExitStack() as stack:
        corpus = source.corpus
        if source.location is not None:
            corpus = source.scored(stack.enter_context(joined(config.address, config.progress)))
        return _filtered_corpus(config, source, corpus, columns, scores)


def _filtered_corpus(
    config: PairsConfig, source: ScoredInput, corpus: Corpus, columns: PreferenceColumns, scores: tuple[str, str]
) -> PairStats:
    ledger = Ledger(config.output)
    disagreement = config.disagreement or "drop"
    identity = {
        "job": "pairs",
        **source.identity,
        **corpus.identity,
        "input_fingerprint": corpus.fingerprint,
        "pairs": columns.identity,
        "scores": list(scores),
        "min_margin": config.min_margin,
        "disagreement": disagreement,
        "rows_per_unit": config.rows_per_unit,
    }
    shared = ledger.plan().shared
    units = corpus.shared_units(config.rows_per_unit or MAX_UNIT_ROWS, shared)
    done = ledger.check(identity, units)
    total = sum(done.values(), UnitStats())
    if len(done) == len(units) and is_complete(ledger):
        print(f"{_filtered(config, total)}; all of it before")
        return _pair_stats(total)
    stage = PairFilterStage(corpus.filesystem, ledger, columns, scores, config.min_margin, disagreement)
    plan = Plan.of(corpus, units, shares=shared is not None)
    with (
        joined(config.address, config.progress),
        recorded(ledger, identity=identity, arguments=config, plan=plan) as results,
    ):
        for stats in stage.run(stretches(units, set(done))):
            total += stats
        results |= asdict(_pair_stats(total)) | dict(total.counts)
    print(f"{_filtered(config, total)}; this run took {clock(results['elapsed_s'])}")
    return _pair_stats(total)


def _pair_stats(total: UnitStats) -> PairStats:
    return PairStats(total.rows, total.written, total.written, total.counts.get("unreadable", 0))


def _filtered(config: PairsConfig, total: UnitStats) -> str:
    counts = total.counts
    notes = [f"the scores disagree with {counts.get('disagreeing', 0):,}"]
    told = (("flipped", "flipped"), ("unscored", "without a score"), ("unreadable", "that cannot be read"))
    notes += [f"{counts[name]:,} {words}" for name, words in told if counts.get(name)]
    return f"{total.written:,} of {total.rows:,} pairs in {config.output} ({', '.join(notes)})"


def _refuse(config: PairsConfig, names: Sequence[str], why: str) -> None:
    own = [name for name in names if getattr(config, name) != PairsConfig.model_fields[name].default]
    given = [f"--{name.replace('_', '-')}" for name in own]
    if given:
        raise CorpusError(f"{' and '.join(given)} {why}: leave them out")


def _num_shares(corpus: Corpus) -> int:
    """Number of files that the pairs are committed in: what a worker joins and writes at once is bounded."""
    return max(num_partitions(corpus.num_rows), min(200, corpus.num_bytes // BYTES_PER_SHARE))


def _counts(config: PairsConfig, total: PairStats) -> str:
    without = total.prompts - total.paired
    notes = [f"{without:,} without a pair"] if without else []
    notes += [f"{total.unreadable:,} pairs left out, whose conversations cannot be read"] if total.unreadable else []
    told = f" ({'; '.join(notes)})" if notes else ""
    return f"{total.pairs:,} pairs of {total.prompts:,} prompts in {config.output}{told}"
