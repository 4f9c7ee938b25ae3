"""jobs.score and the endpoint from 1 to 8 replicas, on a simulated cluster of 4 nodes with 2 GPUs each.

    python -m tests.benchmarks.bench_scale

A decoder that sleeps stands for a 7B model on an H100 (`tests/cluster/simulated.py` says how long); the rest is real
and runs on this machine's cores, all replicas' tokenising, Ray and HTTP included, where a real node has a dozen cores
a GPU. Conversations have some 450 tokens, units 256 rows and requests 16 conversations, so that what the host does for
a token takes a small part of the token's time on the GPU, as it does there. A node is lost under each door as well.
The last line is JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import tyro
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt

from cluster.connect import local_cores
from tests.benchmarks.bench_score import processor

ROOT = Path(__file__).parents[2]


class BenchConfig(BaseModel):
    """Measure how both doors scale."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: tuple[PositiveInt, ...] = (1, 8)
    """Numbers of replicas, the smallest first; 8 GPUs are there."""
    rows_per_replica: PositiveInt = 4096
    """Rows of the job's corpus, for each replica."""
    seconds: PositiveFloat = 20.0
    """How long the endpoint is under load."""
    results: Path = Path(__file__).parent / "results" / "bench_scale.json"
    """Where the JSON is written."""


def main() -> int:
    """Run the benchmark; the exit status."""
    config = tyro.cli(BenchConfig, description=__doc__, prog="python -m tests.benchmarks.bench_scale")
    counts = [str(count) for count in config.replicas]
    command = [sys.executable, "-m", "tests.cluster.scale", "--job-replicas", *counts, "--endpoint-replicas", *counts]
    command += ["--rows-per-replica", str(config.rows_per_replica), "--seconds", str(config.seconds)]
    ran = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    measured = json.loads(ran.stdout.splitlines()[-1])
    result = {"hardware": f"{local_cores()} cores of {processor()}"} | measured
    for door in ("job", "endpoint"):
        first, last = measured[door][0], measured[door][-1]
        speedup = last["tokens_per_s"] / first["tokens_per_s"]
        result[f"{door}_speedup_over_linear"] = round(speedup / (last["replicas"] / first["replicas"]), 3)
    config.results.parent.mkdir(parents=True, exist_ok=True)
    config.results.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
