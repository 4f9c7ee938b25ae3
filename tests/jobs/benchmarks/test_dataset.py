"""Which benchmark the columns tell, and the conversations of each form that rows come in."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from jobs.benchmarks.dataset import Benchmark, Dataset
from jobs.errors import CorpusError
from tests.conftest import chat

PAIR = {"prompt": "hi", "chosen": "yes", "rejected": "no", "subset": "s"}
LISTS = {"id": "1", "prompt": "hi", "chosen": ["yes"], "rejected": ["no", "never"], "num_correct": 1, "subset": "Math"}


def schema(cells: dict[str, Any]) -> pa.Schema:
    return pa.Table.from_pylist([cells]).schema


def answers(cells: dict[str, Any]) -> list[list[dict[str, str]] | str | None]:
    """The messages of each answer, or its problem."""
    found = Dataset.detect(schema(cells)).answers(cells)
    return [
        [{"role": message.role, "content": message.content} for message in answer.conversation.messages]
        if answer.conversation
        else answer.problem
        for answer in found
    ]


def test_the_columns_tell_the_benchmark() -> None:
    assert Dataset.detect(schema(PAIR)).benchmark is Benchmark.REWARDBENCH
    assert Dataset.detect(schema(LISTS)).benchmark is Benchmark.REWARDBENCH_2
    assert Dataset.detect(schema(PAIR | {"chosen_model": "x", "id": 3})).names == {*PAIR, "id"}


def without(cells: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in cells.items() if key != name}


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        (without(PAIR, "subset"), "'subset' must be a column of strings"),
        (PAIR | {"subset": 3}, "'subset' must be a column of strings"),
        (without(PAIR, "prompt"), "there is no 'prompt'"),
        (PAIR | {"prompt": 3}, "'prompt' must be a string or messages"),
        (without(PAIR, "rejected"), "'chosen' and 'rejected' must be two answers, or two lists of them"),
        (PAIR | {"rejected": ["no", "never"]}, "'chosen' and 'rejected' must be two answers, or two lists of them"),
        (PAIR | {"chosen": 1.0, "rejected": 2.0}, "'chosen' and 'rejected' must be two answers, or two lists of them"),
        (without(LISTS, "id"), "there is no 'id'"),
        (without(LISTS, "num_correct"), "'num_correct' must be a column of integers"),
        ({"messages": chat("hi", "yes")}, "'chosen' and 'rejected' must be two answers"),
    ],
)
def test_other_columns_are_refused_with_what_is_wanted_and_what_was_found(cells: dict[str, Any], told: str) -> None:
    with pytest.raises(CorpusError) as caught:
        Dataset.detect(schema(cells))
    assert told in str(caught.value)
    assert "RewardBench has prompt, chosen, rejected, subset" in str(caught.value)
    assert all(name in str(caught.value).splitlines()[-1] for name in cells)


def test_columns_of_one_name_are_refused() -> None:
    twice = pa.schema([*schema(PAIR), pa.field("prompt", pa.string())])
    with pytest.raises(CorpusError, match="there are 2 columns 'prompt'"):
        Dataset.detect(twice)


@pytest.mark.parametrize("prompt", ["hi", chat("hi")])
def test_prompt_and_answer_make_a_conversation(prompt: Any) -> None:
    assert answers(PAIR | {"prompt": prompt}) == [chat("hi", "yes"), chat("hi", "no")]
    assert answers(LISTS | {"prompt": prompt}) == [chat("hi", "yes"), chat("hi", "no"), chat("hi", "never")]


def test_answers_that_are_messages_go_on_from_the_prompt_or_hold_it() -> None:
    whole = {"chosen": chat("hi", "yes"), "rejected": chat("hi", "no"), "subset": "s"}
    assert answers(whole) == [chat("hi", "yes"), chat("hi", "no")]
    assert answers(whole | {"prompt": "hi"}) == [chat("hi", "yes"), chat("hi", "no")]
    ends = {"chosen": chat("hi", "yes")[1:], "rejected": chat("hi", "no")[1:], "subset": "s"}
    assert answers(ends | {"prompt": chat("hi")}) == [chat("hi", "yes"), chat("hi", "no")]
    assert answers(ends) == ["chosen answer: the prompt is null", "rejected answer: the prompt is null"]
    assert answers(LISTS | {"chosen": [chat("hi", "yes")], "rejected": [chat("hi", "no")]}) == [
        chat("hi", "yes"), chat("hi", "no")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("cells", "problems"),
    [
        (PAIR | {"prompt": None}, ["chosen answer: the prompt is null", "rejected answer: the prompt is null"]),
        (PAIR | {"rejected": None}, [chat("hi", "yes"), "rejected answer: it is null"]),
        (LISTS | {"rejected": ["no", None]}, [chat("hi", "yes"), chat("hi", "no"), "rejected answer: it is null"]),
        (LISTS | {"num_correct": 3}, ["num_correct is 3 of 3 answers; there must be a right and a wrong one"]),
        (LISTS | {"num_correct": 0}, ["num_correct is 0 of 3 answers; there must be a right and a wrong one"]),
    ],
)
def test_what_cannot_be_scored_is_told_by_answer(cells: dict[str, Any], problems: list[Any]) -> None:
    assert answers(cells) == problems


@pytest.mark.parametrize("name", ["chosen", "rejected", "num_correct"])
def test_a_row_of_lists_that_has_none_is_one_problem(name: str) -> None:
    found = Dataset.detect(schema(LISTS)).answers(LISTS | {name: None})
    assert [(answer.num_correct, answer.problem) for answer in found] == [(0, f"{name} is null")]


def test_a_null_subset_has_a_name_and_an_id_is_text() -> None:
    dataset = Dataset.detect(schema(PAIR | {"id": 3}))
    assert dataset.subset(PAIR | {"subset": None}) == "(none)"
    assert (dataset.id({"id": 3}), dataset.id({"id": None}), dataset.id({})) == ("3", None, None)


def test_a_system_prompt_column_is_read_and_must_be_there() -> None:
    cells = PAIR | {"domain": "be kind"}
    assert Dataset.detect(schema(cells), "domain").system_prompt(cells) == "be kind"
    assert Dataset.detect(schema(cells)).system_prompt(cells) is None
    with pytest.raises(CorpusError, match="there is no column 'style' of strings"):
        Dataset.detect(schema(cells), "style")
