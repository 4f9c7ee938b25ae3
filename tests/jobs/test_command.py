"""Signals at any moment, errors, and options that were mistyped: what every command line answers alike."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs import pairs, rank, score
from jobs.cli import COMMANDS
from jobs.command import EXIT_STOPPED, STARTED_AT, command_began, run_command
from jobs.errors import CorpusError
from jobs.rank import RankConfig

ROOT = Path(__file__).parents[2]
JOBS = [command.module for command in COMMANDS.values() if command.module.startswith("jobs.")]
ENDS_ITSELF = """
import os, signal, time
os.kill(os.getpid(), signal.{name})
time.sleep(60)
"""


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
@pytest.mark.parametrize("module", ["jobs.score", "jobs.report", "jobs.cli"])
def test_a_signal_while_modules_are_imported_is_one_line(tmp_path: Path, module: str, name: str, status: int) -> None:
    (tmp_path / "pydantic.py").write_text(ENDS_ITSELF.format(name=name))
    command = [sys.executable, "-m", module, *(["score"] if module == "jobs.cli" else [])]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert ended.returncode == status
    spoken = "rayward score" if module == "jobs.cli" else module
    assert ended.stderr == f"{spoken} interrupted before it began\n"


@pytest.mark.parametrize("module", JOBS)
def test_every_job_answers_signals_before_it_imports(module: str) -> None:
    body = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")).body
    _docstring, _future, guard = body[:3]
    assert isinstance(guard, ast.If)
    assert ast.unparse(guard.test) == "__name__ == '__main__'"
    assert ast.unparse(guard.body[-1]) == f"launch('{module}')"


def test_a_command_ends_at_once_with_all_that_it_printed(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        "import atexit\n"
        "class Slow:\n"
        "    def __del__(self): print('taken apart')\n"
        "kept = Slow()\n"
        "def main():\n"
        "    atexit.register(lambda: print('at the end'))\n"
        "    print('working')\n"
        "    return 3\n"
    )
    code = "from jobs.command import launch; launch('job')"
    path = os.pathsep.join([str(ROOT), str(tmp_path)])
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "working\nat the end\n", "")


def test_the_clock_of_a_command_runs_from_the_start_of_its_process() -> None:
    code = "import time; time.sleep(0.3); from jobs import command; print(command.STARTED_AT, command.command_began())"
    before = time.time()
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    began, none = told.split()
    assert before - 0.05 <= float(began) <= time.time() - 0.3  # the kernel counts in hundredths
    assert none == "None"
    assert run_command("rayward score", lambda: int(command_began() != STARTED_AT)) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_work(number: int, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)

    def work() -> int:
        os.kill(os.getpid(), number)
        time.sleep(60)
        return 0

    assert run_command("python -m jobs.score", work) == status
    assert capsys.readouterr().err == "jobs.score interrupted; what is committed stays\n"
    assert signal.getsignal(number) is before


def test_a_signal_that_a_library_turns_into_an_error_is_told_as_a_signal(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
        except KeyboardInterrupt:
            raise ImportError("the library could not be loaded") from None
        return 0

    assert run_command("rayward score", work) == 130
    assert capsys.readouterr().err == "rayward score interrupted; what is committed stays\n"


def test_a_signal_whose_exception_python_drops_comes_again(capsys: pytest.CaptureFixture[str]) -> None:
    class Thing:
        pass

    def interrupt(reference: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the handler runs in here
            pass

    def work() -> int:
        thing = Thing()
        reference = weakref.ref(thing, interrupt)
        del thing
        time.sleep(60)
        return 0 if reference else 1

    assert run_command("jobs.score", work) == 130
    assert capsys.readouterr().err == "jobs.score interrupted; what is committed stays\n"


def test_an_error_of_ours_is_one_sentence_and_another_is_raised(capsys: pytest.CaptureFixture[str]) -> None:
    def stop() -> int:
        raise CorpusError("no such file")

    assert run_command("python -m jobs.score", stop) == EXIT_STOPPED
    assert capsys.readouterr().err == "jobs.score stopped: no such file\n"
    with pytest.raises(ZeroDivisionError):
        run_command("jobs.score", lambda: 1 // 0)


def test_an_unknown_option_is_told_with_the_one_that_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        score.main(["--inptu", "x", "--output=y", "--max_tokns=3"])
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "python -m jobs.score: unknown option --inptu; did you mean --input?",
        "python -m jobs.score: unknown option --max-tokns; did you mean --max-tokens?",
        "python -m jobs.score --help shows all options",
    ]


def test_an_option_like_no_other_is_told_without_a_guess(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        score.main(["--input", "x", "--output", "y", "--zzz"])
    assert capsys.readouterr().err.splitlines()[0] == "python -m jobs.score: unknown option --zzz"


def test_a_missing_option_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        score.main(["--output", "y"])
    assert "--input" in capsys.readouterr().err


def test_options_in_groups_make_the_same_config(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[RankConfig] = []

    def run(config: RankConfig) -> rank.RankTotals:
        made.append(config)
        return rank.RankTotals(rows=0, written=0, unscored=0, ungrouped=0)

    monkeypatch.setattr(rank, "run", run)
    words = ["--input", "a", "--output", "b", "--model", "tiny", "--max_errors", "3", "--replace-system-prompt"]
    assert rank.main([*words, "--top-k=2", "--rows-per-unit", "5"]) == 0
    assert made == [
        RankConfig(
            input="a", output="b", model="tiny", max_errors=3, replace_system_prompt=True, top_k=2, rows_per_unit=5
        )
    ]


def test_a_config_in_groups_is_checked_as_a_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        rank.main(["--input", "a", "--output", "b", "--via-serve", "app", "--token-budget", "9"])
    printed = " ".join(capsys.readouterr().err.replace("\u2502", " ").split())
    assert "--token-budget cannot be set with --via-serve" in printed


@pytest.mark.parametrize("main", [rank.main, pairs.main], ids=["rank", "pairs"])
def test_options_of_scoring_first_stand_in_a_group_of_their_own(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    always, _, first = capsys.readouterr().out.partition("scoring-first options")
    assert all(f" {flag} " in first for flag in ("--model", "--via-serve", "--device", "--num-actors", "--max-errors"))
    assert all(f" {flag} " not in first for flag in ("--input", "--score-column", "--rows-per-unit", "--address"))
    assert all(f" {flag} " in always for flag in ("--input", "--score-column", "--rows-per-unit", "--address"))


def test_signals_are_answered_before_anything_slow_is_loaded() -> None:
    """What `jobs.command` loads is what a Ctrl-C can meet without an answer."""
    code = (
        "import sys; before = set(sys.modules); import jobs.command; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['jobs']"
