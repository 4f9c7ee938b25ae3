"""jobs.rewardbench end to end: pairs through the command, killed and resumed, and clear ends to bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.benchmarks import rewardbench1, rewardbench2
from jobs.benchmarks.dataset import Benchmark
from jobs.benchmarks.leaderboard import leaderboard_cut
from jobs.benchmarks.outcome import AnsweredRow
from jobs.errors import CorpusError, OutputError
from jobs.rewardbench import RewardBenchConfig, main, run
from serve_app.reward_model import RewardModel
from tests.conftest import chat
from tests.jobs.conftest import write
from tests.reward_model import classifiers, polar

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600


SUBSETS = ("llmbar-adver-GPTInst", "llmbar-adver-GPTOut", "llmbar-adver-manual", "llmbar-adver-neighbor")


def llmbar(path: Path, count: int) -> list[dict[str, Any]]:
    """Pairs of every LLMBar subset, and three rows that no model can score, among them."""
    rows: list[dict[str, Any]] = [
        {
            "id": 100 * place + number,
            "prompt": f"Say {number} in words." + " Be brief." * (number % 5),
            "chosen": f"It is {number}, as asked." * (1 + number % 3),
            "rejected": "I would rather " * (number % 7) + f"not say {place}.",
            "subset": subset,
        }
        for place, subset in enumerate([*SUBSETS, "llmbar-natural"])
        for number in range(count)
    ]
    rows[3:3] = [rows[0] | {"prompt": None}, rows[1] | {"rejected": None}, rows[2] | {"chosen": None}]
    write(path, rows, row_group_size=50)
    return rows


def arguments(tmp_path: Path) -> list[str]:
    paths = ["--input", str(tmp_path / "pairs.parquet"), "--output", str(tmp_path / "out")]
    return [*paths, "--model", "tiny", "--dtype", "float32", "--cpus-per-actor", "2", "--rows-per-unit", "16"]


def kill_after(tmp_path: Path, num_parts: int) -> None:
    """Run the command in a process of its own, and kill it as soon as so many units are scored."""
    command = [sys.executable, "-m", "jobs.rewardbench", *arguments(tmp_path)]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while len(list((tmp_path / "out" / "scores").glob("part-*"))) < num_parts:
            assert driver.poll() is None, f"the job ended by itself with {driver.returncode}"
            assert time.monotonic() < deadline, "the job commits nothing"
            time.sleep(0.02)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()


@pytest.mark.usefixtures("local_ray")
@pytest.mark.slow
def test_a_resumed_job_gives_the_figures_of_the_engines_own_scores(
    tmp_path: Path, tiny: RewardModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = llmbar(tmp_path / "pairs.parquet", 12)
    scores, output = tmp_path / "out" / "scores", tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["jobs.rewardbench", *arguments(tmp_path)])
    kill_after(tmp_path, 1)
    before = {part: part.stat().st_mtime_ns for part in scores.glob("part-*")}
    assert not (output / "rewardbench.json").exists()

    assert main() == 3
    printed = capsys.readouterr().out
    assert len(list(scores.glob("part-*"))) > len(before)
    assert all(part.stat().st_mtime_ns == then for part, then in before.items())  # none was scored again

    answers = [(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    own = iter(tiny.get_scores([chat(*answer) for answer in answers if None not in answer]))
    flat = [None if None in answer else next(own) for answer in answers]
    expected = list(zip(flat[::2], flat[1::2], strict=True))
    table = pq.read_table(output / "rows.parquet")
    assert [tuple(scores) for scores in table["scores"].to_pylist()] == expected
    assert table["row"].to_pylist() == list(range(63))
    assert table["id"].to_pylist() == [str(row["id"]) for row in rows]
    assert [row["error"] for row in table.to_pylist()[3:6]] == [
        "chosen answer: the prompt is null; rejected answer: the prompt is null",
        "rejected answer: it is null",
        "chosen answer: it is null",
    ]
    outcome = rewardbench1.evaluate(
        AnsweredRow(place, None, row["subset"], 1, pair)
        for place, (row, pair) in enumerate(zip(rows, expected, strict=True))
    )
    text = (output / "rewardbench.json").read_text()
    data = json.loads(text)
    assert data["sections"] == {section.name: section.score for section in outcome.sections}
    assert data["subsets"]["llmbar-adver-GPTInst"]["unscored_rows"] == 3
    assert [row["row"] for row in data["unscored"]] == [3, 4, 5]
    assert data["run"]["identity"]["dtype"] == "float32"
    assert "Chat Hard: without mt-bench-hard; llmbar-natural 12 of 100" in printed
    assert "counted as wrong since an answer has no score: 3, at rows 3, 4, 5" in printed

    again = {part: part.stat().st_mtime_ns for part in scores.glob("part-*")}
    assert main() == 3
    assert capsys.readouterr().out == printed
    assert (output / "rewardbench.json").read_text() == text
    assert again == {part: part.stat().st_mtime_ns for part in scores.glob("part-*")}


@pytest.mark.usefixtures("local_ray", "in_process")
def test_rewardbench_2_with_message_prompts_and_a_system_prompt_for_each_row(
    tmp_path: Path, tiny: RewardModel, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(row_id: str, subset: str, chosen: list[str], rejected: list[str], **more: Any) -> dict[str, Any]:
        system = "Prefer short answers." if subset == "Math" else None
        row = {"id": row_id, "prompt": chat(f"Question {row_id}?"), "chosen": chosen, "rejected": rejected}
        return row | {"num_correct": len(chosen), "subset": subset, "domain": system} | more

    rows = [
        line("a", "Math", ["four"], ["five", "six", "seven"]),
        line("b", "Math", ["four"], ["four", "six", "seven"]),
        line("c", "Focus", ["yes"], ["no", "never", "maybe"], num_correct=9),
        line("ref:1", "Ties", ["red"], ["loud", "wet"]),
        line("tied:1", "Ties", ["red", "green", "blue"], ["loud", "wet"]),
    ]
    write(tmp_path / "in.parquet", rows)
    options: dict[str, Any] = {"dtype": "float32", "cpus_per_actor": 2, "system_prompt_column": "domain"}
    outcome = run(config(tmp_path, **options))

    def own(row: dict[str, Any], answer: str) -> float:
        system = [{"role": "system", "content": row["domain"]}] if row["domain"] else []
        return tiny.get_score([*system, *row["prompt"], {"role": "assistant", "content": answer}])

    expected = [[own(row, answer) for answer in [*row["chosen"], *row["rejected"]]] for row in rows]
    expected[2] = []
    assert pq.read_table(tmp_path / "out" / "rows.parquet")["scores"].to_pylist() == expected
    assert outcome == rewardbench2.evaluate(
        AnsweredRow(place, row["id"], row["subset"], row["num_correct"], tuple(scores))
        for place, (row, scores) in enumerate(zip(rows, expected, strict=True))
    )
    assert outcome.sections[4].subsets[0].num_unscored == 1
    assert "missing altogether:\n  Factuality\n  Precise IF\n  Safety\n" in capsys.readouterr().out


def config(tmp_path: Path, **options: Any) -> RewardBenchConfig:
    paths = {"input": str(tmp_path / "in.parquet"), "output": str(tmp_path / "out")}
    return RewardBenchConfig(**{**paths, "model": "tiny", **options})


def test_input_that_is_no_benchmark_ends_before_anything_is_written(tmp_path: Path) -> None:
    pair = {"prompt": "hi", "chosen": "yes", "rejected": "no", "subset": "s"}
    write(tmp_path / "in.parquet", [{"prompt": "hi", "response": "yes"}])
    with pytest.raises(
        CorpusError, match=r"'chosen' and 'rejected' must be .*\nColumns found: prompt \(string\), resp"
    ):
        run(config(tmp_path))
    pq.write_table(pq.read_table(write(tmp_path / "in.parquet", [pair])).slice(0, 0), tmp_path / "in.parquet")
    with pytest.raises(CorpusError, match="has no rows"):
        run(config(tmp_path))
    write(tmp_path / "in.parquet", [pair])
    with pytest.raises(CorpusError, match="--system-prompt excludes"):
        run(config(tmp_path, system_prompt="x", system_prompt_column="subset"))
    with pytest.raises(OutputError, match="--output"):
        run(config(tmp_path).model_copy(update={"output": "nowhere://x"}))
    with pytest.raises(CorpusError, match="is a POLAR model.*a benchmark's rows have none"):
        run(config(tmp_path, model=str(polar.write(tmp_path / "polar"))))
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("local_ray", "in_process")
def test_the_leaderboards_cut_is_made_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RewardBench's own script keeps the end of a conversation."""
    folder = classifiers.write(tmp_path / "model")
    classifiers.change_json(folder / "config.json", max_position_embeddings=4096)
    long, short = "na\u00efve " * 4000, "na\u00efve"
    rows = [{"prompt": text, "chosen": "four", "rejected": "five", "subset": "math-prm"} for text in (long, short)]
    write(tmp_path / "in.parquet", rows)
    found = run(config(tmp_path, leaderboard=True, model=str(folder), dtype="float32", cpus_per_actor=2))
    model = RewardModel.from_pretrained(folder, device="cpu", dtype="float32")
    chats = [chat(row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")]
    expected = model.score(chats, truncation="left", max_tokens=2048)
    assert [score.truncated for score in expected] == [True, True, False, False]
    scores = pq.read_table(tmp_path / "out" / "rows.parquet")["scores"].to_pylist()
    assert [value for pair in scores for value in pair] == [score.value for score in expected]
    assert found.benchmark == "RewardBench"
    data = json.loads((tmp_path / "out" / "rewardbench.json").read_text())
    assert data["leaderboard"] == {"truncation": "left", "max_tokens": 2048, "source": "scripts/run_rm.py"}
    told = "leaderboard settings: the end of 2,048 tokens is kept, as in scripts/run_rm.py\n"
    assert told in capsys.readouterr().out


def test_the_leaderboard_cuts_by_benchmark_and_pipeline() -> None:
    llama = "LlamaForSequenceClassification"
    first, second = (leaderboard_cut(benchmark, llama) for benchmark in Benchmark)
    assert [(cut.truncation, cut.max_tokens) for cut in (first, second)] == [("left", 2048), ("right", 2048)]
    for benchmark in Benchmark:
        uncut = leaderboard_cut(benchmark, "InternLM2ForRewardModel")
        assert (uncut.truncation, uncut.max_tokens) == ("error", None)
        assert "nothing is cut" in str(uncut)


@pytest.mark.parametrize("options", [{"truncation": "right"}, {"truncation": "left"}, {"max_tokens": 4096}])
def test_the_leaderboards_cut_excludes_another(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"--(truncation|max-tokens) cannot be set with --leaderboard"):
        config(tmp_path, leaderboard=True, **options)


def test_the_help_tells_what_every_option_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["jobs.rewardbench", "--help"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for name in RewardBenchConfig.model_fields:
        assert "--" + name.replace("_", "-") in printed
    assert "python -m jobs.rewardbench --input filtered.parquet" in printed
