"""Score and rank the shipped sample with the embedded model: `make demo`, or `python -m jobs.demo [--model M]`.

The sample is real: 12 prompts of LLMBar (Zeng et al., 2023), each with two responses of which people prefer one.
"""

from __future__ import annotations

import logging
import shutil
import sys
import textwrap
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import tyro
from pydantic import BaseModel, ConfigDict

from jobs.score import EXIT_STOPPED, ScoreConfig, run
from serve_app.reward_model import ranking
from serve_app.reward_model.errors import RaywardError
from serve_app.reward_model.tiny import NAME as TINY

__all__ = ["SAMPLE", "DemoConfig", "main"]

SAMPLE = Path(__file__).with_name("sample.parquet")
WIDTH = 62


class DemoConfig(BaseModel):
    """Score and rank 12 real prompts with two responses each, and print the result as a table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = TINY
    """tiny, a folder, or a Hugging Face id such as internlm/internlm2-1_8b-reward."""
    output: Path = Path("demo-output")
    """A folder for the scored sample; an earlier demo's is replaced."""


def main() -> int:
    """Run the command line; the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    config = tyro.cli(DemoConfig, description=__doc__, prog="python -m jobs.demo")
    try:
        _clear(config.output)
        run(ScoreConfig(input=str(SAMPLE), output=str(config.output), model=config.model))
    except RaywardError as error:
        print(f"jobs.demo stopped: {error}", file=sys.stderr)
        return EXIT_STOPPED
    rows = [row for part in sorted(config.output.glob("part-*.parquet")) for row in pq.read_table(part).to_pylist()]
    print(_table(rows))
    if config.model == TINY:
        print(
            "\nThe embedded model `tiny` has random weights: it shows the path, and its scores mean nothing.\n"
            "The real thing: .venv/bin/python -m jobs.demo --model internlm/internlm2-1_8b-reward"
        )
    return 0


def _clear(output: Path) -> None:
    """Take an earlier demo's folder away, and nothing that is not one."""
    if (output / "_manifest.json").is_file():
        shutil.rmtree(output)


def _table(rows: list[dict[str, Any]]) -> str:
    """The responses of each prompt, best first; `*` marks the one that people prefer."""
    lines = [f"\n{'rank':>4}  {'score':>8}  {'tokens':>6}  response (* = preferred by people)"]
    for _, group in groupby(rows, key=lambda row: row["prompt_id"]):
        candidates = list(group)
        lines.append("\n" + _short(candidates[0]["prompt"], WIDTH + 24))
        scores = [row["score"] for row in candidates]
        for rank, index in enumerate(ranking.order(scores)):
            row = candidates[index]
            mark = "*" if row["preferred"] else " "
            text = _short(row["response"], WIDTH)
            lines.append(f"{rank:>4}  {row['score']:>8.4f}  {row['num_tokens']:>6}  {mark} {text}")
    return "\n".join(lines)


def _short(text: str, width: int) -> str:
    return textwrap.shorten(" ".join(text.split()), width, placeholder=" ...")


if __name__ == "__main__":
    sys.exit(main())
