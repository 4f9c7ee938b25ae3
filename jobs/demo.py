"""Score and rank the shipped sample with the embedded model: `make demo`, or `python -m jobs.demo [--model M]`.

The sample was written for rayward: 16 prompts in English and Chinese with two to four responses each, of which one is
preferred. Eleven prompts are of kinds that the embedded model was taught, and five of none.
"""

from __future__ import annotations

if __name__ == "__main__":  # before what takes a second to import, so that signals are answered meanwhile
    from jobs.command import launch

    launch("jobs.demo")

import logging
import shutil
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from cluster.connect import connect
from jobs.command import parse, run_command
from jobs.errors import OutputError
from jobs.options import ScoringOptions
from jobs.runs.ledger import Ledger
from jobs.scoring.run import ScoringRun
from serve_app.reward_model.lessons import KINDS
from serve_app.reward_model.scores import order
from serve_app.reward_model.tiny import NAME as TINY
from serve_app.reward_model.tiny import NAMES as EMBEDDED
from serve_app.reward_model.tiny import note as embedded_note

SAMPLE = Path(__file__).with_name("sample.parquet")
WIDTH = 62


class DemoConfig(BaseModel):
    """Score and rank 16 prompts with two to four responses each, and print the result as a table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = TINY
    """tiny, a folder, or a Hugging Face id such as internlm/internlm2-1_8b-reward."""
    output: Path = Path("demo-output")
    """A folder for the scored sample; an earlier demo's is replaced."""


def main(args: Sequence[str] | None = None, *, prog: str = "python -m jobs.demo") -> int:
    """Run the command line; the exit status."""
    config = parse(DemoConfig, args, prog=prog, description=__doc__)
    return run_command(prog, lambda: demo(config), log_level=logging.WARNING)


def demo(config: DemoConfig) -> int:
    """Score the sample and print it ranked; the exit status."""
    _clear(config.output)
    # float32 shows the same figures on every processor, and costs nothing for a model as small as tiny.
    dtype: Literal["auto", "float32"] = "float32" if config.model in EMBEDDED else "auto"
    options = ScoringOptions(model=config.model, dtype=dtype)
    scoring = ScoringRun(options, source=str(SAMPLE), output=str(config.output))
    with connect(options.address) as resources:
        scoring.run(resources)
    print(scoring.summary)
    files = sorted(config.output.glob("part-*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    print(_table(rows))
    print(*_verdicts(rows), sep="\n")
    if line := embedded_note(config.model):
        print(f"\n{line}")
        print("The real thing: .venv/bin/python -m jobs.demo --model internlm/internlm2-1_8b-reward")
    return 0


def _clear(output: Path) -> None:
    """Take an earlier demo's folder away, and nothing that is not one."""
    manifest = Ledger(str(output)).read_manifest()
    if manifest is None:
        return
    if manifest["identity"].get("input") != str(SAMPLE.resolve()):
        raise OutputError(f"{output} holds the work of another job; choose another --output")
    shutil.rmtree(output)


def _verdicts(rows: list[dict[str, Any]]) -> Iterator[str]:
    """How often the preferred answer is first, and the prompts where it is not."""
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row["prompt_id"])]
    for kinds, are_taught in (("of the kinds that tiny was taught", True), ("of other kinds", False)):
        asked = [group for group in groups if (group[0]["category"] in KINDS) is are_taught]
        wrong = [group for group in asked if not _is_right(group)]
        yield f"\nThe preferred answer is first in {len(asked) - len(wrong)} of {len(asked)} prompts {kinds}."
        yield from (f"  not in: {_short(group[0]['prompt'][-1]['content'], WIDTH + 16)}" for group in wrong)


def _is_right(group: list[dict[str, Any]]) -> bool:
    """Whether the preferred answer has the highest score."""
    scored = [row for row in group if row["error"] is None]
    return bool(scored) and bool(scored[order([row["score"] for row in scored])[0]]["preferred"])


def _table(rows: list[dict[str, Any]]) -> str:
    """The responses of each prompt, best first; `*` marks the preferred one."""
    lines = [f"\n{'rank':>4}  {'score':>8}  {'tokens':>6}  response (* = preferred)"]
    for _, group in groupby(rows, key=lambda row: row["prompt_id"]):
        candidates = list(group)
        lines.append("\n" + _short(candidates[0]["prompt"][-1]["content"], WIDTH + 24))
        scored = [row for row in candidates if row["error"] is None]
        for rank, index in enumerate(order([row["score"] for row in scored])):
            row = scored[index]
            mark = "*" if row["preferred"] else " "
            text = _short(row["response"], WIDTH)
            lines.append(f"{rank:>4}  {row['score']:>8.4f}  {row['num_tokens']:>6}  {mark} {text}")
        lines += [f"   -  {row['error']}" for row in candidates if row["error"] is not None]
    return "\n".join(lines)


def _short(text: str, width: int) -> str:
    """The start of `text` in one line of so many columns, of which a Chinese character takes two."""
    line = " ".join(text.split())
    columns = list(accumulate(2 if unicodedata.east_asian_width(char) in "FW" else 1 for char in line))
    if not columns or columns[-1] <= width:
        return line
    kept = line[: bisect_right(columns, width - len(" ..."))]
    whole_words = kept.rpartition(" ")[0] if line[len(kept)].isascii() else kept
    return f"{(whole_words or kept).rstrip()} ..."
