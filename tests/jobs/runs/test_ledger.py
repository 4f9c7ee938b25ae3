"""Commits are whole, restarts find what is done, and foreign work is refused."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.dataset import dataset

from jobs.corpus.files import Corpus, Unit
from jobs.errors import OutputError
from jobs.options import ScoringOptions
from jobs.runs.ledger import Ledger, UnitStats, recorded
from jobs.scoring.remembered import write_scores
from tests.jobs.conftest import write

IDENTITY = {"model_fingerprint": "abc", "dtype": "float32", "truncation": "error"}
TABLE = pa.table({"id": list(range(10)), "score": [0.5] * 10})


@pytest.fixture
def units(tmp_path: Path) -> list[Unit]:
    write(tmp_path / "in" / "a.parquet", [{"id": number} for number in range(30)])
    return Corpus.open(str(tmp_path / "in")).units(10)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return begin(tmp_path / "out")


def begin(folder: Path) -> Ledger:
    """A job's first steps in an output folder."""
    ledger = Ledger(str(folder))
    ledger.check(IDENTITY, [])
    ledger.begin({"identity": IDENTITY, "status": "running"})
    return ledger


def commit(ledger: Ledger, unit: Unit, table: pa.Table = TABLE) -> UnitStats:
    stats = UnitStats(rows=table.num_rows, errors=1, tokens=70, seconds=0.5)
    ledger.commit(unit, table, stats)
    return stats


def test_committed_units_are_found_with_their_counts(ledger: Ledger, units: list[Unit]) -> None:
    assert ledger.done(units) == {}
    stats = commit(ledger, units[1])
    assert ledger.done(units) == {units[1].id: stats}
    assert pq.read_table(ledger.path(units[1])).equals(TABLE)


def test_a_commit_twice_is_one_part(ledger: Ledger, units: list[Unit]) -> None:
    commit(ledger, units[0])
    commit(ledger, units[0])
    assert len(ledger.done(units)) == 1
    assert len(list(Path(ledger.folder).glob("part-*"))) == 1


def test_what_is_no_whole_part_is_not_done(ledger: Ledger, units: list[Unit]) -> None:
    commit(ledger, units[0])
    path = Path(ledger.path(units[0]))
    path.write_bytes(path.read_bytes()[:-10])
    pq.write_table(TABLE, ledger.path(units[1]))
    assert ledger.done(units) == {}


def test_a_table_with_rows_lost_is_not_committed(ledger: Ledger, units: list[Unit]) -> None:
    with pytest.raises(OutputError, match="has 10 rows but 9 came back"):
        commit(ledger, units[0], TABLE.slice(1))
    assert ledger.done(units) == {}


def test_a_restart_with_the_same_settings_goes_on(ledger: Ledger, units: list[Unit]) -> None:
    commit(ledger, units[0])
    (Path(ledger.work_folder) / "half").write_text("left by a killed run")
    again = Ledger(ledger.folder)
    assert list(again.check(IDENTITY, units)) == [units[0].id]
    again.begin({"identity": IDENTITY})
    assert [path.name for path in (Path(ledger.folder) / "_rayward_work").iterdir()] == [again.run]


def test_a_restart_with_other_settings_is_refused_and_names_them(ledger: Ledger, units: list[Unit]) -> None:
    with pytest.raises(OutputError, match=r"(?s)dtype: 'float32' there, 'bfloat16' now.*--output") as caught:
        ledger.check(IDENTITY | {"dtype": "bfloat16"}, units)
    assert "truncation" not in str(caught.value)


def test_a_job_whose_folder_was_taken_over_stops(ledger: Ledger, units: list[Unit], tmp_path: Path) -> None:
    other = Ledger(ledger.folder)
    other.begin({"identity": IDENTITY})
    with pytest.raises(OutputError, match="another job has taken over"):
        commit(ledger, units[0])
    ledger.stop({"identity": IDENTITY, "status": "stopped"})
    commit(other, units[0])
    manifest = other.read_manifest()
    assert manifest is not None
    assert manifest["run"] == other.run


