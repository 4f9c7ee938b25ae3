"""The deployment files: valid for KubeRay and Ray, of one mind with each other, and sized by cluster/sizing.py."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.sizing import GB, GPUS, INTERNLM2_MODELS, ReplicaSize, model_volume_gib, pod_memory_gib, replica_size
from serve_app.config import ModelConfig, ServiceConfig
from serve_app.web.proxy import PROXY_ENVIRONMENT
from tests.cluster.crd_schema import strict_validator

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster" / "deploy"
FILES = {"RayService": "rayservice.yaml", "RayCluster": "raycluster.yaml", "RayJob": "rayjob.yaml"}
SPEC = {"RayService": "rayClusterConfig", "RayJob": "rayClusterSpec"}
GPU_BY_TYPE = {"L4": "L4", "L40S": "L40S", "H100": "H100"}


def document(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))
    return loaded


def ray_cluster(kind: str) -> dict[str, Any]:
    """The cluster inside a KubeRay document."""
    spec = document(FILES[kind])["spec"]
    inner: dict[str, Any] = spec[SPEC[kind]] if kind in SPEC else spec
    return inner


def served_models() -> list[ModelConfig]:
    config = yaml.safe_load(document("rayservice.yaml")["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    return ServiceConfig.model_validate(application["args"]).models


def pinned(package: str) -> str:
    found = re.search(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("kind", FILES)
def test_kuberay_knows_every_key(kind: str, shared: Path) -> None:
    errors = strict_validator(shared / "crds", kind).iter_errors(document(FILES[kind]))
    assert [f"{error.json_path}: {error.message}" for error in errors] == []


def misspelt(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    changed = copy.deepcopy(document("rayservice.yaml"))
    change(changed["spec"])
    return changed


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec.update(upgradeStrategie={"type": "NewCluster"}),
        lambda spec: spec["upgradeStrategy"]["clusterUpgradeOptions"].update(stepSize=5),
        lambda spec: spec["upgradeStrategy"]["clusterUpgradeOptions"].pop("gatewayClassName"),
        lambda spec: spec["rayClusterConfig"]["gcsFaultToleranceOptions"].update(redisAdress="x"),
        lambda spec: spec["rayClusterConfig"]["workerGroupSpecs"][0].update(maxReplica=4),
        lambda spec: spec["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0].update(imagee="x"),
        lambda spec: spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda spec: spec["rayClusterConfig"]["authOptions"].update(mode="tokens"),
    ],
)
def test_the_check_finds_what_kubernetes_would_drop(change: Callable[[dict[str, Any]], object], shared: Path) -> None:
    assert not strict_validator(shared / "crds", "RayService").is_valid(misspelt(change))


def test_the_service_runs_what_serve_and_the_endpoint_accept() -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load(document("rayservice.yaml")["spec"]["serveConfigV2"]))
    assert schema.applications[0].import_path == "serve_app.app:build_app"
    assert {model.model for model in served_models()} == set(INTERNLM2_MODELS)
    assert all(model.max_replicas_per_node == 1 for model in served_models())
    ServiceConfig.model_validate(
        ServeDeploySchema.model_validate(document("serve-config.yaml")).applications[0].args  # the two-model example
    )


def test_proxies_ask_again_for_a_lost_ingress() -> None:
    from ray.serve.schema import ServeDeploySchema

    for config in (document("serve-config.yaml"), yaml.safe_load(document("rayservice.yaml")["spec"]["serveConfigV2"])):
        options = ServeDeploySchema.model_validate(config).controller_options
        assert options is not None
        assert options.runtime_env == {"env_vars": PROXY_ENVIRONMENT}


@pytest.mark.parametrize("kind", FILES)
def test_the_head_does_no_work_and_asks_for_a_token(kind: str) -> None:
    cluster = ray_cluster(kind)
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["rayVersion"] == pinned("ray")


def test_a_lost_head_is_remembered_where_clusters_stay() -> None:
    for kind in ("RayService", "RayCluster"):
        options = ray_cluster(kind)["gcsFaultToleranceOptions"]
        name, _, port = options["redisAddress"].partition(":")
        secret = options["redisPassword"]["valueFrom"]["secretKeyRef"]
        service, redis = yaml.safe_load_all((CLUSTER / "redis.yaml").read_text())
        assert (service["metadata"]["name"], service["spec"]["ports"][0]["port"]) == (name, int(port))
        (container,) = redis["spec"]["template"]["spec"]["containers"]
        assert container["env"][0]["valueFrom"]["secretKeyRef"] == secret


def gpu_groups() -> list[tuple[str, dict[str, Any]]]:
    return [
        (kind, group)
        for kind in FILES
        for group in ray_cluster(kind)["workerGroupSpecs"]
        if group["groupName"] != "cpu"
    ]


def size_of(group: dict[str, Any]) -> tuple[dict[str, str], ReplicaSize]:
    notes = group["template"]["metadata"]["annotations"]
    size = replica_size(INTERNLM2_MODELS[notes["rayward/model"]], GPUS[GPU_BY_TYPE[notes["rayward/gpu"]]])
    assert size is not None
    return notes, size


@pytest.mark.parametrize(("kind", "group"), gpu_groups(), ids=lambda part: part if isinstance(part, str) else "")
def test_a_worker_has_the_memory_that_sizing_says(kind: str, group: dict[str, Any]) -> None:
    notes, size = size_of(group)
    gpu = GPUS[GPU_BY_TYPE[notes["rayward/gpu"]]]
    assert notes["rayward/gpu-memory"] == (
        f"{size.gpu_bytes / GB:.1f} of {gpu.memory_bytes / GB:.0f} GB, {size.weight_bytes / GB:.1f} weights, "
        f"{size.token_budget} tokens a pass"
    )
    spec = group["template"]["spec"]
    (container,) = spec["containers"]
    limits = container["resources"]["limits"]
    assert limits["memory"] == f"{pod_memory_gib(size)}Gi"
    assert limits["nvidia.com/gpu"] == "1"
    assert spec["volumes"][0]["emptyDir"]["sizeLimit"] == f"{model_volume_gib(size)}Gi"


def test_ray_scales_up_the_group_whose_gpu_a_model_asks_for() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = {"metadata": {"name": "rayward", "namespace": "default"}, "spec": ray_cluster("RayService")}
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    groups = {group["groupName"]: group for group in ray_cluster("RayService")["workerGroupSpecs"]}
    for model in served_models():
        assert model.max_replicas is not None
        (name,) = [name for name, kind in types.items() if f"accelerator_type:{model.gpu_type}" in kind["resources"]]
        assert types[name]["resources"]["GPU"] == 1
        assert types[name]["resources"]["CPU"] >= model.num_cpus
        assert types[name]["max_workers"] >= model.max_replicas
        assert groups[name]["template"]["metadata"]["annotations"]["rayward/model"] == model.model


def test_the_clusters_differ_in_their_numbers_of_workers_alone() -> None:
    def bare(group: dict[str, Any]) -> dict[str, Any]:
        containers = copy.deepcopy(group["template"]["spec"]["containers"])
        for container in containers:
            container.pop("env")
        kept = {key: value for key, value in group.items() if not key.lower().endswith("replicas")}
        return kept | {"containers": containers, "template": group["template"].get("metadata")}

    service = {group["groupName"]: bare(group) for group in ray_cluster("RayService")["workerGroupSpecs"]}
    for kind in ("RayCluster", "RayJob"):
        for group in ray_cluster(kind)["workerGroupSpecs"]:
            assert bare(group) == service[group["groupName"]]


def test_a_job_with_rows_in_error_is_not_tried_again() -> None:
    import subprocess

    entrypoint = document("rayjob.yaml")["spec"]["entrypoint"]
    command, _, rest = entrypoint.partition(" || ")
    assert command.startswith("python -m jobs.score ")
    for status, ends in ((0, 0), (3, 0), (1, 1), (137, 1)):
        shell = subprocess.run(["sh", "-c", f"(exit {status}) || {rest}"], check=False)
        assert shell.returncode == ends


def test_the_job_is_one_that_can_be_run() -> None:
    import shlex

    import tyro

    from jobs.score import ScoreConfig

    words = shlex.split(document("rayjob.yaml")["spec"]["entrypoint"].partition(" || ")[0])
    config = tyro.cli(ScoreConfig, args=words[3:])
    (group,) = [group for group in ray_cluster("RayJob")["workerGroupSpecs"] if group["groupName"] != "cpu"]
    assert group["template"]["metadata"]["annotations"]["rayward/model"] == config.model
    assert group["minReplicas"] == config.num_actors


def test_ray_up_accepts_its_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = document("ray-cluster.yaml")
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(config | {"max_worker": 1}))
    assert config["available_node_types"][config["head_node_type"]]["resources"] == {"CPU": 0}
    text = (CLUSTER / "ray-cluster.yaml").read_text()
    for model, gpu in zip(INTERNLM2_MODELS, GPU_BY_TYPE, strict=True):
        size = replica_size(INTERNLM2_MODELS[model], GPUS[gpu])
        assert size is not None
        name = model.rpartition("/")[2]
        assert f"# {name}: {size.gpu_bytes / GB:.1f} of {GPUS[gpu].memory_bytes / GB:.0f} GB" in text


def test_the_image_installs_what_the_constraints_pin() -> None:
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    assert any("--constraint constraints.txt ." in line for line in lines)
    copied = {word.rstrip("/") for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.partition(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    assert packages | {"pyproject.toml", "constraints.txt", project["project"]["readme"]} <= copied
    assert set(project["project"]["license-files"]) <= copied
    assert all((ROOT / name).exists() for name in copied)
