"""What decides how rows are read, end to end: references, chat templates from a file, and rows that look wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import CorpusError
from jobs.score import ScoreConfig, run
from serve_app.reward_model import Conversation, Message, RewardModel
from tests.conftest import chat
from tests.jobs.conftest import read_parts, write
from tests.reward_model import classifiers, polar

pytestmark = pytest.mark.usefixtures("local_ray", "in_process")

ODD: list[dict[str, Any]] = [
    {"messages": chat("hi", "yes")},
    {"messages": [{"role": "human", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    {"messages": chat("hi")},
    {"messages": chat("hi", "")},
]


def config(tmp_path: Path, **options: Any) -> ScoreConfig:
    defaults = {"input": str(tmp_path / "in"), "output": str(tmp_path / "out"), "model": "tiny", "dtype": "float32"}
    return ScoreConfig(**{**defaults, "cpus_per_actor": 1, **options})


def manifest(tmp_path: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((tmp_path / "out" / "_manifest.json").read_text())
    return read


def test_rows_that_look_wrong_are_scored_counted_and_named(
    tmp_path: Path, tiny: RewardModel, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in" / "a.parquet", ODD)
    total = run(config(tmp_path))
    assert total.errors == 0
    assert read_parts(tmp_path / "out")["score"].to_pylist() == tiny.get_scores([row["messages"] for row in ODD])
    counts = {"unknown_role": 1, "last_not_assistant": 1, "empty_response": 1}
    assert {name: manifest(tmp_path)[name] for name in counts} == counts
    told = "warnings: 1 unknown_role, 1 last_not_assistant, 1 empty_response (--strict makes them errors)"
    assert told in capsys.readouterr().out
    run(config(tmp_path))
    assert told in capsys.readouterr().out


def test_strict_makes_them_errors(tmp_path: Path, tiny: RewardModel) -> None:
    write(tmp_path / "in" / "a.parquet", ODD)
    total = run(config(tmp_path, strict=True))
    assert (total.errors, dict(total.counts)) == (3, {})
    first, *others = read_parts(tmp_path / "out")["error"].to_pylist()
    assert first is None
    kinds = ["unknown_role", "last_not_assistant", "empty_response"]
    assert [
        error.startswith(f"MalformedConversationError: {kind}: ") for error, kind in zip(others, kinds, strict=True)
    ]
    assert manifest(tmp_path)["identity"]["strict"] is True


def test_polar_reads_each_rows_reference(tmp_path: Path) -> None:
    folder = polar.write(tmp_path / "polar")
    rows = [{"prompt": "Capital?", "response": text, "answer": "Beijing."} for text in ("Beijing.", "Shanghai.")]
    write(tmp_path / "in" / "a.parquet", [*rows, rows[0] | {"answer": None}])
    total = run(config(tmp_path, model=str(folder), reference_column="answer"))
    table = read_parts(tmp_path / "out")
    turns = [(Message("user", "Capital?"), Message("assistant", str(row["response"]))) for row in rows]
    model = RewardModel.from_pretrained(folder, dtype="float32")
    expected = model.get_scores([Conversation(turn, "Beijing.") for turn in turns])
    assert table["score"].to_pylist() == [*expected, None]
    assert "there is none" in table["error"].to_pylist()[2]
    assert total.errors == 1
    with pytest.raises(CorpusError, match="POLAR model.*--reference-column"):
        run(config(tmp_path, model=str(folder), output=str(tmp_path / "without")))
    with pytest.raises(CorpusError, match="takes no reference"):
        run(config(tmp_path, reference_column="answer", output=str(tmp_path / "needless")))


def test_a_template_from_a_file_scores_a_checkpoint_that_has_none(tmp_path: Path) -> None:
    folder = classifiers.write(tmp_path / "bare", template=None)
    file = tmp_path / "chatml.jinja"
    file.write_text(classifiers.CHATML)
    rows = [{"messages": chat("hello", text)} for text in ("four", "I do not know")]
    write(tmp_path / "in" / "a.parquet", rows)
    run(config(tmp_path, model=str(folder), chat_template=str(file)))
    model = RewardModel.from_pretrained(folder, dtype="float32", chat_template=file)
    assert read_parts(tmp_path / "out")["score"].to_pylist() == model.get_scores([row["messages"] for row in rows])
    assert manifest(tmp_path)["identity"]["model_fingerprint"] == model.fingerprint


def test_attributes_are_a_column_of_each_score(tmp_path: Path) -> None:
    folder = classifiers.write_urm(tmp_path / "urm")
    sides = [[{"role": "user", "content": "hello"}, {"role": "assistant", "content": text}] for text in ("four", "no")]
    write(tmp_path / "in" / "a.parquet", [{"messages": sides[0]}, {"messages": sides[1]}, {"messages": []}])
    run(config(tmp_path, model=str(folder)))
    scores = RewardModel.from_pretrained(folder, device="cpu", dtype="float32").score(sides)
    expected = [dict(score.attributes) for score in scores]
    assert list(expected[0]) == ["helpfulness", "correctness", "coherence", "complexity", "verbosity"]
    table = read_parts(tmp_path / "out")
    assert table["score"].to_pylist() == [*(score.value for score in scores), None]
    assert table["attributes"].to_pylist() == [*expected, None]
    write(tmp_path / "pairs" / "a.parquet", [{"chosen": sides[0], "rejected": sides[1]}])
    run(config(tmp_path, model=str(folder), input=str(tmp_path / "pairs"), output=str(tmp_path / "two")))
    (row,) = read_parts(tmp_path / "two").to_pylist()
    assert [row["chosen_attributes"], row["rejected_attributes"]] == expected
    write(tmp_path / "taken" / "a.parquet", [{"messages": sides[0], "attributes": 1}])
    with pytest.raises(CorpusError, match=r"already has the columns \['attributes'\]"):
        run(config(tmp_path, model=str(folder), input=str(tmp_path / "taken"), output=str(tmp_path / "three")))


def test_a_served_models_template_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--chat-template cannot be set with --via-serve"):
        config(tmp_path, via_serve="app", chat_template="x.jinja")
