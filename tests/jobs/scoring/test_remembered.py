"""Scores that were computed before have the bits that computing them again would give, and are counted."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from pydantic import ValidationError

from jobs.errors import CorpusError, OutputError
from jobs.runs.ledger import UnitStats
from jobs.score import ScoreConfig, run
from jobs.scoring import remembered
from jobs.scoring.remembered import EarlierScores, ScoreIndex, key_of
from jobs.scoring.score_memory import NOT_COMPUTED, REPEATED, REUSED, RecentScores, ScoreMemory, SharedScores
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
    model.scorer.memory = memory()
    prompt = list(range(10, 110))
    for token in (200, 201, 200):
        sequence = [1, *prompt, token, 3]
        assert model.score_token_ids([sequence]) == tiny.score_token_ids([sequence])
    assert model.scorer.cached_tokens == 96  # of the second; the third is remembered


def test_what_an_earlier_job_scored_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remembered, "BYTES_PER_SHARE", 2000)
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
    manifest = manifest_of(tmp_path / "all-out")
    assert manifest["arguments"]["reuse"] == earlier
    with pytest.raises(OutputError, match="of another model: dtype is float32 there and bfloat16 now"):
        EarlierScores.of(earlier).index(manifest["identity"] | {"dtype": "bfloat16"})


def test_what_another_kind_of_processor_scored_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also by the job itself, where it is started again elsewhere; it says so, and the manifest names both kinds."""
    write(tmp_path / "in" / "a.parquet", rows(0, 10))
    _, found = score(tmp_path, "in", rows_per_unit=5)
    (own,) = manifest_of(tmp_path / "in-out")["processors"]
    assert f"torch {torch.__version__}" in own
    monkeypatch.setattr("serve_app.reward_model.scorer.processor_of", lambda device: "another card")
    total, again = score(tmp_path, "in", rows_per_unit=5, output="again", reuse=[str(tmp_path / "in-out")])
    assert again == found  # it is the same processor in truth
    assert not {REPEATED, REUSED} & total.counts.keys()
    assert f"so that all are computed again: {own} there, another card here" in caplog.text
    assert "several kinds" not in caplog.text
    next(iter((tmp_path / "in-out").glob("part-*.parquet"))).unlink()
    total, _ = score(tmp_path, "in", rows_per_unit=5)
    assert REPEATED not in total.counts
    assert caplog.text.count("several kinds of processors") == 1
    assert manifest_of(tmp_path / "in-out")["processors"] == sorted([own, "another card"])


