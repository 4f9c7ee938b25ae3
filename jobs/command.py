"""What every job's command line does alike: logging, errors as one sentence, exit statuses, a clean end on signals."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType

from serve_app.reward_model.errors import RaywardError

__all__ = ["EXIT_ROW_ERRORS", "EXIT_STOPPED", "run_command"]

EXIT_STOPPED = 1
EXIT_ROW_ERRORS = 3


class _Signalled(BaseException):
    """The process was asked to end."""

    def __init__(self, number: int) -> None:
        self.number = number


def run_command(name: str, work: Callable[[], int], *, log_level: int = logging.INFO) -> int:
    """Run a job's work; its exit status, or 1 when it stops, 130 on Ctrl-C, 143 on SIGTERM. Each end is told."""
    logging.basicConfig(level=log_level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    before = signal.signal(signal.SIGTERM, _raise_signalled)
    try:
        return work()
    except RaywardError as error:
        print(f"{name} stopped: {error}", file=sys.stderr)
        return EXIT_STOPPED
    except KeyboardInterrupt:
        return _interrupted(name, signal.SIGINT)
    except _Signalled as signalled:
        return _interrupted(name, signalled.number)
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise_signalled(number: int, frame: FrameType | None) -> None:
    raise _Signalled(number)


def _interrupted(name: str, number: int) -> int:
    print(f"{name} interrupted; what is committed stays", file=sys.stderr)
    return 128 + number
