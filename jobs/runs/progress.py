"""Progress of a run for people and schedulers: its phase, a clock, rows, tokens a second, errors and the time left.

On a terminal it is a bar that ticks every second, elsewhere a log line every 10 seconds, or a JSON object.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TextIO, TypeAlias

from tqdm import tqdm

from cluster.connect import ClusterResources, connect
from jobs.runs.ledger import UnitStats
from jobs.runs.notes import forget, notes_of

logger = logging.getLogger(__name__)

ProgressStyle: TypeAlias = Literal["auto", "json"]
LOG_EVERY_S = 10.0
TICK_S = 1.0
NOW_S = 30.0
"""Seconds that a rate of now looks back, at least over the last report."""
BAR = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows{postfix}"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a run until scoring began, of that those of loading the model, and of scoring and committing."""

    start_s: float
    load_s: float
    score_s: float


class Progress:
    """Counts rows, tokens and errors of a run, and shows them until it is left.

    Args:
        num_rows: the rows of the whole output.
        done: counts of the units that were committed before.
        run: the run whose workers leave notes; without one there is no phase to tell.
        num_units: units that are left.
        style: `json` for an object a line in place of the bar or the log.
        stream: where it is shown.
    """

    def __init__(
        self,
        *,
        num_rows: int,
        done: UnitStats,
        run: str | None = None,
        num_units: int = 0,
        style: ProgressStyle = "auto",
        stream: TextIO | None = None,
    ) -> None:
        self.stats = UnitStats()
        self._num_rows, self._done, self._run, self._num_units = num_rows, done, run, num_units
        self._started, self._started_at = time.monotonic(), time.time()
        self._loaded: tuple[float, float] | None = None
        self._ended_at = 0.0
        self._worked = 0
        self._noted = (0, 0)
        self._samples: deque[tuple[float, int, int]] = deque([(0.0, 0, 0)])
        self._lock = threading.Lock()
        self._stream = stream or sys.stderr
        self._is_json = style == "json"
        self._bar = tqdm(
            desc="starting",
            total=num_rows,
            initial=done.rows,
            file=self._stream,
            dynamic_ncols=True,
            disable=self._is_json or not self._stream.isatty(),
            bar_format=BAR,
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show_now_and_then, daemon=True)

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._ended_at = time.time()
        self._read_notes()
        if self._run is not None:
            forget(self._run)
        if self._is_json:
            self._print_json()
        self._tick()
        self._bar.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def total(self) -> UnitStats:
        """This run's counts and those of the runs before it."""
        return self._done + self.stats

    def add(self, stats: UnitStats) -> None:
        """Count a unit that is committed."""
        with self._lock:
            self.stats += stats
        self._sample()
        self._tick()

    @property
    def phase(self) -> str:
        """What the run does now."""
        if self._run is None:
            return "working"
        if self.stats.rows + self._done.rows >= self._num_rows:
            return "done"
        if self._worked >= self._num_units > 0:
            return "committing"
        return "loading the model" if self._loaded is None and not self.stats.rows else "scoring"

    def timing(self, began_at: float | None = None) -> Timing | None:
        """How the seconds since `began_at` (since the epoch; by default since this was made) were spent up to the end;
        None where no worker told when it had loaded its model."""
        if self._loaded is None:
            return None
        began_at = self._started_at if began_at is None else began_at
        ended_at = self._ended_at or time.time()
        loaded_at, load_s = self._loaded
        scoring_at = min(max(loaded_at, began_at), ended_at)  # clocks of other nodes may differ
        load_s = min(load_s, scoring_at - began_at)
        return Timing(scoring_at - began_at - load_s, load_s, ended_at - scoring_at)

    @property
    def tokens_per_s(self) -> float:
        """Tokens computed a second on average since the model is loaded."""
        return self.stats.computed_tokens / max(self._working_s, 1e-9)

    @property
    def _working_s(self) -> float:
        if self._loaded is None:
            return self.seconds
        return (self._ended_at or time.time()) - max(self._loaded[0], self._started_at)

    def _rates(self) -> tuple[float, float, str]:
        """The rate now and on average, and what it is of."""
        unit = "tokens" if self._reached()[1] else "rows"
        place = 2 if unit == "tokens" else 1
        with self._lock:
            (first, *before), (last, *until) = self._samples[0], self._samples[-1]
        average = until[place - 1] / max(self._working_s, 1e-9)
        span = last - max(first, self.seconds - self._working_s)
        now = (until[place - 1] - before[place - 1]) / span if span > 0 else average
        return now, average, unit

    def left_s(self) -> float | None:
        """Seconds that are left: the mean of what the rate now and that on average say; None before there is one."""
        now, average, _ = self._rates()
        rows, _ = self._reached()
        left = self._num_rows - self._done.rows - rows
        if not rows or not average:
            return None
        by_average = left * self._working_s / rows
        return by_average if not now else by_average * (1 + average / now) / 2

    def line(self) -> str:
        """One line: the phase and its clock, rows, rates, errors and the time left."""
        return f"{self.phase}, {clock(self.seconds)}: {self._num_done:,} of {self._num_rows:,} rows, {self._figures()}"

    def _figures(self) -> str:
        now, average, unit = self._rates()
        left = self.left_s()
        remaining = "?" if left is None else clock(left)
        rates = f"{now:,.0f} {unit}/s now, {average:,.0f} on average"
        return f"{rates}, {self.total.errors:,} errors, {remaining} left"

    @property
    def _num_done(self) -> int:
        """Rows that are scored, committed or not."""
        return min(self._num_rows, self._done.rows + self._reached()[0])

    def _reached(self) -> tuple[int, int]:
        """Rows and tokens of this run, with those of units that are under way, as far as their workers told."""
        return max(self.stats.rows, self._noted[0]), max(self.stats.computed_tokens, self._noted[1])

    def _sample(self) -> None:
        """Note how far the run is, for the rate now."""
        with self._lock:
            self._samples.append((self.seconds, *self._reached()))
            while len(self._samples) > 2 and self._samples[-1][0] - self._samples[1][0] > NOW_S:
                self._samples.popleft()

    def _read_notes(self) -> None:
        if self._run is None:
            return
        notes = notes_of(self._run)
        loaded = [(note["loaded_at"], note["load_s"]) for note in notes if "loaded_at" in note]
        self._loaded = min(loaded) if loaded else self._loaded
        scoring = [note for note in notes if note.get("work") == "scoring"]
        self._worked = sum(note["units"] for note in scoring)
        self._noted = (int(sum(note["rows"] for note in scoring)), int(sum(note["tokens"] for note in scoring)))
        self._sample()

    def _show_now_and_then(self) -> None:
        every = LOG_EVERY_S if self._bar.disable else TICK_S
        while not self._stop.wait(every):
            self._read_notes()
            if self._is_json:
                self._print_json()
            elif self._bar.disable:
                logger.info(self.line())
            else:
                self._tick()

    def _tick(self) -> None:
        self._bar.n = self._num_done
        self._bar.set_description_str(f"{self.phase} {clock(self.seconds)}", refresh=False)
        self._bar.set_postfix_str(self._figures(), refresh=False)
        self._bar.refresh()

    def _print_json(self) -> None:
        now, average, unit = self._rates()
        left = self.left_s()
        told: dict[str, Any] = {
            "phase": self.phase,
            "seconds": round(self.seconds, 1),
            "rows": self._num_done,
            "of_rows": self._num_rows,
            "tokens": self.total.tokens,
            "errors": self.total.errors,
            f"{unit}_per_s_now": round(now, 1),
            f"{unit}_per_s": round(average, 1),
            "seconds_left": None if left is None else round(left),
        }
        print(json.dumps(told), file=self._stream, flush=True)


@contextmanager
def joined(address: str | None, style: ProgressStyle = "auto") -> Iterator[ClusterResources]:
    """The cluster that `connect` joins or starts; a clock shows how long that takes.

    Raises:
        ClusterError: it cannot be joined or started.
    """
    with ExitStack() as stack:
        with nullcontext() if _is_connected() else _ticking("starting Ray", style):
            resources = stack.enter_context(connect(address))
        yield resources


def _is_connected() -> bool:
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


@contextmanager
def _ticking(phase: str, style: ProgressStyle) -> Iterator[None]:
    """A phase with its clock on a terminal; elsewhere a log line when it begins."""
    started, stream = time.monotonic(), sys.stderr
    if style == "json":
        print(json.dumps({"phase": phase, "seconds": 0.0}), file=stream, flush=True)
    elif not stream.isatty():
        logger.info(phase)
    if style == "json" or not stream.isatty():
        yield
        return
    stop = threading.Event()

    def tick() -> None:
        while True:
            stream.write(f"\r{phase} {clock(time.monotonic() - started)}")
            stream.flush()
            if stop.wait(TICK_S):
                stream.write("\r\033[K")
                stream.flush()
                return

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
