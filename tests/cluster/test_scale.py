"""Both doors on a cluster of several nodes, one of which is lost under each: nothing is lost, no request fails.

Ray's simulated cluster is a process of its own: this one has the tests' local Ray. How the doors scale to 8 replicas
is measured by `tests/benchmarks/bench_scale.py`; here it is only seen that replicas work at the same time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serve_app.reward_model import RewardModel
from tests.cluster.simulated import TOKENS_PER_S, expected_score, sleeping_model

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600
SMALL = ["--nodes", "3", "--gpus-per-node", "1", "--endpoint-replicas", "3", "--rows-per-replica", "768"]


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")  # its cache is found by the other process
def test_a_lost_node_costs_the_job_no_row_and_the_endpoint_no_request() -> None:
    command = [sys.executable, "-m", "tests.cluster.scale", *SMALL, "--seconds", "4", "--job-replicas"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    result = json.loads(ran.stdout.splitlines()[-1])
    (endpoint,) = result["endpoint"]
    assert endpoint["tokens_per_s"] > 1.5 * TOKENS_PER_S  # more than one replica can do
    assert result["endpoint_losing_a_node"]["conversations"] > 0
    assert result["job_losing_a_node"]["conversations"] == 2 * 768


def test_the_sleeping_model_tells_sequences_apart_and_takes_its_time(tiny: RewardModel) -> None:
    model = sleeping_model(tokens_per_s=1e6)
    sequences = [[1, 2, 3], [3, 2, 1], [1, 2, 3, 4]]
    scores = model.score_token_ids(sequences)
    assert scores.tolist() == [expected_score(sequence) for sequence in sequences]
    assert len(set(scores.tolist())) == 3
    assert scores.dtype == np.float32
    assert model.fingerprint == tiny.fingerprint
