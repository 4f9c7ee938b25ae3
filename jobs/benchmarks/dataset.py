"""A benchmark's dataset, known by its columns, and its rows' conversations. Next stop: `conversation_file.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pyarrow as pa

from jobs.benchmarks.rewardbench2 import TIES, ties_number
from jobs.corpus.conversations import describe, is_messages, is_text
from jobs.corpus.files import Corpus
from jobs.corpus.turns import without_nulls
from jobs.errors import CorpusError
from serve_app.reward_model.conversation import Conversation
from serve_app.reward_model.errors import ConversationError

NO_SUBSET = "(none)"
CHOSEN, REJECTED = "chosen", "rejected"


class Benchmark(Enum):
    """The benchmarks, by name."""

    REWARDBENCH = "RewardBench"
    REWARDBENCH_2 = "RewardBench 2"


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of a row with its conversation, or the `problem` why it, or the whole row, has none.

    `num_correct` answers of the row are right, the first ones. 0 tells that the row's answers cannot be told apart.
    """

    num_correct: int
    conversation: Conversation | None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Dataset:
    """The reading of a dataset's rows; `names` are the columns that are read."""

    benchmark: Benchmark
    names: frozenset[str]
    system_prompt_column: str | None = None

    @classmethod
    def of(cls, corpus: Corpus, *, system_prompt_column: str | None = None) -> Dataset:
        """The layout that all files of a corpus have.

        Raises:
            CorpusError: a file has that of no benchmark, or another one than the file before it.
        """
        found: dict[Dataset, str] = {}
        for file, schema in zip(corpus.files, corpus.schemas, strict=True):
            try:
                found.setdefault(cls.detect(schema, system_prompt_column), file.path)
            except CorpusError as error:
                raise CorpusError(f"{file.path}: {error}") from None
        if len(found) > 1:
            (first, one), (second, other) = list(found.items())[:2]
            raise CorpusError(
                f"{one} has the columns {sorted(first.names)} of {first.benchmark.value}, {other} has "
                f"{sorted(second.names)} of {second.benchmark.value}; give datasets of one kind at a time"
            )
        return next(iter(found))

    @classmethod
    def detect(cls, schema: pa.Schema, system_prompt_column: str | None = None) -> Dataset:
        """RewardBench has one chosen and one rejected answer a row, RewardBench 2 a list of each.

        Answers are strings or messages (a list of {role, content}), prompts too. Where RewardBench's answers are
        messages, the prompt may be missing.

        Raises:
            CorpusError: the columns are those of neither; the text lists what is wanted and what was found.
        """
        kinds = {name: _kind(schema.field(name).type) for name in (CHOSEN, REJECTED) if schema.names.count(name) == 1}
        benchmark = {
            ("answer", "answer"): Benchmark.REWARDBENCH,
            ("answers", "answers"): Benchmark.REWARDBENCH_2,
        }.get((kinds.get(CHOSEN, ""), kinds.get(REJECTED, "")))
        if benchmark is None:
            raise CorpusError(_refusal("'chosen' and 'rejected' must be two answers, or two lists of them", schema))
        if problems := list(_problems(schema, benchmark)):
            raise CorpusError(_refusal("; ".join(problems), schema))
        names = _read(benchmark) & set(schema.names)
        if system_prompt_column is not None:
            if system_prompt_column not in schema.names or not is_text(schema.field(system_prompt_column).type):
                raise CorpusError(f"there is no column {system_prompt_column!r} of strings.\n{describe(schema)}")
            names |= {system_prompt_column}
        return cls(benchmark, frozenset(names), system_prompt_column)

    def answers(self, cells: Mapping[str, Any]) -> list[Answer]:
        """The answers of a row, the right ones first. A row that has none gives one, which tells why."""
        if problem := self._unreadable(cells):
            return [Answer(0, None, problem)]
        if self.benchmark is Benchmark.REWARDBENCH:
            texts, num_correct = [cells[CHOSEN], cells[REJECTED]], 1
        else:
            if problem := _problem_of_lists(cells):
                return [Answer(0, None, problem)]
            texts, num_correct = [*cells[CHOSEN], *cells[REJECTED]], int(cells["num_correct"])
        return [self._answer(cells, text, num_correct, place) for place, text in enumerate(texts)]

    def _unreadable(self, cells: Mapping[str, Any]) -> str | None:
        """The problem of a row in which a cell cannot be read, such as text that is not UTF-8."""
        found = (f"{name}: {cell}" for name, cell in cells.items() if isinstance(cell, ConversationError))
        return next(found, None)

    def subset(self, cells: Mapping[str, Any]) -> str:
        """The row's subset, `(none)` where it is null."""
        return NO_SUBSET if not isinstance(cells["subset"], str) else cells["subset"]

    def id(self, cells: Mapping[str, Any]) -> str | None:
        """The row's id as a string, None where it has none."""
        return None if cells.get("id") is None or isinstance(cells["id"], ConversationError) else str(cells["id"])

    def system_prompt(self, cells: Mapping[str, Any]) -> str | None:
        """The row's system message, None where it has none."""
        cell = None if self.system_prompt_column is None else cells[self.system_prompt_column]
        return cell if isinstance(cell, str) else None

    def ties_number(self, cells: Mapping[str, Any]) -> tuple[str, int] | None:
        """The kind and number of a row of RewardBench 2's Ties, None for other rows.

        Raises:
            CorpusError: its id is neither `ref:N` nor `tied:N`.
        """
        is_ties = self.benchmark is Benchmark.REWARDBENCH_2 and self.subset(cells) == TIES
        return ties_number(self.id(cells)) if is_ties else None

    def _answer(self, cells: Mapping[str, Any], text: Any, num_correct: int, place: int) -> Answer:
        try:
            return Answer(num_correct, _conversation(cells.get("prompt"), text))
        except ConversationError as error:
            side = "chosen" if place < num_correct else "rejected"
            return Answer(num_correct, None, f"{side} answer: {error}")


