"""The processes of a command and the memory they hold, read from /proc."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Measured", "measured"]

MARK = "RAYWARD_BENCH_RUN"
LOOK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Measured:
    """What a command took: its seconds with start-up, and the most anonymous memory of it and of any Ray worker."""

    seconds: float
    driver_bytes: int
    worker_bytes: int


def measured(arguments: Sequence[str], *, folder: Path) -> Measured:
    """Run `python ARGUMENTS` in `folder` to its end and look at its processes meanwhile.

    Raises:
        RuntimeError: it failed; the text holds what it printed.
    """
    mark = uuid.uuid4().hex
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, MARK: mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    peaks = {"driver": 0, "worker": 0}
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, mark, peaks, ended))
    watcher.start()
    printed, _ = process.communicate()
    seconds = time.perf_counter() - started
    ended.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}:\n{printed}")
    return Measured(seconds, peaks["driver"], peaks["worker"])


def _watch(driver: int, mark: str, peaks: dict[str, int], ended: threading.Event) -> None:
    while not ended.wait(LOOK_EVERY_S):
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                if f"{MARK}={mark}".encode() not in (entry / "environ").read_bytes():
                    continue
                role = "driver" if int(entry.name) == driver else "worker"
                if role == "worker" and not (entry / "cmdline").read_bytes().startswith(b"ray::"):
                    continue
                peaks[role] = max(peaks[role], _anonymous_bytes(entry))
            except OSError:
                continue  # it has ended


def _anonymous_bytes(entry: Path) -> int:
    for line in (entry / "status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    return 0
