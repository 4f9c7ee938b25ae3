"""The endpoint under load while its processes are killed: requests, errors, latency and memory.

    python -m tests.benchmarks.bench_soak --minutes 10

Starts its own Ray, and an endpoint of two replicas of the embedded model behind two ingresses. Every 20 seconds one of
a replica, an ingress, the proxy and the controller is killed, in turn; behind HAProxy that and its actor too. Half of
the clients are `AsyncRewardClient` as it comes, which must see no error; half are plain HTTP without retries, which may
lose what a killed proxy had. Each score is compared with the engine's. The last line is JSON; the exit status is 1
where a client of the first kind saw an error, or anyone a wrong score.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import psutil
import torch

from cluster.connect import connect
from cluster.serve import has_haproxy
from serve_app.client import AsyncRewardClient, RewardClientError
from serve_app.reward_model import RewardModel
from serve_app.web.proxy import haproxy_environment
from tests.benchmarks.bench_engine import hardware
from tests.serve_app.test_endpoint import (
    CONTROLLER,
    INGRESS,
    PROXY,
    conversations,
    deploy_models,
    replica_pids,
    serving,
)

REPLICA = "ServeReplica:rayward:tiny"
HAPROXY, HAPROXY_MANAGER = "haproxy", "HAProxyManager"
ROLES = {REPLICA: "replica", INGRESS: "ingress", PROXY: "proxy", CONTROLLER: "controller"}
HAPROXY_ROLES = {HAPROXY: "haproxy", HAPROXY_MANAGER: "haproxy_manager"}
OPTIONS = {"model": "tiny", "dtype": "float32", "num_cpus": 0.5, "num_replicas": 2, "threads": 1}
TIMEOUT_S = 600.0
Ask = Callable[[list[Any]], Awaitable[list[float]]]


@dataclass
class Clients:
    """What the clients of one kind met."""

    seconds: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: int = 0

    @property
    def figures(self) -> dict[str, Any]:
        cuts = statistics.quantiles(self.seconds, n=100) if len(self.seconds) > 1 else [0.0] * 99
        return {
            "requests": len(self.seconds) + self.errors.total(),
            "errors": dict(self.errors),
            "wrong_scores": self.wrong,
            "p50_s": round(cuts[49], 3),
            "p99_s": round(cuts[98], 3),
        }


def main() -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.bench_soak", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long the clients ask")
    parser.add_argument("--clients", type=int, default=64, help="how many there are, of both kinds")
    parser.add_argument("--kill-every-s", type=float, default=20.0, help="seconds from one kill to the next")
    parser.add_argument(
        "--haproxy", action=argparse.BooleanOptionalAction, default=has_haproxy(), help="as `rayward serve` has it"
    )
    args = parser.parse_args()
    with TemporaryDirectory(prefix="rayward-soak-") as folder:
        os.environ.update(haproxy_environment(Path(folder)) if args.haproxy else {})
        return run(args)


def run(args: argparse.Namespace) -> int:
    """Soak the endpoint, and print what was met; the exit status."""
    asked = conversations(300)
    expected = RewardModel.from_pretrained("tiny", device="cpu", dtype="float32").get_scores(asked)
    with connect("local", num_cpus=6), serving() as url:
        deploy_models([OPTIONS], num_ingress_replicas=2)
        result = asyncio.run(soak(url, asked, expected, args))
    shape = {"minutes": args.minutes, "clients": args.clients, "haproxy": args.haproxy}
    result = {"hardware": hardware(torch.device("cpu"))} | shape | result
    print(json.dumps(result))
    is_right = not result["reward_client"]["errors"] and not any(
        result[kind]["wrong_scores"] for kind in ("reward_client", "plain_http")
    )
    return 0 if is_right else 1


async def soak(url: str, asked: list[Any], expected: list[float], args: argparse.Namespace) -> dict[str, Any]:
    """Every figure."""
    kinds = {"reward_client": Clients(), "plain_http": Clients()}
    until = time.monotonic() + args.minutes * 60
    memory = [resident_mb()]
    async with AsyncExitStack() as stack:
        own = await stack.enter_async_context(AsyncRewardClient(url))
        limits = httpx.Limits(max_connections=None)
        plain = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits))

        async def by_client(chats: list[Any]) -> list[float]:
            return [score.value for score in await own.score(chats)]

        async def by_http(chats: list[Any]) -> list[float]:
            response = await plain.post("/v1/score", json={"conversations": chats})
            response.raise_for_status()
            return [result["score"] for result in response.json()["results"]]

        tasks = [
            asyncio.create_task(ask_until(until, ask, asked, expected, kinds[kind], seed))
            for seed in range(args.clients // 2)
            for kind, ask in (("reward_client", by_client), ("plain_http", by_http))
        ]
        roles = ROLES | (HAPROXY_ROLES if args.haproxy else {})
        killed = await kill_until(until, args.kill_every_s, roles, memory)
        await asyncio.gather(*tasks)
    memory.append(resident_mb())
    return {
        **{kind: clients.figures for kind, clients in kinds.items()},
        "killed": dict(killed),
        "memory_mb": {"first": memory[0], "largest": max(memory), "last": memory[-1]},
    }


async def ask_until(
    until: float, ask: Ask, asked: list[Any], expected: list[float], clients: Clients, seed: int
) -> None:
    """Ask for one to eight conversations, over and over."""
    chooser = random.Random(seed)
    while time.monotonic() < until:
        count = chooser.randint(1, 8)
        first = chooser.randrange(len(asked) - count)
        began = time.monotonic()
        try:
            scores = await ask(asked[first : first + count])
        except (httpx.HTTPError, RewardClientError) as error:
            clients.errors[f"{type(error).__name__}: {error}"[:120]] += 1
            await asyncio.sleep(1.0)
            continue
        clients.seconds.append(time.monotonic() - began)
        clients.wrong += scores != expected[first : first + count]


async def kill_until(until: float, every_s: float, roles: dict[str, str], memory: list[int]) -> Counter[str]:
    """Kill one of each role in turn; how many of each were. Adds the memory before each kill."""
    killed: Counter[str] = Counter()
    for process in cycle(roles):
        await asyncio.sleep(min(every_s, max(0.0, until - time.monotonic())))
        if time.monotonic() >= until:
            return killed
        memory.append(await asyncio.to_thread(resident_mb))
        found = await asyncio.to_thread(pids_of, process)
        if found:
            os.kill(random.choice(found), signal.SIGKILL)
            killed[roles[process]] += 1
    raise AssertionError("roles are taken in turn for ever")


def pids_of(process: str) -> list[int]:
    """Those of HAProxy, which is no actor, or of an actor's class."""
    if process != HAPROXY:
        return list(replica_pids(process).values())
    return [child.pid for child in psutil.Process().children(recursive=True) if child.name() == HAPROXY]


def resident_mb() -> int:
    """The resident memory of the endpoint's processes."""
    total = 0
    for process in ROLES | HAPROXY_ROLES:
        for pid in pids_of(process):
            try:
                total += psutil.Process(pid).memory_info().rss
            except psutil.NoSuchProcess:
                continue
    return round(total / 2**20)


if __name__ == "__main__":
    sys.exit(main())
