"""`--show` prints rows as the model reads them: no Ray, no output folder, nothing scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import score
from jobs.score import ScoreConfig, main
from serve_app.reward_model import RewardModel
from tests.conftest import chat
from tests.jobs.conftest import write


@pytest.fixture
def shown(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is printed for rows, with the options given; starting Ray fails."""

    def no_ray(address: str | None, style: str) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(score, "joined", no_ray)

    def run(rows: list[dict[str, Any]], *options: str) -> str:
        write(tmp_path / "in" / "a.parquet", rows[:2])
        write(tmp_path / "in" / "b.parquet", rows[2:] or rows)
        arguments = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"), "--model", "tiny", *options]
        assert main(arguments) == 0
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().out

    return run


def test_the_first_rows_are_shown_as_the_model_reads_them(shown: Any, tiny: RewardModel) -> None:
    rows = [{"messages": chat(f"hi {number}", "yes")} for number in range(5)]
    told = shown(rows, "--show", "3", "--system-prompt", "Be brief.")
    tokens = tiny.tokenizer.encode([{"role": "system", "content": "Be brief."}, *rows[0]["messages"]])
    assert told.startswith(f"row 0 of a.parquet, {len(tokens)} tokens:\n")
    assert tiny.tokenizer.decode(tokens) in told
    assert "<|im_start|>user\nhi 2<|im_end|>" in told
    assert [line.partition(",")[0] for line in told.splitlines() if line.startswith("row ")] == [
        "row 0 of a.parquet", "row 1 of a.parquet", "row 0 of b.parquet"
    ]  # fmt: skip


def test_a_pair_is_shown_on_both_sides_and_a_bad_row_with_its_reason(shown: Any) -> None:
    rows = [{"prompt": "hi", "chosen": "yes", "rejected": "no"}, {"prompt": "hi", "chosen": None, "rejected": " "}]
    told = shown(rows, "--show", "2")
    assert "row 0 of a.parquet, chosen, " in told
    assert "row 0 of a.parquet, rejected, " in told
    assert "row 1 of a.parquet, chosen: ConversationError: it is null\n" in told
    assert "empty_response: the last message" in told


def test_a_served_models_tokenizer_is_not_here() -> None:
    with pytest.raises(ValueError, match="leave --via-serve out"):
        ScoreConfig(input="a", output="b", model="tiny", show=1, via_serve="app")
