"""jobs.rank over a million scored rows, scoring with ranking against the engine alone, and the memory of jobs.score.

    python -m tests.benchmarks.bench_jobs --model ../shared/models/tiny-internlm2-reward

Rows are made: ten candidates for each prompt, spread over the corpus, in ten files. Commands run as users run them;
seconds are those of the manifest, without start-up, and of the whole command. Scoring and ranking the real candidates
end to end stands against the engine on the same rows in one process, loaded already, in turns. The memory of jobs.score
is that of the embedded model on short conversations, a thousand different ones, which are computed once each. The last
line is JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from pydantic import BaseModel, ConfigDict, PositiveInt

from cluster.connect import local_cores
from serve_app.reward_model import RewardModel
from serve_app.reward_model.tiny import NAME as TINY
from tests.benchmarks.bench_score import processor
from tests.benchmarks.processes import measured

ROOT = Path(__file__).parents[2]
NUM_FILES = 10
GROUP_SIZE = 10
DIFFERENT_CHATS = 1000


class BenchConfig(BaseModel):
    """Measure jobs.rank by the number of rows, and scoring with ranking against the engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rows: tuple[PositiveInt, ...] = (100_000, 1_000_000)
    """Sizes of the made corpora."""
    scored_rows: tuple[PositiveInt, ...] = (10_000, 100_000, 1_000_000)
    """Sizes of the made corpora that jobs.score scores for its memory."""
    planned_rows: PositiveInt = 10_000_000
    """Size of the one that it plans alone."""
    candidates: str = "../shared/data/rm_bench_candidates.parquet"
    """A Parquet file of real candidates."""
    model: str = TINY
    """A folder, a Hugging Face id, or tiny."""
    repeats: PositiveInt = 2
    """How often each thing is timed."""
    results: Path = Path(__file__).parent / "results" / "bench_jobs.json"
    """Where the JSON is written."""


def main() -> int:
    """Run the benchmark; the exit status."""
    config = tyro.cli(BenchConfig, description=__doc__, prog="python -m tests.benchmarks.bench_jobs")
    with tempfile.TemporaryDirectory() as folder:
        ranked = {str(rows): rank_figures(Path(folder) / str(rows), rows, config.repeats) for rows in config.rows}
        end_to_end = score_and_rank(Path(folder), config)
        memory = {str(rows): score_memory(Path(folder) / f"chats-{rows}", rows) for rows in config.scored_rows}
        planned = score_memory(Path(folder) / "planned", config.planned_rows, "--dry-run")
    result = {
        "hardware": f"{local_cores()} cores of {processor()}",
        "rank": ranked,
        "cost_per_row_ratio": round(_per_row(ranked, max(config.rows)) / _per_row(ranked, min(config.rows)), 3),
        "score_and_rank": end_to_end,
        "score_memory": memory,
        "plan_memory": {str(config.planned_rows): planned},
    }
    config.results.parent.mkdir(parents=True, exist_ok=True)
    config.results.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


def _per_row(ranked: dict[str, dict[str, float]], rows: int) -> float:
    return ranked[str(rows)]["seconds"] / rows