def test_nothing_of_anybody_elses_is_touched(tmp_path: Path) -> None:
    for name in ("_tmp", "_attempts", "_rayward_work"):
        (tmp_path / "out" / name).mkdir(parents=True)
        (tmp_path / "out" / name / "precious").write_text("mine")
    ledger = begin(tmp_path / "out")
    ledger.finish({"identity": IDENTITY})
    assert len(list((tmp_path / "out").rglob("precious"))) == 3


def test_parts_of_inputs_that_changed_are_refused(ledger: Ledger, units: list[Unit], tmp_path: Path) -> None:
    commit(ledger, units[0])
    write(tmp_path / "in" / "a.parquet", [{"id": number} for number in range(40)])
    with pytest.raises(OutputError, match="1 unit files .* changed or gone"):
        ledger.done(Corpus.open(str(tmp_path / "in")).units(10))


def test_new_input_files_are_welcome(ledger: Ledger, units: list[Unit], tmp_path: Path) -> None:
    commit(ledger, units[0])
    write(tmp_path / "in" / "0.parquet", [{"id": number} for number in range(10)])
    assert len(ledger.done(Corpus.open(str(tmp_path / "in")).units(10))) == 1


def test_parts_without_a_manifest_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "out" / "part-x.parquet", [{"id": 1}])
    with pytest.raises(OutputError, match="1 unit files but no .manifest"):
        Ledger(str(tmp_path / "out")).check(IDENTITY, [])


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"identity": null}', "3"])
def test_a_broken_manifest_is_an_error(ledger: Ledger, content: str) -> None:
    Path(ledger.manifest_path).write_text(content)
    with pytest.raises(OutputError, match=r"_manifest\.json (cannot be read|is not a manifest)"):
        ledger.check(IDENTITY, [])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB; mounting one takes root."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["mount", "-o", "remount,rw", place], check=True)
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_is_an_error_and_leaves_what_was_committed(small_disk: Path, units: list[Unit]) -> None:
    ledger = begin(small_disk / "out")
    commit(ledger, units[0])
    big = pa.table({"id": [os.urandom(20_000).hex() for _ in range(10)]})
    with pytest.raises(OutputError, match="cannot be written.*No space left"):
        commit(ledger, units[1], big)
    assert list(ledger.done(units)) == [units[0].id]
    assert list(Path(ledger.work_folder).iterdir()) == []


def test_a_read_only_folder_is_an_error_before_anything_runs(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(OutputError, match="cannot be written.*Read-only"):
        begin(small_disk / "out")


def test_an_output_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="cannot be"):
        begin(tmp_path / "out")


def test_the_facts_of_a_run_are_in_its_manifest_from_the_start(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "out"))
    facts = {"model": {"name": "tiny"}}
    with recorded(ledger, identity={}, arguments=ScoringOptions(), facts=facts) as results:
        begun = ledger.read_manifest() or {}
        assert (begun["status"], begun["model"]) == ("running", {"name": "tiny"})
        results["rows"] = 3
    ended = ledger.read_manifest() or {}
    assert (ended["status"], ended["model"], ended["rows"]) == ("complete", {"name": "tiny"}, 3)


def test_sources_that_are_not_installed_have_no_version(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.version

    def lacking(name: str) -> str:
        if name == "rayward":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", lacking)
    with recorded(ledger, identity={"a": 1}, arguments=ScoringOptions()):
        pass
    manifest = json.loads((Path(ledger.folder) / "_manifest.json").read_text())
    assert manifest["versions"]["rayward"] is None
    assert manifest["versions"]["torch"] == installed("torch")


def test_other_libraries_read_the_output_folder_as_it_is(ledger: Ledger, units: list[Unit], tmp_path: Path) -> None:
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    for unit in units:
        write_scores(ledger, unit, pa.table({"key": [b"k"], "outputs": [[1.0]]}))
        commit(ledger, unit)
    ledger.finish({"identity": IDENTITY})
    found = datasets.load_dataset("parquet", data_files=f"{ledger.folder}/*.parquet", cache_dir=str(tmp_path / "cache"))
    assert found["train"].num_rows == len(pandas.read_parquet(ledger.folder)) == 30
    assert dataset(ledger.folder).count_rows() == 30
