"""jobs.best_of_n end to end on a local Ray: real prompts, a local generator, and an endpoint that misbehaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.best_of_n import BestOfNConfig, main, run
from jobs.errors import GeneratorError, OutputError
from jobs.generation import tiny as tiny_generator
from jobs.generation.candidates import Prompt
from jobs.generation.chat_encoder import ChatEncoder
from jobs.generation.internlm2 import load_internlm2
from jobs.generation.local import LocalGenerator
from jobs.generation.options import Sampling
from serve_app.reward_model import RewardModel
from serve_app.reward_model.conversation import Message
from serve_app.reward_model.scores import order, ranks
from tests.conftest import chat
from tests.jobs.conftest import read_parts, write
from tests.serve_app.scripted_server import Reply, Request, refusal, serving

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600
OPTIONS = ["--keep-all", "--n", "4", "--max-new-tokens", "6", "--rows-per-unit", "3", "--dtype", "float32"]
OPTIONS += ["--model", "tiny"]
OPTIONS += ["--generator-dtype", "float32", "--cpus-per-actor", "1", "--generator-cpus-per-actor", "1"]
SAMPLING = Sampling(num_candidates=4, temperature=0.8, top_k=50, top_p=0.95, max_new_tokens=6)


@pytest.fixture
def prompts(tmp_path: Path) -> list[dict[str, Any]]:
    """The questions of 12 prompts of the shipped sample and a null, in two files of the folder `prompts`."""
    sample = pq.read_table(ROOT / "jobs" / "sample.parquet").to_pylist()
    questions = {row["prompt_id"]: row["prompt"][-1]["content"] for row in sample}
    rows: list[dict[str, Any]] = [{"prompt_id": key, "prompt": text} for key, text in list(questions.items())[:12]]
    rows.insert(7, {"prompt_id": 99, "prompt": None})
    assert len({row["prompt_id"] for row in rows}) == 13
    write(tmp_path / "prompts" / "a.parquet", rows[:5])
    write(tmp_path / "prompts" / "b.parquet", rows[5:])
    return rows


@pytest.mark.usefixtures("local_ray")
@pytest.mark.slow
def test_a_resumed_job_draws_and_ranks_what_the_engine_does(
    prompts: list[dict[str, Any]],
    tmp_path: Path,
    tiny: RewardModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    arguments = ["--prompts", str(tmp_path / "prompts"), "--output", str(output), *OPTIONS]
    kill_after([sys.executable, "-m", "jobs.best_of_n", *arguments], output, num_parts=2)
    assert command(monkeypatch, *arguments) == 3
    told = capsys.readouterr().out
    assert f"13 prompts in {output} (" in told
    assert "before): 12 answered, 0 of them with fewer candidates than asked for, 1 without a response" in told
    check_all(read_parts(output), prompts, tiny)
    assert json.loads((output / "_manifest.json").read_text())["processors"] == list(tiny.processors)

    times = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    assert command(monkeypatch, *arguments) == 3
    assert "(13 of them before): 12 answered" in capsys.readouterr().out
    for change in (["--temperature", "0.5"], ["--seed", "1"], ["--no-keep-all"], ["--n", "3"]):
        assert command(monkeypatch, *arguments, *change) == 1
        assert "holds the work of a run with other settings" in capsys.readouterr().err
    assert times == {path: path.stat().st_mtime_ns for path in output.iterdir()}


def check_all(table: pa.Table, prompts: list[dict[str, Any]], tiny: RewardModel) -> None:
    """Every candidate is the one that its seed gives, with the engine's score and its rank."""
    found = table.to_pylist()
    for place, prompt in enumerate(prompts):
        rows = [row for row in found if row["prompt_id"] == prompt["prompt_id"]]
        if prompt["prompt"] is None:
            assert [(row["response"], row["error"]) for row in rows] == [
                (None, "ConversationError: the prompt is null")
            ]
            continue
        key = f"a.parquet:{place}" if place < 5 else f"b.parquet:{place - 5}"
        drawn = sorted(rows, key=lambda row: int(row["candidate"]))
        texts = generated(prompt["prompt"], key)
        assert [row["response"] for row in drawn] == texts
        scores = tiny.get_scores([chat(prompt["prompt"], text) for text in texts])
        assert [row["score"] for row in drawn] == scores
        assert [row["rank"] for row in drawn] == ranks(scores)
        assert [row["rank"] for row in rows] == [0, 1, 2, 3]


