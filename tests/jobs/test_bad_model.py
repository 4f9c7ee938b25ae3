"""A model whose files are missing or broken is one error that names the file, before Ray starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import best_of_n, pairs, rank, rewardbench, score
from jobs.options import EngineOptions
from jobs.scoring.spec import check_model_files
from serve_app.reward_model import CheckpointError, RewardModel
from tests.jobs.conftest import write as write_rows
from tests.reward_model import classifiers

FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"model holds no tokenizer\.json"),
    "tokenizer no JSON": (lambda folder: (folder / "tokenizer.json").write_text("{"), r"model/tokenizer\.json: "),
    "settings no JSON": (lambda folder: (folder / "tokenizer_config.json").write_text("{"), r"/tokenizer_config\.json"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"model holds no config\.json"),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("no"), r"model/config\.json cannot be read"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), r"/config\.json holds no JSON object"),
    "empty weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""),
        r"model/model\.safetensors cannot be read",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"no model\.safetensors.* in .*model"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return classifiers.write(tmp_path / "model")


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_broken_file_is_named_by_the_job_and_by_the_engine(folder: Path, fault: str) -> None:
    check_model_files(EngineOptions(model=str(folder)))
    spoil, message = FAULTS[fault]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        check_model_files(EngineOptions(model=str(folder)))
    with pytest.raises(CheckpointError, match=message):
        _ = RewardModel.from_pretrained(folder, device="cpu", dtype="float32").tokenizer


@pytest.mark.parametrize("job", [score, rank, pairs, best_of_n, rewardbench], ids=lambda job: job.__name__)
def test_jobs_tell_it_before_ray_starts(
    job: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "model.safetensors").write_bytes(b"")
    row = {"prompt": "hi", "chosen": "yes", "rejected": "no", "subset": "s", "response": "yes"}
    write_rows(tmp_path / "in.parquet", [{key: row[key] for key in columns_of(job)}])
    monkeypatch.setattr(job, "joined", lambda address, style: pytest.fail("Ray was started"))
    source = "--prompts" if job is best_of_n else "--input"
    arguments = [source, str(tmp_path / "in.parquet"), "--output", str(tmp_path / "out"), "--model", str(folder)]
    assert job.main([*arguments, *(["--generator", "tiny"] if job is best_of_n else [])]) == 1
    assert "model/model.safetensors cannot be read" in capsys.readouterr().err


def columns_of(job: Any) -> tuple[str, ...]:
    if job is rewardbench:
        return ("prompt", "chosen", "rejected", "subset")
    return ("prompt",) if job is best_of_n else ("prompt", "response")
