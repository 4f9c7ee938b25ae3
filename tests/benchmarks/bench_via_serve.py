"""jobs.score through a running application against actors of its own, on the same conversations and in turns.

    python -m tests.benchmarks.bench_via_serve --model ../shared/models/tiny-internlm2-reward

Both are timed from the first committed unit to the last, over the tokens in between: the start of actors counts in
neither, and the service runs before. The service has nothing to do while own actors score. The last line is JSON.
"""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import tyro
from pydantic import BaseModel, ConfigDict, PositiveInt

from cluster.connect import connect, local_cores
from jobs.score import ScoreConfig, run
from serve_app.app import build_app
from serve_app.config import ServiceConfig
from serve_app.reward_model.tiny import NAME as TINY
from tests.benchmarks.bench_score import processor
from tests.benchmarks.commits import commit_rate, same_rows

APP = "bench"


class BenchConfig(BaseModel):
    """Measure jobs.score with --via-serve and without."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: str = "../shared/data/hh_harmless"
    """A folder of Parquet files, as for jobs.score."""
    model: str = TINY
    """A folder, a Hugging Face id, or tiny."""
    copies: PositiveInt = 2
    """How often the job's corpus holds the input."""
    repeats: PositiveInt = 3
    """How often each of the two is timed."""
    results: Path = Path(__file__).parent / "results" / "bench_via_serve.json"
    """Where the JSON is written."""


def main() -> int:
    """Run the benchmark; the exit status."""
    config = tyro.cli(BenchConfig, description=__doc__, prog="python -m tests.benchmarks.bench_via_serve")
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    own_rates, through_rates = [], []
    with tempfile.TemporaryDirectory() as folder, connect():
        from ray import serve

        corpus = Path(folder) / "in"
        for copy in range(config.copies):
            shutil.copytree(config.input, corpus / str(copy))
        serve.start(proxy_location="Disabled")
        options = {"model": config.model, "num_gpus": 0, "num_cpus": 0, "threads": local_cores()}  # as an own actor has
        serve.run(build_app(ServiceConfig.model_validate(options)), name=APP, route_prefix=None)
        for repeat in range(config.repeats):
            outputs = [Path(folder) / f"{name}{repeat}" for name in ("own", "through")]
            own_rates.append(_rate(corpus, outputs[0], model=config.model, remember_scores=False))  # copies are equal
            through_rates.append(_rate(corpus, outputs[1], via_serve=APP))
            if not same_rows(*outputs):
                raise RuntimeError("the two do not give the same rows")
            print(f"own {own_rates[-1]:,.0f} tokens/s, through Serve {through_rates[-1]:,.0f}", flush=True)
        serve.shutdown()
    ratios = [through / own for through, own in zip(through_rates, own_rates, strict=True)]
    result = {
        "hardware": f"{local_cores()} cores of {processor()}",
        "model": Path(config.model).name,
        "own_tokens_per_s": round(statistics.median(own_rates)),
        "through_tokens_per_s": round(statistics.median(through_rates)),
        "through_over_own": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
    }
    config.results.parent.mkdir(parents=True, exist_ok=True)
    config.results.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


def _rate(corpus: Path, output: Path, **options: Any) -> float:
    run(ScoreConfig.model_validate({"input": str(corpus), "output": str(output)} | options))
    return commit_rate(output)


if __name__ == "__main__":
    sys.exit(main())
