"""Clusters that cannot be joined are one clear error that says what to do."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc  # type: ignore[import-untyped]
import pytest
from pydantic import ValidationError

from cluster import connect as connect_module
from cluster.connect import CLIENT_CALL, GCS_CALL, ClusterError, connect, explained, unreachable
from jobs.score import ScoreConfig


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is connected to no Ray, and its environment names none."""
    import ray

    if ray.is_initialized():
        pytest.skip("this process is connected to Ray already")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_an_address_without_a_cluster_is_an_error_that_names_it(elsewhere: None) -> None:
    with pytest.raises(ClusterError, match="--address foo cannot be joined"), connect("foo"):
        pass


def test_a_machine_without_a_cluster_is_an_error(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def init(address: str, **options: object) -> None:  # this machine may run a cluster of somebody else's
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError, match="--address auto cannot be joined: Could not find"), connect("auto"):
        pass


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_port_where_nothing_listens_is_told_at_once(
    scheme: str, elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connect_module, "ASK_TIMEOUT_S", 0.3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ClusterError, match=f"no Ray answers at 127.0.0.1:{port}"), connect(f"{scheme}127.0.0.1:{port}"):
        pass


def test_the_environment_names_the_cluster(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "bar")
    with pytest.raises(ClusterError, match="--address bar cannot be joined"), connect():
        pass


class Head(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Answers one call as a Ray that asks for a token; it knows no other."""

    def __init__(self, known: str) -> None:
        self._known = known

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if details.method != self._known:
            return None  # gRPC says UNIMPLEMENTED

        def refuse(request: bytes, context: grpc.ServicerContext) -> bytes:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
            return b""

        return grpc.unary_unary_rpc_method_handler(refuse)


@pytest.fixture(params=[GCS_CALL, CLIENT_CALL], ids=["gcs", "client"])
def head(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """The right and the wrong address of something that answers like a head with a token."""
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Head(request.param)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    plain, client = f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"
    yield (plain, client) if request.param == GCS_CALL else (client, plain)
    server.stop(None).wait(5)


def test_a_refused_token_is_told_from_a_dead_cluster(head: tuple[str, str]) -> None:
    right, wrong = head
    assert unreachable(right) is None
    assert "asks for a token" in explained(ConnectionError("ray client connection timeout"), right)
    assert "not what the address says" in str(unreachable(wrong))
    assert explained(ConnectionError("no reason known"), wrong) == "no reason known"


def test_other_versions_are_named() -> None:
    from ray._private.utils import check_version_info

    with pytest.raises(RuntimeError) as caught:
        check_version_info({"ray_version": "2.59.0", "python_version": "3.10.2"}, "node 10.0.0.1")
    text = explained(caught.value, "auto")
    assert "it runs Ray 2.59.0 on Python 3.10.2, this process Ray 2.60" in text
    assert "constraints.txt" in text


@pytest.mark.parametrize("from_environment", [False, True])
def test_jobs_refuse_ray_client_and_say_how_to_submit(from_environment: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "ray://head:10001"
    monkeypatch.setenv("RAY_ADDRESS", address if from_environment else "auto")
    with pytest.raises(ValidationError, match="ray job submit"):
        ScoreConfig(input="a", output="b", model="tiny", address=None if from_environment else address)
