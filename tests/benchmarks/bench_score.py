"""jobs.score against the engine in one process, on the same conversations and in one run.

    python -m tests.benchmarks.bench_score --model ../shared/models/tiny-internlm2-reward

Tokenisation counts in both, start-up in neither: the job is timed from its first committed unit to its last, over the
tokens in between, over several copies of the corpus, since Ray starts the processes that read and commit meanwhile. The
engine gets the job's units one after the other, since prompts are shared within a call; `--engines` are so many beside
each other, processes that divide the threads and the units, as the job's actors do. The two take turns. The last line
is JSON.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
import torch
import tyro
from pydantic import BaseModel, ConfigDict, PositiveInt

from cluster.connect import connect, local_cores
from jobs.corpus.conversations import conversations
from jobs.corpus.files import Corpus, auto_rows_per_unit
from jobs.corpus.reader import UnitReader
from jobs.corpus.readings import conversation_reading
from jobs.score import ScoreConfig, run
from serve_app.reward_model import Conversation, RewardModel
from serve_app.reward_model.tiny import NAME as TINY
from tests.benchmarks.bench_serve import write_checkpoint
from tests.benchmarks.commits import commit_rate


class BenchConfig(BaseModel):
    """Measure jobs.score and the engine on the same conversations."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: str = "../shared/data/hh_harmless"
    """A folder of Parquet files, as for jobs.score."""
    model: str = TINY
    """A folder, a Hugging Face id, or tiny."""
    preset: Literal["tiny", "mid"] | None = None
    """The shape of a model with random weights, in place of `model`."""
    num_rows: PositiveInt | None = None
    """Rows of the input to take, from its start; all by default."""
    rows_per_unit: PositiveInt | None = None
    """Rows of a unit; by default what a job takes for such a corpus."""
    engines: PositiveInt = 1
    """Engines beside each other, each a process with its part of the threads."""
    copies: PositiveInt = 3
    """How often the job's corpus holds the input."""
    repeats: PositiveInt = 3
    """How often each of the two is timed."""
    results: Path = Path(__file__).parent / "results" / "bench_score.json"
    """Where the JSON is written."""


def main() -> int:
    """Run the benchmark; the exit status."""
    config = tyro.cli(BenchConfig, description=__doc__, prog="python -m tests.benchmarks.bench_score")
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    engine_rates, job_rates = [], []
    with tempfile.TemporaryDirectory() as folder:
        config = _at_hand(config, Path(folder))
        with connect(), ProcessPoolExecutor(config.engines, get_context("spawn"), _load, (config,)) as engines:
            units = range(len(_conversations(config.input, config.rows_per_unit)))
            _engine_rate(engines, units)
            for _ in range(config.repeats):
                engine_rates.append(_engine_rate(engines, units))
                job_rates.append(_job_rate(config))
                print(f"engine {engine_rates[-1]:,.0f} tokens/s, jobs.score {job_rates[-1]:,.0f} tokens/s", flush=True)
    ratios = [job / engine for job, engine in zip(job_rates, engine_rates, strict=True)]
    result = {
        "hardware": f"{local_cores()} cores of {processor()}",
        "model": Path(config.model).name,
        "torch": torch.__version__,
        "engines": config.engines,
        "units": len(units),
        "engine_tokens_per_s": round(statistics.median(engine_rates)),
        "job_tokens_per_s": round(statistics.median(job_rates)),
        "job_over_engine": round(statistics.median(ratios), 3),
    }
    config.results.parent.mkdir(parents=True, exist_ok=True)
    config.results.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


def _at_hand(config: BenchConfig, folder: Path) -> BenchConfig:
    """The configuration with the model and the corpus that it asks to be made, in `folder`."""
    chosen: dict[str, str] = {}
    if config.preset is not None:
        chosen["model"] = str(folder / config.preset)
        write_checkpoint(folder / config.preset, config.preset)
    if config.num_rows is not None:
        chosen["input"] = str(folder / "in")
        (folder / "in").mkdir()
        pq.write_table(pq.read_table(config.input).slice(0, config.num_rows), folder / "in" / "rows.parquet")
    return config.model_copy(update=chosen)


def _conversations(source: str, rows_per_unit: int | None) -> list[list[Conversation]]:
    """The conversations of each unit that the job cuts the corpus into."""
    corpus = Corpus.open(source)
    columns = conversation_reading(corpus.schemas[0])
    units = corpus.units(rows_per_unit or auto_rows_per_unit(corpus.num_rows))
    tables = [table for _, table in UnitReader(corpus.filesystem).read(units)]
    return [[row for row in conversations(table, columns) if isinstance(row, Conversation)] for table in tables]


@dataclass(frozen=True, slots=True)
class _Engine:
    """What a process of the engine holds: the model and the units."""

    model: RewardModel
    units: list[list[Conversation]]


_engine: _Engine | None = None


def _load(config: BenchConfig) -> None:
    global _engine
    torch.set_num_threads(max(1, local_cores() // config.engines))
    model = RewardModel.from_pretrained(config.model)
    _engine = _Engine(model, _conversations(config.input, config.rows_per_unit))
    model.score(_engine.units[0][:8])


def _scored_tokens(unit: int) -> int:
    assert _engine is not None
    return sum(score.num_tokens for score in _engine.model.score(_engine.units[unit]))


def _engine_rate(engines: ProcessPoolExecutor, units: range) -> float:
    """Tokens a second of the engines, which take unit after unit."""
    started = time.perf_counter()
    return sum(engines.map(_scored_tokens, units)) / (time.perf_counter() - started)


def _job_rate(config: BenchConfig) -> float:
    with tempfile.TemporaryDirectory() as folder:
        corpus, output = Path(folder) / "in", str(Path(folder) / "out")
        for copy in range(config.copies):
            shutil.copytree(config.input, corpus / str(copy))
        # The copies hold equal conversations, and all are to be computed.
        options = {"model": config.model, "rows_per_unit": config.rows_per_unit, "remember_scores": False}
        run(ScoreConfig.model_validate({"input": str(corpus), "output": output} | options))
        return commit_rate(Path(output))


def processor() -> str:
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
