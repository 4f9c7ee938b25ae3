"""rayward's code on the nodes of a cluster: is it there, is it this one, and a runtime_env that brings it along.

A node counts by what its workers would import. Ray adds the driver's folders to their search path, so on the machine
of the driver they find what the driver runs.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

PACKAGES = ("serve_app", "jobs", "cluster")
# What the code needs and cannot bring along: hundreds of megabytes that belong into an image.
REQUIRED = ("torch", "transformers", "tokenizers", "safetensors", "pyarrow", "pydantic", "numpy", "tqdm", "httpx")
COMPARED = ("torch", "transformers", "tokenizers")
PROBE_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class NodeCode:
    """What a node's workers would run: a hash of rayward's sources, None where they are missing; required modules
    that are missing; and the versions of what may change a score.
    """

    node: str
    fingerprint: str | None
    missing: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()


def code_here() -> NodeCode:
    """What this process runs."""
    return NodeCode("here", *_probe()(PACKAGES, REQUIRED, COMPARED))


def code_on_nodes(timeout_s: float = PROBE_TIMEOUT_S) -> list[NodeCode]:
    """What each node of the connected cluster would run. One that does not say so in time counts as having nothing."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = ray.remote(num_cpus=0, max_retries=0)(_probe())
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            pinned = probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            asked[pinned.remote(PACKAGES, REQUIRED, COMPARED)] = str(node["NodeManagerAddress"])
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
    for answer in late:
        ray.cancel(answer, force=True)
    return [_answered(asked[answer], answer) for answer in ready] + [NodeCode(asked[answer], None) for answer in late]


def _answered(node: str, answer: Any) -> NodeCode:
    import ray

    try:
        return NodeCode(node, *ray.get(answer))
    except ray.exceptions.RayError as error:
        logger.warning("node %s does not say what code it has: %s", node, str(error).strip().splitlines()[-1])
        return NodeCode(node, None)


def why_ship(nodes: list[NodeCode], here: NodeCode) -> str | None:
    """Why the code has to be sent along; None where every node runs what this process runs."""
    absent = [node.node for node in nodes if node.fingerprint is None]
    other = [node.node for node in nodes if node.fingerprint not in (None, here.fingerprint)]
    reasons = [f"{_some(names)} {what}" for names, what in ((absent, "lacks it"), (other, "has another")) if names]
    return " and ".join(reasons) or None


def missing_modules(nodes: list[NodeCode]) -> str | None:
    """Which nodes lack required modules, in words; None where none does."""
    lacking = {node.node: node.missing for node in nodes if node.missing}
    return "; ".join(f"{node} lacks {', '.join(names)}" for node, names in lacking.items()) or None


def runtime_env_with_code() -> dict[str, Any]:
    """A Ray runtime_env with rayward's packages as they are on this machine."""
    folders = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        folders += list(spec.submodule_search_locations or []) if spec is not None else []
    return {"py_modules": folders, "excludes": ["**/__pycache__/", "*.pyc"]}


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more nodes"


def _probe() -> Callable[..., tuple[str | None, tuple[str, ...], tuple[str, ...]]]:
    """The function that looks. It is made here, so that it travels by value: a node may lack this module."""

    def probe(
        packages: tuple[str, ...], required: tuple[str, ...], compared: tuple[str, ...]
    ) -> tuple[str | None, tuple[str, ...], tuple[str, ...]]:
        import hashlib
        import importlib.metadata
        import importlib.util
        from pathlib import Path

        missing = tuple(name for name in required if importlib.util.find_spec(name) is None)
        versions = tuple(f"{name} {importlib.metadata.version(name)}" for name in compared if name not in missing)
        digest = hashlib.sha256()
        for package in packages:
            spec = importlib.util.find_spec(package)
            if spec is None or not spec.submodule_search_locations:
                return None, missing, versions
            folder = Path(next(iter(spec.submodule_search_locations)))
            for file in sorted(folder.rglob("*.py")):
                digest.update(f"{package}/{file.relative_to(folder).as_posix()}".encode() + file.read_bytes())
        return digest.hexdigest()[:16], missing, versions

    return probe
