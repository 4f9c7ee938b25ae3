"""Who imports whom: dependencies point downwards, and the engine needs no Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGINE = "serve_app/reward_model"
OURS = ("serve_app", "jobs", "cluster", "tests")
ENGINE_ALLOWS = {"huggingface_hub", "numpy", "safetensors", "serve_app", "tokenizers", "torch", "transformers"}


def imports(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("file", modules(ENGINE), ids=lambda file: file.stem)
def test_the_engine_imports_only_what_a_bare_gpu_box_has(file: Path) -> None:
    for name in imports(file):
        top = name.partition(".")[0]
        assert top in ENGINE_ALLOWS or top in sys.stdlib_module_names, f"{file.name} imports {name}"
        assert top != "serve_app" or name.startswith("serve_app.reward_model"), f"{file.name} imports {name}"


def test_importing_the_engine_loads_no_ray_and_no_pydantic() -> None:
    code = "import sys, serve_app.reward_model; print(sorted({'ray', 'pydantic', 'fastapi'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == "[]"


def test_the_endpoint_knows_neither_jobs_nor_cluster() -> None:
    for file in modules("serve_app"):
        assert not [name for name in imports(file) if name.partition(".")[0] in ("jobs", "cluster")], file


def test_batching_knows_the_engine_alone() -> None:
    for file in modules("serve_app/batching"):
        for name in imports(file):
            assert not name.startswith("serve_app") or name.startswith(("serve_app.batching", ENGINE.replace("/", ".")))
            assert name.partition(".")[0] not in ("ray", "pydantic", "fastapi"), f"{file} imports {name}"


def test_the_jobs_know_of_the_endpoint_the_engine_and_what_crosses_processes() -> None:
    allowed = ("serve_app.reward_model", "serve_app.batching")
    for file in modules("jobs"):
        for name in imports(file):
            assert not name.startswith("serve_app") or name.startswith(allowed), f"{file} imports {name}"


def test_the_cluster_knows_no_jobs() -> None:
    for file in modules("cluster"):
        assert not [name for name in imports(file) if name.startswith("jobs")], file


def test_every_package_is_listed() -> None:
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {str(file.parent.relative_to(ROOT)).replace("/", ".") for top in OURS[:3] for file in modules(top)}
    assert set(listed) == found
