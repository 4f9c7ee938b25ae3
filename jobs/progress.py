"""How far a job is: a bar on a terminal, a log line every 10 seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import threading
import time
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from jobs.ledger import UnitStats

__all__ = ["Progress", "clock"]

logger = logging.getLogger(__name__)
LOG_EVERY_S = 10.0


class Progress:
    """Counts rows, tokens and errors of a run, and shows them until it is left."""

    def __init__(self, *, num_rows: int, done: UnitStats, stream: TextIO = sys.stderr) -> None:
        self.stats = UnitStats()
        self._num_rows = num_rows
        self._done = done
        self._started = time.monotonic()
        self._bar = tqdm(
            total=num_rows,
            initial=done.rows,
            unit="row",
            file=stream,
            dynamic_ncols=True,
            disable=not stream.isatty(),
            smoothing=0.1,
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._log_now_and_then, daemon=True)

    def __enter__(self) -> Progress:
        if self._bar.disable:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._bar.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def total(self) -> UnitStats:
        """This run's counts and those of the runs before it."""
        return self._done + self.stats

    def add(self, stats: UnitStats) -> None:
        self.stats += stats
        self._bar.set_postfix_str(f"{self._rate}, {self.total.errors} errors", refresh=False)
        self._bar.update(stats.rows)

    @property
    def tokens_per_s(self) -> float:
        return self.stats.tokens / max(self.seconds, 1e-9)

    @property
    def _rate(self) -> str:
        if self.stats.tokens:
            return f"{self.tokens_per_s:,.0f} tokens/s"
        return f"{self.stats.rows / max(self.seconds, 1e-9):,.0f} rows/s"

    def line(self) -> str:
        """One line: rows, tokens or rows per second, errors and the time left."""
        rows = self.stats.rows
        left = self._num_rows - self.total.rows
        remaining = clock(left * self.seconds / rows) if rows else "?"
        done = f"{self.total.rows:,} of {self._num_rows:,} rows"
        return f"{done}, {self._rate}, {self.total.errors} errors, {remaining} left"

    def _log_now_and_then(self) -> None:
        while not self._stop.wait(LOG_EVERY_S):
            logger.info(self.line())


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
