"""The server's JSON as typed results. Anything that is not what the route promises is a `MalformedAnswerError`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn, TypeVar

from serve_app.client.errors import MalformedAnswerError


@dataclass(frozen=True, slots=True)
class Score:
    """The model's scalar for one conversation, how many tokens it read, and whether it was shortened to fit.

    `warnings` say what looks wrong in the conversation, such as `"unknown role: ..."`. `attributes` are what a gating
    head weighs to make the scalar, by name; other models have none.
    """

    value: float
    num_tokens: int
    truncated: bool
    warnings: tuple[str, ...] = ()
    attributes: Mapping[str, float] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class TurnScores:
    """The scores of one conversation after each message of the assistant, in order, and the tokens read up to each.

    `truncated` says whether any of these turns was shortened to fit. `warnings` are those of the conversation; one that
    is about a message within it names that in front, as in `"[3]: empty_response: ..."`.
    """

    values: tuple[float, ...]
    num_tokens: tuple[int, ...]
    truncated: bool
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class StepwiseScore:
    """A process reward model's score of each step of an answer, in order; `score` is what the aggregate made of them,
    where one was named.
    """

    values: tuple[float, ...]
    num_tokens: int
    score: float | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two scores; `margin` is the first less the second, `probability` its logistic (Bradley-Terry)."""

    scores: tuple[float, float]
    first_is_better: bool
    margin: float
    probability: float


@dataclass(frozen=True, slots=True)
class RankedConversation:
    """A conversation's place in the list that was asked for (`index`) and among its neighbours (`rank`, 0 the best)."""

    index: int
    score: float
    rank: int


@dataclass(frozen=True, slots=True)
class Ranking:
    """One result per conversation, in input order, and the indices from the best to the worst."""

    results: list[RankedConversation]
    order: list[int]

    @classmethod
    def of(cls, scores: list[float]) -> Ranking:
        """The ranking of `scores`; equal ones rank in input order, as the server has it."""
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        rank_of = {index: rank for rank, index in enumerate(order)}
        results = [RankedConversation(index, score, rank_of[index]) for index, score in enumerate(scores)]
        return cls(results=results, order=order)


@dataclass(frozen=True, slots=True)
class RankedResponse:
    """A response, its score, and its place in the list that was asked for."""

    index: int
    response: str
    score: float


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model that is served, and the most tokens it reads in one conversation."""

    id: str
    max_tokens: int


T = TypeVar("T")
WARNING = re.compile(r"conversations\[(?P<place>\d+)\](?:\.messages)?(?:: )?(?P<text>(?<=: ).*|\[\d+\]: .*)", re.DOTALL)


def read_json(content: bytes) -> Any:
    """The value that `content` spells.

    Raises:
        MalformedAnswerError: it is not JSON; NaN and Infinity, which Python's reader takes, are not.
    """
    try:
        return json.loads(content, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MalformedAnswerError(f"the answer is not JSON: {error}", status=200) from error


def read_model(answer: object) -> str:
    """The name of the model that scored."""
    return _field(answer, "model", str)


def read_scores(answer: object, count: int) -> list[Score]:
    """`/v1/score`: one score for each of `count` conversations, in their order."""
    warnings = _warnings(answer)
    return _by_index(
        {
            (index := _field(row, "index", int)): Score(
                value=_score(row),
                num_tokens=_field(row, "num_tokens", int),
                truncated=_field(row, "truncated", bool),
                warnings=tuple(warnings.get(index, ())),
                attributes=_attributes(row),
            )
            for row in _rows(answer, count)
        },
        count,
    )


def read_turn_scores(answer: object, count: int) -> list[TurnScores]:
    """`/v1/score` with `every_turn`: the scores of each of `count` conversations' turns, in their order."""
    warnings = _warnings(answer)
    results: dict[int, TurnScores] = {}
    for row in _rows(answer, count):
        index = _field(row, "index", int)
        values, num_tokens = _field(row, "turn_scores", list), _field(row, "turn_tokens", list)
        if len(values) != len(num_tokens) or not values:
            _refuse(f"there are {len(values)} 'turn_scores' and {len(num_tokens)} 'turn_tokens'")
        results[index] = TurnScores(
            tuple(_finite(value, "turn_scores") for value in values),
            tuple(_count(number, "turn_tokens") for number in num_tokens),
            _field(row, "truncated", bool),
            tuple(warnings.get(index, ())),
        )
    return _by_index(results, count)


