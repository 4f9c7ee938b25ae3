"""A corpus that has scores: the input as it is, or, where a model is named, scored first into the output folder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
from pydantic import Field

from cluster.connect import ClusterResources
from jobs.command import OptionGroup
from jobs.corpus.candidates import CandidateColumns
from jobs.corpus.conversations import ConversationColumns, is_list
from jobs.corpus.files import Corpus
from jobs.corpus.preferences import PreferenceColumns
from jobs.corpus.readings import Reading, conversation_columns
from jobs.corpus.sources import Source
from jobs.corpus.storage import below, beside
from jobs.errors import CorpusError
from jobs.options import ColumnName, CorpusOptions, EngineOptions, ReadingOptions
from jobs.runs.ledger import Ledger
from jobs.scoring.run import ScoringRun
from serve_app.reward_model import ModelSpec

if TYPE_CHECKING:
    from serve_app.reward_model import RewardModel

logger = logging.getLogger(__name__)
SCORES = "scores"
SCORED = "_scored"  # what the name of the scored corpus ends in; earlier versions made it a folder inside the output
# Engine options that such a job needs for its own work too.
SCORING_ONLY = ("reads", "via_serve", "reuse", "remember_scores")
ALWAYS_USED = ("rows_per_unit", "progress", "address")


class ScoredOptions(ReadingOptions, CorpusOptions):
    """A job that reads scores, and may have them made first."""

    model: str | None = None
    """Score the input first with this model: a folder, a Hugging Face id, or tiny, a toy model."""
    score_column: ColumnName = Field(default="score")
    """Column of the scores: numbers, null where a row has none."""

    option_groups: ClassVar = (
        OptionGroup(
            "scoring_first",
            "They matter where the input is scored first: with --model or --via-serve.",
            (*SCORING_ONLY, *(name for name in EngineOptions.model_fields if name not in ALWAYS_USED)),
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
        plan = Ledger(scored or options.output).plan()
        self.corpus = Corpus.open(options.source, output=options.output, companion=scored, plan=plan)
        """The input as it is."""
        self._scoring: ScoringRun | None = None
        self.location = scored
        """Where the rows are that are scored first; None where the input has its scores."""
        self.candidate_scores: str | None = None
        """The column of lists of scores, where rows hold candidates."""
        self.pair_scores: tuple[str, str] | None = None
        """The columns of the scores of the chosen and of the rejected side, where rows are pairs."""
        if scored is not None:
            self._check_unscored()
            self._scoring = ScoringRun(
                options,
                source=options.source,
                output=scored,
                prefix=self._prefix(),
                load=load,
                corpus=self.corpus,
            )
            self._take(self._scoring.reading, takes_candidates=takes_candidates, takes_pairs=takes_pairs)
        if scored is None and takes_candidates:
            self.candidate_scores = _candidate_scores(self.corpus, options)
        if scored is None and takes_pairs:
            self.pair_scores = _pair_scores(self.corpus, options)
        if scored is None and self.candidate_scores is None and self.pair_scores is None:
            _check_scored(self.corpus, options.score_column)

    def _take(self, reading: Reading, *, takes_candidates: bool, takes_pairs: bool) -> None:
        """Note the columns that scoring rows of this reading makes; refuse one that the job cannot have."""
        prefix = self._prefix()
        if isinstance(reading, CandidateColumns):
            if not takes_candidates:
                raise CorpusError(
                    f"the input has several responses a row, in {reading.responses!r}: jobs.rank --model makes a row "
                    "of each, which this job reads"
                )
            self.candidate_scores = f"{prefix}{SCORES}"
        elif isinstance(reading, PreferenceColumns):
            if not takes_pairs:
                raise CorpusError(
                    "the input has pairs, in 'chosen' and 'rejected': jobs.score scores them, and this job then takes "
                    "--score-column margin with --global-top-k and an --output-prefix"
                )
            self.pair_scores = (f"{prefix}chosen_score", f"{prefix}rejected_score")

    @property
    def identity(self) -> dict[str, Any]:
        """The entries of a run's identity that say which scores it reads."""
        return Source.of(self.location or self._options.source).identity

    def conversations(self) -> ConversationColumns:
        """The columns of conversations, the same in every file.

        Raises:
            CorpusError: a file has none, several, or others than the file before it.
        """
        if self._scoring is not None and isinstance(self._scoring.reading, ConversationColumns):
            return self._scoring.reading
        return conversation_columns(self.corpus, self._options.columns)

    def scored(self, resources: ClusterResources) -> Corpus:
        """The corpus with its scores, on the connected Ray: what is not scored yet is scored now.

        Raises:
            RaywardError: scoring stops; what is committed stays.
        """
        if self._scoring is None or self.location is None:
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
