"""Every example of every README page runs, and prints what the page shows."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.readme_blocks import LANGUAGES, Example, difference, examples, fences

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "serve_app/README.md", "jobs/README.md", "cluster/README.md", "tests/benchmarks/README.md")
OTHER_PAGES = (".github/CONTRIBUTING.md",)
MINUTES = ("serve_app/README.md", "jobs/README.md", "cluster/README.md")
ADDRESS = "127.0.0.1:8000"
TIMEOUT_S = 600
LOG_LINE = re.compile(r"\d\d:\d\d:\d\d ")


def test_a_page_that_shows_something_else_is_found_out() -> None:
    assert difference("a 1.25 b\n", "a 1.2600 b") is None
    assert difference("a 1.25 b\n", "a 1.27 b") is not None
    assert difference("score \u22120.31\u2026 in 0:\u2026", "score \u22120.3087 in 0:06") is None
    assert difference("first\n\u2026\nlast", "first\nlast") is None
    assert difference("first\n\u2026\nlast", "first\none\n\ntwo\nlast\n") is None
    assert difference("first\nlast", "first\none\nlast") is not None
    assert difference("24 rows", "25 rows") is not None
    assert difference("", "something") is not None


def test_commands_end_where_their_output_begins(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(
        "```console\n$ one \\\n    --two\nout\n\nput\n$ three\n```\n```python\nx\n```\nprints\n```text\ny\n```\n"
    )
    assert list(examples(page)) == [
        Example("console", "one \\\n    --two", "out\n\nput", 2),
        Example("console", "three", "", 7),
        Example("python", "x\n", "y\n", 9),
    ]


@pytest.mark.parametrize("name", [*PAGES, *OTHER_PAGES])
def test_blocks_say_what_they_are(name: str) -> None:
    """Output stands in `console` blocks and behind `python` ones alone, where it is compared."""
    for block in fences(ROOT / name):
        assert block.language in LANGUAGES, f"{name}:{block.line}"
        if block.language == "sh":
            assert not any(line.startswith("$ ") for line in block.text.splitlines()), f"{name}:{block.line}"
        if block.language == "text":
            assert block.follows, f"{name}:{block.line}"


def test_all_pages_are_tested() -> None:
    folders = (ROOT / name for name in ("serve_app", "jobs", "cluster", "tests", ".github"))
    found = [*ROOT.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))]
    names = {str(page.relative_to(ROOT)) for page in found if page.parent.name != "results"}
    assert names - {"CHANGELOG.md"} == {*PAGES, *OTHER_PAGES}


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.fixture
def endpoint(local_ray: None) -> Iterator[str]:
    """Host and port of an endpoint with the embedded model, as serve_app/README.md starts it.

    It ends with its page: the jobs of the next one want all CPUs of the tests' Ray.
    """
    from ray import serve

    from serve_app.app import build_app
    from serve_app.config import ServiceConfig

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    model = {"model": "tiny", "dtype": "float32", "num_cpus": 0.5, "threads": 1}
    serve.run(build_app(ServiceConfig.model_validate({"models": [model]})), name="readme", route_prefix="/")
    yield f"127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture
def environment(local_ray: None, tmp_path: Path) -> dict[str, str]:
    """What examples find: the commands of this Python, this tree's packages, and the tests' Ray."""
    import ray

    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "python").symlink_to(sys.executable)
    return os.environ | {
        "PATH": os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "COLUMNS": "100",
        "NO_COLOR": "1",
    }


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in MINUTES)) for name in PAGES])
def test_examples_print_what_the_page_shows(
    name: str, environment: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    page = ROOT / name
    work = tmp_path / "work"
    (work / "jobs").mkdir(parents=True)
    shutil.copy(ROOT / "jobs" / "sample.parquet", work / "jobs")
    address = request.getfixturevalue("endpoint") if ADDRESS in page.read_text(encoding="utf-8") else ADDRESS
    wrong = []
    for example in examples(page):
        told = _run(example, example.program.replace(ADDRESS, address), work, environment)
        if told is not None:
            wrong.append(f"{name}:{example.line}: {told}")
    assert not wrong, "\n\n".join(wrong)


def _run(example: Example, program: str, folder: Path, environment: dict[str, str]) -> str | None:
    """Run an example; what is wrong with it, or None."""
    command = [sys.executable, "-c", program]
    if example.language == "console":
        command = ["bash", "-euo", "pipefail", "-c", program]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        # A reader of a console sees both; what a program prints is its standard output.
        stderr=subprocess.STDOUT if example.language == "console" else subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode != 0:
        return f"exit status {done.returncode}\n{done.stdout}\n{done.stderr or ''}"
    # Pages leave log lines out, which begin with the time.
    printed = "".join(line for line in done.stdout.splitlines(keepends=True) if not LOG_LINE.match(line))
    return None if example.shown is None else difference(example.shown, printed)
