"""The shipped sample is what its source says, and every job can read it."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pyarrow.parquet as pq

from jobs.corpus.conversations import ConversationColumns, conversations, prompts
from jobs.corpus.readings import conversation_reading
from jobs.demo import SAMPLE
from serve_app.reward_model.conversation import Conversation
from tests.jobs.sample import sample_table


def test_the_shipped_file_is_made_of_its_source() -> None:
    assert pq.read_table(SAMPLE).equals(sample_table())


def test_each_prompt_has_two_to_four_responses_of_which_one_is_preferred() -> None:
    groups: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in pq.read_table(SAMPLE).to_pylist():
        groups[row["prompt_id"]].append(row)
    assert list(groups) == list(range(16))
    for rows in groups.values():
        assert 2 <= len(rows) <= 4
        assert [row["preferred"] for row in rows].count(True) == 1
        assert len({row["response"] for row in rows}) == len(rows)
        assert all(row["prompt"] == rows[0]["prompt"] for row in rows)
    assert {row["language"] for rows in groups.values() for row in rows} == {"en", "zh"}
    assert {len(rows[0]["prompt"]) for rows in groups.values()} == {1, 2, 3, 4}  # one turn and several


def test_rows_are_conversations_and_prompts_by_the_names_that_jobs_look_for() -> None:
    table = pq.read_table(SAMPLE)
    columns = conversation_reading(table.schema, ConversationColumns())
    assert (columns.prompt, columns.response) == ("prompt", "response")
    assert all(isinstance(row, Conversation) for row in conversations(table, columns))
    assert all(isinstance(row, Conversation) for row in prompts(table, columns))
