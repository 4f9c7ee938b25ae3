"""Progress is a bar on a terminal, log lines or JSON elsewhere: phase, clock, rows, rates, errors, the time left."""

from __future__ import annotations

import io
import json
import logging
import re
import time
import uuid
from dataclasses import astuple
from typing import Any

import pytest

from jobs.runs import progress
from jobs.runs.ledger import UnitStats
from jobs.runs.notes import forget, note, notes_of
from jobs.runs.progress import Progress, clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def run() -> str:
    return uuid.uuid4().hex


def wait_for(condition: Any) -> Any:
    deadline = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < deadline, "nothing is shown"
        time.sleep(0.01)
    return found


def test_a_terminal_gets_a_bar_that_ticks(monkeypatch: pytest.MonkeyPatch, run: str) -> None:
    monkeypatch.setattr(progress, "TICK_S", 0.01)
    terminal = Terminal()
    with Progress(num_rows=100, done=UnitStats(rows=20), run=run, num_units=2, stream=terminal) as shown:
        wait_for(lambda: terminal.getvalue().count("loading the model 0:00") > 2)
        shown.add(UnitStats(rows=40, errors=2, tokens=4000, seconds=1.0))
        wait_for(lambda: "scoring 0:0" in terminal.getvalue().split("\r")[-1])
        note(run, work="scoring", units=1, rows=70.0, tokens=7000, loaded_at=time.time(), load_s=0.0)
        wait_for(lambda: "90/100 rows" in terminal.getvalue().split("\r")[-1])
        note(run, work="scoring", units=2, rows=80.0, tokens=8000, loaded_at=time.time(), load_s=0.0)
        wait_for(lambda: "committing 0:0" in terminal.getvalue().split("\r")[-1])
        shown.add(UnitStats(rows=40, tokens=4000, seconds=1.0))
    last = terminal.getvalue().split("\r")[-1]
    assert "done 0:0" in last
    assert "100/100 rows" in last
    assert re.search(r"tokens/s now, [\d,]+ on average, 2 errors, 0:00 left", last)


def test_elsewhere_a_line_is_logged_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, run: str
) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.01)
    stream = io.StringIO()
    with (
        caplog.at_level(logging.INFO),
        Progress(num_rows=100, done=UnitStats(rows=20), run=run, num_units=2, stream=stream) as shown,
    ):
        wait_for(lambda: [line for line in caplog.messages if line.startswith("loading the model, 0:00: 20 of 100")])
        shown.add(UnitStats(rows=40, errors=1, tokens=4000, seconds=1.0))
        seen = wait_for(lambda: [line for line in caplog.messages if "60 of 100 rows" in line])
    assert stream.getvalue() == ""
    assert seen[0].startswith("scoring, 0:0")
    assert "1 errors" in seen[0]
    assert re.search(r", \d+:\d\d left$", seen[0])


def test_schedulers_get_an_object_a_line(run: str) -> None:
    stream = Terminal()
    with Progress(num_rows=10, done=UnitStats(), run=run, num_units=1, style="json", stream=stream) as shown:
        shown.add(UnitStats(rows=10, errors=1, tokens=50))
    (told,) = map(json.loads, stream.getvalue().splitlines())
    named = {"phase": "done", "rows": 10, "of_rows": 10, "tokens": 50, "errors": 1, "seconds_left": 0}
    assert named.items() <= told.items()
    assert {"seconds", "tokens_per_s", "tokens_per_s_now"} < told.keys()


def test_the_time_left_counts_this_runs_rows_only() -> None:
    with Progress(num_rows=200, done=UnitStats(rows=100), stream=io.StringIO()) as shown:
        shown._started -= 50.0
        shown.add(UnitStats(rows=25, tokens=100))
        assert shown.line() == ("working, 0:50: 125 of 200 rows, 2 tokens/s now, 2 on average, 0 errors, 2:30 left")


def test_the_rate_now_is_that_since_the_last_reports() -> None:
    with Progress(num_rows=400, done=UnitStats(), stream=io.StringIO()) as shown:
        for seconds, tokens in ((100, 1000), (50, 100), (10, 100)):
            shown._started -= seconds
            shown.add(UnitStats(rows=100, tokens=tokens))
        now, average, unit = shown._rates()
        assert (round(now, 1), round(average, 1), unit) == (3.3, 7.5, "tokens")
        left = shown.left_s()
        assert left is not None
        assert left == pytest.approx(160 / 3 * (1 + 7.5 / (200 / 60)) / 2, rel=1e-3)


def test_the_seconds_of_a_run_are_split(run: str) -> None:
    with Progress(num_rows=1, done=UnitStats(), run=run, num_units=1, stream=io.StringIO()) as shown:
        assert shown.timing() is None
        note(run, work="scoring", units=1, rows=1, tokens=50, loaded_at=shown._started_at + 7.0, load_s=3.0)
        shown.add(UnitStats(rows=1, tokens=50))
    shown._ended_at = shown._started_at + 17.0
    timing = shown.timing(shown._started_at - 2.0)
    assert timing is not None
    assert [round(seconds, 3) for seconds in astuple(timing)] == [6.0, 3.0, 10.0]
    assert shown.tokens_per_s == pytest.approx(5.0)
    assert notes_of(run) == []


def test_a_process_has_one_note_for_each_run(run: str) -> None:
    note(run, units=1)
    note(run, units=2)
    note(f"{run}-other", units=9)
    assert notes_of(run) == [{"units": 2}]
    forget(f"{run}-other")
    forget(run)
    assert notes_of(run) == []


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7325, "2:02:05")])
def test_durations_read_like_a_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown
