"""Scored tables for the tests of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from jobs.corpus.conversations import ConversationColumns
from jobs.grouping.keys import GroupKeys
from jobs.reporting.columns import LabelColumn, ReportColumns, ScoreColumn
from jobs.reporting.scales import Extents, Scales

CONVERSATION = ConversationColumns(prompt="prompt", response="response")
SCORE = ScoreColumn("score", "num_tokens", "error", CONVERSATION)
LABEL = LabelColumn("preferred", GroupKeys("prompt", None))
COLUMNS = ReportColumns((SCORE,), ("domain",), LABEL, None, guessed_by=False, guessed_label=False)


def scored(num_rows: int, *, seed: int = 0, num_prompts: int = 7) -> pa.Table:
    """Random rows: some without a score, some without a label, domain or token count."""
    chooser = np.random.default_rng(seed)

    def some(values: Sequence[Any], share: float) -> list[Any]:
        return [value if kept else None for value, kept in zip(values, chooser.random(num_rows) < share, strict=True)]

    scores = some([float(value) for value in chooser.normal(0, 2, num_rows).astype(np.float32)], 0.9)
    kinds = ("TooLongError: 40,000 tokens", "ConversationError: no messages", "DeadRowError: died 3 times")
    return pa.table(
        {
            "prompt": [f"prompt {place}" for place in chooser.integers(0, num_prompts, num_rows)],
            "response": [f"response {place}" for place in range(num_rows)],
            "domain": pa.array(
                some([("code", "chat", "\u5bf9\u8bdd")[place % 3] for place in range(num_rows)], 0.95), pa.string()
            ),
            "preferred": pa.array(some([bool(side) for side in chooser.integers(0, 2, num_rows)], 0.9), pa.bool_()),
            "score": pa.array(scores, pa.float32()),
            "num_tokens": pa.array(some(chooser.integers(3, 4000, num_rows).tolist(), 0.95), pa.int32()),
            "error": pa.array(
                [None if score is not None else kinds[place % 3] for place, score in enumerate(scores)], pa.string()
            ),
        }
    )


def scales_of(tables: Sequence[pa.Table], columns: ReportColumns = COLUMNS) -> Scales:
    """The scales of a corpus whose stretches are the tables."""
    return Scales.of([Extents.of([table], columns) for table in tables])
