"""Scoring actors on a cluster, their number and what each takes: plain arithmetic, checked before they start."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster.connect import ClusterResources
from jobs.errors import ResourceError

# CPUs of a reading or committing task; a node must have as much beside its actors, or nothing is ever read.
TASK_CPUS = 0.5
REPLICAS_PER_FORWARDER = 4
# Actors of one node that take the place of one with as many threads, which wait for each other. Each has the weights
# and the libraries for itself, and should have some units, so that all end at about the same time.
MAX_SPLIT = 8
SPLIT_MEMORY_SHARE = 0.5
LIBRARIES_BYTES = 2**30
UNITS_PER_ACTOR = 2
LEFT_WITHIN_S = 3.0
"""How long the actors of a job that has ended may take to go."""


@dataclass(frozen=True, slots=True)
class ActorPool:
    """Scoring actors: how many, and what each takes of the cluster."""

    num_actors: int
    cpus_per_actor: float
    gpus_per_actor: float

    @property
    def num_threads(self) -> int:
        """Torch threads of one actor."""
        return max(1, int(self.cpus_per_actor))


def plan_actors(
    resources: ClusterResources,
    *,
    device: str,
    num_actors: int | None = None,
    cpus_per_actor: int | None = None,
    gpus_per_actor: float | None = None,
) -> ActorPool:
    """One actor a GPU on cuda; on cpu one a node, with the node's CPUs but one. What is asked for goes before that.

    The GPUs of one actor are on one node, as Ray places an actor's resources.

    Raises:
        ResourceError: the cluster has no GPU, or no room for the actors.
    """
    if device == "cuda":
        return _on_gpus(resources, num_actors, cpus_per_actor or 1, gpus_per_actor or 1.0)
    if gpus_per_actor is not None:
        raise ResourceError("--gpus-per-actor is given, but actors score on cpu; leave it out, or say --device cuda")
    wanted = num_actors or resources.num_nodes
    actors_per_node = -(-wanted // resources.num_nodes)
    share = max(resources.node_cpus - 1, TASK_CPUS) / actors_per_node
    cpus = cpus_per_actor or (int(share) if share >= 1 else share)
    if cpus * actors_per_node > resources.node_cpus - TASK_CPUS:
        raise ResourceError(
            f"{wanted} actors of {cpus:g} CPUs do not fit: nodes {resources.num_nodes}, CPUs of each "
            f"{resources.node_cpus}, of which reading and writing need {TASK_CPUS:g}; lower --num-actors or "
            "--cpus-per-actor"
        )
    return ActorPool(wanted, cpus, 0.0)


def split_actors(pool: ActorPool, resources: ClusterResources, *, num_units: int, weight_bytes: int) -> ActorPool:
    """Several actors of fewer threads for each of a pool that scores on CPUs, as far as memory and work go.

    With a model of 12.6 million weights on two cores, two actors of one thread score 1.8 times as fast as one of two
    (`bench_score`).
    """
    by_memory = int(SPLIT_MEMORY_SHARE * resources.node_memory / (weight_bytes + LIBRARIES_BYTES))
    by_work = num_units // (UNITS_PER_ACTOR * pool.num_actors)
    parts = max(1, min(int(pool.cpus_per_actor), MAX_SPLIT, by_memory, by_work))
    return pool if parts == 1 else ActorPool(parts * pool.num_actors, int(pool.cpus_per_actor / parts), 0.0)


def shortage(pool: ActorPool, free: Callable[[], Mapping[str, float]]) -> str | None:
    """Why not even one actor can start: what it takes and what of that others leave; None where one can.

    The actors of a job that has just ended take a moment to go, which is waited for.

    Args:
        pool: the actors.
        free: tells what is free in the cluster, as `ray.available_resources` does.
    """
    deadline = time.monotonic() + LEFT_WITHIN_S
    while (lacking := _lacking(pool, free())) and time.monotonic() < deadline:
        time.sleep(LEFT_WITHIN_S / 20)
    return lacking


def _lacking(pool: ActorPool, free: Mapping[str, float]) -> str | None:
    wanted = {"CPU": pool.cpus_per_actor, "GPU": pool.gpus_per_actor}
    lacking = [
        f"{free.get(name, 0.0):g} of {wants:g} {name}s" for name, wants in wanted.items() if free.get(name, 0.0) < wants
    ]
    return f"only {' and '.join(lacking)} that an actor takes are free" if lacking else None


def plan_forwarders(
    free_cpus: float, *, num_replicas: int, num_actors: int | None = None, cpus_per_actor: int | None = None
) -> ActorPool:
    """Processes that tokenise for replicas elsewhere and send to them: one for every four, half a CPU each.

    Raises:
        ResourceError: so many CPUs are not free.
    """
    wanted, cpus = (
        num_actors or max(1, math.ceil(num_replicas / REPLICAS_PER_FORWARDER)),
        cpus_per_actor or TASK_CPUS,
    )
    if wanted * cpus + TASK_CPUS > free_cpus:
        raise ResourceError(
            f"{wanted} processes of {cpus:g} CPUs that send to the replicas, and {TASK_CPUS:g} for reading and "
            f"writing, do not fit the {free_cpus:g} CPUs that are free; add a node, or lower --num-actors"
        )
    return ActorPool(wanted, cpus, 0.0)


def _on_gpus(resources: ClusterResources, num_actors: int | None, cpus: int, gpus: float) -> ActorPool:
    if not resources.num_gpus:
        raise ResourceError("--device cuda, but Ray sees no GPU in the cluster")
    most = resources.places_for(gpus)
    wanted = num_actors or most
    if not most or wanted > most:
        nodes = f", {resources.most_gpus} at most on a node" if gpus > 1 else ""
        raise ResourceError(
            f"{max(wanted, 1)} actors of {gpus:g} GPUs do not fit {resources.num_gpus} GPUs{nodes}; lower --num-actors "
            "or --gpus-per-actor"
        )
    return ActorPool(wanted, cpus, gpus)
