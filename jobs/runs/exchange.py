"""Rows regrouped across the cluster on Ray tasks: each task splits what it makes, the next ones gather the pieces.

What travels is narrow (keys, scores, places), so that a corpus of any width is regrouped at some 40 bytes a row. Pieces
stay in Ray's object store; the driver holds their names.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jobs.errors import WorkerError
from serve_app.reward_model.errors import RaywardError

if TYPE_CHECKING:
    import ray


logger = logging.getLogger(__name__)
MAX_RETRIES = 3
LOG_EVERY_S = 10.0

Pieces = list[list["ray.ObjectRef[Any]"]]


def scatter(
    function: Callable[..., Sequence[Any]], arguments: Sequence[Any], *, num_parts: int, pieces: Pieces | None = None
) -> Pieces:
    """Start `function(argument, pieces)` as a task for each argument; it returns a sequence of `num_parts` pieces.

    Args:
        function: a picklable function.
        arguments: one for each task.
        num_parts: how many pieces each task returns.
        pieces: for each task, what tasks before it made for it; it gets them as a list.

    Returns:
        The names of the pieces: one list for each task, in order.
    """
    import ray

    # A task whose process dies is run again; what a task raises is no accident, and is reported.
    task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES, num_returns=num_parts)(_run)
    given = pieces if pieces is not None else [[] for _ in arguments]
    started = [task.remote(function, num_parts, argument, *own) for argument, own in zip(arguments, given, strict=True)]
    return [[refs] for refs in started] if num_parts == 1 else started


def _run(function: Callable[..., Sequence[Any]], num_parts: int, argument: Any, *pieces: Any) -> Any:
    parts = function(argument, list(pieces))
    assert len(parts) == num_parts
    return parts[0] if num_parts == 1 else tuple(parts)


def gathered(pieces: Pieces, num_parts: int) -> Pieces:
    """For each of `num_parts` gatherers the pieces made for it, in the order of the tasks that made them."""
    return [[own[part] for own in pieces] for part in range(num_parts)]


def results(pieces: Pieces, *, part: int = 0, told: str | None = None) -> Iterator[Any]:
    """The given piece of each task, as tasks end. `told` names what is counted in a log line now and then.

    Raises:
        RaywardError: what a task raised; tasks that have not begun are cancelled.
    """
    import ray

    waiting = [own[part] for own in pieces]
    total, last = len(waiting), time.monotonic()
    try:
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=LOG_EVERY_S)
            yield from (_value(ref) for ref in ready)
            if told and time.monotonic() - last > LOG_EVERY_S:
                logger.info("%s: %d of %d", told, total - len(waiting), total)
                last = time.monotonic()
    finally:
        for ref in waiting:
            ray.cancel(ref)


def _value(ref: ray.ObjectRef[Any]) -> Any:
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        raise cause if isinstance(cause, RaywardError) else WorkerError(f"{type(cause).__name__}: {cause}") from error
    except ray.exceptions.RayError as error:
        raise WorkerError(f"a Ray task failed for good: {error}") from error
