"""The endpoint's options, and the number of replicas that follows from the load."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from pydantic import ValidationError

from serve_app.app import _deployment, application, build_app
from serve_app.autoscaling import QUEUED_SECONDS, replicas_for_queue
from serve_app.config import ServiceConfig
from serve_app.reward_model import ModelSpec, UnsupportedDeviceError
from serve_app.web.proxy import PROXY_ENVIRONMENT


def parsed(**options: Any) -> ServiceConfig:
    return ServiceConfig.model_validate(options)


def test_one_model_needs_no_list() -> None:
    config = parsed(model="internlm/internlm2-1_8b-reward", num_replicas="2", allow_unauthenticated="true")
    assert (config.models[0].name, config.models[0].num_replicas) == ("internlm2-1_8b-reward", 2)
    assert config.allow_unauthenticated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name a model"),
        ({"models": []}, "models"),
        ({"model": "tiny", "replicas": 2}, "replicas"),
        ({"model": "tiny", "max_replicas": 2, "min_replicas": 3}, "less than min_replicas"),
        ({"models": [{"model": "a/tiny"}, {"model": "b/tiny"}]}, "different names"),
        ({"model": "tiny", "token_budget": 0}, "token_budget"),
        ({"model": "tiny", "prefix_cache_bytes": -1}, "prefix_cache_bytes"),
        ({"model": "tiny", "gpu_type": "L4", "num_gpus": 0}, "leave one of them out"),
        ({"model": "tiny", "quantization": "fp8", "num_gpus": 0}, "fp8 is for GPUs"),
        ({"model": "tiny", "num_gpus": 1.5}, "a part of a GPU, or a whole number of them"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        parsed(**options)


def test_prefixes_are_kept_unless_it_says_otherwise() -> None:
    assert parsed(model="tiny").models[0].spec().prefix_cache_bytes == "auto"
    assert parsed(model="tiny", prefix_cache_bytes="0").models[0].spec().prefix_cache_bytes == 0


def test_serve_knows_how_to_read_its_command_line() -> None:
    """It does so where the annotation of the builder is the class itself, not its name."""
    assert inspect.signature(build_app).parameters["config"].annotation is ServiceConfig


def test_a_type_of_gpu_is_asked_of_ray() -> None:
    """Also before the cluster has such a GPU: the autoscaler brings it."""
    deployment = _deployment(parsed(model="tiny", gpu_type="L4").models[0], 1, ModelSpec.load)._bound_deployment
    assert deployment.ray_actor_options == {"num_cpus": 1.0, "num_gpus": 1.0, "accelerator_type": "L4"}


@pytest.mark.parametrize(("num_gpus", "devices", "share"), [(2, 2, 1.0), (0.5, 1, 0.5), (0, 1, 1.0)])
def test_a_replica_spreads_the_layers_over_its_gpus(num_gpus: float, devices: int, share: float) -> None:
    """Ray gives the GPUs of one actor on one node."""
    deployment = _deployment(parsed(model="tiny", num_gpus=num_gpus).models[0], 1, ModelSpec.load)._bound_deployment
    assert deployment.ray_actor_options == {"num_cpus": 1.0, "num_gpus": num_gpus}
    arguments: Any = deployment.init_args
    spec = arguments[1]
    assert (spec.num_devices, spec.memory_share) == (devices, share)


def test_fp8_without_gpus_is_refused_before_anything_is_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.app._num_gpus", lambda model: 0.0)
    with pytest.raises(UnsupportedDeviceError, match="fp8 needs an NVIDIA GPU"):
        build_app(parsed(model="tiny", quantization="fp8"))


def test_a_chat_template_is_read_where_the_endpoint_is_started(tmp_path: Path) -> None:
    """Its text travels to the nodes that score, which need no such file."""
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[0]['content'] }}")
    config = parsed(model="tiny", chat_template=str(file))
    assert config.models[0].chat_template == "{{ messages[0]['content'] }}"
    assert ServiceConfig.model_validate(config.model_dump()) == config
    with pytest.raises(ValidationError, match="no chat template file .*nowhere.jinja"):
        parsed(model="tiny", chat_template=str(tmp_path / "nowhere.jinja"))


def test_the_shipped_configuration_is_valid() -> None:
    path = Path(__file__).parents[2] / "cluster" / "deploy" / "serve-config.yaml"
    application = yaml.safe_load(path.read_text(encoding="utf-8"))["applications"][0]
    config = parsed(**application["args"])
    assert application["import_path"] == "serve_app.app:build_app"
    assert [model.may_sleep for model in config.models] == [False, True]


@pytest.mark.parametrize(
    ("running", "requests", "queued_seconds", "replicas"),
    [
        (0, 0, [], 0),
        (0, 3, [], 1),
        (1, 1, [0.1], 1),
        (1, 9, [5.0], 2),
        (2, 9, [1.6, 1.2], 3),
        (4, 1, [0.0, 0.0, 0.1, 0.0], 1),
        (4, 0, [0.0] * 4, 0),
        (2, 5, [], 1),
    ],
)
def test_replicas_follow_the_seconds_of_work_that_wait(
    running: int, requests: float, queued_seconds: list[float], replicas: int
) -> None:
    context = SimpleNamespace(
        policy_state={"kept": 1},
        current_num_replicas=running,
        target_num_replicas=running,
        total_num_requests=requests,
        aggregated_metrics={QUEUED_SECONDS: dict(enumerate(queued_seconds))} if queued_seconds else None,
    )
    assert replicas_for_queue(context) == (replicas, {"kept": 1})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cpus_of_nodes", "given", "replicas"),
    [([], None, 1), ([4.0], None, 1), ([0.0, 4.0], None, 1), ([0.0, 4.0, 4.0, 4.0], None, 2), ([4.0, 4.0], 5, 5)],
)
def test_a_cluster_has_an_ingress_to_spare(
    monkeypatch: pytest.MonkeyPatch, cpus_of_nodes: list[float], given: int | None, replicas: int
) -> None:
    nodes: list[dict[str, Any]] = [{"Alive": True, "Resources": {"CPU": cpus}} for cpus in cpus_of_nodes]
    nodes.append({"Alive": False, "Resources": {"CPU": 4.0}})
    monkeypatch.setattr(ray, "is_initialized", lambda: bool(cpus_of_nodes))
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    ingress = application(parsed(model="tiny", num_gpus=0, num_ingress_replicas=given))._bound_deployment
    assert ingress.num_replicas == replicas


def test_a_ray_that_serve_run_starts_has_proxies_that_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve run` builds the application first; what somebody has set stays."""
    kept = next(iter(PROXY_ENVIRONMENT))
    monkeypatch.setattr(os, "environ", {kept: "own"})
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", dict)
    monkeypatch.setattr(ray, "nodes", list)
    build_app(parsed(model="tiny"))
    assert os.environ == {kept: "own"}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    build_app(parsed(model="tiny"))
    assert os.environ == PROXY_ENVIRONMENT | {kept: "own"}
