"""Rows that kill the scorer are found by halving, in few deaths, and no other row is given up."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.corpus.files import Unit
from jobs.errors import ScorerError
from jobs.runs.attempts import MAX_LOAD_DEATHS, AttemptLog, Attempts
from jobs.runs.ledger import Ledger


def live(attempts: Attempts, poison: set[int]) -> bool:
    """One life of a scorer: True if it gets through, False if it dies."""
    for index, (first, stop) in enumerate(attempts.ranges):
        attempts.current = index
        if poison & set(range(first, stop)):
            return False
    return True


@pytest.mark.parametrize("poison", [set(), {0}, {99}, {37}, {37, 38}, {0, 50, 99}])
def test_halving_finds_the_rows_that_kill(poison: set[int]) -> None:
    attempts, deaths = Attempts.of(100), 0
    while not live(attempts, poison):
        deaths += 1
        attempts = attempts.after_death()
    assert set(attempts.given_up) == poison
    covered = {row for first, stop in attempts.ranges for row in range(first, stop)}
    assert covered == set(range(100)) - poison
    assert deaths <= 9 * len(poison)


def test_one_death_gives_no_row_up() -> None:
    """A lost node kills the scorer once, whatever it was doing."""
    attempts = Attempts.of(1)
    assert not live(attempts, {0})
    assert attempts.after_death().given_up == []


def test_a_process_that_dies_loading_the_model_stops_the_job() -> None:
    attempts = Attempts.of(10)
    for _ in range(MAX_LOAD_DEATHS - 1):
        attempts.loading = True
        attempts = attempts.after_death()
    attempts.loading = True
    with pytest.raises(ScorerError, match="while loading the model"):
        attempts.after_death()


def test_a_scorer_that_dies_on_everything_stops_the_job() -> None:
    attempts = Attempts.of(10_000)
    with pytest.raises(ScorerError, match="rows alone are not why"):  # noqa: PT012
        for _ in range(10_000):
            live(attempts, set(range(10_000)))
            attempts = attempts.after_death()


def test_the_log_brings_attempts_back_in_the_same_run_only(tmp_path: Path) -> None:
    unit = Unit("a.parquet", "a.parquet", "1-2", 0, 8)
    ledger, later = Ledger(str(tmp_path)), Ledger(str(tmp_path))
    ledger.begin({"identity": {}})
    attempts = Attempts.of(8)
    attempts.current = 0
    attempts = attempts.after_death()
    attempts.strikes[3] = 1
    log = AttemptLog(ledger, unit)
    assert log.read() is None
    log.write(attempts)
    assert log.read() == attempts
    assert AttemptLog(later, unit).read() is None
    log.remove()
    log.remove()
    assert log.read() is None
