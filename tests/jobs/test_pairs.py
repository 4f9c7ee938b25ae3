"""jobs.pairs on a local Ray: the pairs of candidates, in a layout that TRL and datasets read."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.errors import CorpusError, OutputError
from jobs.pairs import PairsConfig, run
from serve_app.reward_model import RewardModel
from tests.conftest import chat
from tests.jobs.conftest import candidates, kill_after, read_parts, write

pytestmark = pytest.mark.usefixtures("local_ray")


def config(tmp_path: Path, **options: Any) -> PairsConfig:
    return PairsConfig(**{"input": str(tmp_path / "in"), "output": str(tmp_path / "out"), **options})


def written(folder: Path, num_prompts: int) -> list[dict[str, Any]]:
    """Candidates with scores, in three files that cut through prompts."""
    table = candidates(num_prompts, scored=True)
    folder.mkdir()
    for number in range(3):
        size = table.num_rows // 3 + 1
        pq.write_table(table.slice(number * size, size), folder / f"{number}.parquet")
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def test_the_best_and_the_worst_of_every_prompt_are_joined_with_their_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = written(tmp_path / "in", 50)
    total = run(config(tmp_path, rows_per_unit=20))
    groups = defaultdict(list)
    for row in rows:
        groups[row["prompt"]].append(row)
    wanted = []
    for prompt, group in groups.items():
        best, worst = max(group, key=lambda row: row["score"]), min(group, key=lambda row: row["score"])
        wanted.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": [{"role": "assistant", "content": best["response"]}],
                "rejected": [{"role": "assistant", "content": worst["response"]}],
                "score_chosen": best["score"],
                "score_rejected": worst["score"],
                "margin": best["score"] - worst["score"],
            }
        )
    assert read_parts(tmp_path / "out").to_pylist() == wanted  # prompts in input order
    assert (total.prompts, total.paired, total.pairs) == (50, 50, 50)
    assert run(config(tmp_path, rows_per_unit=20)) == total
    monkeypatch.setattr("jobs.grouping.ranks.ROWS_PER_PARTITION", 60)
    shares = run(config(tmp_path, rows_per_unit=20, output=str(tmp_path / "shares")))
    assert shares == total
    assert len(list((tmp_path / "shares").glob("part-*-of-00005.parquet"))) == 5
    assert sorted(read_parts(tmp_path / "shares").to_pylist(), key=str) == sorted(wanted, key=str)
    with pytest.raises(OutputError, match="min_margin"):
        run(config(tmp_path, rows_per_unit=20, min_margin=1.0))


def test_pairs_of_whole_conversations_keep_all_turns(tmp_path: Path) -> None:
    rows = [
        {"messages": chat("hi", "hello", "\u8bd7?", answer), "score": score}
        for answer, score in (("no", 0.0), ("yes", 2.0), ("yes", 2.0))
    ]
    write(tmp_path / "in" / "a.parquet", [*rows, {"messages": chat("lone", "one"), "score": 1.0}])
    total = run(config(tmp_path, strategy="all"))
    found = read_parts(tmp_path / "out").to_pylist()
    assert [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in found] == [("yes", "no")] * 2
    assert all(pair["prompt"] == chat("hi", "hello", "\u8bd7?") for pair in found)
    assert (total.prompts, total.paired, total.unreadable) == (2, 1, 0)


def test_a_scored_row_without_a_response_costs_its_pair_alone(tmp_path: Path) -> None:
    rows = [
        {"prompt": p, "response": r, "score": s} for p, r, s in (("a", None, 2.0), ("a", "x", 1.0), ("b", "y", 1.0))
    ]
    write(tmp_path / "in" / "a.parquet", [*rows, {"prompt": "b", "response": "z", "score": 0.0}])
    total = run(config(tmp_path))
    assert (total.pairs, total.unreadable) == (1, 1)
    assert read_parts(tmp_path / "out")["chosen"].to_pylist() == [[{"role": "assistant", "content": "y"}]]


def test_no_rows_make_no_pairs_and_missing_scores_are_told(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", [{"prompt": "a", "response": "b", "score": 1.0}])
    pq.write_table(pq.read_table(tmp_path / "in" / "a.parquet").slice(0, 0), tmp_path / "in" / "a.parquet")
    assert run(config(tmp_path)).pairs == 0
    assert read_parts(tmp_path / "out").column_names[:3] == ["prompt", "chosen", "rejected"]
    with pytest.raises(CorpusError, match="has no column 'reward'"):
        run(config(tmp_path, score_column="reward"))


@pytest.mark.slow
def test_a_killed_job_ends_with_the_pairs_of_one_left_alone(tmp_path: Path) -> None:
    written(tmp_path / "in", 100)
    command = [sys.executable, "-m", "jobs.pairs", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]
    kill_after(command, tmp_path / "out", 0)
    total = run(config(tmp_path))
    assert total == run(config(tmp_path, output=str(tmp_path / "alone")))
    assert total.pairs == 100
    assert read_parts(tmp_path / "out").equals(read_parts(tmp_path / "alone"))


@pytest.mark.usefixtures("in_process")
def test_an_unscored_corpus_is_scored_first(tmp_path: Path) -> None:
    rows = written(tmp_path / "in", 5)
    total = run(config(tmp_path, model="tiny", score_column="tiny_score", dtype="float32", cpus_per_actor=2))
    assert (total.prompts, total.pairs) == (5, 5)
    scored = {row["response"]: row["tiny_score"] for row in read_parts(tmp_path / "_out_scored").to_pylist()}
    assert scored.keys() == {row["response"] for row in rows}
    for pair in read_parts(tmp_path / "out").to_pylist():
        assert pair["score_chosen"] == scored[pair["chosen"][0]["content"]] > pair["score_rejected"]


@pytest.mark.usefixtures("in_process")
def test_pairs_that_have_no_scores_are_scored_and_filtered(tmp_path: Path, tiny: RewardModel) -> None:
    sides = [(chat(f"Count to {n}.", "one, two"), chat(f"Count to {n}.", "I would rather not.")) for n in range(8)]
    write(tmp_path / "in" / "a.parquet", [{"chosen": one, "rejected": other} for one, other in sides])
    engine: dict[str, Any] = {"model": "tiny", "dtype": "float32", "cpus_per_actor": 1}
    total = run(config(tmp_path, disagreement="flip", **engine))
    assert (total.prompts, total.pairs) == (8, 8)
    scores = [sorted(tiny.get_scores(list(both)), reverse=True) for both in sides]
    found = read_parts(tmp_path / "out")
    assert [[row["score_chosen"], row["score_rejected"]] for row in found.to_pylist()] == scores
    write(tmp_path / "lists" / "a.parquet", [{"prompt": "hi", "responses": ["yes", "no"]}])
    with pytest.raises(CorpusError, match=r"jobs\.rank --model makes a row of each"):
        run(config(tmp_path, input=str(tmp_path / "lists"), output=str(tmp_path / "none"), **engine))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the training libraries
def test_dpo_takes_a_step_on_the_pairs(tmp_path: Path, tiny: RewardModel) -> None:
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    written(tmp_path / "in", 4)
    run(config(tmp_path))
    pairs = datasets.load_dataset("parquet", data_files=str(tmp_path / "out" / "*.parquet"), cache_dir=str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(tiny.folder, trust_remote_code=False)
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "dpo"), max_steps=1, per_device_train_batch_size=2, max_length=128, use_cpu=True,
        bf16=False, report_to=[], gradient_checkpointing=False,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "policy")
    policy = LlamaForCausalLM.from_pretrained(tmp_path / "policy")
    trainer = trl.DPOTrainer(model=policy, args=arguments, train_dataset=pairs["train"], processing_class=tokenizer)
    assert trainer.train().global_step == 1
