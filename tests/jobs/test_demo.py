"""The demo scores and ranks the shipped sample, and says that the embedded model's scores mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import demo
from jobs.errors import OutputError
from jobs.runs.ledger import Ledger


@pytest.mark.usefixtures("local_ray")
def test_the_demo_prints_every_prompt_with_its_responses_ranked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["jobs.demo", "--output", str(tmp_path / "demo")])
    for _ in range(2):  # the second run replaces the first
        assert demo.main() == 0
    printed = capsys.readouterr().out
    table = printed[printed.rindex("rank     score") :].splitlines()
    ranks = [int(line[:4]) for line in table[1:] if line[:4].strip().isdigit()]
    assert ranks == [0, 1] * 12
    scores = [float(line[4:14]) for line in table[1:] if line[:4].strip().isdigit()]
    assert all(best >= worst for best, worst in zip(scores[::2], scores[1::2], strict=True))
    assert "its scores mean nothing" in printed


def test_the_demo_takes_no_folder_away_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    demo._clear(tmp_path)
    ledger = Ledger(str(tmp_path))
    ledger.begin({"identity": {"input": "/another/corpus"}})
    with pytest.raises(OutputError, match="holds the work of another job"):
        demo._clear(tmp_path)
    assert (tmp_path / "precious").exists()