def manifest_of(output: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((output / "_manifest.json").read_text())
    return manifest


def test_hashes_of_an_earlier_form_are_refused_and_stop_no_restart(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They do not tell kinds of processors apart."""
    write(tmp_path / "in" / "a.parquet", rows(0, 5))
    score(tmp_path, "in")
    (path,) = (tmp_path / "in-out" / "_scores").iterdir()
    with pa.ipc.open_file(path) as source:
        table = source.read_all().replace_schema_metadata(None)
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(CorpusError, match="another version of rayward wrote it"):
        score(tmp_path, "in", output="other", reuse=[str(tmp_path / "in-out")])
    next(iter((tmp_path / "in-out").glob("part-*.parquet"))).unlink()
    total, _ = score(tmp_path, "in")
    assert REPEATED not in total.counts
    assert "do not tell kinds of processors apart; its conversations are computed again" in caplog.text


def test_scores_that_may_be_of_several_processors_are_not_remembered() -> None:
    remembering = memory()
    with remembering.unit() as unit:
        recalled = remembering.recall([[1, 2], [1, 2]])
        assert recalled.completed([(3.0,)], remember=False) == [(3.0,), (3.0,)]
    assert (unit.table().num_rows, unit.counts) == (0, {REPEATED: 1, NOT_COMPUTED: 2})
    assert remembering.recall([[1, 2]]).missing == [0]


def test_folders_without_scores_are_refused_before_anything_runs(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", rows(0, 2))
    with pytest.raises(OutputError, match="there is no output of a job"):
        score(tmp_path, "in", reuse=[str(tmp_path / "nowhere")])
    score(tmp_path, "in", remember_scores=False)
    with pytest.raises(OutputError, match="keeps no hashes of its conversations"):
        score(tmp_path, "in", output="again", reuse=[str(tmp_path / "in-out")])
    with pytest.raises(ValidationError, match="--reuse and --no-remember-scores exclude each other"):
        ScoreConfig(input="a", output="b", model="tiny", remember_scores=False, reuse=("c",))


def memory(shared: SharedScores | None = None) -> ScoreMemory:
    return ScoreMemory(ScoreIndex(), ScoreIndex(), shared, processor="a card")


def test_a_job_that_starts_again_finds_what_it_scored_before(tmp_path: Path) -> None:
    """Also of a unit whose scores were written, and which was not committed."""
    write(tmp_path / "in" / "a.parquet", [*rows(0, 10), *rows(5, 10)])
    _, found = score(tmp_path, "in", rows_per_unit=10)
    for part in sorted((tmp_path / "in-out").glob("part-*.parquet")):
        part.unlink()
    total, again = score(tmp_path, "in", rows_per_unit=10)
    assert again == found
    assert total.counts[REPEATED] == 20
    assert total.computed_tokens == 0


def test_a_damaged_file_of_scores_stops_no_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "in" / "a.parquet", rows(0, 10))
    _, found = score(tmp_path, "in", rows_per_unit=5)
    damaged, whole = sorted((tmp_path / "in-out" / "_scores").iterdir())
    damaged.write_bytes(whole.read_bytes()[:-9])
    with pytest.raises(CorpusError, match="Without that file its conversations are computed again"):
        score(tmp_path, "in", output="other", reuse=[str(tmp_path / "in-out")])
    for part in (tmp_path / "in-out").glob("part-*.parquet"):
        part.unlink()
    total, again = score(tmp_path, "in", rows_per_unit=5)
    assert again == found
    assert total.counts[REPEATED] == 5
    assert f"{damaged.name} cannot be read" in caplog.text


def test_units_without_a_score_are_read_again(tmp_path: Path) -> None:
    """Also where nothing but such a unit is there."""
    write(tmp_path / "in" / "a.parquet", [*[{"messages": None}] * 4, *rows(0, 4)])
    score(tmp_path, "in", rows_per_unit=4)
    _, plain = score(tmp_path, "in", output="plain", rows_per_unit=4, remember_scores=False)
    total, found = score(tmp_path, "in", output="again", rows_per_unit=4, reuse=[str(tmp_path / "in-out")])
    assert found == plain
    assert total.counts[REUSED] == 4
    write(tmp_path / "none" / "a.parquet", [{"messages": None}] * 4)
    write(tmp_path / "some" / "a.parquet", rows(0, 4))
    score(tmp_path, "none")
    total, _ = score(tmp_path, "some", reuse=[str(tmp_path / "none-out")])
    assert REUSED not in total.counts


def test_an_error_stays_its_rows_own(tiny: RewardModel) -> None:
    remembering = memory()
    long = [1] * (tiny.config.max_tokens + 1)
    sequences = [[5, 6, 7], long, [5, 6, 7], long, [5, 6]]
    for _ in range(2):
        found = remembering.outputs(sequences, tiny.scorer.outputs)
        errors = [found[1], found[3]]
        assert all(isinstance(error, ScoringError) for error in errors)
        assert errors[0] is not errors[1]
        assert str(errors[0]) == str(errors[1])
        plain = tiny.scorer.outputs([[5, 6, 7], [5, 6]])
        assert [list(found[place]) for place in (0, 2, 4)] == [list(plain[0]), list(plain[0]), list(plain[1])]  # type: ignore[arg-type]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.scoring.score_memory.MAX_REMEMBERED", 2)
    remembering = memory()
    with remembering.unit() as unit:
        for number in (1, 2, 1, 3, 2):
            remembering.outputs([[number, 5]], computed)
    assert unit.counts == {REPEATED: 1, NOT_COMPUTED: 2}
    with remembering.unit() as unit:
        pass
    assert (unit.table().num_rows, unit.counts) == (0, {})


def computed(sequences: Sequence[Sequence[int]]) -> list[Any]:
    return [(float(sum(sequence)),) for sequence in sequences]


def never(sequences: Sequence[Sequence[int]]) -> list[Any]:
    assert not sequences
    return []


def test_threads_count_for_their_own_units() -> None:
    remembering, both_began = memory(), threading.Barrier(2)

    def unit_of(first: int) -> tuple[int, dict[str, int]]:
        with remembering.unit() as unit:
            both_began.wait()
            remembering.outputs([[first, number] for number in range(first)] * 2, computed)
        return unit.table().num_rows, dict(unit.counts)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(unit_of, (3, 5)))
    assert found == [(3, {REPEATED: 3, NOT_COMPUTED: 6}), (5, {REPEATED: 5, NOT_COMPUTED: 10})]


def test_processes_tell_each_other_what_they_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.scoring.score_memory.PROCESSES_PER_SHARE", 1)
    sequences = [[number, 7] for number in range(40)]
    with SharedScores.among(3) as shared:
        assert shared is not None
        assert len(shared.shares) == 3
        one, other = memory(shared), memory(pickle.loads(pickle.dumps(shared)))
        expected = one.outputs(sequences, computed)
        with other.unit() as unit:
            assert other.outputs(sequences, never) == expected
    assert unit.counts == {REPEATED: 40, NOT_COMPUTED: 80}
    with SharedScores.among(1) as alone:
        assert alone is None


def test_an_actor_that_is_lost_or_slow_costs_no_score(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with SharedScores.among(2) as shared:
        assert shared is not None
        remembering = memory(shared)
        shared.add({key_of([1], "a card"): (1.0,)})
        assert shared.find([key_of([1], "a card")]) == {key_of([1], "a card"): (1.0,)}
        ray.kill(shared.shares[0])
        while _answers(shared):  # it does until it has heard
            pass
        assert remembering.outputs([[2], [3]], computed) == [(2.0,), (3.0,)]
        assert "equal conversations may be computed again" in caplog.text
        caplog.clear()
        assert remembering.outputs([[4]], computed) == [(4.0,)]
        assert not caplog.text  # it is not asked for a while
    monkeypatch.setattr("jobs.scoring.score_memory.ANSWER_TIMEOUT_S", 0.0)
    with SharedScores.among(2) as slow:
        assert memory(slow).outputs([[2]], computed) == [(2.0,)]
        assert "GetTimeoutError" in caplog.text


def _answers(shared: SharedScores) -> bool:
    try:
        ray.get(shared.shares[0].find.remote([]))
    except ray.exceptions.RayActorError:
        return False
    return True


def test_recent_scores_keep_those_that_were_asked_for() -> None:
    recent = RecentScores(2)
    first, second, third = (key_of([number], "a card") for number in range(3))
    recent.add({first: (0.0,), second: (1.0,)})
    recent.find([first])
    recent.add({third: (2.0,)})
    assert recent.find([first, second, third]).keys() == {first, third}
