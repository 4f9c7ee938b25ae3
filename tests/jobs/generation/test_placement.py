"""Both kinds of actors fit the cluster together, or are refused."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.connect import ClusterResources
from jobs.errors import ResourceError
from jobs.generation.options import GeneratorOptions
from jobs.generation.placement import Pools, plan_pools
from jobs.options import EngineOptions
from jobs.runs.placement import ActorPool


def pools(
    nodes: int, cpus: int, gpus: int, *, scoring: str = "cuda", generating: str | None = "cuda", **chosen: Any
) -> Pools:
    own = {name: value for name, value in chosen.items() if name.startswith("generator")}
    rest = {name: value for name, value in chosen.items() if name not in own}
    return plan_pools(
        ClusterResources(num_nodes=nodes, num_gpus=gpus, node_cpus=cpus),
        EngineOptions(**rest),
        GeneratorOptions(**own),
        scoring_device=scoring,
        generating_device=generating,
    )


@pytest.mark.parametrize(
    ("gpus", "generating", "scoring"),
    [
        (1, ActorPool(1, 1, 0.5), ActorPool(1, 1, 0.5)),
        (2, ActorPool(1, 1, 1.0), ActorPool(1, 1, 1.0)),
        (4, ActorPool(3, 1, 1.0), ActorPool(1, 1, 1.0)),
        (8, ActorPool(6, 1, 1.0), ActorPool(2, 1, 1.0)),
    ],
)
def test_gpus_are_shared_three_to_one(gpus: int, generating: ActorPool, scoring: ActorPool) -> None:
    assert pools(1, 32, gpus) == Pools(generating, scoring)


def test_what_is_asked_for_goes_first() -> None:
    chosen = pools(1, 32, 4, num_actors=2, gpus_per_actor=0.5, generator_gpus_per_actor=1.5)
    assert chosen == Pools(ActorPool(2, 1, 1.5), ActorPool(2, 1, 0.5))


@pytest.mark.parametrize(
    ("nodes", "cpus", "generating", "scoring"),
    [
        (1, 2, ActorPool(1, 0.5, 0), ActorPool(1, 0.5, 0)),
        (1, 3, ActorPool(1, 1, 0), ActorPool(1, 1, 0)),
        (1, 16, ActorPool(1, 7, 0), ActorPool(1, 8, 0)),
        (4, 16, ActorPool(4, 7, 0), ActorPool(4, 8, 0)),
    ],
)
def test_cpus_are_shared_in_halves(nodes: int, cpus: int, generating: ActorPool, scoring: ActorPool) -> None:
    assert pools(nodes, cpus, 0, scoring="cpu", generating="cpu") == Pools(generating, scoring)


def test_an_endpoint_takes_nothing() -> None:
    assert pools(1, 16, 0, scoring="cpu", generating=None) == Pools(ActorPool(1, 0, 0), ActorPool(1, 15, 0))
    assert pools(1, 16, 4, generating=None) == Pools(ActorPool(1, 0, 0), ActorPool(4, 1, 1.0))


def test_one_model_on_gpus_and_one_on_cpus() -> None:
    assert pools(1, 16, 2, scoring="cpu") == Pools(ActorPool(2, 1, 1.0), ActorPool(1, 13, 0))


@pytest.mark.parametrize(
    "options",
    [
        {"nodes": 1, "cpus": 8, "gpus": 2, "num_actors": 2},
        {"nodes": 1, "cpus": 8, "gpus": 2, "generator_actors": 2},
        {"nodes": 1, "cpus": 8, "gpus": 0, "scoring": "cpu", "generating": "cpu", "generator_cpus_per_actor": 9},
        {"nodes": 1, "cpus": 8, "gpus": 0, "scoring": "cpu", "generating": "cpu", "cpus_per_actor": 8},
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ResourceError, match="generator"):
        pools(**options)
