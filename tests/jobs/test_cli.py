"""The console command: every command by name, light help, completion."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]
# Importing torch alone takes more than this; `rayward --help` takes 0.1 s, a job's 0.5 s on a quiet machine.
MOST_CPU_S = 2.0
PROBED = """
import atexit, os, runpy, sys

def told():
    heavy = sorted({{"torch", "ray", "transformers"}} & set(sys.modules))
    print("\\n" + repr((heavy, sum(os.times()[:2]))), file=sys.stderr)

atexit.register(told)
{code}
"""


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """`main` answers signals by ending the process, which pytest's must survive."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def probed(code: str) -> tuple[list[str], float, str]:
    """The heavy libraries that a fresh interpreter has loaded after `code`, its processor seconds, and its output."""
    command = [sys.executable, "-c", PROBED.format(code=code)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    heavy, seconds = ast.literal_eval(ended.stderr.splitlines()[-1])
    return heavy, seconds, ended.stdout


def as_module(module: str, *words: str) -> str:
    return f"sys.argv[1:] = {list(words)!r}; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"


LIGHT = {
    "rayward --help": as_module("jobs.cli", "--help"),
    "rayward --version": as_module("jobs.cli", "--version"),
    **{f"rayward {name} --help": as_module("jobs.cli", name, "--help") for name in COMMANDS},
    "python -m jobs.score --help": as_module("jobs.score", "--help"),
    "python -m cluster.plan --help": as_module("cluster.plan", "--help"),
    "import serve_app.client": "import serve_app.client",
    "import cluster.connect": "import cluster.connect",
    "import cluster.plan": "import cluster.plan",
}


@pytest.mark.parametrize("code", LIGHT.values(), ids=LIGHT)
def test_it_loads_neither_torch_nor_ray(code: str) -> None:
    heavy, seconds, _ = probed(code)
    assert heavy == []
    assert seconds < MOST_CPU_S


def test_help_loads_no_command() -> None:
    shown = "atexit.register(lambda: print({'jobs.score', 'pydantic', 'tyro'} & set(sys.modules)))"
    _, _, printed = probed(f"{shown}; {LIGHT['rayward --help']}")
    assert printed.splitlines()[-1] == "set()"


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in printed
        assert command.summary in printed


def test_without_a_command_help_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: rayward COMMAND")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_options_of_its_module(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = COMMANDS[name]
    config = getattr(importlib.import_module(command.module), command.config)
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert f"usage: rayward {name} " in printed
    assert "python -m" not in printed
    for field in config.model_fields:
        assert f"--{field.replace('_', '-')}" in printed


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_guesses_what_option_was_meant(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = COMMANDS[name]
    field = next(iter(getattr(importlib.import_module(command.module), command.config).model_fields))
    flag = f"--{field.replace('_', '-')}"
    with pytest.raises(SystemExit, match="2"):
        main([name, f"{flag}x", "1"])
    assert f"rayward {name}: unknown option {flag}x; did you mean {flag}?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["scor"], "rayward: unknown command scor; did you mean score?"),
        (["best_of_n"], "rayward: unknown command best_of_n; did you mean best-of-n?"),
        (["qqq"], "rayward: unknown command qqq"),
        (["--versoin"], "rayward: unknown option --versoin; did you mean --version?"),
    ],
)
def test_an_unknown_command_is_told(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines() == [told, "rayward --help lists the commands"]


def test_words_before_the_options_of_serve_are_models(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def run(config: Any) -> int:
        asked.append(config)
        return 0

    monkeypatch.setattr("cluster.serve.run", run)
    assert main(["serve", "tiny", "other=a/b", "--model", "c/d", "--port", "9000"]) == 0
    assert (asked[0].model, asked[0].port) == (("tiny", "other=a/b", "c/d"), 9000)


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rayward {importlib.metadata.version('rayward')}\n"

    def unknown(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", unknown)
    assert main(["--version"]) == 0
    assert "not installed" in capsys.readouterr().out


def test_a_plan_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--rows", "1000", "--tokens-per-row", "100", "--replicas", "2"]) == 0
    assert "1,000 rows of 100 tokens" in capsys.readouterr().out


def test_bash_completes_commands_and_options(tmp_path: Path) -> None:
    script = tmp_path / "rayward.bash"
    script.write_text(probed(as_module("jobs.cli", "completion", "bash"))[2])
    assert completed(script, ["rayward", "sc"]) == ["score"]
    assert "--top-k" in completed(script, ["rayward", "rank", "--to"])


def completed(script: Path, words: list[str]) -> list[str]:
    """What bash offers for the last word."""
    code = f"""
source {script}
COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; COMP_LINE="{" ".join(words)}"; COMP_POINT=${{#COMP_LINE}}
$(complete -p rayward | sed 's/.*-F \\([^ ]*\\).*/\\1/') rayward "{words[-1]}" "{words[-2]}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    return [word.strip() for word in done.stdout.splitlines()]


def test_zsh_gets_a_script_and_another_shell_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--tyro-print-completion", "zsh"])
    assert not end.value.code
    assert "#compdef rayward" in capsys.readouterr().out
    assert main(["completion", "fish"]) == 2
    assert "usage: rayward completion {bash,zsh,tcsh}" in capsys.readouterr().err
