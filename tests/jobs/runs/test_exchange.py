"""Pieces reach who they were made for; accidents are repeated, errors are told."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from jobs.errors import CorpusError, WorkerError
from jobs.runs.exchange import gathered, results, scatter

pytestmark = pytest.mark.usefixtures("local_ray")


def spread(argument: int, pieces: list[int]) -> list[int]:
    assert pieces == []
    return [10 * argument + part for part in range(3)]


def total(argument: str, pieces: list[int]) -> list[tuple[str, list[int]]]:
    return [(argument, pieces)]


def test_each_gatherer_gets_its_piece_of_every_task_in_order() -> None:
    made = scatter(spread, [1, 2, 3, 4], num_parts=3)
    sums = scatter(total, ["a", "b", "c"], num_parts=1, pieces=gathered(made, 3))
    assert dict(results(sums)) == {"a": [10, 20, 30, 40], "b": [11, 21, 31, 41], "c": [12, 22, 32, 42]}


def fail(argument: str, pieces: list[int]) -> list[int]:
    if argument == "ours":
        raise CorpusError("a file is broken")
    if argument == "other":
        raise ZeroDivisionError("one over none")
    if not Path(argument).exists():
        Path(argument).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [1]


def test_errors_keep_their_type_or_become_a_workers() -> None:
    with pytest.raises(CorpusError, match="a file is broken"):
        list(results(scatter(fail, ["ours"], num_parts=1)))
    with pytest.raises(WorkerError, match="ZeroDivisionError: one over none"):
        list(results(scatter(fail, ["other"], num_parts=1)))


def test_a_task_whose_process_dies_is_run_again(tmp_path: Path) -> None:
    assert list(results(scatter(fail, [str(tmp_path / "died")], num_parts=1))) == [1]
    assert (tmp_path / "died").exists()
