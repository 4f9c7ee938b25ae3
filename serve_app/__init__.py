"""The online door: reward models behind an endpoint, on Ray Serve. The engine that all doors share is in here too.

app, config      build_app, for `serve run`, and its options
ingress          the deployment that speaks HTTP; model_handle: a model's replicas as it sees them
score_calls      small requests that arrive together travel as one
replica          a model in a replica; trial: its first passes; autoscaling: replicas from the work that waits
web              HTTP, without Ray: routes, other servers' wire formats, the playground
batching         concurrent requests -> batches, without Ray
client           RewardClient, without torch and Ray
reward_model     the engine
"""

import os
from itertools import islice
from pathlib import Path

CPU_FACTS = Path("/proc/cpuinfo")


def _has_amx() -> bool:
    try:
        with CPU_FACTS.open(encoding="utf-8", errors="replace") as lines:
            return any("amx_tile" in line for line in islice(lines, 40))  # the first processor's
    except OSError:
        return False


# PyTorch's threads wait for work by spinning, for milliseconds: beside the threads that compute pieces of products
# (`reward_model/onednn.py`) that halves the engine's rate on two cores. PyTorch reads this when it is imported; what
# the user has set stays. Actors of jobs import PyTorch first, and have one thread where nothing else is asked for.
if "OMP_WAIT_POLICY" not in os.environ and _has_amx():
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
