"""Why a Ray cluster cannot be joined, in words that say what to do.

Ray reports a refused token, a wrong port and a dead cluster alike, as a connection that timed out. One bare gRPC call
tells them apart.
"""

from __future__ import annotations

import os
import re

import grpc  # type: ignore[import-untyped]  # comes with ray[serve]

__all__ = ["explained", "unreachable"]

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
    with grpc.insecure_channel(where) as channel:
        call = channel.unary_unary(CLIENT_CALL if address.startswith("ray://") else GCS_CALL)
        try:
            call(b"", timeout=ASK_TIMEOUT_S, wait_for_ready=True)
        except grpc.RpcError as failure:
            return failure.code()
    return None
