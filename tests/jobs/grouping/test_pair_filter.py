"""Scored pairs are kept, dropped or turned round by their margin, and come out in TRL's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import fs

from jobs.corpus.files import Corpus
from jobs.corpus.preferences import PreferenceColumns
from jobs.errors import CorpusError
from jobs.grouping.pair_filter import Disagreement, PairFilterStage
from jobs.pairs import PairsConfig, run
from jobs.reporting.columns import ChosenColumns, ReportColumns
from jobs.runs.ledger import Ledger
from jobs.scoring.scored_corpus import ScoredInput
from tests.conftest import chat
from tests.jobs.conftest import read_parts, write

ULTRAFEEDBACK: list[dict[str, Any]] = [
    {
        "prompt": f"Why {number}?",
        "chosen": chat(f"Why {number}?", "good"),
        "rejected": chat(f"Why {number}?", "bad"),
        "score_chosen": 9.0,
        "score_rejected": 1.0,
        "chosen_score": chosen,
        "rejected_score": rejected,
        "margin": None if chosen is None else chosen - rejected,
        "error": None if chosen is not None else "both: it is null",
    }
    for number, (chosen, rejected) in enumerate([(3.0, 1.0), (1.0, 2.0), (2.0, 2.0), (1.5, 1.0), (None, 0.0)])
]
COLUMNS = PreferenceColumns("chosen", "rejected", "prompt")
NAMES = ("chosen_score", "rejected_score")


def kept(
    tmp_path: Path, disagreement: Disagreement, min_margin: float, rows: list[dict[str, Any]] = ULTRAFEEDBACK
) -> tuple[list[tuple[str, str, float]], dict[str, int]]:
    ledger = Ledger(str(tmp_path / "out"))
    stage = PairFilterStage(fs.LocalFileSystem(), ledger, COLUMNS, NAMES, min_margin, disagreement)
    table, counts = stage.kept(pa.Table.from_pylist(rows))
    found = table.to_pylist()
    assert all(row["score_chosen"] - row["score_rejected"] == row["margin"] for row in found)
    return [(row["prompt"][0]["content"], row["chosen"][0]["content"], row["margin"]) for row in found], counts


def test_what_becomes_of_pairs_that_the_scores_disagree_with(tmp_path: Path) -> None:
    agreed = [("Why 0?", "good", 2.0), ("Why 3?", "good", 0.5)]
    found, counts = kept(tmp_path, "drop", 0.0)
    assert found == agreed
    assert counts == {"unscored": 1, "disagreeing": 1, "flipped": 0, "unreadable": 0}
    assert kept(tmp_path, "keep", 0.0)[0] == [agreed[0], ("Why 1?", "good", -1.0), agreed[1]]
    found, counts = kept(tmp_path, "flip", 0.0)
    assert found == [agreed[0], ("Why 1?", "bad", 1.0), agreed[1]]
    assert counts["flipped"] == 1
    assert kept(tmp_path, "flip", 0.5)[0] == [agreed[0], ("Why 1?", "bad", 1.0)]
    assert kept(tmp_path, "drop", 5.0)[0] == []


def test_a_pair_that_cannot_be_read_is_counted(tmp_path: Path) -> None:
    found, counts = kept(tmp_path, "drop", 0.0, [ULTRAFEEDBACK[0] | {"rejected": None}, ULTRAFEEDBACK[0]])
    assert (len(found), counts["unreadable"]) == (1, 1)


def test_the_prompt_is_what_both_sides_begin_with(tmp_path: Path) -> None:
    start = chat("a", "b", "c")
    row = ULTRAFEEDBACK[0] | {"prompt": None, "chosen": chat("a", "b", "c", "d"), "rejected": chat("a", "b", "x", "d")}
    ledger = Ledger(str(tmp_path / "out"))
    stage = PairFilterStage(fs.LocalFileSystem(), ledger, PreferenceColumns("chosen", "rejected"), NAMES, 0.0, "drop")
    (pair,) = stage.kept(pa.Table.from_pylist([row]))[0].to_pylist()
    assert (pair["prompt"], len(pair["chosen"]), len(pair["rejected"])) == (start[:2], 2, 2)
    same = stage.kept(pa.Table.from_pylist([row | {"rejected": row["chosen"]}]))[0].to_pylist()
    assert (same[0]["prompt"], len(same[0]["chosen"])) == (start, 1)


def test_scored_pairs_are_found_under_their_prefix(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", ULTRAFEEDBACK)
    config = PairsConfig(input=str(tmp_path / "in"), output=str(tmp_path / "out"))
    assert ScoredInput(config, takes_pairs=True).pair_scores == NAMES
    with pytest.raises(CorpusError, match=r"its rows are scored pairs\. jobs\.pairs filters"):
        ScoredInput(config)
    rows = [{"x_chosen_score": 1.0, "x_rejected_score": 2.0, "scores": [1.0]}]
    write(tmp_path / "other" / "a.parquet", rows)
    other = config.model_copy(update={"input": str(tmp_path / "other"), "score_column": "x_score"})
    assert ScoredInput(other, takes_pairs=True).pair_scores == ("x_chosen_score", "x_rejected_score")
    lists = config.model_copy(update={"input": str(tmp_path / "other")})
    with pytest.raises(CorpusError, match="scored candidates, in lists"):
        ScoredInput(lists, takes_pairs=True)


def test_options_that_choose_among_candidates_are_refused_for_pairs(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", ULTRAFEEDBACK)
    write(tmp_path / "rows" / "a.parquet", [{"prompt": "a", "response": "b", "score": 1.0}])
    there: dict[str, Any] = {"input": str(tmp_path / "in"), "output": str(tmp_path / "out")}
    with pytest.raises(CorpusError, match="--strategy and --max-pairs choose among candidates"):
        run(PairsConfig(**there, strategy="all", max_pairs=3))
    with pytest.raises(CorpusError, match="--disagreement are for rows that are scored pairs already"):
        run(PairsConfig(**there | {"input": str(tmp_path / "rows")}, disagreement="flip"))


def test_a_report_reads_the_scores_of_this_projects_pairs(tmp_path: Path) -> None:
    """UltraFeedback has scores of its own in columns of like names."""
    write(tmp_path / "in" / "a.parquet", ULTRAFEEDBACK)
    columns = ReportColumns.of(Corpus.open(str(tmp_path / "in")), ChosenColumns())
    assert columns.pair is not None
    assert (columns.pair.chosen.name, columns.pair.rejected.name) == NAMES
    assert columns.pair.chosen.error == "error"


@pytest.mark.usefixtures("local_ray")
def test_the_job_filters_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in" / "a.parquet", ULTRAFEEDBACK)
    config = PairsConfig(input=str(tmp_path / "in"), output=str(tmp_path / "out"), disagreement="flip", rows_per_unit=2)
    total = run(config)
    assert (total.prompts, total.pairs) == (5, 3)
    told = "3 of 5 pairs in"
    assert told in capsys.readouterr().out
    first = read_parts(tmp_path / "out")
    assert first["margin"].to_pylist() == [2.0, 1.0, 0.5]
    sorted((tmp_path / "out").glob("part-*"))[1].unlink()
    assert run(config) == total
    assert read_parts(tmp_path / "out").equals(first)
    assert "disagree with 1, 1 flipped, 1 without a score" in capsys.readouterr().out
