"""The endpoint as a Serve application.

serve run serve_app.app:build_app model=tiny
"""

# No postponed annotations here: Serve reads build_app's, to check the arguments of its command line.
import os
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from serve_app.config import ModelConfig, ServiceConfig
from serve_app.ingress import Ingress
from serve_app.replica import RewardReplica

__all__ = ["build_app"]

# Requests wait in the replicas' own queues, bounded in tokens; Serve's bounds in requests stay out of the way.
MAX_ONGOING_REQUESTS = 10_000
INGRESS_CPUS = 0.1
AUTOSCALING_POLICY = "serve_app.autoscaling:replicas_for_queue"
DRAIN_S = 60.0


def build_app(config: ServiceConfig) -> Application:
    """The application: an ingress and one deployment for each model. Serve passes the arguments of its command line."""
    replicas = [_deployment(model, _threads(config, model)) for model in config.models]
    ingress = serve.deployment(
        name="ingress",
        num_replicas=config.num_ingress_replicas,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        graceful_shutdown_timeout_s=DRAIN_S,
    )(Ingress)
    return ingress.bind(config, *replicas)


def _deployment(model: ModelConfig, threads: int | None) -> Application:
    num_gpus = _num_gpus(model)
    options: dict[str, Any] = {
        "name": model.name,
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "ray_actor_options": {"num_cpus": model.num_cpus, "num_gpus": num_gpus},
        "graceful_shutdown_timeout_s": DRAIN_S,
        "health_check_period_s": 10.0,
        "health_check_timeout_s": 30.0,
    }
    if model.max_replicas_per_node is not None:
        options["max_replicas_per_node"] = model.max_replicas_per_node
    if model.max_replicas is None:
        options["num_replicas"] = model.num_replicas
    else:
        options["autoscaling_config"] = {
            "min_replicas": model.min_replicas,
            "max_replicas": model.max_replicas,
            "upscale_delay_s": 5.0,
            "downscale_delay_s": 120.0,
            "policy": {"policy_function": AUTOSCALING_POLICY},
        }
    deployment = serve.deployment(**options)(RewardReplica)
    return deployment.bind(model, "cuda" if num_gpus else "cpu", threads)


def _num_gpus(model: ModelConfig) -> float:
    if model.num_gpus is not None:
        return model.num_gpus
    return 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU", 0) else 0.0


def _threads(config: ServiceConfig, model: ModelConfig) -> int | None:
    """CPU threads of one replica: as set, or an even share of this machine's cores."""
    if model.threads is not None or _num_gpus(model):
        return model.threads
    replicas = sum(each.max_replicas or each.num_replicas for each in config.models)
    return max(1, (os.cpu_count() or 1) // replicas)
