"""jobs.rank on a local Ray: every row once, in order, with its rank; scoring first where a model is named."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.errors import CorpusError, OutputError
from jobs.rank import RankConfig, main, run
from serve_app.reward_model import RewardModel
from serve_app.reward_model.scores import ranks
from tests.jobs.conftest import candidates, kill_after, read_parts, write

pytestmark = pytest.mark.usefixtures("local_ray")


def config(tmp_path: Path, **options: Any) -> RankConfig:
    return RankConfig(**{"input": str(tmp_path / "in"), "output": str(tmp_path / "out"), **options})


def scored(prompt: str, score: float | None, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": "yes", "score": score, **more}


def column(output: Path, name: str) -> list[Any]:
    values: list[Any] = read_parts(output)[name].to_pylist()
    return values


def test_groups_that_span_files_and_units_are_ranked_in_input_order(tmp_path: Path) -> None:
    scores = [1.0, 3.0, 1.0, None, 2.0, 3.0, 5.0, float("nan")]
    rows = [scored("ab"[number % 2], score, id=number) for number, score in enumerate(scores)]
    write(tmp_path / "in" / "a.parquet", rows[:5])
    write(tmp_path / "in" / "b.parquet", rows[5:])
    total = run(config(tmp_path, rows_per_unit=2))
    table = read_parts(tmp_path / "out")
    assert table["id"].to_pylist() == list(range(8))
    assert table["rank"].to_pylist() == [2, 0, 3, None, 1, 1, 0, None]
    assert table["margin"].to_pylist() == [4.0, 0.0, 4.0, None, 3.0, 0.0, 0.0, None]
    assert table["group_size"].to_pylist() == [4] * 8
    assert (total.rows, total.written, total.unscored, total.ungrouped) == (8, 8, 2, 0)
    manifest = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    assert manifest["score_quantiles"]["0.5"] == 2.0
    assert run(config(tmp_path, rows_per_unit=2)) == total


@pytest.mark.usefixtures("in_process")
def test_an_unscored_corpus_is_scored_first_with_the_engines_bits(tmp_path: Path, tiny: RewardModel) -> None:
    table = candidates(12)
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "a.parquet")
    total = run(config(tmp_path, model="tiny", dtype="float32", cpus_per_actor=2, rows_per_unit=16))
    found = read_parts(tmp_path / "out")
    assert total.rows == found.num_rows == 72
    assert found.select(table.column_names).equals(table)
    rows = found.to_pylist()
    scores = tiny.get_scores(
        [[{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}] for r in rows]
    )
    assert [row["score"] for row in rows] == scores
    for _, group in groupby(rows, key=lambda row: row["prompt_id"]):
        own = list(group)
        assert [row["rank"] for row in own] == ranks([row["score"] for row in own])


@pytest.mark.parametrize(
    ("num_prompts", "is_killed"), [(40, False), pytest.param(400, True, marks=pytest.mark.slow)], ids=["cut", "killed"]
)
def test_a_job_that_ended_while_it_committed_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_prompts: int, is_killed: bool
) -> None:
    num_rows = 6 * num_prompts
    (tmp_path / "in").mkdir()
    pq.write_table(candidates(num_prompts, scored=True), tmp_path / "in" / "a.parquet")
    if is_killed:
        paths = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
        kill_after([sys.executable, "-m", "jobs.rank", *paths, "--rows-per-unit", "12"], tmp_path / "out", 10)
    else:
        run(config(tmp_path, rows_per_unit=12))
        for part in sorted((tmp_path / "out").glob("part-*"))[10:]:
            part.unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("part-*")}
    assert 10 <= len(before) < num_rows // 12
    assert run(config(tmp_path, rows_per_unit=12)).rows == num_rows
    # ten partitions of the groups instead of one
    monkeypatch.setattr("jobs.grouping.ranks.ROWS_PER_PARTITION", num_rows // 10)
    assert run(config(tmp_path, rows_per_unit=12, output=str(tmp_path / "alone"))).rows == num_rows
    assert read_parts(tmp_path / "out").equals(read_parts(tmp_path / "alone"))
    assert before.items() <= {path: path.stat().st_mtime_ns for path in before}.items()


def test_top_k_keeps_the_best_of_each_group(tmp_path: Path) -> None:
    rows = [scored("p", float(number % 7), house=number % 5) for number in range(70)]
    write(tmp_path / "in" / "a.parquet", [*rows, scored("p", 9.0, house=None)])
    total = run(config(tmp_path, group_by="house", top_k=2, rows_per_unit=10))
    assert (total.rows, total.written, total.ungrouped) == (71, 10, 1)
    found = read_parts(tmp_path / "out").to_pylist()
    assert {row["house"] for row in found} == set(range(5))
    assert sorted(row["rank"] for row in found) == [0] * 5 + [1] * 5
    assert all(row["score"] == 6.0 and row["group_size"] == 14 for row in found)


def test_global_top_k_ranks_the_whole_corpus(tmp_path: Path) -> None:
    rows = [scored(str(number), float(number * 37 % 101), id=number) for number in range(101)]
    write(tmp_path / "in" / "a.parquet", [*rows, scored("none", None, id=101)])
    run(config(tmp_path, global_top_k=4, rows_per_unit=10))
    found = sorted(read_parts(tmp_path / "out").to_pylist(), key=lambda row: row["rank"])
    assert [row["score"] for row in found] == [100.0, 99.0, 98.0, 97.0]
    assert [row["margin"] for row in found] == [0.0, 1.0, 2.0, 3.0]
    assert {row["group_size"] for row in found} == {102}


def test_one_group_may_hold_half_of_the_corpus_and_rows_may_repeat(tmp_path: Path) -> None:
    rows = [scored("big", 1.0)] * 500 + [scored(f"\u8bd7 {number}", 2.0) for number in range(500)]
    write(tmp_path / "in" / "a.parquet", rows)
    run(config(tmp_path, rows_per_unit=100))
    assert column(tmp_path / "out", "rank") == [*range(500), *[0] * 500]


def test_names_of_columns_may_be_any_text_and_messages_large(tmp_path: Path) -> None:
    long = "word " * 400_000
    rows = [{"\u8bc4 \u5206.x": score, "my group.y": {"deep": [long]}} for score in (1.0, 2.0)]
    write(tmp_path / "in" / "a.parquet", rows)
    run(config(tmp_path, score_column="\u8bc4 \u5206.x", group_by="my group.y", output_prefix="\u540d "))
    table = read_parts(tmp_path / "out")
    assert table["\u540d rank"].to_pylist() == [1, 0]
    assert table.drop_columns(["\u540d rank", "\u540d group_size", "\u540d margin"]).to_pylist() == rows


def test_a_null_prompt_has_no_group_and_no_rows_are_an_output_too(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [scored("p", 1.0), {**scored("p", 2.0), "prompt": None}])
    empty = pq.read_table(tmp_path / "in" / "a.parquet").slice(0, 0)
    pq.write_table(empty, tmp_path / "in" / "b.parquet")
    assert run(config(tmp_path)).ungrouped == 1
    assert column(tmp_path / "out", "rank") == [0, None]
    assert column(tmp_path / "out", "group_size") == [1, None]
    total = run(config(tmp_path, input=str(tmp_path / "in" / "b.parquet"), output=str(tmp_path / "none")))
    assert total.rows == 0
    assert "rank" in read_parts(tmp_path / "none").column_names


def test_a_restart_after_the_input_grew_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [scored("p", 1.0)])
    run(config(tmp_path))
    write(tmp_path / "in" / "b.parquet", [scored("p", 2.0)])
    with pytest.raises(OutputError, match="input_fingerprint"):
        run(config(tmp_path))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"group_by": "no"}, "has no column 'no' for --group-by"),
        ({"score_column": "no"}, "has no column 'no': name the scores with --score-column, or score the input"),
        ({"score_column": "prompt"}, "column 'prompt' is string; scores are numbers"),
        ({"model": "tiny"}, "has a column 'score' already: leave --model and --via-serve out"),
        ({"group_by": "prompt", "prompt_column": "x", "output_prefix": "r_"}, None),
        ({}, r"already has the columns \['margin'\]"),
    ],
)
def test_what_the_input_lacks_is_told_before_anything_is_made(
    tmp_path: Path, options: dict[str, Any], told: str | None
) -> None:
    write(tmp_path / "in" / "a.parquet", [scored("p", 1.0, margin=1)])
    if told is None:  # with --group-by no conversation is needed
        assert run(config(tmp_path, **options)).rows == 1
        return
    with pytest.raises(CorpusError, match=told):
        run(config(tmp_path, **options))
    assert not (tmp_path / "out").exists()


def test_the_command_line_tells_what_has_no_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "a.parquet", [scored("p", 1.0), scored("p", None)])
    arguments = ["--input", str(tmp_path / "a.parquet"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["jobs.rank", *arguments])
    assert main() == 3
    assert f"2 rows in {tmp_path / 'out'} (1 without a score); this run took " in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["jobs.rank", *arguments, "--global-top-k", "1", "--top-k", "1"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2


@pytest.mark.usefixtures("in_process")
def test_a_cell_that_cannot_be_read_leaves_its_row_without_score_and_group(tmp_path: Path) -> None:
    """Text that is not UTF-8 and a null turn of a prompt, through scoring and ranking."""
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    asked = [{"role": "user", "content": "hi"}]
    texts = pa.array([b"yes", b"caf\xe9", b"no", b"a", b"b"], pa.binary())
    data = {
        "prompt": pa.array([asked, asked, asked, [None], None], turns),
        "response": pa.Array.from_buffers(pa.string(), 5, texts.buffers()),
    }
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table(data), tmp_path / "in" / "a.parquet")
    total = run(config(tmp_path, model="tiny", dtype="float32", cpus_per_actor=1))
    assert (total.rows, total.unscored, total.ungrouped) == (5, 3, 2)
    found = read_parts(tmp_path / "out")
    assert found["group_size"].to_pylist() == [3, 3, 3, None, None]
    assert [rank is None for rank in found["rank"].to_pylist()] == [False, True, False, True, True]
    errors = found["error"].to_pylist()
    assert errors[1] == "ConversationError: response: the text is not valid UTF-8 (byte 3: unexpected end of data)"
    assert [error and error.partition(": ")[2] for error in errors[3:]] == [
        "message 0 is NoneType, not an object with 'role' and 'content'",
        "the prompt is null",
    ]
