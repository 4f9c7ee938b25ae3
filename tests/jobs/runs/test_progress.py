"""Progress is a bar on a terminal and log lines elsewhere, with rows, tokens per second, errors and the time left."""

from __future__ import annotations

import io
import logging
import re
import time

import pytest

from jobs.runs import unit_run
from jobs.runs.ledger import UnitStats
from jobs.runs.unit_run import Progress, clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar() -> None:
    terminal = Terminal()
    with Progress(num_rows=100, done=UnitStats(rows=20), stream=terminal) as shown:
        shown.add(UnitStats(rows=80, errors=2, tokens=4000, seconds=1.0))
    last = terminal.getvalue().split("\r")[-1]
    assert "100/100" in last
    assert "tokens/s, 2 errors" in last


def test_elsewhere_a_line_is_logged_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unit_run, "LOG_EVERY_S", 0.01)
    stream = io.StringIO()
    with caplog.at_level(logging.INFO), Progress(num_rows=100, done=UnitStats(rows=20), stream=stream) as shown:
        shown.add(UnitStats(rows=40, errors=1, tokens=4000, seconds=1.0))
        deadline = time.monotonic() + 60
        while not (seen := [line for line in caplog.messages if "60 of 100 rows" in line]):
            assert time.monotonic() < deadline, "nothing is logged"
            time.sleep(0.01)
    assert stream.getvalue() == ""
    assert "1 errors" in seen[0]
    assert re.search(r", \d+:\d\d left$", seen[0])


def test_the_time_left_counts_this_runs_rows_only() -> None:
    with Progress(num_rows=200, done=UnitStats(rows=100), stream=io.StringIO()) as shown:
        shown._started -= 50.0
        shown.add(UnitStats(rows=25, tokens=100))
        assert shown.line() == "125 of 200 rows, 2 tokens/s, 0 errors, 2:30 left"


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7325, "2:02:05")])
def test_durations_read_like_a_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
