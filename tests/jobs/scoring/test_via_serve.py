"""jobs.score through the replicas of a running application: the same bits, nothing lost, no other model."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from jobs.errors import JobError, ServedModelError
from jobs.runs.ledger import UnitStats
from jobs.score import ScoreConfig, run
from jobs.scoring.via_serve import ServedModel, ServedModelSource
from serve_app.reward_model import RewardModel
from tests.conftest import chat
from tests.jobs.conftest import read_parts, write
from tests.serve_app.test_endpoint import deploy_models, replica_pids, wait_for

APP = "rayward"
TINY = {"model": "tiny", "dtype": "float32", "num_cpus": 0.5, "num_replicas": 2, "threads": 1}
NUM_ROWS = 400


@pytest.fixture(scope="module")
def app(local_ray: None) -> Iterator[None]:
    """Two replicas of `tiny`."""
    from ray import serve

    serve.start(proxy_location="Disabled")
    deploy_models([TINY])
    yield
    serve.shutdown()


def texts(place: int) -> list[dict[str, str]]:
    prompt = f"question {place // 4} " + "and on " * (place // 4 % 30)
    return chat(prompt, f"answer {place} " + "so " * (place % 7))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 conversations, four to a prompt; one of them is too long."""
    rows = [{"messages": texts(place)} for place in range(NUM_ROWS)]
    rows[77] = {"messages": chat("long " * 900, "yes")}
    return write(tmp_path_factory.mktemp("corpus") / "rows.parquet", rows)


def config(corpus: Path, output: Path, **options: Any) -> ScoreConfig:
    defaults = {"via_serve": APP, "rows_per_unit": 50, "max_tokens": 500, "address": "local"}
    return ScoreConfig.model_validate({"input": str(corpus), "output": str(output), **defaults, **options})


def check(output: Path, tiny: RewardModel) -> None:
    rows = read_parts(output).to_pylist()
    expected = [place for place in range(NUM_ROWS) if place != 77]
    assert [rows[place]["score"] for place in expected] == tiny.get_scores([texts(place) for place in expected])
    assert rows[77]["score"] is None
    assert "ConversationTooLongError" in rows[77]["error"]


def test_every_turn_has_the_same_bits_through_the_application(app: None, tmp_path: Path, tiny: RewardModel) -> None:
    talks = [chat(*(f"{talk} goes on, and {place}" for place in range(2 * talk))) for talk in range(1, 9)]
    write(tmp_path / "in" / "a.parquet", [{"messages": talk} for talk in talks])
    run(config(tmp_path / "in", tmp_path / "out", every_turn=True, max_tokens=None))
    expected = [[turn.value for turn in tiny.score_turns(talk)] for talk in talks]
    assert read_parts(tmp_path / "out")["turn_scores"].to_pylist() == expected


def test_what_own_actors_scored_is_not_asked_for_again(
    app: None, corpus: Path, tmp_path: Path, tiny: RewardModel, in_process: None
) -> None:
    """And the other way round: scores have the same bits, so that it does not matter who made them."""
    own = {"via_serve": None, "model": "tiny", "dtype": "float32", "cpus_per_actor": 1}
    run(config(corpus, tmp_path / "own", **own, limit=300))
    total = run(config(corpus, tmp_path / "served", reuse=(str(tmp_path / "own"),)))
    check(tmp_path / "served", tiny)
    assert total.counts["scores_reused"] == 299
    total = run(config(corpus, tmp_path / "again", **own, reuse=(str(tmp_path / "served"),)))
    check(tmp_path / "again", tiny)
    assert total.computed_tokens == 0


def test_nothing_is_remembered_of_replicas_on_several_kinds_of_processors(
    app: None, corpus: Path, tmp_path: Path, tiny: RewardModel, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of them a score is of is not known any more."""

    def load(source: ServedModelSource) -> ServedModel:
        model = loaded(source)
        model._calls.processors.add("another card")
        return model

    loaded = ServedModelSource.load
    monkeypatch.setattr(ServedModelSource, "load", load)
    total = run(config(corpus, tmp_path / "served"))
    check(tmp_path / "served", tiny)
    assert total.processors == (*tiny.processors, "another card")
    hashes = (tmp_path / "served" / "_scores").iterdir()
    assert sum(pa.ipc.open_file(path).read_all().num_rows for path in hashes) == 0


@pytest.mark.slow
def test_replicas_that_die_cost_no_row_and_own_actors_take_the_output_over(
    app: None, corpus: Path, tmp_path: Path, tiny: RewardModel
) -> None:
    before = replica_pids()
    done: list[UnitStats] = []
    job = threading.Thread(target=lambda: done.append(run(config(corpus, tmp_path))))
    job.start()
    wait_for(lambda: bool(list(tmp_path.glob("part-*"))))
    for pid in before.values():
        os.kill(pid, signal.SIGKILL)
    job.join(600)
    assert (done[0].rows, done[0].errors) == (NUM_ROWS, 1)
    assert not replica_pids().keys() & before.keys()
    check(tmp_path, tiny)
    manifest = json.loads((tmp_path / "_manifest.json").read_text())
    assert manifest["arguments"]["via_serve"] == APP
    assert manifest["via_serve"]["deployment"] == "tiny"
    assert manifest["arguments"]["model"] is None
    described = {"device": "cpu", "dtype": "float32", "quantization": "none"}
    assert manifest["model"] == {"name": "tiny", "revision": None, "fingerprint": tiny.fingerprint, **described}

    next(tmp_path.glob("part-*")).unlink()
    again = run(config(corpus, tmp_path, via_serve=None, model="tiny", dtype="float32", cpus_per_actor=1))
    assert (again.rows, again.errors) == (NUM_ROWS, 1)
    check(tmp_path, tiny)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"via_serve": "nobody"}, "no such Serve application; these run: rayward"),
        ({"via_serve": f"{APP}/other"}, "say which model, as in rayward/tiny"),
        ({"dtype": "bfloat16"}, "serves dtype float32, not bfloat16"),
        ({"device": "cuda"}, "serves device cpu, not cuda"),
        ({"quantization": "fp8"}, "serves quantization none, not fp8"),
        ({"cpus_per_actor": 64}, "do not fit"),
    ],
)
def test_what_does_not_fit_the_application_is_refused(
    app: None, corpus: Path, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(JobError, match=reason):
        run(config(corpus, tmp_path, **options))
    assert not list(tmp_path.glob("part-*"))


def test_another_model_is_refused(app: None, corpus: Path, tmp_path: Path, other_folder: Path) -> None:
    with pytest.raises(ServedModelError, match="serves tiny with fingerprint .*, not .*other"):
        run(config(corpus, tmp_path, model=str(other_folder)))


def test_options_that_the_replicas_decide_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="--gpus-per-actor and --token-budget cannot be set with --via-serve"):
        config(tmp_path, tmp_path, gpus_per_actor=1, token_budget=4096)
