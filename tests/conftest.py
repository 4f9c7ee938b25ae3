"""Models, a local Ray and real data. Ray is imported only where a test asks for it: engine tests need none."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Threads that wait must sleep: two test processes and their Rays share the processors, and threads that spin for each
# other keep them from all else. Set before torch is loaded, which reads it then; processes that tests start inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Ray's workers give way to all else by default: beside a busy process they would hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")

import torch
from safetensors.torch import load_file, save_file

from serve_app.reward_model import RewardModel
from serve_app.reward_model.onednn import OneDnnLinear

SHARED = Path(os.environ.get("RAYWARD_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of the real tokenizer and real data; tests that need it skip where it is not there."""
    if not (SHARED / "goldens").is_dir():
        pytest.skip("no real tokenizer and data: lay the folder `shared` beside the clone, or set RAYWARD_SHARED to it")
    return SHARED


@pytest.fixture(scope="session")
def goldens(shared: Path) -> list[dict[str, Any]]:
    """218 real conversations with the original implementation's token ids and float32 scores."""
    lines = (shared / "goldens" / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def golden_folder(shared: Path) -> Path:
    """The checkpoint of the goldens: InternLM2-Reward's architecture and tokenizer, small random weights."""
    return shared / "models" / "tiny-internlm2-reward"


@pytest.fixture(scope="session")
def golden_fp32(golden_folder: Path) -> RewardModel:
    return RewardModel.from_pretrained(str(golden_folder), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def golden_bf16(golden_folder: Path) -> RewardModel:
    """Without the processor's own bfloat16 products the goldens would take minutes."""
    if not OneDnnLinear.supports(torch.empty(0, dtype=torch.bfloat16)):
        pytest.skip("oneDNN has no torch.bfloat16 products on this processor")
    return RewardModel.from_pretrained(str(golden_folder), device="cpu", dtype="bfloat16")


def pytest_configure() -> None:
    """Several test processes share the processors: more threads than these would wait for each other by spinning."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files: first those of a process that is connected to no Ray, since `local_ray` stays to the end; then those
    on Ray, and others with slow tests, which take the longest, so that two processes end at about the same time.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    fixtures: dict[Path, set[str]] = {}
    for item in items:
        fixtures.setdefault(item.path, set()).update(getattr(item, "fixturenames", ()))
    items.sort(
        key=lambda item: (
            "elsewhere" not in fixtures[item.path],
            "local_ray" not in fixtures[item.path],
            item.path not in slow,
        )
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say why tests were skipped: each reason once, with the number of tests."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    )
    if reasons:
        terminalreporter.section("skipped")
        for reason, number in reasons.most_common():
            terminalreporter.line(f"{number:4} {reason}")


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the tests' own, and nothing of what a user has set: no cluster, no endpoint, no key."""
    with pytest.MonkeyPatch.context() as environment:
        for name in ("RAY_ADDRESS", "RAYWARD_API_KEY", "RAYWARD_URL"):
            environment.delenv(name, raising=False)
        environment.setenv("RAYWARD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny() -> RewardModel:
    """The embedded model, made anew in the cache of the tests."""
    return RewardModel.from_pretrained("tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def tiny_bf16(tiny: RewardModel) -> RewardModel:
    return RewardModel.from_pretrained("tiny", device="cpu", dtype="bfloat16")


@pytest.fixture(scope="session")
def other_folder(tiny: RewardModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second model: the embedded one with its head turned round."""
    from serve_app.reward_model.tiny import cached_folder

    folder = Path(shutil.copytree(cached_folder(), tmp_path_factory.mktemp("models") / "other"))
    weights = load_file(folder / "model.safetensors")
    weights["v_head.weight"] = -weights["v_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def local_ray(tiny: RewardModel) -> Iterator[None]:
    """A local Ray of 4 logical CPUs, stopped at the end. Its workers find the embedded model where `tiny` was made."""
    from cluster.connect import connect

    with connect("local", num_cpus=4):
        import ray

        yield
    assert not ray.is_initialized()


@pytest.fixture
def threads() -> Iterator[None]:
    """Lets a test set the number of torch threads, and puts it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def chat(*contents: str) -> list[dict[str, str]]:
    """A conversation of `contents`, user and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[place % 2], "content": content} for place, content in enumerate(contents)]
