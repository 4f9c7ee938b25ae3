"""Inputs are found, cut into units from footers alone, and streamed back whole."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from jobs.corpus.files import Corpus, Unit, auto_rows_per_unit
from jobs.corpus.reader import UnitReader, read_tasks
from jobs.corpus.storage import filesystem_of
from jobs.errors import CorpusError
from tests.jobs.conftest import write


def rows(first: int, count: int) -> list[dict[str, object]]:
    return [{"id": number, "messages": f"text {number}"} for number in range(first, first + count)]


def read_all(corpus: Corpus, units: list[Unit]) -> list[pa.Table]:
    tables = [table for _, table in UnitReader(corpus.filesystem).read(units)]
    assert all(isinstance(table, pa.Table) for table in tables), tables
    return tables


def test_a_file_a_folder_a_glob_and_a_uri_find_the_same(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", rows(0, 3))
    write(tmp_path / "in" / "deep" / "b.parquet", rows(3, 3))
    write(tmp_path / "in" / "_hidden" / "c.parquet", rows(9, 3))
    write(tmp_path / "in" / ".d.parquet", rows(9, 3))
    (tmp_path / "in" / "notes.txt").write_text("not data")
    folder = tmp_path / "in"
    names = {
        source: [file.name for file in Corpus.open(source).files]
        for source in (
            str(folder),
            f"{folder}/",
            f"{folder}/**/[ab].parquet".replace("[ab]", "?"),
            f"file://{folder}",
            f"file://{folder}/**/*.parquet",
        )
    }
    assert names[str(folder)] == ["a.parquet", "deep/b.parquet"]
    assert names[f"{folder}/"] == names[f"file://{folder}"] == names[str(folder)]
    assert names[f"{folder}/**/?.parquet"] == ["_hidden/c.parquet", "a.parquet", "deep/b.parquet"]
    assert [file.name for file in Corpus.open(f"{folder}/*.parquet").files] == [".d.parquet", "a.parquet"]
    assert [file.name for file in Corpus.open(f"{folder}/a.parquet").files] == ["a.parquet"]


def test_paths_are_taken_from_where_the_user_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in" / "a.parquet", rows(0, 3))
    monkeypatch.chdir(tmp_path)
    assert filesystem_of("in")[1] == filesystem_of("./in/")[1] == str(tmp_path / "in")
    assert Corpus.open("in/*.parquet").num_rows == 3


def test_the_jobs_own_output_is_no_input(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows(0, 3))
    write(tmp_path / "out" / "part-a.parquet", rows(0, 3))
    assert Corpus.open(str(tmp_path), output=str(tmp_path / "out")).num_rows == 3
    (tmp_path / "link").symlink_to(tmp_path / "out")
    assert Corpus.open(str(tmp_path), output=str(tmp_path / "link")).num_rows == 3
    with pytest.raises(CorpusError, match="inside the output folder"):
        Corpus.open(str(tmp_path / "out"), output=str(tmp_path))


@pytest.mark.parametrize("row_group_size", [7, 50, 1000])
@pytest.mark.parametrize("rows_per_unit", [1, 8, 64, 10_000])
def test_units_hold_every_row_once_in_order(tmp_path: Path, row_group_size: int, rows_per_unit: int) -> None:
    for number in range(3):
        write(tmp_path / f"{number}.parquet", rows(number * 130, 130), row_group_size=row_group_size)
    corpus = Corpus.open(str(tmp_path))
    units = corpus.units(rows_per_unit)
    tables = read_all(corpus, units)
    assert [table.num_rows for table in tables] == [unit.num_rows for unit in units]
    assert max(unit.num_rows for unit in units) <= rows_per_unit
    assert pa.concat_tables(tables)["id"].to_pylist() == list(range(390))
    assert len({unit.id for unit in units}) == len(units)


def test_units_end_at_row_groups_where_they_can(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows(0, 100), row_group_size=20)
    units = Corpus.open(str(tmp_path)).units(50)
    assert [unit.num_rows for unit in units] == [40, 40, 20]


def test_any_subset_of_units_reads_right(tmp_path: Path) -> None:
    """As after a restart, when some are done."""
    write(tmp_path / "a.parquet", rows(0, 200), row_group_size=64)
    corpus = Corpus.open(str(tmp_path))
    units = corpus.units(16)
    for chosen in (units[3:5] + units[9:], units[::3], units[-1:]):
        for unit, table in zip(chosen, read_all(corpus, chosen), strict=True):
            assert table["id"].to_pylist() == list(range(unit.first_row, unit.first_row + unit.num_rows))


def test_fat_rows_make_small_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.corpus.files.MAX_UNIT_BYTES", 100_000)
    table = pa.table({"messages": [os.urandom(20_000).hex() for _ in range(20)]})
    pq.write_table(table, tmp_path / "a.parquet", compression="none")
    assert max(unit.num_rows for unit in Corpus.open(str(tmp_path)).units(1000)) <= 3


def test_a_file_without_rows_has_a_unit_of_its_own(tmp_path: Path) -> None:
    pq.write_table(pa.table({"messages": pa.array([], pa.string())}), tmp_path / "a.parquet")
    corpus = Corpus.open(str(tmp_path))
    units = corpus.units(10)
    assert [unit.num_rows for unit in units] == [0]
    assert read_all(corpus, units)[0].schema.names == ["messages"]


def test_broken_files_are_one_error_at_planning(tmp_path: Path) -> None:
    good = write(tmp_path / "good.parquet", rows(0, 50))
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-20])
    (tmp_path / "text.parquet").write_text("id,messages")
    (tmp_path / "empty.parquet").write_bytes(b"")
    with pytest.raises(CorpusError) as caught:
        Corpus.open(str(tmp_path))
    for name in ("cut", "text", "empty"):
        assert f"{tmp_path}/{name}.parquet" in str(caught.value)
    assert "good.parquet" not in str(caught.value)


@pytest.mark.parametrize("source", ["nowhere", "empty", "empty/*.parquet", "gopher://x/y"])
def test_nothing_to_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CorpusError, match=r"does not exist|no Parquet files|gopher"):
        Corpus.open(source)


def test_a_file_that_changes_under_the_job_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows(0, 50))
    corpus = Corpus.open(str(tmp_path))
    units = corpus.units(10)
    write(path, rows(100, 60))
    results = [result for _, result in UnitReader(fs.LocalFileSystem()).read(units)]
    assert len(results) == len(units)
    assert all(isinstance(result, CorpusError) and "changed" in str(result) for result in results)


def test_a_page_that_cannot_be_read_is_an_error_of_its_units(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows(0, 5000), row_group_size=1000)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = b"\xff" * 2000
    path.write_bytes(content)
    corpus = Corpus.open(str(tmp_path))
    units = corpus.units(1000)
    results = [result for _, result in UnitReader(corpus.filesystem).read(units)]
    assert units == [unit for unit, _ in UnitReader(corpus.filesystem).read(units)]
    assert any(isinstance(result, CorpusError) and "cannot be read from row" in str(result) for result in results)


def test_unit_sizes_grow_with_the_corpus() -> None:
    assert auto_rows_per_unit(0) == auto_rows_per_unit(4_624) == 256
    assert auto_rows_per_unit(10_000_000) == 4096
    assert auto_rows_per_unit(10**9) == 16384


def test_odd_names_are_found_as_paths_and_uris(tmp_path: Path) -> None:
    write(tmp_path / "数 据" / "a b.parquet", rows(0, 3))
    for source in (str(tmp_path / "数 据"), (tmp_path / "数 据").as_uri(), f"file://{tmp_path}/数 据"):
        assert [file.name for file in Corpus.open(source).files] == ["a b.parquet"]


def test_a_loop_of_links_repeats_no_row(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.parquet", rows(0, 3))
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    assert [file.name for file in Corpus.open(str(tmp_path / "in")).files] == ["a.parquet"]


def test_files_in_folders_make_units_that_sort_like_the_files(tmp_path: Path) -> None:
    for name in ("a-b", "a/b", "a/c"):
        write(tmp_path / f"{name}.parquet", rows(0, 20), row_group_size=5)
    ids = [unit.id for unit in Corpus.open(str(tmp_path)).units(5)]
    stems = [identity.rsplit("-", 2)[0] for identity in ids]
    assert sorted(set(stems)) == ["a--b", "a--c", "a-b"]


def test_dictionaries_inside_lists_read_across_row_groups(tmp_path: Path) -> None:
    words = pa.array(["user", "assistant"] * 5).dictionary_encode()
    messages = pa.ListArray.from_arrays(
        pa.array(range(0, 11, 2), pa.int32()),
        pa.StructArray.from_arrays([words, words.cast(pa.string())], ["role", "content"]),
    )
    pq.write_table(pa.table({"messages": messages}), tmp_path / "a.parquet", row_group_size=2)
    corpus = Corpus.open(str(tmp_path))
    (table,) = read_all(corpus, corpus.units(100))
    assert table["messages"].to_pylist() == messages.to_pylist()


def test_fat_rows_are_not_read_by_the_thousand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.corpus.files.MAX_UNIT_BYTES", 5_000_000)
    whole = pa.table({"messages": [os.urandom(50_000).hex() for _ in range(300)]})
    pq.write_table(whole, tmp_path / "a.parquet", compression="none", use_dictionary=False, write_batch_size=8)
    del whole
    corpus = Corpus.open(str(tmp_path))
    before, most = pa.total_allocated_bytes(), 0
    for _, table in UnitReader(corpus.filesystem).read(corpus.units(1000)):
        assert isinstance(table, pa.Table)
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 45_000_000  # 60 MB when read by 4,096 rows


@pytest.mark.parametrize("max_tasks", [1, 3, 100])
def test_read_tasks_never_begin_inside_a_row_group_that_another_reads(tmp_path: Path, max_tasks: int) -> None:
    write(tmp_path / "a.parquet", rows(0, 100), row_group_size=20)
    write(tmp_path / "b.parquet", rows(0, 64), row_group_size=64)
    units = Corpus.open(str(tmp_path)).units(8)
    tasks = read_tasks(units, max_tasks)
    assert [unit for task in tasks for unit in task] == units
    assert not any(task[0].splits_group for task in tasks)
    assert len(tasks) <= max_tasks + 1
    done_before = read_tasks(units[2:], max_tasks)
    assert done_before[0][0] == units[2]
