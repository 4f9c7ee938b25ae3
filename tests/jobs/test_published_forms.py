"""Corpora as they are published go from file to scores, ranks, pairs and a report, with one command each."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import api
from serve_app.reward_model import RewardModel
from tests.jobs.conftest import read_parts
from tests.jobs.corpus.test_published import ASK, BAD, FORMS, GOOD, MORE, THEN, said

OPTIONS: dict[str, Any] = {"model": "tiny", "dtype": "float32", "cpus_per_actor": 2}
PAIRS = ("ultrafeedback_binarized", "Skywork-Reward-Preference", "hh-rlhf")
CANDIDATES = ("UltraFeedback", "Nectar")
CONVERSATIONS = ("HelpSteer2", "lmsys-chat-1m", "ShareGPT")
pytestmark = pytest.mark.usefixtures("in_process", "local_ray")


def written(folder: Path, name: str) -> list[list[dict[str, str]]]:
    """A corpus of one row in a published form; its conversations."""
    folder.mkdir()
    if name == "hh-rlhf":
        start = f"\n\nHuman: {ASK}\n\nAssistant: {GOOD}\n\nHuman: {MORE}\n\nAssistant:"
        with gzip.open(folder / "train.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write(json.dumps({"chosen": f"{start} {THEN}", "rejected": f"{start} {BAD}"}) + "\n")
        return [said(ASK, GOOD, MORE, THEN), said(ASK, GOOD, MORE, BAD)]
    if name == "ShareGPT":
        turns = [{"from": "human", "value": ASK}, {"from": "gpt", "value": GOOD}]
        (folder / "sharegpt.jsonl").write_text(json.dumps({"id": "abc_0", "conversations": turns}) + "\n")
        return [said(ASK, GOOD)]
    rows, _, conversations = FORMS[name]
    pq.write_table(rows, folder / "train-00000-of-00001.parquet")
    return conversations


def scored(tmp_path: Path, name: str, tiny: RewardModel) -> tuple[pa.Table, list[float]]:
    """The row as `jobs.score` writes it to `scored`, and the engine's scores of its conversations."""
    expected = tiny.get_scores(written(tmp_path / "in", name))
    chosen: dict[str, Any] = {"reads": FORMS[name][1]} if name in FORMS else {}
    result = api.score(str(tmp_path / "in"), str(tmp_path / "scored"), **OPTIONS, **chosen)
    assert (result.counts["rows"], result.counts["errors"]) == (1, 0)
    return read_parts(tmp_path / "scored"), expected


def reported(tmp_path: Path, source: str) -> str:
    api.report(str(tmp_path / source), str(tmp_path / "report.html"))
    return (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(tmp_path: Path, tiny: RewardModel, name: str) -> None:
    table, (chosen, rejected) = scored(tmp_path, name, tiny)
    (row,) = table.to_pylist()
    assert (row["chosen_score"], row["rejected_score"]) == (chosen, rejected)
    kept = api.pairs(str(tmp_path / "scored"), str(tmp_path / "pairs"), disagreement="flip")
    assert kept.counts["pairs"] == 1
    (pair,) = read_parts(tmp_path / "pairs").to_pylist()
    assert (pair["score_chosen"], pair["score_rejected"]) == (max(chosen, rejected), min(chosen, rejected))
    order = {"score_column": "margin", "global_top_k": 1, "output_prefix": "by_"}
    api.rank(str(tmp_path / "scored"), str(tmp_path / "ranked"), **order)
    assert read_parts(tmp_path / "ranked")["by_rank"].to_pylist() == [0]
    assert "<svg" in reported(tmp_path, "scored")


@pytest.mark.parametrize("name", CANDIDATES)
def test_candidates(tmp_path: Path, tiny: RewardModel, name: str) -> None:
    table, expected = scored(tmp_path, name, tiny)
    (row,) = table.to_pylist()
    assert (row["scores"], row["best"]) == (expected, expected.index(max(expected)))
    api.rank(str(tmp_path / "scored"), str(tmp_path / "ranked"))
    ranked = {row["score"]: row["rank"] for row in read_parts(tmp_path / "ranked").to_pylist()}
    assert ranked == {max(expected): 0, min(expected): 1}
    api.pairs(str(tmp_path / "ranked"), str(tmp_path / "pairs"))
    (pair,) = read_parts(tmp_path / "pairs").to_pylist()
    assert (pair["score_chosen"], pair["score_rejected"]) == (max(expected), min(expected))
    assert "<svg" in reported(tmp_path, "ranked")


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(tmp_path: Path, tiny: RewardModel, name: str) -> None:
    table, expected = scored(tmp_path, name, tiny)
    assert table["score"].to_pylist() == expected
    api.rank(str(tmp_path / "scored"), str(tmp_path / "ranked"), global_top_k=1)
    assert read_parts(tmp_path / "ranked")["rank"].to_pylist() == [0]
    assert "<svg" in reported(tmp_path, "scored")
