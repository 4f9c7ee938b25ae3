"""The comparison with vLLM, with a stand-in behind the same driver: what is timed, compared, and refused."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

from serve_app.reward_model import RewardModel
from tests.benchmarks.bench_peers import PeerError, compare, engine, sequences_of, write_llama

VLLM = """
import json

print("what a library prints is no answer")
CALLS = []


class PoolingParams:
    def __init__(self, *, use_activation):
        assert not use_activation


class LLM:
    def __init__(self, *, model, runner, enable_prefix_caching, **options):
        assert json.load(open(model + "/config.json"))["architectures"] == ["LlamaForSequenceClassification"]
        assert runner == "pooling" and enable_prefix_caching
        self.is_empty = False

    def reset_prefix_cache(self):
        self.is_empty = True

    def encode(self, prompts, *, pooling_params, pooling_task, use_tqdm):
        assert self.is_empty and pooling_task == "classify"
        self.is_empty = False
        print("not this either")
        return [Found(sum(prompt["prompt_token_ids"])) for prompt in prompts]


class Found:
    def __init__(self, total):
        if total < 0:
            raise SystemExit(3)
        self.outputs = self
        self.data = self
        self.total = total

    def flatten(self):
        return [self.total / 1000]
"""


class Ours:
    """Scores as the stand-in's, so far away."""

    def __init__(self, apart: float = 0.0) -> None:
        self.apart = apart
        self.calls: list[int] = []

    def run(self, sequences: list[list[int]]) -> tuple[float, list[float]]:
        self.calls.append(len(sequences))
        return 0.5, [sum(sequence) / 1000 + self.apart for sequence in sequences]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, and a vLLM that this interpreter finds."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"architectures": ["LlamaForSequenceClassification"]}))
    (tmp_path / "vllm.py").write_text(VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_engines_take_turns_and_their_scores_are_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sequences = [[100, 200, place] for place in range(10)]
    with engine("vllm", Path(sys.executable), folder) as theirs:
        assert theirs.facts["engine"] == "vllm"
        assert theirs.facts["cores"] >= 1
        assert "torch" in theirs.facts["versions"]
        ours = Ours(apart=0.25)
        figures = compare(ours, theirs, sequences, repeats=3)
        assert ours.calls == [4, 10, 10, 10]
        assert figures["rayward_tokens_per_s"] == 60
        assert figures["vllm_tokens_per_s"] > 60
        assert figures["times_as_fast"] < 1
        assert figures["furthest_scores"] == 0.25
        assert "scores at most 0.250 apart" in capsys.readouterr().out
        for apart in (1.0, float("nan")):
            with pytest.raises(PeerError, match="do not read the same"):
                compare(Ours(apart), theirs, sequences, repeats=1)
        with pytest.raises(PeerError, match="ended with 3"):
            theirs.run([[-1]])


def test_the_model_is_one_that_rayward_reads_and_turns_are_prefixes(tiny: RewardModel, tmp_path: Path) -> None:
    write_llama(tmp_path / "model", "tiny")
    model = RewardModel.from_pretrained(str(tmp_path / "model"), device="cpu", dtype="float32")
    turns = sequences_of("turns")[:8]
    assert all(longer[: len(turn)] == turn for turn, longer in itertools.pairwise(turns))
    assert len(set(model.score_token_ids(turns[:3]).tolist())) == 3
