"""Rules of the house: who imports whom, what faces load, and one name for one thing.

Imports inside functions count like those at the top of a file.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import serve_app

ROOT = Path(__file__).parents[1]
PRODUCT = ("serve_app", "jobs", "cluster")
ENGINE = "serve_app.reward_model"
ENGINE_ALLOWS = {"huggingface_hub", "numpy", "safetensors", "tokenizers", "torch", "transformers", "triton"}
COMMANDS = {
    f"jobs.{name}" for name in ("score", "rank", "pairs", "best_of_n", "rewardbench", "report", "verify", "demo")
}
# Each floor of jobs imports from those before it, and from itself where it is a package.
FLOORS = (
    {"jobs.errors", "jobs.command", "jobs.intervals"},
    {"jobs.corpus"},
    {"jobs.options"},
    {"jobs.runs"},
    {"jobs.scoring", "jobs.grouping"},
    {"jobs.generation", "jobs.benchmarks", "jobs.reporting"},
    COMMANDS,
    {"jobs.api"},
    {"jobs.cli"},
)
# Public names of before that stay: the engine's score and the client's, and each trainer's reward function.
SHARED_NAMES = {"Score", "RewardFunction"}
LIGHT_FACES = ("serve_app.client", "serve_app.client.errors", "cluster.connect", "cluster.plan", "jobs.cli")


def product_files() -> dict[str, Path]:
    """The files of the product by module name."""
    files = [file for folder in PRODUCT for file in (ROOT / folder).rglob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


FILES = product_files()


def imported(module: str) -> Iterator[str]:
    """The modules that a module imports anywhere; those of the product by their full names."""
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in FILES else node.module


ARROWS = {module: set(imported(module)) for module in FILES}


def below(name: str, packages: tuple[str, ...]) -> bool:
    """Whether a module is one of the packages, or in one."""
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def ours(modules: set[str]) -> set[str]:
    return {name for name in modules if below(name, PRODUCT)}


def test_the_engine_imports_only_what_a_bare_gpu_box_has() -> None:
    for module in FILES:
        if below(module, (ENGINE,)):
            for name in ARROWS[module]:
                top = name.partition(".")[0]
                known = top in ENGINE_ALLOWS or top in sys.stdlib_module_names or below(name, (ENGINE,))
                assert known, f"{module} imports {name}"


@pytest.mark.parametrize(
    ("package", "allowed", "forbidden"),
    [
        ("serve_app", ("serve_app",), ()),
        ("serve_app.batching", ("serve_app.batching", ENGINE), ("ray", "pydantic", "fastapi")),
        ("serve_app.web", ("serve_app.web", "serve_app.config", ENGINE), ("ray",)),
        ("serve_app.client", ("serve_app.client",), ("ray", "torch", "pydantic", "fastapi")),
        ("cluster", ("cluster", "serve_app"), ()),
        ("jobs", ("jobs", "cluster.connect", ENGINE, "serve_app.batching"), ()),
    ],
)
def test_a_package_imports_from_those_below_it(
    package: str, allowed: tuple[str, ...], forbidden: tuple[str, ...]
) -> None:
    for module in FILES:
        if below(module, (package,)):
            strangers = {name for name in ours(ARROWS[module]) if not below(name, allowed)}
            assert not strangers, f"{module} imports {strangers}"
            assert not {name for name in ARROWS[module] if below(name, forbidden)}, module


def test_the_client_needs_httpx_and_the_standard_library() -> None:
    for module in FILES:
        if below(module, ("serve_app.client",)):
            tops = {name.partition(".")[0] for name in ARROWS[module]} - {"httpx", "serve_app"}
            assert tops <= set(sys.stdlib_module_names), module


def floor(module: str) -> int:
    found = [number for number, names in enumerate(FLOORS) if below(module, tuple(names))]
    assert len(found) == 1, f"{module} stands on no floor of jobs: give it one in FLOORS"
    return found[0]


def test_jobs_import_from_lower_floors_alone() -> None:
    for module in FILES:
        if module == "jobs" or not module.startswith("jobs."):
            continue
        package = ".".join(module.split(".")[:2])
        for name in ours(ARROWS[module]):
            if name.startswith("jobs.") and not below(name, (package,)):
                assert floor(name) < floor(module), f"{module} imports {name}"


def test_no_module_imports_itself_in_a_circle() -> None:
    try:
        TopologicalSorter({module: ours(names) - {module} for module, names in ARROWS.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_two_public_classes_have_one_name() -> None:
    homes = defaultdict(list)
    for module, file in FILES.items():
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(module)
    assert {name for name, modules in homes.items() if len(modules) > 1} == SHARED_NAMES, homes


def test_no_product_code_reads_the_tests() -> None:
    for module, file in FILES.items():
        assert not {name for name in ARROWS[module] if below(name, ("tests",))}, module
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert node.value != "tests", module
                assert not node.value.startswith("tests/"), module


def loaded_by(code: str) -> set[str]:
    """What of the heavy libraries a fresh interpreter has loaded after running `code`."""
    heavy = "{'torch', 'ray', 'transformers', 'pydantic', 'fastapi'}"
    script = f"import sys\n{code}\nprint(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(ast.literal_eval(found.stdout.splitlines()[-1]))


def test_importing_the_engine_loads_no_ray_and_no_pydantic() -> None:
    assert not loaded_by(f"import {ENGINE}") & {"ray", "pydantic", "fastapi"}


@pytest.mark.parametrize("face", LIGHT_FACES)
def test_a_light_face_loads_no_torch(face: str) -> None:
    assert not loaded_by(f"import {face}") & {"torch", "transformers"}


@pytest.mark.parametrize("package", sorted(name for name, file in FILES.items() if file.name == "__init__.py"))
def test_a_package_names_its_modules(package: str) -> None:
    """The docstring of a package is its plan: every module in it is named there."""
    tree = ast.parse(FILES[package].read_text(encoding="utf-8"))
    doc = ast.get_docstring(tree) or ""
    children = {
        name.removeprefix(f"{package}.")
        for name in FILES
        if name.startswith(f"{package}.") and "." not in name.removeprefix(f"{package}.")
    }
    assert not {child for child in children if child not in doc}, f"{package}/__init__.py does not name them"


def test_all_stands_in_faces_alone_and_is_true() -> None:
    """`__all__` is for packages and modules that hand on what others define."""
    for module, file in FILES.items():
        body = ast.parse(file.read_text(encoding="utf-8")).body
        exported = [node for node in body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"]
        functions = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        if not exported or "__getattr__" in functions:  # a face that imports what it exports when it is asked for
            continue
        assert not functions, f"{module} is no face: it defines what it exports"
        handed = {
            alias.asname or alias.name for node in body if isinstance(node, ast.ImportFrom) for alias in node.names
        }
        assert set(ast.literal_eval(exported[0].value)) <= handed, module


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == {name for name, file in FILES.items() if file.name == "__init__.py"}


@pytest.mark.parametrize("module", ["cluster.reward_pool.actor", "serve_app.replica", "serve_app.reward_model.model"])
def test_what_pytorch_reads_at_its_start_is_set_before(module: str) -> None:
    """As processes of Ray import the code that they run."""
    told = "import os, sys, importlib; sys.modules['torch'] = None\n"
    told += f"try: importlib.import_module({module!r})\nexcept ImportError: pass\n"
    told += "print(os.environ.get('GOMP_SPINCOUNT'), 'serve_app' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run([sys.executable, "-c", told], env=environment, cwd=ROOT, capture_output=True, text=True)
    spins = "1000" if serve_app._has_amx() else "None"
    assert done.stdout.split() == [spins, "True"], done.stderr
