"""The console command `rayward`: every job, and the plan, by name.

    rayward score --input data/ --output scored/

`rayward score` is `python -m jobs.score`, with the same options and exit statuses. Commands are imported by name, each
when it is called, so that `rayward --help` loads none.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any, NoReturn

from jobs.command import EXIT_USAGE, answer_signals, leave, parse, run_command, suggestion

PROG = "rayward"
SHELLS = ("bash", "zsh", "tcsh")
COMPLETION_FLAG = "--tyro-print-completion"


@dataclass(frozen=True, slots=True)
class Command:
    """A command: its module, the class of its options, and the line that `rayward --help` has of it."""

    module: str
    config: str
    summary: str


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "score": Command("jobs.score", "ScoreConfig", "score every conversation of a corpus"),
        "rank": Command("jobs.rank", "RankConfig", "rank the rows of a scored corpus within their groups"),
        "pairs": Command("jobs.pairs", "PairsConfig", "make preference pairs of a scored corpus"),
        "best-of-n": Command("jobs.best_of_n", "BestOfNConfig", "generate several responses and keep the best"),
        "rewardbench": Command("jobs.rewardbench", "RewardBenchConfig", "evaluate a reward model on RewardBench"),
        "report": Command("jobs.report", "ReportConfig", "make an HTML report of a scored corpus"),
        "verify": Command(
            "jobs.verify", "VerifyConfig", "check a downloaded model against published figures or Transformers"
        ),
        "serve": Command("cluster.serve", "ServeConfig", "serve reward models over HTTP until Ctrl-C"),
        "plan": Command("cluster.plan", "PlanConfig", "estimate GPUs, hours and bytes for a corpus"),
        "demo": Command("jobs.demo", "DemoConfig", "score and rank a small sample with the embedded model"),
    }
)
# Answered here.
COMPLETION = "completion"


def main(args: Sequence[str] | None = None) -> int:
    """Run the command that the first word names with the words after it; its exit status, 2 where there is none."""
    words = list(sys.argv[1:] if args is None else args)
    answer_signals(" ".join([PROG, *words[:1]]))
    name, rest = (words[0], words[1:]) if words else ("", [])
    if name == "plan":
        return _plan(rest)
    if name == "serve":
        return _serve(rest)
    if name in COMMANDS:
        return int(importlib.import_module(COMMANDS[name].module).main(rest, prog=f"{PROG} {name}"))
    if name in ("-h", "--help", ""):
        print(_help(), file=sys.stdout if name else sys.stderr)
        return 0 if name else EXIT_USAGE
    if name == "--version":
        print(f"{PROG} {_version()}")
        return 0
    if name in (COMPLETION, COMPLETION_FLAG):
        return _complete(rest)
    print(_unknown(name), file=sys.stderr)
    return EXIT_USAGE


def _help() -> str:
    lines = [f"  {name:<14}{command.summary}" for name, command in COMMANDS.items()]
    lines.append(f"  {COMPLETION:<14}print a completion script for {', '.join(SHELLS[:-1])} or {SHELLS[-1]}")
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [OPTIONS]",
            "",
            "One conversation, one score: reward models on Ray.",
            "",
            "commands:",
            *lines,
            "",
            f"{PROG} COMMAND --help shows a command's options; {PROG} --version the version.",
        ]
    )


def _plan(words: Sequence[str]) -> int:
    """Run `cluster.plan`, which is no job and knows none: its options are read here."""
    plan = importlib.import_module(COMMANDS["plan"].module)
    return int(plan.run(parse(plan.PlanConfig, words, prog=f"{PROG} plan", description=str(plan.__doc__))))


def _serve(words: Sequence[str]) -> int:
    """Run `cluster.serve`, which is no job either. Words before the first option are models."""
    serve = importlib.import_module(COMMANDS["serve"].module)
    first = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    options = [*chain.from_iterable(("--model", word) for word in words[:first]), *words[first:]]
    prog = f"{PROG} serve"
    config = parse(serve.ServeConfig, options, prog=prog, description=str(serve.__doc__))
    return run_command(prog, lambda: int(serve.run(config)), log_level=logging.WARNING, farewell="stopped")


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(PROG)
    except PackageNotFoundError:
        return "(no version: it runs from its sources and is not installed)"


def _unknown(name: str) -> str:
    known = [*COMMANDS, COMPLETION, "--help", "--version"]
    what = "option" if name.startswith("-") else "command"
    return f"{PROG}: unknown {what} {name}{suggestion(name, known)}\n{PROG} --help lists the commands"


def _complete(words: Sequence[str]) -> int:
    """Print the completion script of a shell for all commands and their options."""
    if len(words) != 1 or words[0] not in SHELLS:
        print(f"usage: {PROG} {COMPLETION} {{{','.join(SHELLS)}}}", file=sys.stderr)
        return EXIT_USAGE
    from typing import Annotated, Union

    import tyro

    kinds: list[Any] = []
    for name, command in COMMANDS.items():
        config = getattr(importlib.import_module(command.module), command.config)
        kinds.append(Annotated[config, tyro.conf.subcommand(name, description=command.summary)])
    tyro.cli(Union[tuple(kinds)], prog=PROG, args=[COMPLETION_FLAG, words[0]])  # type: ignore[call-overload]  # noqa: UP007
    raise AssertionError("tyro exits once it has printed a completion script")


def run() -> NoReturn:
    """Run the command that this process was started with, and end with its exit status."""
    leave(main())


if __name__ == "__main__":
    run()
