"""Shares of a cluster for generating and scoring actors: plain arithmetic, checked before they start."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.connect import ClusterResources
from jobs.errors import ResourceError
from jobs.generation.options import GeneratorOptions
from jobs.options import EngineOptions
from jobs.runs.placement import TASK_CPUS, ActorPool, plan_actors

# It waits for the endpoint: Ray's CPUs, which are bookkeeping, are left to the actors that compute.
HTTP_ACTOR = ActorPool(num_actors=1, cpus_per_actor=0, gpus_per_actor=0.0)


@dataclass(frozen=True, slots=True)
class Pools:
    """The actors of both stages."""

    generating: ActorPool
    scoring: ActorPool


def plan_pools(
    resources: ClusterResources,
    options: EngineOptions,
    generation: GeneratorOptions,
    *,
    scoring_device: str,
    generating_device: str | None,
) -> Pools:
    """Pools for both stages; `generating_device` is None for an endpoint, which takes nothing of the cluster.

    On GPUs a quarter of them scores, and the others generate; a single one is shared. On CPUs each node has one actor
    of each kind, which share its CPUs but one. What is asked for goes before that.

    Raises:
        ResourceError: there is no room for both.
    """
    if generating_device is None:
        return Pools(HTTP_ACTOR, _plan(resources, scoring_device, options))
    if scoring_device == generating_device == "cuda":
        return _on_gpus(resources, options, generation)
    if scoring_device == generating_device:
        return _on_cpus(resources, options, generation)
    beside = _without_gpu_actors(resources)
    return Pools(
        plan_actors(
            resources if generating_device == "cuda" else beside,
            device=generating_device,
            num_actors=generation.generator_actors,
            cpus_per_actor=generation.generator_cpus_per_actor,
            gpus_per_actor=generation.generator_gpus_per_actor,
        ),
        _plan(resources if scoring_device == "cuda" else beside, scoring_device, options),
    )


def _plan(resources: ClusterResources, device: str, options: EngineOptions) -> ActorPool:
    return plan_actors(
        resources,
        device=device,
        num_actors=options.num_actors,
        cpus_per_actor=options.cpus_per_actor,
        gpus_per_actor=options.gpus_per_actor,
    )


def _on_gpus(resources: ClusterResources, options: EngineOptions, generation: GeneratorOptions) -> Pools:
    gpus = options.gpus_per_actor or (0.5 if resources.num_gpus == 1 else 1.0)
    num_actors = options.num_actors or max(1, int(resources.num_gpus / gpus) // 4)
    scoring = plan_actors(
        resources, device="cuda", num_actors=num_actors, cpus_per_actor=options.cpus_per_actor, gpus_per_actor=gpus
    )
    left = resources.num_gpus - num_actors * gpus
    share = generation.generator_gpus_per_actor or min(1.0, left)
    most = int(left / share) if share > 0 else 0
    wanted = generation.generator_actors or most
    if not most or wanted > most:
        raise ResourceError(
            f"{max(wanted, 1)} generating actors of {share:g} GPUs do not fit: of {resources.num_gpus} GPUs scoring "
            f"takes {num_actors * gpus:g}; lower --num-actors, --gpus-per-actor, --generator-actors or "
            "--generator-gpus-per-actor"
        )
    return Pools(ActorPool(wanted, generation.generator_cpus_per_actor or 1, share), scoring)


def _on_cpus(resources: ClusterResources, options: EngineOptions, generation: GeneratorOptions) -> Pools:
    nodes = resources.num_nodes
    per_node = {
        "generating": -(-(generation.generator_actors or nodes) // nodes),
        "scoring": -(-(options.num_actors or nodes) // nodes),
    }
    available = max(resources.node_cpus - 1, TASK_CPUS)
    generating = generation.generator_cpus_per_actor or _share(available / 2, per_node["generating"])
    rest = available - generating * per_node["generating"]
    scoring = options.cpus_per_actor or _share(max(rest, TASK_CPUS / 2), per_node["scoring"])
    taken = generating * per_node["generating"] + scoring * per_node["scoring"]
    if taken > resources.node_cpus - TASK_CPUS:
        raise ResourceError(
            f"{taken:g} CPUs of actors on each node do not fit its {resources.node_cpus}, of which reading and writing "
            f"need {TASK_CPUS:g}; lower --generator-cpus-per-actor, --cpus-per-actor, --generator-actors or "
            "--num-actors"
        )
    return Pools(
        ActorPool(generation.generator_actors or nodes, generating, 0.0),
        ActorPool(options.num_actors or nodes, scoring, 0.0),
    )


def _share(cpus: float, num_actors: int) -> float:
    share = cpus / num_actors
    return int(share) if share >= 1 else share


def _without_gpu_actors(resources: ClusterResources) -> ClusterResources:
    """The cluster as the actors see it that compute on CPUs, beside others that take a CPU for each GPU."""
    beside = -(-resources.num_gpus // resources.num_nodes)
    return replace(resources, node_cpus=max(1, resources.node_cpus - beside))