def read_step_scores(answer: object, count: int) -> list[StepwiseScore]:
    """`/v1/steps`: the scores of each of `count` answers' steps, in their order."""
    warnings = _warnings(answer)
    results: dict[int, StepwiseScore] = {}
    for row in _rows(answer, count):
        index = _field(row, "index", int)
        values = tuple(_finite(value, "step_scores") for value in _field(row, "step_scores", list))
        score = _score(row) if "score" in row else None
        results[index] = StepwiseScore(values, _field(row, "num_tokens", int), score, tuple(warnings.get(index, ())))
    return _by_index(results, count)


def read_comparison(answer: object) -> Comparison:
    """`/v1/compare`"""
    scores = _field(answer, "scores", list)
    if len(scores) != 2:
        _refuse(f"'scores' has {len(scores)} values, not 2")
    first, second = (_finite(score, "scores") for score in scores)
    return Comparison(
        scores=(first, second),
        first_is_better=_field(answer, "first_is_better", bool),
        margin=_finite(_field(answer, "margin", object), "margin"),
        probability=_finite(_field(answer, "probability", object), "probability"),
    )


def read_ranking(answer: object, count: int) -> Ranking:
    """`/v1/rank`: a result for each of `count` conversations, in their order, and `order` from the best on."""
    results = _by_index(
        {
            (index := _field(row, "index", int)): RankedConversation(index, _score(row), _field(row, "rank", int))
            for row in _rows(answer, count)
        },
        count,
    )
    order = _field(answer, "order", list)
    if order != sorted(range(count), key=lambda index: results[index].rank):
        _refuse("'order' is not what the ranks say")
    if [results[index].rank for index in order] != list(range(count)):
        _refuse(f"the ranks are not the numbers below {count}")
    return Ranking(results=results, order=order)


def read_best_of_n(answer: object, responses: Sequence[str], top_n: int | None) -> list[RankedResponse]:
    """`/v1/best_of_n`: the best `top_n` of `responses`, the best first."""
    count = len(responses) if top_n is None else min(top_n, len(responses))
    results = [
        RankedResponse(_field(row, "index", int), _field(row, "response", str), _score(row))
        for row in _rows(answer, count)
    ]
    if len({result.index for result in results}) != count:
        _refuse("a response is named twice")
    for result in results:
        if not 0 <= result.index < len(responses) or responses[result.index] != result.response:
            _refuse(f"result {result.index} is not the response that was sent")
    if any(before.score < after.score for before, after in pairwise(results)):
        _refuse("the results are not sorted from the best on")
    return results


def read_models(answer: object) -> list[ModelInfo]:
    """`/v1/models`: the models served, the default first."""
    rows = _field(answer, "data", list)
    return [ModelInfo(id=_field(row, "id", str), max_tokens=_field(row, "max_tokens", int)) for row in rows]


def _rows(answer: object, count: int) -> list[Any]:
    rows: list[Any] = _field(answer, "results", list)
    if len(rows) != count:
        _refuse(f"'results' has {len(rows)} rows, not {count}")
    return rows


def _warnings(answer: object) -> dict[int, list[str]]:
    """The warnings of an answer, by the place of the conversation; the server puts the field's name in front."""
    found: dict[int, list[str]] = {}
    if not isinstance(answer, Mapping) or "warnings" not in answer:
        return found
    for warning in _field(answer, "warnings", list):
        named = WARNING.fullmatch(str(warning))
        if named is None:
            _refuse(f"a warning names no conversation: {warning!r}")
        found.setdefault(int(named["place"]), []).append(named["text"])
    return found


def _attributes(row: object) -> dict[str, float]:
    if not isinstance(row, Mapping) or "attributes" not in row:
        return {}
    return {name: _finite(value, f"attributes.{name}") for name, value in _field(row, "attributes", dict).items()}


def _by_index(results: dict[int, T], count: int) -> list[T]:
    if results.keys() != set(range(count)):
        _refuse(f"the indices are not the numbers below {count}")
    return [results[index] for index in range(count)]


def _field(row: object, name: str, kind: type[T]) -> T:
    if not isinstance(row, Mapping) or name not in row:
        _refuse(f"{name!r} is missing")
    value = row[name]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):  # True is an int to Python
        _refuse(f"{name!r} is {type(value).__name__}, not {kind.__name__}")
    return value


def _score(row: object) -> float:
    return _finite(_field(row, "score", object), "score")


def _finite(value: object, name: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        _refuse(f"{name!r} is {type(value).__name__}, not a number")
    if not abs(value) <= sys.float_info.max:  # 1e999 is JSON, and infinite once read
        _refuse(f"{name!r} is not finite")
    return float(value)


def _count(value: object, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        _refuse(f"{name!r} has {type(value).__name__}, not a whole number")
    return value


def _refuse(reason: str) -> NoReturn:
    raise MalformedAnswerError(f"the answer is malformed: {reason}", status=200)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
