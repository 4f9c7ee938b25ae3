"""The one `ray.init`: an embedded local Ray or a running cluster by its address, and why one cannot be joined."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.node_code import COMPARED, code_here, code_on_nodes, missing_modules, runtime_env_with_code, why_ship
from serve_app.reward_model.errors import RaywardError

if TYPE_CHECKING:
    import grpc  # type: ignore[import-untyped]  # comes with ray[serve]

ASK_TIMEOUT_S = 5.0
# Answered by the head's GCS and by its Ray Client server, in this order; each knows only its own.
GCS_CALL = "/ray.rpc.NodeInfoGcsService/CheckAlive"
CLIENT_CALL = "/ray.rpc.RayletDriver/ClusterInfo"
TOKEN_ADVICE = (
    "the cluster asks for a token, and this process has none or a wrong one: take it from the head with "
    "`ray get-auth-token`, put it into ~/.ray/auth_token or RAY_AUTH_TOKEN here, and set RAY_AUTH_MODE=token"
)
_VERSIONS = re.compile(r"Ray: (\S+)\s+Python: (\S+).*Ray: (\S+)\s+Python: (\S+)", re.DOTALL)


def unreachable(address: str) -> str | None:
    """Why no Ray is at `host:port` or `ray://host:port`, or None. Asked first, since Ray itself tries for minutes.

    With TLS, which the bare call does not speak, and for `auto` it is always None.
    """
    import grpc

    where = address.removeprefix("ray://")
    code = _answer(address)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
        ports = "6379 is the head's usual port, 10001 the one for ray://, 8265 the dashboard's, which is neither"
        return f"no Ray answers at {where}: is the head up and the port right ({ports})?"
    if code == grpc.StatusCode.UNIMPLEMENTED:
        is_client = address.startswith("ray://")
        right = "that port is the cluster's own: leave `ray://` out" if is_client else "it wants `ray://` in front"
        return f"{where} is Ray, but not what the address says; perhaps {right}"
    return None


def explained(error: Exception, address: str) -> str:
    """What stands behind Ray's `error` at `address` (`auto`, `host:port` or `ray://host:port`)."""
    import grpc

    text = str(error).strip()
    if "ersion mismatch" in text and (found := _VERSIONS.search(text)):
        cluster_ray, cluster_python, our_ray, our_python = found.groups()
        return (
            f"it runs Ray {cluster_ray} on Python {cluster_python}, this process Ray {our_ray} on Python {our_python}; "
            "both must agree: use the versions of constraints.txt on every node and here"
        )
    if "uthentication" in text or _answer(address) == grpc.StatusCode.UNAUTHENTICATED:
        return TOKEN_ADVICE
    return text


def _answer(address: str) -> grpc.StatusCode | None:
    """The status of a bare call, without a token, to what should be Ray; None where that shows nothing."""
    where = address.removeprefix("ray://")
    if ":" not in where or os.environ.get("RAY_USE_TLS", "0") != "0":
        return None
    import grpc

    with grpc.insecure_channel(where) as channel:
        call = channel.unary_unary(CLIENT_CALL if address.startswith("ray://") else GCS_CALL)
        try:
            call(b"", timeout=ASK_TIMEOUT_S, wait_for_ready=True)
        except grpc.RpcError as failure:
            return failure.code()
    return None


logger = logging.getLogger(__name__)

# An embedded Ray lists this many CPUs more than there are cores: reading and committing are scheduled on it, while a
# scoring actor holds all the cores. Ray's CPUs are bookkeeping and bind nothing.
IO_CPUS = 1
LOCAL = "local"


class ClusterError(RaywardError):
    """A Ray cluster cannot be joined or started."""


@dataclass(frozen=True, slots=True)
class ClusterResources:
    """What a cluster has: nodes, GPUs in all, and the CPUs of its smallest node that has any.

    `gpus_of_nodes` are the GPUs of each node that has any; without it all are taken to be on one. `node_memory` are the
    bytes for tasks and actors of the node with the least; 0 where nobody knows.
    """

    num_nodes: int
    num_gpus: int
    node_cpus: int
    gpus_of_nodes: tuple[int, ...] = ()
    node_memory: int = 0

    def places_for(self, gpus: float) -> int:
        """Processes of so many GPUs that have a place, each on one node."""
        return sum(int(there / gpus) for there in self.gpus_of_nodes or (self.num_gpus,))

    @property
    def most_gpus(self) -> int:
        """GPUs of the node with the most."""
        return max(self.gpus_of_nodes, default=self.num_gpus)


