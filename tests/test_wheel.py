"""The wheel in a clean environment, called from a folder with packages of the same names: it is all there and its own.

The environment has the running one's dependencies, by path, and neither its rayward nor pip.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("serve_app", "jobs", "cluster")
DATA_SUFFIXES = {".css", ".html", ".jinja", ".js", ".json", ".parquet", ".safetensors"}
NO_PACKAGE = ROOT / "cluster" / "deploy"  # dashboards and manifests are used from a checkout
SHIPPED = """
import os, sys
from pathlib import Path

from cluster.node_code import code_here, code_on_nodes, runtime_env_with_code

os.chdir(sys.prefix)
import ray

ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, runtime_env=runtime_env_with_code())


def where():
    import jobs

    folder = Path(jobs.__file__).parent
    return str(folder), (folder / "sample.parquet").is_file(), (folder / "reporting" / "page.css").is_file()


folder, *complete = ray.get(ray.remote(where).remote())
assert "_ray_pkg_" in folder, folder
assert all(complete), complete
assert [node.fingerprint for node in code_on_nodes()] == [code_here().fingerprint]
print("shipped")
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built from a copy, since a build leaves files behind."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel"]
    checked([*pip, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(built), str(source)], ROOT)
    (made,) = built.glob("rayward-*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a clean environment that has the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    checked([sys.executable, "-m", "venv", "--without-pip", str(folder)], ROOT)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), "install"]
    checked([*pip, "--no-deps", "--no-index", str(wheel)], ROOT)
    (site,) = (folder / "lib").glob("python*/site-packages")
    # Only now: pip must not see the rayward of the running environment. A path, whose own .pth files are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of somebody's own, with packages that are named like ours and cannot be imported."""
    folder = tmp_path_factory.mktemp("project")
    for name in PACKAGES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise ImportError('{name} of the current folder was imported')\n")
    shutil.copy(ROOT / "jobs" / "sample.parquet", folder)
    return folder


def checked(command: list[str], folder: Path) -> str:
    """The standard output of a command that must succeed."""
    ended = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert ended.returncode == 0, f"{command}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def test_the_wheel_has_every_module_and_all_data(wheel: Path) -> None:
    files = [file for name in PACKAGES for file in (ROOT / name).rglob("*") if not file.is_relative_to(NO_PACKAGE)]
    wanted = {str(file.relative_to(ROOT)) for file in files if file.suffix in DATA_SUFFIXES | {".py"}}
    assert {name for name in wanted if name.endswith((".jinja", ".parquet", ".js", ".safetensors"))}
    assert not wanted - set(zipfile.ZipFile(wheel).namelist())


def test_the_commands_run_on_workers_and_take_nothing_from_the_current_folder(installed: Path, project: Path) -> None:
    rayward = str(installed / "rayward")
    assert checked([rayward, "--version"], project).startswith("rayward ")
    assert "rank" in checked([rayward, "demo"], project)
    num_rows = pq.read_metadata(project / "sample.parquet").num_rows
    scored = checked([rayward, "score", "--input", "sample.parquet", "--output", "scored", "--model", "tiny"], project)
    assert f"{num_rows:,} scored" in scored
    ranked = checked([rayward, "rank", "--input", "scored", "--output", "ranked"], project)
    assert f"{num_rows:,} rows in ranked" in ranked
    checked([rayward, "report", "--input", "ranked", "--output", "report.html"], project)
    assert "<svg" in (project / "report.html").read_text(encoding="utf-8")


def test_a_cluster_is_sent_the_installed_code(installed: Path, project: Path, tmp_path: Path) -> None:
    script = tmp_path / "shipped.py"
    script.write_text(SHIPPED)
    assert checked([str(installed / "python"), str(script)], project).strip().endswith("shipped")
