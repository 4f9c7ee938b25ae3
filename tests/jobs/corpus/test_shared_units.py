"""Small files share a unit; a restart finds the same units, without reading again what did not change."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.corpus import files
from jobs.corpus.files import Corpus, Plan, Unit
from jobs.corpus.formats import FileContent
from jobs.corpus.lines import scan_lines
from jobs.corpus.reader import UnitReader
from jobs.errors import CorpusError, OutputError
from jobs.runs.ledger import Ledger, UnitStats
from tests.jobs.conftest import write
from tests.jobs.object_store import Store, object_store


def small_files(folder: Path, names: Iterator[str] | list[str], *, rows: int = 1) -> None:
    for place, name in enumerate(names):
        write(folder / name, [{"id": f"{name}:{row}", "place": place} for row in range(rows)])


def read(corpus: Corpus, units: list[Unit]) -> pa.Table:
    tables = [table for _, table in UnitReader(corpus.filesystem).read(units)]
    assert all(isinstance(table, pa.Table) for table in tables), tables
    return pa.concat_tables(tables)


def test_small_files_share_a_unit_in_their_order(tmp_path: Path) -> None:
    small_files(tmp_path, [f"{number:03d}.parquet" for number in range(100)])
    corpus = Corpus.open(str(tmp_path))
    units = corpus.shared_units(40)
    assert [unit.num_rows for unit in units] == [40, 40, 20]
    assert read(corpus, units).equals(read(corpus, corpus.units(40)))
    assert [unit.id for unit in units] == sorted(unit.id for unit in units)
    assert [Unit.of(unit.text()) for unit in units] == units
    assert units[1].place(0) == ("040.parquet", 0)
    assert units[1].place(39) == ("079.parquet", 0)


def test_a_file_shares_only_where_it_fits_whole_and_has_the_same_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_files(tmp_path, ["a.parquet", "b.parquet"], rows=3)
    small_files(tmp_path, ["c.parquet"], rows=25)
    small_files(tmp_path, ["d.parquet", "e.parquet"], rows=9)
    write(tmp_path / "f.parquet", [{"id": "f", "place": 0.5}])
    pq.write_table(
        pa.table({"id": pa.array([], pa.string()), "place": pa.array([], pa.float64())}), tmp_path / "g.parquet"
    )
    corpus = Corpus.open(str(tmp_path))
    found = [([part.name[0] for part in unit.files], unit.num_rows) for unit in corpus.shared_units(10)]
    assert found == [
        (["a", "b"], 6),
        (["c"], 8),
        (["c"], 8),
        (["c"], 9),
        (["d"], 9),
        (["e"], 9),
        (["f", "g"], 1),
    ]
    monkeypatch.setattr(files, "MAX_UNIT_BYTES", 1)
    assert {len(unit.files) for unit in corpus.shared_units(1)} == {1}


def test_a_file_of_a_unit_that_changed_is_its_error(tmp_path: Path) -> None:
    small_files(tmp_path, ["a.parquet", "b.parquet", "c.parquet"])
    corpus = Corpus.open(str(tmp_path))
    (unit,) = corpus.shared_units(10)
    write(tmp_path / "b.parquet", [{"id": "other", "place": 1}] * 3)
    ((_, failed),) = UnitReader(corpus.filesystem).read([unit])
    assert isinstance(failed, CorpusError)
    assert "b.parquet changed while" in str(failed)


def test_units_of_several_texts_read_like_each_by_itself(tmp_path: Path) -> None:
    for number in range(6):
        rows = [{"id": number, "text": f"row {row}"} for row in range(number + 1)]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    corpus = Corpus.open(str(tmp_path))
    units = corpus.shared_units(8)
    assert [len(unit.files) for unit in units] == [3, 1, 1, 1]
    assert read(corpus, units).equals(read(corpus, corpus.units(8)))


def begin(tmp_path: Path) -> tuple[Corpus, list[Unit]]:
    """Plan and begin a run as jobs do."""
    ledger = Ledger(str(tmp_path / "out"))
    plan = ledger.plan()
    corpus = Corpus.open(str(tmp_path / "in"), plan=plan)
    units = corpus.shared_units(40, plan.shared)
    ledger.done(units)
    ledger.begin({"identity": {}}, Plan.of(corpus, units, shares=plan.shared is not None))
    for unit, table in UnitReader(corpus.filesystem).read(units):
        assert isinstance(table, pa.Table)
        ledger.commit(unit, table, UnitStats(rows=unit.num_rows))
    return corpus, units


def test_files_that_come_later_leave_the_units_before_them_alone(tmp_path: Path) -> None:
    small_files(tmp_path / "in", [f"{number}b.parquet" for number in range(5)])
    small_files(tmp_path / "in", ["9.parquet"], rows=39)
    _, before = begin(tmp_path)
    assert [len(unit.files) for unit in before] == [5, 1]
    small_files(tmp_path / "in", ["0a.parquet", "3c.parquet", "3d.parquet"])
    corpus, units = begin(tmp_path)
    assert {unit.id for unit in before} < {unit.id for unit in units}
    assert sorted(read(corpus, units)["id"].to_pylist()) == sorted(read(corpus, corpus.units(1))["id"].to_pylist())
    assert begin(tmp_path)[1] == units
    (tmp_path / "in" / "1b.parquet").unlink()
    with pytest.raises(OutputError, match="changed or gone"):
        begin(tmp_path)


def test_a_folder_begun_by_an_earlier_version_has_a_unit_for_each_file(tmp_path: Path) -> None:
    small_files(tmp_path / "in", ["a.parquet", "b.parquet"])
    Ledger(str(tmp_path / "out")).begin({"identity": {}})
    for _ in range(2):
        assert [len(unit.files) for unit in begin(tmp_path)[1]] == [1, 1]


def test_a_restart_reads_a_text_only_where_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        (tmp_path / "in" / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n' * 50)
    first, units = begin(tmp_path)
    read_again: list[str] = []

    def noted(stream: pa.NativeFile, *, name: str) -> FileContent:
        read_again.append(name)
        return scan_lines(stream, name=name)

    monkeypatch.setattr(files, "scan_lines", noted)
    assert begin(tmp_path) == (first, units)
    assert read_again == []
    (tmp_path / "in" / "c.jsonl").write_text('{"text": "c"}\n')
    begin(tmp_path)
    assert [Path(name).name for name in read_again] == ["c.jsonl"]


def test_a_plan_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    small_files(tmp_path / "in", ["a.parquet"])
    begin(tmp_path)
    (tmp_path / "out" / "_plan.json").write_text("{}")
    with pytest.raises(OutputError, match="how the input is cut"):
        begin(tmp_path)


def test_small_files_of_a_store_are_read_several_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"id": 1}])
    with object_store(monkeypatch) as store:
        assert isinstance(store, Store)
        for number in range(30):
            store.put(f"bucket/in/{number:02d}.parquet", path.read_bytes())
        corpus = Corpus.open("s3://bucket/in")
        (unit,) = corpus.shared_units(256)
        store.requests.clear()
        assert read(corpus, [unit]).num_rows == 30
        assert store.requests == {"HEAD": 30, "GET": 30}
        ledger = Ledger("s3://bucket/out")
        ledger.begin({"identity": {}}, Plan.of(corpus, [unit], shares=True))
        store.requests.clear()
        plan = ledger.plan()
        again = Corpus.open("s3://bucket/in", plan=plan)
        assert again.shared_units(256, plan.shared) == [unit]
        assert store.requests["GET"] + store.requests["HEAD"] <= 6  # for the listing and the plan
