"""Units through Ray Data: read (CPU) -> one or more stages of actors -> commit (CPU), one report each to the driver.

A unit travels as one row: its description and its table as Arrow IPC bytes. Ray Data drops empty blocks and splits
and merges others; a single row it leaves whole. What goes wrong travels as a field of that row, since an exception
in a Ray Data stage reaches the driver without its type.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
from pyarrow import fs

from jobs.corpus.files import Unit
from jobs.corpus.reader import UnitReader, read_tasks
from jobs.errors import ScorerError
from jobs.runs.ledger import Ledger, UnitStats
from jobs.runs.placement import TASK_CPUS, ActorPool
from serve_app.reward_model.errors import RaywardError

if TYPE_CHECKING:
    import ray.data


MAX_READ_TASKS = 200


class UnitWorker(Protocol):
    """Work of an actor of a stage on units."""

    def process(self, unit: Unit, table: pa.Table) -> tuple[pa.Table, UnitStats]:
        """The unit's table as the next stage gets it, and what this stage counted."""
        ...


@dataclass(frozen=True, slots=True)
class Stage:
    """Actors that work on units as they come, each on `units_at_once`; `make` runs in the actor."""

    make: Callable[[], UnitWorker]
    pool: ActorPool
    units_at_once: int = 1


@dataclass(frozen=True, slots=True)
class UnitReport:
    """A committed unit and its counts."""

    unit: Unit
    stats: UnitStats


def run_units(
    units: list[Unit],
    *,
    filesystem: fs.FileSystem,
    ledger: Ledger,
    stages: Sequence[Stage],
) -> Iterator[UnitReport]:
    """Read units, pass them through the stages in turn and commit them on the connected Ray, yielding each as it is
    committed, in no fixed order. All stages run at the same time, each on other units.

    Raises:
        RaywardError: a unit cannot be read, worked on or committed. Units committed before stay committed.
    """
    with _quiet_context():  # put back at the end: this process may have pipelines of its own
        yield from _reports(units, filesystem=filesystem, ledger=ledger, stages=stages)


def _reports(
    units: list[Unit], *, filesystem: fs.FileSystem, ledger: Ledger, stages: Sequence[Stage]
) -> Iterator[UnitReport]:
    import ray.data

    tasks = [{"units": [unit.text() for unit in task]} for task in read_tasks(units, MAX_READ_TASKS)]
    dataset: ray.data.Dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
    dataset = dataset.map_batches(
        partial(_read, filesystem=filesystem), batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS
    )
    for stage in stages:
        dataset = _staged(dataset, stage)
    dataset = dataset.map_batches(
        partial(_commit, ledger=ledger), batch_size=None, batch_format="pyarrow", num_cpus=TASK_CPUS
    )
    try:
        for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
            assert isinstance(batch, pa.Table)
            for parcel in batch.to_pylist():
                yield _report(parcel)
    except ray.exceptions.RayError as error:
        raise ScorerError(f"a Ray task or actor failed for good: {error}") from error


def _staged(dataset: ray.data.Dataset, stage: Stage) -> ray.data.Dataset:
    import ray.data

    pool = stage.pool
    strategy = ray.data.ActorPoolStrategy(
        min_size=1,
        max_size=pool.num_actors,
        initial_size=pool.num_actors,
        max_concurrent_calls_per_actor=stage.units_at_once if stage.units_at_once > 1 else None,
        enable_true_multi_threading=stage.units_at_once > 1,
    )
    return dataset.map_batches(
        _ActorStage,
        fn_constructor_args=(stage.make, pool.num_threads),
        batch_size=1,  # one parcel; Ray Data refuses to leave it out where there are GPUs
        batch_format="pyarrow",
        compute=strategy,
        num_cpus=pool.cpus_per_actor,
        num_gpus=pool.gpus_per_actor or None,
    )


