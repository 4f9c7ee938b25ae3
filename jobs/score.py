"""Score every conversation of a corpus.

    python -m jobs.score --input data/ --output scored/ --model internlm/internlm2-1_8b-reward

The input is a file, a folder, a glob or an s3://, gs:// or hdfs:// URI. Conversations are in a `messages` column (a
list of {role, content}, or a JSON string of one), or in `prompt` and `response`. The output folder gets every input
row with all its columns and four more: `score`, `num_tokens`, `truncated` and `error`. Rows with `chosen` and
`rejected` are pairs: both sides are scored, and the new columns are `chosen_score`, `rejected_score`, `margin`,
`chosen_num_tokens`, `rejected_num_tokens`, `truncated` and `error`. Rows with a list of responses are candidates; the
new columns are `scores`, `best`, `num_tokens`, `truncated` and `error`. A job that was stopped is
taken up by the same command. Exit status: 0 every row was scored, 3 some rows carry an error, 1 the job stopped, 2 an
option is wrong, 130 or 143 it was interrupted.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what takes a second to import, so that signals are answered meanwhile
    from jobs.command import launch

    launch("jobs.score")

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from jobs.command import EXIT_ROW_ERRORS, command_began, parse, run_command
from jobs.options import CorpusOptions, ReadingOptions, check_model_named
from jobs.runs.ledger import UnitStats
from jobs.runs.progress import joined
from jobs.scoring.run import ScoringRun
from serve_app.reward_model import ModelSpec

if TYPE_CHECKING:
    from serve_app.reward_model import RewardModel


SHOWN_ROWS = 3


class ScoreConfig(ReadingOptions, CorpusOptions):
    """Score every conversation of a corpus; the same command resumes a stopped job."""

    model: str | None = None
    """Required: a folder, a Hugging Face id such as internlm/internlm2-1_8b-reward, or tiny, a toy model. With
    --via-serve it may be left out: then it is whatever the application serves."""
    output_prefix: str = ""
    """Put in front of the names of the new columns."""
    show: PositiveInt | None = None
    """Print this many of the first conversations as the model would read them, with their numbers of tokens, and stop:
    nothing is scored or written, and Ray is not started."""

    limit: PositiveInt | None = None
    """Score the first this many rows alone."""
    sample: float | None = Field(default=None, gt=0, le=1)
    """Score this share of the rows alone, such as 0.01, in stretches that are spread over the corpus."""
    dry_run: bool = False
    """Print what the job would take (rows, tokens, hours) and its first three rows, and stop: nothing is written, and
    Ray is not started. Without --tokens-per-s the model is loaded here and scores a few rows."""
    tokens_per_s: PositiveFloat | None = None
    """With --dry-run: the rate of one actor, where it is known."""

    @model_validator(mode="after")
    def _names_a_model(self) -> Self:
        if self.via_serve is None:
            check_model_named(self.model)
        return self

    @model_validator(mode="after")
    def _estimated_by_a_model(self) -> Self:
        if self.dry_run and self.via_serve is not None:
            raise ValueError("--dry-run reads the tokenizer of --model: name the model and leave --via-serve out")
        if self.tokens_per_s is not None and not self.dry_run:
            raise ValueError("--tokens-per-s is for --dry-run")
        return self

    @model_validator(mode="after")
    def _shown_by_a_model(self) -> Self:
        if self.steps_column is not None and (self.dry_run or self.show is not None):
            raise ValueError("--dry-run and --show are for conversations, and not for --steps-column")
        if self.show is not None and self.via_serve is not None:
            raise ValueError("--show reads the tokenizer of --model: name the model and leave --via-serve out")
        return self


def main(args: Sequence[str] | None = None, *, prog: str = "python -m jobs.score") -> int:
    """Run the command line; the exit status."""
    config = parse(ScoreConfig, args, prog=prog, description=__doc__)
    return run_command(prog, lambda: EXIT_ROW_ERRORS if run(config).errors else 0)


def run(config: ScoreConfig, *, load: Callable[[ModelSpec], RewardModel] = ModelSpec.load) -> UnitStats:
    """Score a corpus as `config` says; the counts of the whole output.

    Args:
        config: the job; with `show` or `dry_run` nothing is scored, and the counts are zero.
        load: makes the model on a worker.

    Raises:
        RaywardError: the job cannot start, or stops; what is committed stays.
    """
    scoring = ScoringRun(
        config,
        source=config.source,
        output=config.output,
        prefix=config.output_prefix,
        limit=config.limit,
        sample=config.sample,
        load=load,
    )
    if config.dry_run:
        for text in scoring.estimate(config.tokens_per_s):
            print(text)
        print()
        for text in scoring.preview(SHOWN_ROWS):
            print(text, end="")
        return UnitStats()
    if config.show is not None:
        for text in scoring.preview(config.show):
            print(text, end="")
        return UnitStats()
    with joined(config.address, config.progress) as resources:
        total = scoring.run(resources)
    print(scoring.summary)
    if command_began() is not None and scoring.next_command is not None:
        print(scoring.next_command)
    return total
