"""A corpus that has scores: the input as it is, or, where a model is named, scored first into the output folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import pyarrow as pa
from pydantic import Field

from cluster.connect import ClusterResources
from jobs.command import OptionGroup
from jobs.corpus.conversations import is_list
from jobs.corpus.files import Corpus
from jobs.corpus.storage import below, beside
from jobs.errors import CorpusError
from jobs.options import ColumnName, CorpusOptions, EngineOptions, ScoringOptions
from jobs.runs.ledger import Ledger
from jobs.scoring.run import ScoringRun
from serve_app.reward_model import ModelSpec

if TYPE_CHECKING:
    from serve_app.reward_model import RewardModel

logger = logging.getLogger(__name__)
SCORES = "scores"
SCORED = "_scored"  # what the name of the scored corpus ends in; earlier versions made it a folder inside the output
# Engine options that such a job needs for its own work too.
ALWAYS_USED = ("rows_per_unit", "address")


class ScoredOptions(ScoringOptions, CorpusOptions):
    """A job that reads scores, and may have them made first."""

    model: str | None = None
    """Score the input first with this model: a folder, a Hugging Face id, or tiny, a toy model."""
    score_column: ColumnName = Field(default="score")
    """Column of the scores: numbers, null where a row has none."""

    option_groups: ClassVar = (
        OptionGroup(
            "scoring_first",
            "They matter where the input is scored first: with --model or --via-serve.",
            ("via_serve", *(name for name in EngineOptions.model_fields if name not in ALWAYS_USED)),
        ),
    )


class ScoredInput:
    """The scored corpus of a job; mistakes in the input show when this is made, before Ray starts.

    Args:
        options: the job.
        takes_candidates: whether the job can have several scores a row, in a list, as `jobs.score` writes them for
            candidates.
        takes_pairs: whether it can have two, as `jobs.score` writes them for pairs.
        load: makes the model on a worker.

    Raises:
        CorpusError: the input has no scores and no model is named, or it has both.
        OutputError: the output is no location, or its bucket is not there.
    """

    def __init__(
        self,
        options: ScoredOptions,
        *,
        takes_candidates: bool = False,
        takes_pairs: bool = False,
        load: Callable[[ModelSpec], RewardModel] = ModelSpec.load,
    ) -> None:
        self._options = options
        Ledger(options.output)  # raises where no output can be
        scores_first = options.model is not None or options.via_serve is not None
        scored = _scored_location(options.output) if scores_first else None
        self.corpus = Corpus.open(options.input, output=options.output, companion=scored)
        """The input as it is."""
        self._scoring: ScoringRun | None = None
        self.location = options.input
        """Where the scored rows are, or will be."""
        self.candidate_scores: str | None = None
        """The column of lists of scores, where rows hold candidates."""
        self.pair_scores: tuple[str, str] | None = None
        """The columns of the scores of the chosen and of the rejected side, where rows are pairs."""
        if scored is not None:
            self._check_unscored()
            self.location = scored
            self._scoring = ScoringRun(
                options,
                source=options.input,
                output=self.location,
                prefix=self._prefix(),
                load=load,
                corpus=self.corpus,
            )
        if scored is None and takes_candidates:
            self.candidate_scores = _candidate_scores(self.corpus, options)
        if scored is None and takes_pairs:
            self.pair_scores = _pair_scores(self.corpus, options)
        if scored is None and self.candidate_scores is None and self.pair_scores is None:
            _check_scored(self.corpus, options.score_column)

    def scored(self, resources: ClusterResources) -> Corpus:
        """The corpus with its scores, on the connected Ray: what is not scored yet is scored now.

        Raises:
            RaywardError: scoring stops; what is committed stays.
        """
        if self._scoring is None:
            return self.corpus
        self._scoring.run(resources)
        logger.info("%s", self._scoring.summary)
        return Corpus.open(self.location)

    def _prefix(self) -> str:
        return self._options.score_column.removesuffix("score")

    def _check_unscored(self) -> None:
        column = self._options.score_column
        if not column.endswith("score"):
            raise CorpusError(f"--score-column {column}: with --model or --via-serve its name must end in 'score'")
        if column in self.corpus.schemas[0].names:
            raise CorpusError(
                f"the input has a column {column!r} already: leave --model and --via-serve out to use it, or name the "
                f"new one with --score-column, such as --score-column new_{column}"
            )


def _scored_location(output: str) -> str:
    """Beside the output, where no reader of it finds the rows a second time; inside where a run has begun it there."""
    before = below(output, SCORED)
    return beside(output, SCORED) if Ledger(before).read_manifest() is None else before


def _candidate_scores(corpus: Corpus, options: ScoredOptions) -> str | None:
    """The column of lists of scores that all files have: the one named, or by default `scores` without a `score`."""
    names = [options.score_column]
    if "score_column" not in options.model_fields_set:
        names.append(SCORES)
    schema = corpus.schemas[0]
    name = next((name for name in names if name in schema.names), None)
    if name is None or not _are_score_lists(schema.field(name).type):
        return None
    for file, schema in zip(corpus.files, corpus.schemas, strict=True):
        if name not in schema.names or not _are_score_lists(schema.field(name).type):
            raise CorpusError(
                f"{file.path} has no lists of scores in a column {name!r}, which the files before it have"
            )
    return name


def _pair_scores(corpus: Corpus, options: ScoredOptions) -> tuple[str, str] | None:
    """The columns of both scores of pairs that all files have, under the prefix of --score-column; None where one of
    that name itself is there."""
    column = options.score_column
    prefix = column.removesuffix("score")
    names = (f"{prefix}chosen_score", f"{prefix}rejected_score")
    first = corpus.schemas[0]
    if column in first.names or not set(names) <= set(first.names):
        return None
    for name in names:
        _check_scored(corpus, name)
    return names


def _are_score_lists(kind: pa.DataType) -> bool:
    return is_list(kind) and pa.types.is_floating(kind.value_type)


def _check_scored(corpus: Corpus, column: str) -> None:
    for file, schema in zip(corpus.files, corpus.schemas, strict=True):
        if column not in schema.names:
            raise CorpusError(f"{file.path} has no column {column!r}: {_advice(schema)}")
        kind = schema.field(column).type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)):
            raise CorpusError(f"{file.path}: column {column!r} is {kind}; scores are numbers")


def _advice(schema: pa.Schema) -> str:
    """How a corpus without the column of scores is read."""
    if {"chosen_score", "rejected_score"} <= set(schema.names):
        return (
            "its rows are scored pairs. jobs.pairs filters and flips them, jobs.report shows them, and jobs.rank takes "
            "--score-column margin with --global-top-k and an --output-prefix"
        )
    if SCORES in schema.names and _are_score_lists(schema.field(SCORES).type):
        return "its rows are scored candidates, in lists. jobs.rank makes a row of each, which this job reads"
    return "name the scores with --score-column, or score the input now with --model (tiny to try it out)"