@contextmanager
def _quiet_context() -> Iterator[None]:
    """Ray Data without bars and chatter, and with one row a block: set on the driver, sent along to the workers."""
    import ray.data

    chatter, context = logging.getLogger("ray.data"), ray.data.DataContext.get_current()
    ours = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "execution_no_progress_timeout_s": -1,  # one unit may take an hour on a slow machine
        "target_max_block_size": 1,
    }
    before, level = {name: getattr(context, name) for name in ours}, chatter.level
    try:
        chatter.setLevel(logging.CRITICAL + 1)
        for name, value in ours.items():
            setattr(context, name, value)
        yield
    finally:
        chatter.setLevel(level)
        for name, value in before.items():
            setattr(context, name, value)


def _parcel(
    unit: Unit, *, table: pa.Table | None = None, stats: UnitStats | None = None, failure: Exception | None = None
) -> pa.Table:
    """The one row a unit travels as. The table's bytes are wrapped, not copied, into a binary column."""
    columns: dict[str, Any] = {
        "unit": pa.array([unit.text()]),
        "table": pa.nulls(1, pa.large_binary()) if table is None else _as_binary(table),
        "stats": pa.array([json.dumps(dataclasses.asdict(stats)) if stats else None], pa.string()),
        "failure": pa.array([_pickled(failure) if failure else None], pa.binary()),
    }
    return pa.table(columns)


def _pickled(failure: Exception) -> bytes:
    known = failure if isinstance(failure, RaywardError) else ScorerError(f"{type(failure).__name__}: {failure}")
    return pickle.dumps(known)


def _as_binary(table: pa.Table) -> pa.Array:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue()
    offsets = pa.py_buffer(struct.pack("<qq", 0, content.size))
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, content])


def _unit(parcel: pa.Table) -> Unit:
    return Unit.of(parcel["unit"][0].as_py())


def _stats(parcel: pa.Table) -> UnitStats:
    """Counts of the unit by the stages before."""
    counted = parcel["stats"][0].as_py()
    return UnitStats(**json.loads(counted)) if counted else UnitStats()


def _table(parcel: pa.Table) -> pa.Table:
    return pa.ipc.open_stream(pa.BufferReader(parcel["table"][0].as_buffer())).read_all()


def _failed(parcel: pa.Table) -> bool:
    return bool(parcel["failure"][0].is_valid)


def _read(batch: pa.Table, filesystem: fs.FileSystem) -> Iterator[pa.Table]:
    units = [Unit.of(text) for task in batch["units"].to_pylist() for text in task]
    for unit, table in UnitReader(filesystem).read(units):
        yield _parcel(unit, failure=table) if isinstance(table, Exception) else _parcel(unit, table=table)


class _ActorStage:
    """The Ray Data form of a `UnitWorker`: one parcel in, one out."""

    def __init__(self, make: Callable[[], UnitWorker], num_threads: int) -> None:
        import torch

        torch.set_num_threads(num_threads)
        self._worker = make()

    def __call__(self, parcel: pa.Table) -> pa.Table:
        if _failed(parcel):
            return parcel
        unit = _unit(parcel)
        try:
            table, stats = self._worker.process(unit, _table(parcel))
        except Exception as error:  # sent to the driver, which raises it
            logging.getLogger(__name__).exception("unit %s failed", unit.id)
            return _parcel(unit, failure=error)
        return _parcel(unit, table=table, stats=_stats(parcel) + stats)


def _commit(parcel: pa.Table, ledger: Ledger) -> pa.Table:
    if _failed(parcel):
        return parcel
    unit, stats = _unit(parcel), _stats(parcel)
    try:
        ledger.commit(unit, _table(parcel), stats)
    except Exception as error:  # sent to the driver, which raises it
        return _parcel(unit, failure=error)
    return _parcel(unit, stats=stats)


def _report(parcel: dict[str, Any]) -> UnitReport:
    if parcel["failure"] is not None:
        failure: Exception = pickle.loads(parcel["failure"])  # made by `_pickled` on one of our own workers
        raise failure
    return UnitReport(Unit.of(parcel["unit"]), UnitStats(**json.loads(parcel["stats"])))
