"""jobs.score with `--reuse` on a corpus of which most was scored before, against the same job without.

    python -m tests.benchmarks.bench_reuse --preset mid --num-rows 2000

Ray runs already in both; loading the model counts in both. The two take turns, and have to give the same rows. The last
line is JSON.
"""

from __future__ import annotations

import json
import logging
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from pydantic import BaseModel, ConfigDict, Field, PositiveInt

from cluster.connect import connect, local_cores
from jobs.score import ScoreConfig, run
from tests.benchmarks.bench_score import processor
from tests.benchmarks.bench_serve import write_checkpoint
from tests.benchmarks.commits import same_rows


class BenchConfig(BaseModel):
    """Measure what `--reuse` saves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: str = "../shared/data/hh_harmless"
    """A folder of Parquet files, as for jobs.score."""
    model: str | None = None
    """A folder or a Hugging Face id, in place of a preset."""
    preset: Literal["tiny", "mid"] = "mid"
    """The shape of a model with random weights."""
    num_rows: PositiveInt = 2000
    """Rows of the corpus: the first of the input."""
    share: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """How much of it was scored before."""
    repeats: PositiveInt = 2
    """How often each of the two is timed."""


def main() -> int:
    """Run the benchmark; the exit status."""
    config = tyro.cli(BenchConfig, description=__doc__, prog="python -m tests.benchmarks.bench_reuse")
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, connect():
        place = Path(folder)
        _write_corpora(config, place)
        model = config.model or str(place / "model")
        if config.model is None:
            write_checkpoint(place / "model", config.preset)
        _seconds(place, "before", "most", model)
        pairs = []
        for repeat in range(config.repeats):
            plain, reused = f"plain-{repeat}", f"reused-{repeat}"
            pairs.append(
                (
                    _seconds(place, plain, "all", model, remember_scores=False),
                    _seconds(place, reused, "all", model, reuse=(str(place / "before"),)),
                )
            )
            assert same_rows(place / plain, place / reused), "the scores differ"
            print(f"without {pairs[-1][0]:.1f} s, with --reuse {pairs[-1][1]:.1f} s", flush=True)
    result = {
        "hardware": f"{local_cores()} cores of {processor()}",
        "model": (config.model and Path(config.model).name) or config.preset,
        "rows": config.num_rows,
        "share_scored_before": config.share,
        "seconds": [[round(one, 2) for one in pair] for pair in pairs],
        "reused_over_plain": round(statistics.median(reused / plain for plain, reused in pairs), 3),
    }
    print(json.dumps(result))
    return 0


def _write_corpora(config: BenchConfig, place: Path) -> None:
    """All rows, and the share of them that is scored before, drawn at random."""
    rows = pq.read_table(config.input).slice(0, config.num_rows)
    drawn = random.Random(0).sample(range(rows.num_rows), int(config.share * rows.num_rows))
    for name, table in {"all": rows, "most": rows.take(pa.array(sorted(drawn)))}.items():
        (place / name).mkdir()
        pq.write_table(table, place / name / "rows.parquet")


def _seconds(place: Path, output: str, source: str, model: str, **options: object) -> float:
    """How long a job takes from its call to its end."""
    paths = {"input": str(place / source), "output": str(place / output), "model": model}
    started = time.perf_counter()
    run(ScoreConfig.model_validate({**paths, "rows_per_unit": 1024, **options}))
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