def generated(text: str, key: str) -> list[str]:
    """What the embedded generator draws for a prompt at this place, without Ray."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tiny_generator.cached_folder()
    model = load_internlm2(folder, device=torch.device("cpu"), dtype=torch.float32)
    generator = LocalGenerator(model, ChatEncoder.from_pretrained(folder), SAMPLING, batch_size=32)
    (generation,) = generator.generate([Prompt((Message("user", text),), key)])
    torch.set_num_threads(before)
    return [candidate.text for candidate in generation.candidates]


def kill_after(command: list[str], output: Path, *, num_parts: int) -> None:
    """Start the job, and kill its driver as soon as so many parts are committed."""
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while len(list(output.glob("part-*"))) < num_parts:
            assert driver.poll() is None, f"the job ended by itself with {driver.returncode}"
            assert time.monotonic() < deadline, "the job commits nothing"
            time.sleep(0.02)
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


class Misbehaving:
    """An endpoint whose conduct follows from the number in a prompt. `down_at` makes it fail from that number on.

    It fails once all earlier prompts have had their last request: an answer in between would be a sign of life.
    """

    NUM_REQUESTS: ClassVar = {1: 3, 2: 2, 4: 3, 5: 2, 6: 0}  # of those that are not answered at once; 6 is null

    def __init__(self, output: Path, *, down_at: int) -> None:
        self.asked: Counter[int] = Counter()
        self.down_at = down_at
        self.streamed = False
        self._output = output
        self._lock = threading.Lock()

    def answer(self, request: Request) -> Reply:
        if request.body["messages"][-1]["content"] == "Hi":  # the trial request
            return self.choices(request, 0, 1)
        number = int(request.body["messages"][-1]["content"].split()[-1])
        with self._lock:
            self.asked[number] += 1
        if number >= self.down_at:
            earlier = range(self.down_at)
            wait_until(lambda: all(self.asked[n] >= self.NUM_REQUESTS.get(n, 1) for n in earlier))
            return refusal(503, "down")
        conduct: dict[int, Callable[[Request, int], Reply]] = {
            1: self.fewer, 2: self.cut_once, 3: self.refused, 4: self.half, 5: self.stalls_once, 23: self.last
        }  # fmt: skip
        return conduct.get(number, self.whole)(request, number)

    def choices(self, request: Request, number: int, count: int) -> Reply:
        texts = [f"{number} seems right, as {request.body['n'] - place} would." for place in range(count)]
        return Reply({"choices": [{"message": {"content": text}, "finish_reason": "stop"} for text in texts]})

    def whole(self, request: Request, number: int) -> Reply:
        return self.choices(request, number, request.body["n"])

    def fewer(self, request: Request, number: int) -> Reply:
        return self.choices(request, number, 1)

    def cut_once(self, request: Request, number: int) -> Reply:
        return Reply(b'{"choices"', is_cut=True) if self.asked[number] == 1 else self.whole(request, number)

    def refused(self, request: Request, number: int) -> Reply:
        return refusal(400, "not this one")

    def half(self, request: Request, number: int) -> Reply:
        return self.choices(request, number, 2) if request.body["n"] == 3 else refusal(500, "broken")

    def stalls_once(self, request: Request, number: int) -> Reply:
        """Wait at the first request until there is a second: the client has given up."""
        wait_until(lambda: self.asked[number] > 1)
        return self.whole(request, number)

    def last(self, request: Request, number: int) -> Reply:
        """Wait for scores of earlier units: they stream behind generation, or this never sees one."""
        wait_until(lambda: bool(list(self._output.glob("part-*-000000000012-*"))))
        self.streamed = True
        return self.whole(request, number)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_every_prompt_of_a_bad_endpoint_ends_with_its_best_or_a_reason_and_a_restart_finishes_the_rest(
    tmp_path: Path, tiny: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = [{"id": number, "prompt": chat(f"Is this right: {number}")} for number in range(24)]
    rows[6]["prompt"] = None
    write(tmp_path / "prompts.parquet", rows)
    output = tmp_path / "out"
    conduct = Misbehaving(output, down_at=12)
    monkeypatch.setenv("CHAT_KEY", "the secret")
    with serving(conduct.answer) as server:
        job = BestOfNConfig(
            prompts=str(tmp_path / "prompts.parquet"),
            output=str(output),
            generator=server.url + "/v1/",
            generator_model="chat",
            model="tiny",
            n=3,
            rows_per_unit=4,
            concurrency=4,
            max_retries=1,
            request_timeout_s=600.0,
            api_key_env="CHAT_KEY",
            dtype="float32",
            cpus_per_actor=2,
        )
        with pytest.raises(GeneratorError, match="seems to be down: .*the same command goes on"):
            run(job.model_copy(update={"request_timeout_s": 5.0}))
        assert json.loads((output / "_manifest.json").read_text())["status"] == "stopped"
        committed = {row["id"] for row in read_parts(output).to_pylist()} if list(output.glob("part-*")) else set()
        assert committed <= set(range(12))
        before = Counter(conduct.asked)
        conduct.down_at = 24
        total = run(job)
        assert all(conduct.asked[number] == before[number] for number in committed)
        assert {request.headers["Authorization"] for request in server.requests} == {"Bearer the secret"}
    assert conduct.streamed
    assert (total.rows, total.errors, total.counts) == (24, 2, {"candidates": 65, "answered_in_part": 1})
    assert "the secret" not in (output / "_manifest.json").read_text()
    table = read_parts(output)
    assert table.select(["id", "prompt"]).to_pylist() == rows
    found = table.to_pylist()
    check_best(found, tiny)
    assert found[3]["error"] == "no candidate has a score: 3 of 3: HTTP 400: not this one"
    assert (found[4]["num_candidates"], found[4]["error"]) == (2, None)
    assert found[4]["failures"] == "1 of 3: HTTP 500: broken (asked 2 times)"
    assert found[6]["error"] == "ConversationError: the prompt is null"
    assert table["error"].null_count == 22
    assert table["failures"].null_count == 22


def check_best(found: list[dict[str, Any]], tiny: RewardModel) -> None:
    """Whole answers hold the best of three texts, scored as the engine scores them."""
    for row in found:
        if row["num_candidates"] == 3 and row["id"] != 1:
            texts = [f"{row['id']} seems right, as {left} would." for left in (3, 2, 1)]
            scores = tiny.get_scores([[*row["prompt"], {"role": "assistant", "content": text}] for text in texts])
            best = order(scores)[0]
            assert (row["response"], row["score"]) == (texts[best], scores[best])


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command line in this process; its exit status."""
    monkeypatch.setattr("sys.argv", ["jobs.best_of_n", *arguments])
    return main()


