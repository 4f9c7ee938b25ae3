"""What every command line does alike: signals from the first moment, options, errors as one sentence, exit statuses.

It imports the standard library alone: a command calls `launch` before it imports what takes seconds.
"""

from __future__ import annotations

import atexit
import difflib
import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel


def _process_started_at() -> float:
    """When this process was started, in seconds since the epoch: as Linux tells it. Elsewhere it is about now, since a
    command imports this module first."""
    try:
        with open("/proc/self/stat", encoding="ascii") as stat, open("/proc/uptime", encoding="ascii") as uptime:
            ticks = int(stat.read().rpartition(")")[2].split()[19])
            age = float(uptime.read().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        age = 0.0
    return time.time() - max(0.0, age)


# The clock of a command runs from here.
STARTED_AT = _process_started_at()
EXIT_STOPPED = 1
EXIT_USAGE = 2
EXIT_ROW_ERRORS = 3
SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A signal's exception that Python had to drop, as in a weakref's callback, is sent again after this time.
AGAIN_AFTER_S = 0.05

Config = TypeVar("Config", bound="BaseModel")


@dataclass(frozen=True, slots=True)
class OptionGroup:
    """Options that stand together in `--help`: the group's name, a sentence on them, and their fields' names.

    A config class lists its groups in `option_groups`.
    """

    name: str
    text: str
    fields: tuple[str, ...]


class _Signalled(BaseException):
    """The process was asked to end."""


def launch(module: str) -> NoReturn:
    """Import a command's module, run its `main` and exit with its status. Signals are answered from here on."""
    answer_signals(module)
    leave(importlib.import_module(module).main())


def leave(status: int) -> NoReturn:
    """End this process with a status, once its threads have ended, what is registered for its end is done, and what was
    printed is out. Taking the modules of torch and Ray apart, which takes seconds, is left to the kernel."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with suppress(OSError, ValueError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def answer_signals(name: str) -> None:
    """Let Ctrl-C and SIGTERM end this process at once with one line: for the time before there is work to end."""

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{name} interrupted before it began\n".encode())
        os._exit(128 + number)  # an exception could be lost in, or changed by, the import that it meets

    for number in SIGNALS:
        signal.signal(number, end)


def parse(config: type[Config], args: Sequence[str] | None, *, prog: str, description: str) -> Config:
    """The options of a command line, by default this process's.

    It exits with status 0 after `--help`, and with 2 where an option is wrong; an unknown one is told alone, with the
    one that was meant.
    """
    import tyro

    words = _gathered(list(sys.argv[1:] if args is None else args), _several(config))
    description = description.replace(f"python -m {config.__module__}", prog)
    view = _grouped(config)
    unknown = [flag for flag in _flags(words) if flag not in _known_flags(config)]
    if unknown and not _parses(view, words):
        for flag in unknown:
            print(f"{prog}: unknown option {flag}{suggestion(flag, _known_flags(config))}", file=sys.stderr)
        print(f"{prog} --help shows all options", file=sys.stderr)
        sys.exit(EXIT_USAGE)
    return _plain(tyro.cli(view, args=words, prog=prog, description=description), config)


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean ...?` with what is written most like `word`, or nothing where nothing is."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def run_command(
    prog: str,
    work: Callable[[], int],
    *,
    log_level: int = logging.INFO,
    farewell: str = "interrupted; what is committed stays",
) -> int:
    """Run a command's work; its exit status, or 1 when it stops, 130 on Ctrl-C, 143 on SIGTERM. Each end is told, one
    by a signal with the words of `farewell`.
    """
    from serve_app.reward_model.errors import RaywardError

    name = prog.removeprefix("python -m ")
    logging.basicConfig(level=log_level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with _raised_signals() as received, _running():
        try:
            return work()
        except RaywardError as error:
            if not received:
                print(f"{name} stopped: {error}", file=sys.stderr)
                return EXIT_STOPPED
        except (_Signalled, KeyboardInterrupt):
            received = received or [signal.SIGINT]
        except Exception:
            if not received:  # an import or a library may make another error of the signal's
                raise
    print(f"{name} {farewell}", file=sys.stderr)
    return 128 + received[0]


_num_running = 0


@contextmanager
def _running() -> Iterator[None]:
    global _num_running
    _num_running += 1
    try:
        yield
    finally:
        _num_running -= 1


def command_began() -> float | None:
    """When the command that runs in this process was started, in seconds since the epoch; None where none runs, as in
    a notebook."""
    return STARTED_AT if _num_running else None


@contextmanager
def _raised_signals() -> Iterator[list[int]]:
    """Signals as exceptions in the main thread, and the numbers of those that came."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else _Signalled

    def unraisable(lost: Any) -> None:
        if isinstance(lost.exc_value, _Signalled | KeyboardInterrupt) and received:
            threading.Timer(AGAIN_AFTER_S, os.kill, (os.getpid(), received[-1])).start()
        else:
            hook(lost)

    hook = sys.unraisablehook
    sys.unraisablehook = unraisable
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def _flags(words: Sequence[str]) -> list[str]:
    """The options on a command line, as they are listed in help: without values, with hyphens."""
    names = (word.partition("=")[0] for word in words if word.startswith("--") and word != "--")
    return [name.replace("_", "-") for name in names]


def _several(config: type[BaseModel]) -> list[str]:
    """The options that take one text or several."""
    names = [name for name, field in config.model_fields.items() if field.annotation == (str | tuple[str, ...])]
    return [f"--{name.replace('_', '-')}" for name in names]


def _gathered(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """A command line on which an option that is given more than once, with a value each time, has them all at once."""
    made = [part for word in words for part in (word.split("=", 1) if word.partition("=")[0] in flags else [word])]
    for flag in flags:
        places = [place for place, word in enumerate(made[:-1]) if word == flag]
        for place in reversed(places[1:]):
            value = made[place + 1]
            del made[place : place + 2]
            made.insert(places[0] + 2, value)
    return made


def _known_flags(config: type[BaseModel]) -> list[str]:
    names = [name.replace("_", "-") for name in config.model_fields]
    switches = [name.replace("_", "-") for name, field in config.model_fields.items() if field.annotation is bool]
    ours = [*(f"--{name}" for name in names), *(f"--no-{name}" for name in switches), "--help"]
    return [*ours, "--tyro-print-completion", "--tyro-write-completion"]


def _parses(view: type[BaseModel], words: Sequence[str]) -> bool:
    import tyro

    try:
        tyro.cli(view, args=words, console_outputs=False)
    except SystemExit as end:
        return end.code != EXIT_USAGE
    return True


def _groups(config: type[BaseModel]) -> Mapping[str, OptionGroup]:
    return {group.name: group for group in getattr(config, "option_groups", ())}


def _grouped(config: type[Config]) -> type[BaseModel]:
    """The same options, each group in a model of its own, which is how tyro knows groups; flags stay as they are."""
    groups = _groups(config)
    if not groups:
        return config
    from pydantic import Field, ValidationError, create_model, model_validator
    from tyro.conf import OmitArgPrefixes

    def check(view: BaseModel) -> BaseModel:
        try:
            _plain(view, config)
        except ValidationError as error:
            found = [str(one["msg"]).removeprefix("Value error, ") for one in error.errors()]
            raise ValueError("; ".join(found)) from None
        return view

    taken = {name for group in groups.values() for name in group.fields}
    own = {name: (field.annotation, field) for name, field in config.model_fields.items() if name not in taken}
    models: dict[str, Any] = {}
    for name, group in groups.items():
        fields = {one: (config.model_fields[one].annotation, config.model_fields[one]) for one in group.fields}
        model: type[BaseModel] = create_model(name, __doc__=group.text, **fields)  # type: ignore[call-overload]
        # With a description of its own tyro need not read the sources for one.
        field = Field(default=model(), description=group.text)
        models[name] = (OmitArgPrefixes[model], field)  # type: ignore[misc,valid-type]
    made: type[BaseModel] = create_model(  # type: ignore[call-overload]
        config.__name__,
        __doc__=config.__doc__,
        __validators__={"check": model_validator(mode="after")(check)},
        **own,
        **models,
    )
    return made


def _plain(view: BaseModel, config: type[Config]) -> Config:
    """The config that a view of it stands for."""
    if isinstance(view, config):
        return view
    values: dict[str, Any] = {}
    for name in type(view).model_fields:
        value = getattr(view, name)
        if name in _groups(config):
            values |= {field: getattr(value, field) for field in type(value).model_fields}
        else:
            values[name] = value
    return config(**values)
