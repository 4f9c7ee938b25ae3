"""The demo scores and ranks the shipped sample, and says that the embedded model's scores mean nothing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
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
    first, *groups = printed[printed.rindex("rank     score") :].split("\n\n")[:17]
    assert first == "rank     score  tokens  response (* = preferred)"
    expected = Counter(pq.read_table(demo.SAMPLE)["prompt_id"].to_pylist())
    assert len(groups) == len(expected)
    for number, group in enumerate(groups):
        _, *lines = group.splitlines()
        assert [int(line[:4]) for line in lines] == list(range(expected[number]))
        scores = [float(line[4:14]) for line in lines]
        assert scores == sorted(scores, reverse=True)
        assert [line[24] for line in lines].count("*") == 1
        assert not any(line.endswith("  ...") for line in lines)
    assert "its scores mean nothing" in printed


def test_the_demo_takes_no_folder_away_that_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    demo._clear(tmp_path)
    ledger = Ledger(str(tmp_path))
    ledger.begin({"identity": {"input": "/another/corpus"}})
    with pytest.raises(OutputError, match="holds the work of another job"):
        demo._clear(tmp_path)
    assert (tmp_path / "precious").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("one two", "one two"),
        ("one two three four five", "one two three ..."),
        ("one  two\nthree four five", "one two three ..."),
        ("abcdefghijklmnopqrstuvwxyz", "abcdefghijklmn ..."),
        (
            "\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341",
            "\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03 ...",
        ),
        ("", ""),
    ],
)
def test_a_long_text_is_cut_at_a_word_or_between_chinese_characters(text: str, shown: str) -> None:
    assert demo._short(text, 18) == shown