@pytest.mark.usefixtures("local_ray")
def test_a_generator_that_is_not_there_stops_the_job_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "one.parquet", [{"prompt": "Hi"}])
    arguments = ["--prompts", str(tmp_path / "one.parquet"), "--output", str(tmp_path / "out"), "--model", "tiny"]
    for generator, reason in (
        ("http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1 cannot be reached"),
        ("http://me:pw@host/v1", "put the key into the environment"),
        ("./nowhere", "model folder ./nowhere does not exist"),
    ):
        assert command(monkeypatch, *arguments, "--generator", generator) == 1
        assert reason in capsys.readouterr().err
    assert command(monkeypatch, *arguments, "--generator", "http://127.0.0.1:9/v1", "--generator-model", "chat") == 1
    assert "http://127.0.0.1:9/v1 does not answer a trial request: ConnectError" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_help_tells_what_every_option_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, "--help")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for name in BestOfNConfig.model_fields:
        assert "--" + name.replace("_", "-") in printed
    assert "python -m jobs.best_of_n --prompts prompts/" in printed
    for arguments in (["--top-p", "0"], ["--n", "0"], ["--extra-body", "[1]"]):
        with pytest.raises(SystemExit) as caught:
            command(monkeypatch, "--prompts", "a", "--output", "b", "--model", "tiny", *arguments)
        assert caught.value.code == 2


def test_the_output_of_tables_of_another_length_is_committed_whole(tmp_path: Path) -> None:
    """A part of `keep_all` has more rows than its unit; one that was cut is not taken for done."""
    from jobs.corpus.files import Unit
    from jobs.runs.ledger import Ledger, UnitStats

    ledger = Ledger(str(tmp_path / "out"))
    ledger.begin({"identity": {}})
    unit = Unit(path="a", name="a", fingerprint="f", first_row=0, num_rows=2)
    stats = UnitStats(rows=2, counts={"added_rows": 3, "candidates": 5})
    with pytest.raises(OutputError, match="a table of 4 rows where 5 are counted"):
        ledger.commit(unit, pa.table({"a": range(4)}), stats)
    with pytest.raises(OutputError, match="has 2 rows but 1 came back"):
        ledger.commit(unit, pa.table({"a": [1]}), UnitStats(rows=1))
    ledger.commit(unit, pa.table({"a": range(5)}), stats)
    assert ledger.done([unit]) == {unit.id: stats}
    table = pq.read_table(ledger.path(unit))
    pq.write_table(table.slice(0, 2), ledger.path(unit))
    assert ledger.done([unit]) == {}
