"""The demo scores and ranks the shipped sample, and says where the preferred answer is not first."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

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
    first_marks = [group.splitlines()[1][24] for group in groups]
    told = re.findall(r"first in (\d+) of (\d+) prompts of", printed[printed.rindex("rank     score") :])
    assert [int(number) for _, number in told] == [11, 5]
    assert sum(int(number) for number, _ in told) == first_marks.count("*")
    assert printed.count("  not in: ") == 2 * (16 - first_marks.count("*"))
    assert "tiny: a toy model that knows arithmetic, " in printed


def test_prompts_whose_preferred_answer_is_not_first_are_named() -> None:
    def answer(number: int, category: str, score: float | None, *, preferred: bool) -> dict[str, Any]:
        prompt = [{"role": "user", "content": f"Question {number}?"}]
        error = None if score is not None else "too long"
        kept = {"category": category, "score": score, "error": error, "preferred": preferred}
        return {"prompt_id": number, "prompt": prompt, **kept}

    rows = [
        answer(0, "arithmetic", 1.0, preferred=False),
        answer(0, "arithmetic", 2.0, preferred=True),
        answer(1, "capitals", 1.0, preferred=True),
        answer(1, "capitals", 2.0, preferred=False),
        answer(2, "code", None, preferred=True),
        answer(2, "code", 1.0, preferred=False),
    ]
    assert list(demo._verdicts(rows)) == [
        "\nThe preferred answer is first in 1 of 2 prompts of the kinds that tiny was taught.",
        "  not in: Question 1?",
        "\nThe preferred answer is first in 0 of 1 prompts of other kinds.",
        "  not in: Question 2?",
    ]


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
