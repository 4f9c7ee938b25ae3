"""The one `ray.init`: an embedded local Ray, or a running cluster by its address."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from serve_app.reward_model.errors import RaywardError

__all__ = ["ClusterError", "ClusterResources", "connect", "local_cores"]

logger = logging.getLogger(__name__)

# An embedded Ray lists this many CPUs more than there are cores: reading and committing are scheduled on it, while a
# scoring actor holds all the cores. Ray's CPUs are bookkeeping and bind nothing.
IO_CPUS = 1


class ClusterError(RaywardError):
    """A Ray cluster cannot be joined or started."""


@dataclass(frozen=True, slots=True)
class ClusterResources:
    """What a cluster has: nodes, GPUs in all, and the CPUs of its smallest node that has any."""

    num_nodes: int
    num_gpus: int
    node_cpus: int


def local_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def connect(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[ClusterResources]:
    """Join the cluster at `address` (`auto`, `host:port`, `ray://host:port`), or start an embedded local Ray.

    `num_cpus` is how many CPUs an embedded Ray lists: by default the cores of this process and one more. Leaves on
    exit what it joined and stops what it started. Where this process is connected to Ray already, that connection is
    used and left as it is.

    Raises:
        ClusterError: there is no cluster at the address, or a local Ray does not start.
    """
    _set_quiet_environment()  # read by Ray when it is imported
    import ray

    if ray.is_initialized():
        yield _resources()
        return
    options: dict[str, object] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"num_cpus": num_cpus or local_cores() + IO_CPUS, "include_dashboard": False}
    else:
        logger.info("joining the Ray cluster at %s", address)
    try:
        with _muted_stderr(), _own_sigterm():
            ray.init(address or "local", **options)  # type: ignore[arg-type]  # ray.init is typed option by option
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = f"--address {address} cannot be joined" if address else "a local Ray does not start"
        raise ClusterError(f"{where}: {error}") from error
    try:
        yield _resources()
    finally:
        ray.shutdown()


def _resources() -> ClusterResources:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [int(resources["CPU"]) for resources in nodes if resources.get("CPU", 0) >= 1]
    return ClusterResources(
        num_nodes=len(cpus),
        num_gpus=int(sum(resources.get("GPU", 0) for resources in nodes)),
        node_cpus=min(cpus, default=1),
    )


def _set_quiet_environment() -> None:
    """Ask Ray for its errors alone. What the user has set in the environment stays."""
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }.items():
        os.environ.setdefault(name, value)
    # Ray Data gives no other way yet to limit the restarts of an actor.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"ray\..*")


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Ray answers SIGTERM with an abort of its own; the program keeps the handler it had."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _muted_stderr() -> Iterator[None]:
    """Ray's processes greet on the file descriptor; Python errors are raised all the same."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