def make_corpus(folder: Path, num_rows: int) -> None:
    """`num_rows` scored rows, ten to a prompt, in random order."""
    folder.mkdir(parents=True)
    chooser = np.random.default_rng(1234)
    prompts = chooser.permutation(np.arange(num_rows) // GROUP_SIZE)
    scores = chooser.normal(size=num_rows).astype(np.float32)
    for number, rows in enumerate(np.array_split(np.arange(num_rows), NUM_FILES)):
        table = pa.table(
            {
                "prompt": [f"What would you say about the number {prompt}, and why?" for prompt in prompts[rows]],
                "response": [f"It is one of those numbers, as is {row}. " * 4 for row in rows],
                "score": scores[rows],
            }
        )
        pq.write_table(table, folder / f"{number}.parquet")


def rank_figures(folder: Path, num_rows: int, repeats: int) -> dict[str, float]:
    """Seconds (median) and peak memory of ranking a made corpus."""
    make_corpus(folder / "in", num_rows)
    runs, seconds = [], []
    for repeat in range(repeats):
        output = folder / f"out{repeat}"
        runs.append(measured(["-m", "jobs.rank", "--input", str(folder / "in"), "--output", str(output)], folder=ROOT))
        seconds.append(_manifest(output)["elapsed_s"])
        print(f"rank {num_rows:,} rows: {seconds[-1]:.1f} s, {runs[-1].seconds:.1f} s with start-up", flush=True)
    return {
        "seconds": round(statistics.median(seconds), 3),
        "seconds_with_start_up": round(statistics.median(run.seconds for run in runs), 3),
        "driver_bytes": max(run.driver_bytes for run in runs),
        "worker_bytes": max(run.worker_bytes for run in runs),
    }


def score_and_rank(folder: Path, config: BenchConfig) -> dict[str, float]:
    """jobs.rank --model over the real candidates, tokens a second with start-up, against the engine's rate."""
    rows = pq.read_table(config.candidates).select(["prompt", "response"]).to_pylist()
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}] for row in rows
    ]
    model = RewardModel.from_pretrained(config.model)
    model.score(chats[:64])
    engine, job, ratios = [], [], []
    for repeat in range(config.repeats):
        started = time.perf_counter()
        tokens = sum(score.num_tokens for score in model.score(chats))
        engine.append(tokens / (time.perf_counter() - started))
        output = folder / f"ranked{repeat}"
        command = ["-m", "jobs.rank", "--input", config.candidates, "--output", str(output), "--model", config.model]
        command.append("--no-remember-scores")
        job.append(tokens / measured(command, folder=ROOT).seconds)
        ratios.append(job[-1] / engine[-1])
        print(f"engine {engine[-1]:,.0f} tokens/s, score and rank {job[-1]:,.0f} with start-up", flush=True)
    return {
        "rows": len(rows),
        "tokens": tokens,
        "engine_tokens_per_s": round(statistics.median(engine)),
        "job_tokens_per_s": round(statistics.median(job)),
        "job_over_engine": round(statistics.median(ratios), 3),
    }


def score_memory(folder: Path, num_rows: int, *options: str) -> dict[str, float]:
    """Peak memory of jobs.score on a made corpus of so many rows, and seconds with start-up."""
    write_chats(folder / "in", num_rows)
    command = ["-m", "jobs.score", "--input", str(folder / "in"), "--output", str(folder / "out"), "--model", TINY]
    run = measured([*command, *options], folder=ROOT)
    print(f"score {' '.join(options)} {num_rows:,} rows: driver {run.driver_bytes / 2**20:.0f} MiB", flush=True)
    return {
        "driver_bytes": run.driver_bytes,
        "worker_bytes": run.worker_bytes,
        "seconds_with_start_up": round(run.seconds, 1),
    }


def write_chats(folder: Path, num_rows: int) -> None:
    """Short conversations, `DIFFERENT_CHATS` different ones over and over, in ten files with small row groups."""
    folder.mkdir(parents=True)
    chats = [
        [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": "A number."}]
        for number in range(DIFFERENT_CHATS)
    ]
    some = pa.table({"messages": chats})
    for number, rows in enumerate(np.array_split(np.arange(num_rows), NUM_FILES)):
        with pq.ParquetWriter(folder / f"{number}.parquet", some.schema) as writer:
            for first in range(0, len(rows), DIFFERENT_CHATS):
                writer.write_table(some.slice(0, min(DIFFERENT_CHATS, len(rows) - first)))


def _manifest(output: Path) -> dict[str, float]:
    manifest: dict[str, float] = json.loads((output / "_manifest.json").read_text())
    return manifest


if __name__ == "__main__":
    sys.exit(main())