def _read(benchmark: Benchmark) -> set[str]:
    return {"id", "prompt", CHOSEN, REJECTED, "subset"} | (
        {"num_correct"} if benchmark is Benchmark.REWARDBENCH_2 else set()
    )


def _kind(kind: pa.DataType) -> str:
    """`answer` for a string or messages, `answers` for a list of either, else nothing."""
    if is_text(kind) or is_messages(kind):
        return "answer"
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return "answers" if is_list and _kind(kind.value_type) == "answer" else ""


def _problems(schema: pa.Schema, benchmark: Benchmark) -> Iterator[str]:
    for name in sorted(_read(benchmark)):
        if schema.names.count(name) > 1:
            yield f"there are {schema.names.count(name)} columns {name!r}"
    types = {field.name: field.type for field in schema}
    if "subset" not in types or not is_text(types["subset"]):
        yield "'subset' must be a column of strings"
    if "prompt" in types and _kind(types["prompt"]) != "answer":
        yield "'prompt' must be a string or messages"
    if "prompt" not in types and (benchmark is Benchmark.REWARDBENCH_2 or not is_messages(types[CHOSEN])):
        yield "there is no 'prompt'"
    if benchmark is Benchmark.REWARDBENCH_2:
        if "id" not in types:
            yield "there is no 'id'"
        if "num_correct" not in types or not pa.types.is_integer(types["num_correct"]):
            yield "'num_correct' must be a column of integers"


def _refusal(problem: str, schema: pa.Schema) -> str:
    return (
        f"these are not the columns of a benchmark: {problem}. RewardBench has prompt, chosen, rejected, subset; "
        "RewardBench 2 has id, prompt, chosen (a list), rejected (a list), num_correct, subset.\n" + describe(schema)
    )


def _problem_of_lists(cells: Mapping[str, Any]) -> str | None:
    for name in (CHOSEN, REJECTED, "num_correct"):
        if cells[name] is None:
            return f"{name} is null"
    total = len(cells[CHOSEN]) + len(cells[REJECTED])
    if not 0 < cells["num_correct"] < total:
        return f"num_correct is {cells['num_correct']} of {total} answers; there must be a right and a wrong one"
    return None


def _conversation(prompt: Any, answer: Any) -> Conversation:
    """The conversation that ends in `answer`: prompt and answer, or messages alone if they begin with the prompt.

    Messages go on from the prompt when the first of them is the assistant's, as TRL has them; else they are the whole
    conversation, as in the preference sets that RewardBench's own loader reads.
    """
    if answer is None:
        raise ConversationError("it is null")
    turns = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else [*map(without_nulls, answer)]
    if not turns:
        raise ConversationError("it has no messages")
    if isinstance(answer, str) or _role(turns[0]) == "assistant":
        turns = [*_prompt(prompt), *turns]
    return Conversation.parse(turns)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else None


def _prompt(prompt: Any) -> Sequence[Any]:
    if prompt is None:
        raise ConversationError("the prompt is null")
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*map(without_nulls, prompt)]
