"""The endpoint as a Serve application.

serve run serve_app.app:build_app model=tiny
"""

# No postponed annotations here: Serve reads build_app's, to check the arguments of its command line.
import os
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from serve_app.config import ModelConfig, ServiceConfig
from serve_app.ingress import Ingress
from serve_app.replica import Load, RewardReplica
from serve_app.reward_model import ModelSpec
from serve_app.web.proxy import PROXY_ENVIRONMENT
from serve_app.web.security import Guard, digests_from_environment

# Requests wait in the replicas' own queues, bounded in tokens; Serve's bounds in requests stay out of the way.
MAX_ONGOING_REQUESTS = 10_000
# Those that wait for a model without a replica: it sleeps, or its only one is being replaced.
MAX_QUEUED_REQUESTS = 1_000
INGRESS_CPUS = 0.1
INGRESSES_OF_A_CLUSTER = 2
"""One answers on while Serve replaces the other. Serve spreads them over nodes; a proxy asks that of its own first."""
INGRESS_HEALTH_CHECK_PERIOD_S = 2.0
"""How long Serve may take to see that an ingress died; meanwhile a lone one's requests wait in the proxy."""
AUTOSCALING_POLICY = "serve_app.autoscaling:replicas_for_queue"
DRAIN_S = 600.0


def build_app(config: ServiceConfig) -> Application:
    """The application, for Serve, which passes the arguments of its command line.

    Where this process has no Ray yet, as under `serve run`, models are checked first, and a Ray that it starts has
    proxies that repeat lost requests.
    """
    if not ray.is_initialized():
        check(config, None, is_here=False)
        for name, value in PROXY_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    return application(config)


def check(config: ServiceConfig, host: str | None, *, is_here: bool) -> None:
    """Check what can be known before anything starts: keys for the host, each model's configuration and tokenizer.

    Args:
        host: the address to listen on; None where it is not known yet.
        is_here: whether this machine serves; else a folder and a file of keys that are not here are left to the nodes.

    Raises:
        RaywardError: a model cannot be read, or the device cannot do what is asked of it.
        InsecureBindError: the host is open to other machines, or the file of keys is empty, and there are no keys.
        OSError: the file of keys cannot be read.
    """
    if is_here or config.api_keys_file is None or Path(config.api_keys_file).is_file():
        Guard.from_config(config).check_host(host)
    for model in config.models:
        folder = Path(model.model).expanduser()
        if is_here or not folder.is_absolute() or folder.is_dir():
            _spec(model, "cuda" if model.num_gpus else "auto").read()


def application(
    config: ServiceConfig, *, load: Load = ModelSpec.load, ingress_log: LoggingConfig | None = None
) -> Application:
    """An ingress, with a log of its own if that is given, and one deployment for each model, which `load` makes."""
    num_cpu_replicas = sum(model.max_replicas or model.num_replicas for model in config.models if not _num_gpus(model))
    replicas = [_deployment(model, max(1, num_cpu_replicas), load) for model in config.models]
    ingress = serve.deployment(
        name="ingress",
        num_replicas=config.num_ingress_replicas or _num_ingresses(),
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        graceful_shutdown_timeout_s=DRAIN_S,
        health_check_period_s=INGRESS_HEALTH_CHECK_PERIOD_S,
        logging_config=ingress_log,
    )(Ingress)
    return ingress.bind(config, digests_from_environment(), *replicas)


def _deployment(model: ModelConfig, num_sharing: int, load: Load) -> Application:
    num_gpus = _num_gpus(model)
    spec = _spec(model, "cuda" if num_gpus else "cpu").on_gpus(num_gpus)
    options: dict[str, Any] = {
        "name": model.name,
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "max_queued_requests": MAX_QUEUED_REQUESTS,
        "ray_actor_options": {"num_cpus": model.num_cpus, "num_gpus": num_gpus},
        "graceful_shutdown_timeout_s": DRAIN_S,
        "health_check_period_s": 10.0,
        "health_check_timeout_s": 30.0,
    }
    if model.gpu_type is not None:
        options["ray_actor_options"]["accelerator_type"] = model.gpu_type
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
    return deployment.bind(model, spec, num_sharing, load)


def _spec(model: ModelConfig, device: str) -> ModelSpec:
    """Which model the replicas load and how. Raises `UnsupportedDeviceError` where the device is known not to do."""
    spec = model.spec(device)
    spec.check_device()
    return spec


def _num_ingresses() -> int:
    """One on a single machine; in a cluster of several nodes enough that the loss of one is not that of all."""
    nodes = ray.nodes() if ray.is_initialized() else []
    num_nodes = sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in nodes)
    return INGRESSES_OF_A_CLUSTER if num_nodes > 1 else 1


def _num_gpus(model: ModelConfig) -> float:
    """As configured, or 1 where there are GPUs: in the cluster, or on this machine before Ray is joined. A model that
    wants GPUs of some type gets 1 wherever it is: the cluster may have none yet.
    """
    if model.num_gpus is not None:
        return model.num_gpus
    if model.gpu_type is not None:
        return 1.0
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0 if ray.is_initialized() else torch.cuda.is_available()
    return 1.0 if has_gpus else 0.0
