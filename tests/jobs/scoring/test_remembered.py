"""Scores that were computed before have the bits that computing them again would give, and are counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from jobs.errors import OutputError
from jobs.runs.ledger import UnitStats
from jobs.score import ScoreConfig, run
from jobs.scoring import remembered
from jobs.scoring.remembered import NOT_COMPUTED, REPEATED, REUSED, EarlierScores, ScoreIndex
from jobs.scoring.remembering_scorer import RememberingScorer
from serve_app.reward_model import RewardModel, ScoringError
from tests.conftest import chat
from tests.jobs.conftest import read_parts, write

pytestmark = pytest.mark.usefixtures("local_ray", "in_process")


def rows(first: int, count: int) -> list[dict[str, Any]]:
    return [{"messages": chat(f"Count to {number}.", "one, " * (number % 5))} for number in range(first, first + count)]


def score(tmp_path: Path, name: str, **options: Any) -> tuple[UnitStats, list[Any]]:
    """The counts and the columns of a job over the corpus of that name."""
    output = tmp_path / f"{options.pop('output', name)}-out"
    paths = {"input": str(tmp_path / name), "output": str(output)}
    found = run(ScoreConfig(**{**paths, "model": "tiny", "dtype": "float32", "cpus_per_actor": 1, **options}))
    return found, read_parts(output).select(["score", "num_tokens", "truncated", "error"]).to_pylist()


def test_equal_conversations_are_computed_once(
    tmp_path: Path, tiny: RewardModel, capsys: pytest.CaptureFixture[str]
) -> None:
    every = [*rows(0, 20), *rows(10, 10), *rows(0, 5), {"messages": None}, {"messages": None}]
    write(tmp_path / "in" / "a.parquet", every)
    total, found = score(tmp_path, "in", rows_per_unit=12)
    assert "; 15 scores of repeated conversations; this run" in capsys.readouterr().out
    tokens = sum(row["num_tokens"] for row in found[20:35])
    assert total.counts.items() >= {REPEATED: 15, NOT_COMPUTED: tokens}.items()
    assert [row["score"] for row in found[:35]] == tiny.get_scores([row["messages"] for row in every[:35]])
    plain, same = score(tmp_path, "in", rows_per_unit=12, output="plain", remember_scores=False)
    assert same == found
    assert not {REPEATED, REUSED} & plain.counts.keys()
    assert plain.tokens == total.tokens
    assert not (tmp_path / "plain-out" / "_scores").exists()


def test_a_scorer_that_remembers_keeps_its_prefix_cache(tiny: RewardModel) -> None:
    """`--prefix-cache-bytes` is of use beside scores that are remembered, which is the default."""
    model = RewardModel.from_pretrained(str(tiny.folder), device="cpu", dtype="float32", prefix_cache_bytes=1 << 24)
    model.scorer = RememberingScorer(model.scorer, ScoreIndex())
    prompt = list(range(10, 110))
    for token in (200, 201, 200):
        sequence = [1, *prompt, token, 3]
        assert model.score_token_ids([sequence]) == tiny.score_token_ids([sequence])
    assert model.scorer.cached_tokens == 96  # of the second; the third is remembered


def test_what_an_earlier_job_scored_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remembered, "ROWS_PER_SHARE", 16)
    write(tmp_path / "first" / "a.parquet", rows(0, 30))
    write(tmp_path / "second" / "a.parquet", rows(100, 30))
    write(tmp_path / "all" / "a.parquet", [*rows(0, 30), *rows(90, 40)])
    for name in ("first", "second"):
        score(tmp_path, name, rows_per_unit=7)
    _, alone = score(tmp_path, "all", output="alone")
    capsys.readouterr()
    earlier = [str(tmp_path / name) for name in ("first-out", "second-out")]
    total, found = score(tmp_path, "all", reuse=earlier)
    assert found == alone
    assert total.counts[REUSED] == 60
    assert total.computed_tokens == sum(row["num_tokens"] for row in found[30:40])
    assert "; 60 scores reused; this run 70 rows" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "all-out" / "_manifest.json").read_text())
    assert manifest["arguments"]["reuse"] == earlier
    with pytest.raises(OutputError, match="of another model: dtype is float32 there and bfloat16 now"):
        EarlierScores.of(earlier).index(manifest["identity"] | {"dtype": "bfloat16"})


def test_folders_without_scores_are_refused_before_anything_runs(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", rows(0, 2))
    with pytest.raises(OutputError, match="there is no output of a job"):
        score(tmp_path, "in", reuse=[str(tmp_path / "nowhere")])
    score(tmp_path, "in", remember_scores=False)
    with pytest.raises(OutputError, match="keeps no hashes of its conversations"):
        score(tmp_path, "in", output="again", reuse=[str(tmp_path / "in-out")])
    with pytest.raises(ValidationError, match="--reuse and --via-serve exclude each other"):
        ScoreConfig(input="a", output="b", via_serve="app", reuse=("c",))


def test_an_error_stays_its_rows_own(tiny: RewardModel) -> None:
    scorer = RememberingScorer(tiny.scorer, ScoreIndex())
    long = [1] * (tiny.config.max_tokens + 1)
    sequences = [[5, 6, 7], long, [5, 6, 7], long, [5, 6]]
    for _ in range(2):
        found = scorer.outputs(sequences)
        errors = [found[1], found[3]]
        assert all(isinstance(error, ScoringError) for error in errors)
        assert errors[0] is not errors[1]
        plain = tiny.scorer.outputs([[5, 6, 7], [5, 6]])
        assert [list(found[place]) for place in (0, 2, 4)] == [list(plain[0]), list(plain[0]), list(plain[1])]  # type: ignore[arg-type]


def test_memory_is_bounded(tiny: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.scoring.remembering_scorer.MAX_REMEMBERED", 2)
    scorer = RememberingScorer(tiny.scorer, ScoreIndex())
    for number in (1, 2, 1, 3, 2):
        scorer.outputs([[number, 5]])
    _, counts = scorer.noted()
    assert counts == {REPEATED: 1, NOT_COMPUTED: 2}
    scorer.begin()
    assert scorer.noted() == (scorer.noted()[0].slice(0, 0), {})