def local_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def connect(
    address: str | None = None, *, num_cpus: int | None = None, log_to_driver: bool = False
) -> Iterator[ClusterResources]:
    """Join the cluster at `address`, or start an embedded local Ray.

    Leaves on exit what it joined and stops what it started. Where this process is connected to Ray already, that
    connection is used and left as it is. A cluster whose nodes lack rayward, or have another one, is sent the code of
    this process; PyTorch and the other requirements must be there.

    Args:
        address: `auto` (the cluster this machine belongs to), `host:port` of a head, `ray://host:port` of its Ray
            Client server, or `local`; by default what RAY_ADDRESS says, else `local`.
        num_cpus: how many CPUs an embedded Ray lists: by default the cores of this process and one more.
        log_to_driver: show here what processes of an embedded Ray print.

    Raises:
        ClusterError: there is no cluster at the address, it asks for a token, it runs another Ray or Python, its nodes
            lack what rayward requires, or a local Ray does not start.
    """
    _set_quiet_environment(is_shown=log_to_driver)  # read by Ray when it is imported
    import ray

    if ray.is_initialized():
        yield _resources()
        return
    where = address or os.environ.get("RAY_ADDRESS") or LOCAL
    try:
        if where == LOCAL:
            num_cpus = num_cpus or local_cores() + IO_CPUS
            _init(LOCAL, num_cpus=num_cpus, include_dashboard=False, log_to_driver=log_to_driver)
        else:
            logger.info("joining the Ray cluster at %s", where)
            _join(where)
        yield _resources()
    finally:
        ray.shutdown()


def _join(address: str) -> None:
    """Connect, and once more with the code of this process if a node's is another."""
    import ray

    if why := unreachable(address):
        raise ClusterError(f"--address {address} cannot be joined: {why}")
    _init(address)
    nodes, here = code_on_nodes(), code_here()
    if missing := missing_modules(nodes):
        raise ClusterError(f"--address {address}: {missing}; install rayward's requirements (constraints.txt) there")
    if len({node.versions for node in nodes if node.versions}) > 1:
        logger.warning("nodes differ in %s: scores may differ in their last bits", ", ".join(COMPARED))
    why = why_ship(nodes, here)
    if why is None:
        return
    logger.info("sending rayward's code along, since %s", why)
    ray.shutdown()
    _init(address, runtime_env=runtime_env_with_code())
    if why := why_ship(code_on_nodes(), here):
        raise ClusterError(f"--address {address}: rayward's code does not reach every node: {why}")


def _init(address: str, **options: Any) -> None:
    import ray

    try:
        with _muted_stderr(), _own_sigterm(), _own_search_path():
            ray.init(address, **{"log_to_driver": False, "logging_level": logging.ERROR, **options})
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        if address == LOCAL:
            raise ClusterError(f"a local Ray does not start: {error}") from error
        raise ClusterError(f"--address {address} cannot be joined: {explained(error, address)}") from error


def _resources() -> ClusterResources:
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    with_cpus = [resources for resources in nodes if resources.get("CPU", 0) >= 1]
    cpus = [int(resources["CPU"]) for resources in with_cpus]
    return ClusterResources(
        num_nodes=len(cpus),
        num_gpus=int(sum(resources.get("GPU", 0) for resources in nodes)),
        node_cpus=min(cpus, default=1),
        gpus_of_nodes=tuple(int(resources["GPU"]) for resources in nodes if resources.get("GPU", 0) >= 1),
        node_memory=min((int(resources.get("memory", 0)) for resources in with_cpus), default=0),
    )


def gpus_of_actor() -> float:
    """GPUs that Ray set aside for the actor that asks, parts allowed; 0 outside of actors."""
    import ray

    if not ray.is_initialized() or ray.get_runtime_context().get_actor_id() is None:
        return 0.0
    return float(ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0))


def _set_quiet_environment(*, is_shown: bool) -> None:
    """Ask Ray for its errors alone. What the user has set in the environment stays."""
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if not is_shown:  # each process of Ray says that it has read this variable
        quiet["RAY_BACKEND_LOG_LEVEL"] = "fatal"
    for name, value in quiet.items():
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
def _own_search_path() -> Iterator[None]:
    """Ray puts the current folder first on its workers' search path, even where this process does not look there.

    Then a folder `jobs` in it, as many projects have one, would be what the workers import. So Ray is started from
    another folder unless the current one is on this process's search path, as it is with `python -m`.
    """
    here = os.getcwd()
    if {"", here} & set(sys.path):
        yield
        return
    os.chdir(sys.prefix)
    try:
        yield
    finally:
        os.chdir(here)


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
