"""Which columns a report is about: found by name, or named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.corpus.conversations import ConversationColumns
from jobs.corpus.files import Corpus
from jobs.errors import CorpusError
from jobs.reporting.columns import ChosenColumns, ReportColumns

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
TYPES = {
    "messages": MESSAGES,
    "chosen": MESSAGES,
    "rejected": MESSAGES,
    "preferred": pa.bool_(),
    "num_tokens": pa.int32(),
    "x_num_tokens": pa.int64(),
    "score": pa.float32(),
    "x_score": pa.float64(),
    "chosen_score": pa.float32(),
    "rejected_score": pa.float32(),
    "score_chosen": pa.float32(),
    "score_rejected": pa.float32(),
    "stars": pa.int8(),
}


def found(tmp_path: Path, *files: str, **chosen: Any) -> ReportColumns:
    """The columns of a corpus whose files have the named columns."""
    for number, names in enumerate(files):
        schema = pa.schema([(name, TYPES.get(name, pa.string())) for name in names.split()])
        pq.write_table(schema.empty_table(), tmp_path / f"{number}.parquet")
    return ReportColumns.of(Corpus.open(str(tmp_path)), ChosenColumns(**chosen))


def test_what_the_jobs_write_is_found(tmp_path: Path) -> None:
    columns = found(tmp_path, "prompt response preferred domain language score num_tokens truncated error rank")
    (score,) = columns.scores
    assert (score.name, score.tokens, score.error) == ("score", "num_tokens", "error")
    assert score.texts == ConversationColumns(prompt="prompt", response="response")
    assert columns.by == ("domain", "language")
    assert columns.label is not None
    assert columns.label.name == "preferred"
    assert columns.guessed_by
    assert columns.guessed_label
    assert columns.pair is None


def test_a_prefix_is_that_of_all_score_columns(tmp_path: Path) -> None:
    (score,) = found(tmp_path, "messages x_score x_num_tokens x_error num_tokens error").scores
    assert (score.name, score.tokens, score.error) == ("x_score", "x_num_tokens", "x_error")


@pytest.mark.parametrize(
    ("names", "pair", "texts"),
    [
        (
            "chosen rejected chosen_score rejected_score",
            ("chosen_score", "rejected_score"),
            ConversationColumns("chosen"),
        ),
        (
            "prompt chosen rejected score_chosen score_rejected margin",
            ("score_chosen", "score_rejected"),
            ConversationColumns(prompt="prompt", response="chosen"),
        ),
    ],
)
def test_two_columns_of_scores_make_each_row_a_pair(
    tmp_path: Path, names: str, pair: tuple[str, str], texts: ConversationColumns
) -> None:
    columns = found(tmp_path, names)
    assert columns.pair is not None
    assert (columns.pair.chosen.name, columns.pair.rejected.name) == pair == tuple(s.name for s in columns.scores)
    assert columns.scores[0].texts == texts
    assert columns.label is None


def test_what_one_file_lacks_is_not_found_and_what_is_named_is_not_a_guess(tmp_path: Path) -> None:
    columns = found(tmp_path, "prompt response preferred domain score", "prompt response score", by=("prompt",))
    assert columns.by == ("prompt",)
    assert columns.label is None
    assert not columns.guessed_by


@pytest.mark.parametrize(
    ("names", "chosen", "told"),
    [
        ("prompt stars", {}, "its columns of numbers are stars: name the scores with --score-column"),
        ("prompt scores", {}, "has candidates, with lists of scores in 'scores'"),
        ("prompt", {}, "no column 'score', and it has no columns of numbers"),
        ("prompt", {"scores": ("no",)}, "has no column 'no' for --score-column; it has prompt"),
        ("prompt", {"scores": ("prompt",)}, "column 'prompt' is string; --score-column takes numbers"),
        ("score", {"by": ("no",)}, "has no column 'no' for --by"),
        ("score messages", {"by": ("messages",)}, "--by takes text, whole numbers or booleans"),
        ("score", {"label": "score"}, "--label takes booleans, 1 and 0"),
        ("score preferred", {"label": "preferred"}, "nor a 'prompt' column; name one with --group-by"),
        ("score", {"pair": ("score", "no")}, "has no column 'no' for --pair"),
        ("score", {"tokens": "no"}, "has no column 'no' for --tokens-column"),
        ("score", {"texts": ConversationColumns("no")}, "there is no column 'no' for --messages-column"),
        ("score stars prompt score", {}, "no column 'score', and its columns of numbers are"),
    ],
)
def test_what_is_not_there_is_told_by_its_flag(tmp_path: Path, names: str, chosen: dict[str, Any], told: str) -> None:
    with pytest.raises(CorpusError, match=told):
        found(tmp_path, names, **chosen)
