"""What people read: the subsets that there are, the card's figures beside ours, and what is missing."""

from __future__ import annotations

import json

from jobs.benchmarks import rewardbench1, rewardbench2
from jobs.benchmarks.outcome import AnsweredRow
from jobs.benchmarks.table import as_data, table


def test_a_part_of_rewardbench_names_what_it_lacks() -> None:
    rows = [
        AnsweredRow(0, None, "llmbar-natural", 1, (1.0, 0.0)),
        AnsweredRow(1, None, "llmbar-natural", 1, (1.0, None), "rejected answer: it is null"),
        AnsweredRow(2, None, "mine", 1, (1.0, 0.0)),
    ]
    outcome = rewardbench1.evaluate(rows)
    lines = table(outcome, model="some-model", rows=rows).splitlines()
    assert lines[:4] == [
        "subset                              pairs   score",
        "Chat Hard",
        "  mt-bench-hard                 0 of   37       -",
        "  llmbar-natural                2 of  100    50.0",
    ]
    assert "  mine                                  1   100.0" in lines
    assert "                                Score     Chat   Chat Hard   Safety   Reasoning" in lines
    assert "some-model                          -        -       *50.0        -           -" in lines
    assert "InternLM2-1.8B-Reward (card)     80.6     95.0        58.1     81.8        87.4" in lines
    remarks = lines[lines.index("* not on the benchmark's own rows:") + 1 :]
    assert remarks[0].startswith("  Chat Hard: without mt-bench-hard, llmbar-adver-neighbor, ")
    assert remarks[0].endswith("; llmbar-natural 2 of 100")
    assert remarks[1] == "missing altogether:"
    assert remarks[3].startswith("  Safety: refusals-dangerous, ")
    assert remarks[5:] == [
        "there is no final score while subsets are missing",
        "pairs counted as wrong since an answer has no score: 1, at rows 1 (from 0; rows.parquet says why)",
    ]

    data = json.loads(json.dumps(as_data(outcome, rows=rows), allow_nan=False))
    assert (data["score"], data["sections"]["Chat Hard"], data["complete"]) == (None, 0.5, False)
    assert data["missing"]["Reasoning"][0] == "math-prm"
    assert data["unscored"] == [{"row": 1, "subset": "llmbar-natural", "error": "rejected answer: it is null"}]
    natural = {"score": 0.5, "rows": 2, "benchmark_rows": 100, "unscored_rows": 1}
    assert data["subsets"]["llmbar-natural"] == natural
    assert data["comparisons"]["InternLM2-20B-Reward (card)"]["sections"]["Chat Hard"] == 0.741


def test_the_whole_of_rewardbench_2_is_marked_nowhere() -> None:
    rows = [
        AnsweredRow(0, f"{kind}:{number // 2}", name, 1, (1.0, 0.5))
        for name, count in rewardbench2.NUM_PROMPTS.items()
        for number, kind in zip(range(count), ["ref", "tied"] * count, strict=False)
    ]
    outcome = rewardbench2.evaluate(rows)
    printed = table(outcome, model="m", rows=rows)
    assert "  Factuality       475 of  475   100.0" in printed
    assert printed.splitlines()[-1].split() == ["m", "100.2", "100.0", "100.0", "100.0", "100.0", "100.0", "101.0"]
    assert "*" not in printed
    assert as_data(outcome, rows=rows)["complete"] is True
