"""How many replicas a model needs: from the tokens that wait, not from the number of requests, whose sizes differ."""

from __future__ import annotations

import math
from typing import Any

from ray.serve.config import AutoscalingContext

QUEUED_SECONDS = "queued_seconds"
"""What a replica reports: the seconds of work that it has taken on and not finished."""
TARGET_SECONDS = 1.0


def replicas_for_queue(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """Replicas that bring the work waiting for each near one second; Serve's own delays and bounds follow after.

    A model without replicas gets one as soon as a request waits at a handle.
    """
    state = context.policy_state
    running = context.current_num_replicas
    if running == 0:
        return (1 if context.total_num_requests > 0 else context.target_num_replicas), state
    reported = (context.aggregated_metrics or {}).get(QUEUED_SECONDS, {})
    wanted = math.ceil(sum(reported.values()) / TARGET_SECONDS)
    fewest = 1 if context.total_num_requests > 0 else 0
    return max(fewest, min(wanted, 2 * running)), state
