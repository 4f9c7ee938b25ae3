"""Parts of a corpus and what the whole of it would take, before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import score
from jobs.corpus.files import Corpus, sampled
from jobs.corpus.reader import UnitReader
from jobs.score import ScoreConfig, main
from jobs.scoring.estimate import TokenEstimate
from serve_app.reward_model import RewardModel
from tests.conftest import chat
from tests.jobs.conftest import write


def corpus(folder: Path, *sizes: int) -> Corpus:
    first = 0
    for number, size in enumerate(sizes):
        rows = [{"id": place, "messages": chat(f"Say {place}.", "so")} for place in range(first, first + size)]
        write(folder / f"{number}.parquet", rows, row_group_size=7)
        first += size
    return Corpus.open(str(folder))


def ids(found: Corpus, units: list[Any]) -> list[int]:
    tables = [table for _, table in UnitReader(found.filesystem).read(units) if not isinstance(table, Exception)]
    assert len(tables) == len(units)
    return [one for table in tables for one in table["id"].to_pylist()]


@pytest.mark.parametrize("limit", [1, 7, 20, 25, 40, 1000])
def test_a_limit_keeps_the_first_rows(tmp_path: Path, limit: int) -> None:
    found = corpus(tmp_path, 20, 20).limited(limit)
    assert found.num_rows == min(limit, 40)
    assert len(found.files) == len(found.schemas) == (1 if limit <= 20 else 2)
    assert ids(found, found.units(6)) == list(range(min(limit, 40)))


def test_a_limit_cuts_lines_too(tmp_path: Path) -> None:
    whole = corpus(tmp_path / "in", 20)
    table = pq.read_table(tmp_path / "in" / "0.parquet")
    lines = table.to_pandas().to_json(orient="records", lines=True)
    (tmp_path / "a.jsonl").write_text(lines)
    found = Corpus.open(str(tmp_path / "a.jsonl")).limited(9)
    assert ids(found, found.units(4)) == list(range(9))
    assert whole.limited(None) is whole


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.34, 1.0])
def test_a_sample_is_spread_evenly(tmp_path: Path, fraction: float) -> None:
    found = corpus(tmp_path, 60, 40)
    units = sampled(found.units(1), fraction)
    assert len(units) == max(1, int(100 * fraction))
    rows = ids(found, units)
    assert rows == sorted(set(rows))
    gaps = np.diff([-1, *rows, 100])
    assert gaps.max() <= 100 / len(units) + 1 or len(units) == 1
    assert sampled(found.units(1), None) == found.units(1)


def test_stretches_lie_all_over_the_corpus(tmp_path: Path) -> None:
    found = corpus(tmp_path, 60, 3, 37)
    stretches = found.stretches(10, 2)
    assert [unit.num_rows for unit in stretches] == [2] * 10
    assert ids(found, stretches) == [row for place in range(10) for row in (10 * place + 5, 10 * place + 6)]
    assert ids(found, found.stretches(64, 4)) == list(range(100))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    chooser = np.random.default_rng(3)
    hits = 0
    for _ in range(400):
        lengths = np.repeat(chooser.lognormal(5, 1, 64), 4).astype(int) + chooser.integers(0, 9, 256)
        found = TokenEstimate.of([list(map(int, part)) for part in np.split(lengths, 64)], num_rows=1_000_000)
        hits += found.low <= (np.exp(5.5) + 3.5) * 1e6 <= found.high  # the mean of that distribution
    assert 0.86 <= hits / 400 <= 0.99
    whole = TokenEstimate.of([[5, None], [7, 8]], num_rows=4)
    assert (whole.tokens, whole.low, whole.high, whole.sampled_rows, whole.bad_rows) == (20.0, 20.0, 20.0, 4, 1)
    assert TokenEstimate.of([], num_rows=0).tokens == 0.0


def test_a_dry_run_tells_rows_tokens_and_hours_and_writes_nothing(
    tmp_path: Path, tiny: RewardModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "joined", None)  # Ray is not started
    corpus(tmp_path / "in", 20, 20)
    words = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--dry-run", "--dtype", "float32"]
    words += ["--model", "tiny"]
    assert main([*words, "--tokens-per-s", "100"]) == 0
    told = capsys.readouterr().out
    tokens = sum(len(tiny.tokenizer.encode(chat(f"Say {place}.", "so"))) for place in range(40))
    assert told.startswith(f"40 rows, files: 2\nabout {tokens:,} tokens (from 40 rows)\n")
    assert f"about {tokens / 100 / 3600:,.3g} hours of one actor at 100 tokens/s, as given\n" in told
    assert [line.partition(",")[0] for line in told.splitlines() if line.startswith("row ")] == [
        f"row {place} of 0.parquet" for place in range(3)
    ]
    assert main([*words, "--limit", "8"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("8 rows, files: 1\n")
    assert "tokens/s, measured here on cpu" in told
    assert not (tmp_path / "out").exists()


def test_options_of_a_dry_run_belong_to_it() -> None:
    with pytest.raises(ValueError, match="--tokens-per-s is for --dry-run"):
        ScoreConfig(input="a", output="b", model="tiny", tokens_per_s=1.0)
    with pytest.raises(ValueError, match="leave --via-serve out"):
        ScoreConfig(input="a", output="b", model="tiny", dry_run=True, via_serve="app")
