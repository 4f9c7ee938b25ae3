"""Writes the shipped sample, `jobs/sample.parquet`, from `sample.yaml` beside this file.

python -m tests.jobs.sample
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from jobs.demo import SAMPLE

SOURCE = Path(__file__).with_name("sample.yaml")
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMA = pa.schema(
    [
        ("prompt_id", pa.int64()),
        ("language", pa.string()),
        ("category", pa.string()),
        ("prompt", MESSAGES),
        ("response", pa.string()),
        ("preferred", pa.bool_()),
    ]
)


def sample_table() -> pa.Table:
    """The sample: a row for each response, the rows of a prompt together, every prompt a list of messages."""
    prompts = yaml.safe_load(SOURCE.read_text(encoding="utf-8"))
    rows = [row for number, prompt in enumerate(prompts) for row in _rows(number, prompt)]
    return pa.Table.from_pylist(rows, SCHEMA)


def _rows(number: int, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one prompt. The preferred response moves from place to place, so that no place gives it away."""
    prompt = entry["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    preferred, *others = entry["responses"]
    place = number % len(entry["responses"])
    return [
        {
            "prompt_id": number,
            "language": entry["language"],
            "category": entry["category"],
            "prompt": messages,
            "response": response,
            "preferred": response is preferred,
        }
        for response in [*others[:place], preferred, *others[place:]]
    ]


if __name__ == "__main__":
    pq.write_table(sample_table(), SAMPLE)
    print(f"{SAMPLE}: {sample_table().num_rows} rows")
