"""Both doors on a cluster of several nodes, one of which is lost under each: nothing is lost, no request fails.

Ray's simulated cluster is a process of its own: this one has the tests' local Ray. How the doors scale to 8 replicas
is measured by `tests/benchmarks/bench_scale.py`.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from serve_app.reward_model import RewardModel
from tests.cluster.scale import CLIENTS_PER_REPLICA, REQUEST_CONVERSATIONS
from tests.cluster.simulated import expected_score, sleeping_model

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 600
NODES, ROWS_PER_ACTOR = 3, 256
SMALL = {"--nodes": NODES, "--gpus-per-node": 1, "--words": 100, "--rows-per-replica": ROWS_PER_ACTOR}


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")  # its cache is found by the other process
def test_a_lost_node_costs_the_job_no_row_and_the_endpoint_no_request() -> None:
    """The other process checks each row, each answer and each score; it ends with 0 where all are as they must be.

    The endpoint's node has an ingress with requests inside, of clients that send each request once and of
    `RewardClient`. The job's has a scoring actor with a unit.
    """
    options = itertools.chain.from_iterable((name, str(value)) for name, value in SMALL.items())
    command = [sys.executable, "-m", "tests.cluster.scale", *options, "--rows-per-unit", "64"]
    command += ["--job-replicas", "--endpoint-replicas"]  # none of the drives that measure
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    result = json.loads(ran.stdout.splitlines()[-1])
    assert (result["job"], result["endpoint"]) == ([], [])
    clients = CLIENTS_PER_REPLICA * NODES
    assert result["endpoint_losing_a_node"]["conversations"] >= 5 * REQUEST_CONVERSATIONS * clients
    assert result["job_losing_a_node"]["conversations"] == ROWS_PER_ACTOR * (NODES - 1)


def test_the_sleeping_model_tells_sequences_apart_and_takes_its_time(tiny: RewardModel) -> None:
    model = sleeping_model(tokens_per_s=1e6)
    sequences = [[1, 2, 3], [3, 2, 1], [1, 2, 3, 4]]
    scores = model.score_token_ids(sequences)
    assert scores.tolist() == [expected_score(sequence) for sequence in sequences]
    assert len(set(scores.tolist())) == 3
    assert scores.dtype == np.float32
    assert model.fingerprint == tiny.fingerprint
