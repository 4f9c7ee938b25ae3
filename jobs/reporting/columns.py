"""Columns of a scored corpus that a report is about: those named, or those that the jobs of this project write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from jobs.corpus.conversations import ConversationColumns, is_list
from jobs.corpus.files import Corpus
from jobs.corpus.readings import conversation_reading
from jobs.errors import CorpusError
from jobs.grouping.keys import GroupKeys

BY_NAMES = ("domain", "subset", "category", "language", "lang")
LABEL_NAMES = ("preferred", "is_preferred", "label", "preference")
PAIR_NAMES = (("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"))


@dataclass(frozen=True, slots=True)
class ScoreColumn:
    """A column of scores, the columns of its token counts and errors, and the texts that it scored; `turns` has the
    scores after each answer, in lists.
    """

    name: str
    tokens: str | None
    error: str | None
    texts: ConversationColumns
    turns: str | None = None


@dataclass(frozen=True, slots=True)
class PairColumns:
    """Two columns of scores: in every row those of the preferred and of the other response."""

    chosen: ScoreColumn
    rejected: ScoreColumn

    @property
    def name(self) -> str:
        """The name of the two together."""
        return f"{self.chosen.name} over {self.rejected.name}"


@dataclass(frozen=True, slots=True)
class LabelColumn:
    """A column that tells preferred rows from others; rows with one key are candidates of one prompt."""

    name: str
    keys: GroupKeys


@dataclass(frozen=True, slots=True)
class ChosenColumns:
    """The columns that the user named; what is empty is looked for."""

    scores: tuple[str, ...] = ()
    by: tuple[str, ...] = ()
    label: str | None = None
    pair: tuple[str, str] | None = None
    group_by: str | None = None
    tokens: str | None = None
    error: str | None = None
    texts: ConversationColumns = field(default_factory=ConversationColumns)


@dataclass(frozen=True, slots=True)
class ReportColumns:
    """The columns of a report. Groups and a label that were found and not named may prove unfit."""

    scores: tuple[ScoreColumn, ...]
    by: tuple[str, ...]
    label: LabelColumn | None
    pair: PairColumns | None
    guessed_by: bool
    guessed_label: bool

    @classmethod
    def of(cls, corpus: Corpus, chosen: ChosenColumns) -> ReportColumns:
        """The columns to report on, which every file has.

        Raises:
            CorpusError: there are no scores, or a column that was named is not there or has the wrong type.
        """
        finder = _Finder(corpus, chosen)
        pair = finder.pair()
        scores = finder.scores(pair)
        label = finder.label() if pair is None else None
        by = tuple(dict.fromkeys(chosen.by)) or finder.having(BY_NAMES, _is_groupable)
        for name in chosen.by:
            finder.check(name, "--by", _is_groupable, "text, whole numbers or booleans")
        return cls(scores, by, label, pair, guessed_by=not chosen.by, guessed_label=chosen.label is None)

    def narrow(self) -> list[str]:
        """All columns but those of texts."""
        names = [name for score in self.scores for name in (score.name, score.tokens, score.error, score.turns)]
        return sorted({name for name in (*names, *self.by, self.label and self.label.name) if name})


class _Finder:
    """Looks columns up in all files of a corpus."""

    def __init__(self, corpus: Corpus, chosen: ChosenColumns) -> None:
        self._files = list(zip((file.path for file in corpus.files), corpus.schemas, strict=True))
        self._chosen = chosen
        first = corpus.schemas[0]
        self._names = [name for name in first.names if all(schema.names.count(name) == 1 for _, schema in self._files)]

    def having(self, names: tuple[str, ...], fits: Callable[[pa.DataType], bool]) -> tuple[str, ...]:
        """The `names` that every file has, with a type that fits."""
        return tuple(name for name in names if name in self._names and all(map(fits, self._types(name))))

    def check(self, name: str, flag: str, fits: Callable[[pa.DataType], bool], wanted: str) -> None:
        for path, schema in self._files:
            if schema.names.count(name) != 1:
                number = f"{schema.names.count(name)} columns" if name in schema.names else "no column"
                raise CorpusError(f"{path} has {number} {name!r} for {flag}; it has {', '.join(schema.names)}")
            if not fits(kind := schema.field(name).type):
                raise CorpusError(f"{path}: column {name!r} is {kind}; {flag} takes {wanted}")

    def pair(self) -> PairColumns | None:
        names = self._chosen.pair
        if names is None:
            if self._chosen.label is not None:
                return None
            names = next((pair for pair in PAIR_NAMES if len(self.having(pair, _is_number)) == 2), None)
            if names is None or (self._chosen.scores and not set(names) <= set(self._chosen.scores)):
                return None
        for name in names:
            self.check(name, "--pair", _is_number, "numbers")
        return PairColumns(self._score(names[0]), self._score(names[1]))

    def scores(self, pair: PairColumns | None) -> tuple[ScoreColumn, ...]:
        names = self._chosen.scores
        if not names:
            found = self.having(("score",), _is_number)
            ending = tuple(name for name in self._names if name.endswith("score"))
            own = (pair.chosen.name, pair.rejected.name) if pair else ()
            names = own or found or self.having(ending, _is_number)
        if not names:
            raise CorpusError(self._no_scores())
        for name in names:
            self.check(name, "--score-column", _is_number, "numbers")
        paired = (pair.chosen.name, pair.rejected.name) if pair else ()
        return tuple(self._score(name) for name in dict.fromkeys((*names, *paired)))

    def _no_scores(self) -> str:
        path, schema = self._files[0]
        if "scores" in schema.names:
            return (
                f"{path} has candidates, with lists of scores in 'scores', and no column 'score': python -m jobs.rank "
                "makes a row of each, which this job reads"
            )
        numbers = [field.name for field in schema if _is_number(field.type)]
        there = f"its columns of numbers are {', '.join(numbers)}" if numbers else "it has no columns of numbers"
        return (
            f"{path} has no column 'score', and {there}: name the scores with --score-column, or score the input "
            "first with python -m jobs.score"
        )

    def label(self) -> LabelColumn | None:
        name = self._chosen.label
        if name is not None:
            self.check(name, "--label", _is_groupable, "booleans, 1 and 0, or 'chosen' and 'rejected'")
            keys = self._keys()
            if keys is None:
                raise CorpusError(
                    f"{self._files[0][0]}: --label pairs the candidates of one prompt, and there is neither a "
                    "'messages' nor a 'prompt' column; name one with --group-by"
                )
            return LabelColumn(name, keys)
        found = self.having(LABEL_NAMES, lambda kind: _is_text(kind) or pa.types.is_boolean(kind))
        keys = self._keys() if found else None
        return LabelColumn(found[0], keys) if keys is not None else None

    def _keys(self) -> GroupKeys | None:
        if self._chosen.group_by is not None:
            self.check(self._chosen.group_by, "--group-by", lambda _: True, "any type")
            return GroupKeys(self._chosen.group_by, None)
        columns = set(self._conversations())
        return GroupKeys(None, columns.pop()) if len(columns) == 1 else None

    def _conversations(self) -> Iterator[ConversationColumns]:
        named = self._chosen.texts != ConversationColumns()
        for path, schema in self._files:
            try:
                yield conversation_reading(schema, self._chosen.texts)
            except CorpusError as error:
                if named:
                    raise CorpusError(f"{path}: {error}") from None
                return

    def _score(self, name: str) -> ScoreColumn:
        """With the companions that `jobs.score` writes beside it, under the same prefix."""
        prefix = name.removesuffix("score") if name.endswith("score") else ""
        tokens, error = self._chosen.tokens, self._chosen.error
        if tokens is not None:
            self.check(tokens, "--tokens-column", _is_number, "numbers")
        if error is not None:
            self.check(error, "--error-column", _is_text, "text")
        found_tokens = self.having((f"{prefix}num_tokens", "num_tokens"), _is_number)
        found_errors = self.having((f"{prefix}error", "error"), _is_text)
        return ScoreColumn(
            name,
            tokens or next(iter(found_tokens), None),
            error or next(iter(found_errors), None),
            self._texts(name),
            next(iter(self.having((f"{prefix}turn_scores",), _are_numbers)), None),
        )

    def _texts(self, score: str) -> ConversationColumns:
        """The text that was scored: of `chosen_score` or `score_chosen` the column `chosen`, else the conversation."""
        side = score.removesuffix("_score").removeprefix("score_")
        if side != score and side in self._names:
            has_prompt = "prompt" in self._names
            return ConversationColumns(prompt="prompt", response=side) if has_prompt else ConversationColumns(side)
        columns = set(self._conversations())
        return columns.pop() if len(columns) == 1 else ConversationColumns()

    def _types(self, name: str) -> list[pa.DataType]:
        return [schema.field(name).type for _, schema in self._files]


def _is_number(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (pa.types.is_floating, pa.types.is_integer, pa.types.is_null))


def _are_numbers(kind: pa.DataType) -> bool:
    return is_list(kind) and _is_number(kind.value_type)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
    return any(is_kind(kind) for is_kind in kinds)


def _is_groupable(kind: pa.DataType) -> bool:
    return _is_text(kind) or any(is_kind(kind) for is_kind in (pa.types.is_integer, pa.types.is_boolean))
