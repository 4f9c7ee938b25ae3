"""Actors fit the cluster, or the job says so before it starts."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.connect import ClusterResources
from jobs.errors import ResourceError
from jobs.runs.placement import ActorPool, plan_actors, shortage, split_actors

LAPTOP = ClusterResources(num_nodes=1, num_gpus=0, node_cpus=3)
SMALL = ClusterResources(num_nodes=1, num_gpus=0, node_cpus=1)
CPUS = ClusterResources(num_nodes=4, num_gpus=0, node_cpus=16)
GPUS = ClusterResources(num_nodes=2, num_gpus=16, node_cpus=64)
UNEVEN = ClusterResources(num_nodes=2, num_gpus=4, node_cpus=64, gpus_of_nodes=(1, 3))


@pytest.mark.parametrize(
    ("resources", "options", "pool", "num_threads"),
    [
        (LAPTOP, {"device": "cpu"}, ActorPool(1, 2, 0.0), 2),
        (LAPTOP, {"device": "cpu", "num_actors": 2}, ActorPool(2, 1, 0.0), 1),
        (SMALL, {"device": "cpu"}, ActorPool(1, 0.5, 0.0), 1),
        (CPUS, {"device": "cpu"}, ActorPool(4, 15, 0.0), 15),
        (CPUS, {"device": "cpu", "num_actors": 8}, ActorPool(8, 7, 0.0), 7),
        (GPUS, {"device": "cuda"}, ActorPool(16, 1, 1.0), 1),
        (GPUS, {"device": "cuda", "gpus_per_actor": 0.5}, ActorPool(32, 1, 0.5), 1),
        (UNEVEN, {"device": "cuda", "gpus_per_actor": 2.0}, ActorPool(1, 1, 2.0), 1),
        (GPUS, {"device": "cuda", "num_actors": 3, "cpus_per_actor": 4}, ActorPool(3, 4, 1.0), 4),
    ],
)
def test_actors_are_planned(
    resources: ClusterResources, options: dict[str, Any], pool: ActorPool, num_threads: int
) -> None:
    planned = plan_actors(resources, **options)
    assert planned == pool
    assert planned.num_threads == num_threads


@pytest.mark.parametrize(
    ("resources", "options", "reason"),
    [
        (LAPTOP, {"device": "cpu", "cpus_per_actor": 16}, "1 actors of 16 CPUs do not fit"),
        (LAPTOP, {"device": "cpu", "cpus_per_actor": 3}, "reading and writing need 0.5"),
        (LAPTOP, {"device": "cpu", "num_actors": 3, "cpus_per_actor": 1}, "3 actors of 1 CPUs"),
        (LAPTOP, {"device": "cpu", "gpus_per_actor": 1.0}, "--gpus-per-actor is given"),
        (LAPTOP, {"device": "cuda"}, "no GPU in the cluster"),
        (GPUS, {"device": "cuda", "num_actors": 17}, "17 actors of 1 GPUs do not fit 16"),
        (GPUS, {"device": "cuda", "gpus_per_actor": 32.0}, "do not fit 16 GPUs"),
        (
            UNEVEN,
            {"device": "cuda", "gpus_per_actor": 4.0},
            "1 actors of 4 GPUs do not fit 4 GPUs, 3 at most on a node",
        ),
        (UNEVEN, {"device": "cuda", "gpus_per_actor": 2.0, "num_actors": 2}, "2 actors of 2 GPUs do not fit 4 GPUs, 3"),
    ],
)
def test_what_does_not_fit_is_refused(resources: ClusterResources, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ResourceError, match=reason):
        plan_actors(resources, **options)


@pytest.mark.parametrize(
    ("pool", "memory_gib", "num_units", "weights_gib", "split"),
    [
        (ActorPool(1, 2, 0.0), 16, 24, 0.1, ActorPool(2, 1, 0.0)),
        (ActorPool(1, 2, 0.0), 16, 3, 0.1, ActorPool(1, 2, 0.0)),  # little work
        (ActorPool(1, 2, 0.0), 0, 24, 0.1, ActorPool(1, 2, 0.0)),  # nobody knows of the memory
        (ActorPool(1, 2, 0.0), 16, 24, 7.0, ActorPool(1, 2, 0.0)),  # one copy takes half of it
        (ActorPool(1, 0.5, 0.0), 16, 24, 0.1, ActorPool(1, 0.5, 0.0)),
        (ActorPool(4, 15, 0.0), 64, 1000, 0.1, ActorPool(32, 1, 0.0)),
        (ActorPool(4, 15, 0.0), 64, 1000, 7.0, ActorPool(16, 3, 0.0)),
        (ActorPool(4, 63, 0.0), 256, 40, 0.1, ActorPool(20, 12, 0.0)),
    ],
)
def test_actors_on_cpus_are_split(
    pool: ActorPool, memory_gib: float, num_units: int, weights_gib: float, split: ActorPool
) -> None:
    resources = ClusterResources(pool.num_actors, 0, int(pool.cpus_per_actor) + 1, node_memory=int(memory_gib * 2**30))
    found = split_actors(pool, resources, num_units=num_units, weight_bytes=int(weights_gib * 2**30))
    assert found == split


def test_what_others_hold_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = ActorPool(num_actors=2, cpus_per_actor=2.0, gpus_per_actor=0.5)
    leaving = iter([{"CPU": 0.5}, {"CPU": 1.5}, {"CPU": 2.0, "GPU": 0.5}])
    assert shortage(pool, lambda: next(leaving)) is None
    monkeypatch.setattr("jobs.runs.placement.LEFT_WITHIN_S", 0.01)
    assert shortage(pool, lambda: {"CPU": 0.5, "GPU": 1.0}) == "only 0.5 of 2 CPUs that an actor takes are free"
    assert shortage(pool, lambda: {"CPU": 3.0}) == "only 0 of 0.5 GPUs that an actor takes are free"
