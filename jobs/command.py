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
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass
from io import StringIO
from types import FrameType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic.fields import FieldInfo


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

    It exits with status 0 after `--help`, and with 2 where options are wrong, with a line on each; an unknown one is
    told alone, with the one that was meant.
    """
    import tyro
    from pydantic import ValidationError

    words = _gathered(list(sys.argv[1:] if args is None else args), _several(config))
    description = description.replace(f"python -m {config.__module__}", prog)
    view = _view(config)
    said = StringIO()
    try:
        with redirect_stderr(said):
            found = tyro.cli(view, args=words, prog=prog, description=description)
        return _plain(found, config)
    except ValidationError as error:
        wrong = _wrong(error, config)
    except SystemExit as end:
        if end.code != EXIT_USAGE:
            raise
        unknown = [flag for flag in _flags(words) if flag not in _known_flags(config)]
        wrong = [f"unknown option {flag}{suggestion(flag, _known_flags(config))}" for flag in unknown]
        wrong = wrong or _missing(config, words) or [_first_paragraph(said.getvalue())]
    for text in wrong:
        print(f"{prog}: {text}", file=sys.stderr)
    print(f"{prog} --help shows all options", file=sys.stderr)
    sys.exit(EXIT_USAGE)


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


def _missing(config: type[BaseModel], words: Sequence[str]) -> list[str]:
    """What is told of options that must be given and are not."""
    given = _flags(words)
    names = [f"--{name.replace('_', '-')}" for name, field in config.model_fields.items() if field.is_required()]
    return [f"{flag} is missing" for flag in names if flag not in given]


def _first_paragraph(told: str) -> str:
    """What tyro says is wrong, without its heading, the frame around it and the advice below."""
    lines = [line.strip("\u2502 ") for line in told.splitlines()][1:]
    is_rule = [not line.strip("-\u2500") for line in lines]
    if all(is_rule):
        return told.strip()
    start = is_rule.index(False)
    end = next((place for place in range(start, len(lines)) if is_rule[place]), len(lines))
    return " ".join(lines[start:end]).removeprefix("Error parsing ")


def _wrong(error: ValidationError, config: type[BaseModel]) -> list[str]:
    """What a config says of its values, each with the option that it is about."""
    found = []
    for one in error.errors():
        text = str(one["msg"]).removeprefix("Value error, ")
        name = str(one["loc"][0]) if one["loc"] else ""
        if name not in config.model_fields or (one["type"] == "value_error" and "--" in text):
            found.append(text)  # its options are in it
        else:
            found.append(f"--{name.replace('_', '-')} {one['input']}: {text[:1].lower()}{text[1:]}")
    return list(dict.fromkeys(found))


def _groups(config: type[BaseModel]) -> Mapping[str, OptionGroup]:
    return {group.name: group for group in getattr(config, "option_groups", ())}


def _view(config: type[Config]) -> type[BaseModel]:
    """The same options without what the config checks of their values, so that it can be told in our own words.

    Each group is in a model of its own, which is how tyro knows groups; flags stay as they are.
    """
    from pydantic import Field
    from tyro.conf import OmitArgPrefixes

    groups = _groups(config)
    taken = {name for group in groups.values() for name in group.fields}
    fields = {name: _unchecked(field) for name, field in config.model_fields.items()}
    models: dict[str, Any] = {}
    for name, group in groups.items():
        model = _model(name, group.text, {one: fields[one] for one in group.fields})
        # With a description of its own tyro need not read the sources for one.
        field = Field(default=model(), description=group.text)
        models[name] = (OmitArgPrefixes[model], field)  # type: ignore[misc,valid-type]
    own = {name: field for name, field in fields.items() if name not in taken}
    return _model(config.__name__, config.__doc__, own | models)


def _model(name: str, text: str | None, fields: Mapping[str, Any]) -> type[BaseModel]:
    from pydantic import ConfigDict, create_model

    made: type[BaseModel] = create_model(name, __doc__=text, __config__=ConfigDict(protected_namespaces=()), **fields)
    return made


def _unchecked(field: FieldInfo) -> tuple[Any, Any]:
    """A field's type, with what it has for tyro alone, and its default and description."""
    from pydantic import Field

    kind = _bare(field.annotation)
    for mark in field.metadata:
        if type(mark).__module__.startswith("tyro"):
            kind = Annotated[kind, mark]
    if field.default_factory is not None:
        return kind, Field(default_factory=field.default_factory, description=field.description)
    return kind, Field(default=field.default, description=field.description)


def _bare(kind: Any) -> Any:
    """A type without the checks of its values, at any depth."""
    if get_origin(kind) is Annotated:
        return _bare(get_args(kind)[0])
    arguments = get_args(kind)
    if not arguments or get_origin(kind) is Literal:
        return kind
    bare = tuple(argument if argument is Ellipsis else _bare(argument) for argument in arguments)
    return Union[bare] if get_origin(kind) in (Union, UnionType) else get_origin(kind)[bare]  # noqa: UP007


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
