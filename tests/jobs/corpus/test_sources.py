"""Several inputs, columns that folders stand for, and splits that stand side by side."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
import pytest

from jobs.corpus.files import Corpus
from jobs.corpus.reader import UnitReader
from jobs.corpus.sources import Source
from jobs.corpus.storage import identity_of
from jobs.errors import CorpusError
from jobs.runs.ledger import UnitStats
from jobs.score import ScoreConfig, main
from tests.jobs.conftest import write
from tests.jobs.object_store import object_store


def read(corpus: Corpus, columns: list[str] | None = None) -> pa.Table:
    tables = [table for _, table in UnitReader(corpus.filesystem, columns=columns).read(corpus.shared_units(100))]
    assert all(isinstance(table, pa.Table) for table in tables), tables
    return pa.concat_tables(tables)


def test_two_inputs_are_one_corpus_in_the_order_given(tmp_path: Path) -> None:
    for folder in ("b", "a"):
        write(tmp_path / folder / "x.parquet", [{"id": folder}])
    source = Source((str(tmp_path / "b"), str(tmp_path / "a" / "*.parquet")))
    corpus = Corpus.open(source)
    assert [file.name for file in corpus.files] == ["0/x.parquet", "1/x.parquet"]
    assert read(corpus)["id"].to_pylist() == ["b", "a"]
    assert source.identity == {"input": [str(tmp_path / "b"), str(tmp_path / "a" / "*.parquet")]}
    assert Source.of(str(tmp_path)).identity == {"input": identity_of(str(tmp_path))}


def test_inputs_that_share_a_file_or_no_store_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a" / "x.parquet", [{"id": 1}])
    with pytest.raises(CorpusError, match=r"x\.parquet is in two of the inputs"):
        Corpus.open(Source((str(tmp_path), str(tmp_path / "a"))))
    with object_store(monkeypatch) as store:
        store.put("bucket/in/a.parquet", (tmp_path / "a" / "x.parquet").read_bytes())
        with pytest.raises(CorpusError, match="are on different stores"):
            Corpus.open(Source((str(tmp_path / "a"), "s3://bucket/in")))


@pytest.mark.parametrize(
    "words",
    [["--input", "a", "--output", "o", "--input=b"], ["--input", "a", "b", "--output", "o"]],
)
def test_an_input_may_be_named_twice(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ScoreConfig] = []

    def run(config: ScoreConfig) -> UnitStats:
        seen.append(config)
        return UnitStats()

    monkeypatch.setattr("jobs.score.run", run)
    assert main([*words, "--model", "tiny"]) == 0
    assert seen[0].input == ("a", "b")
    assert seen[0].output == "o"


def test_folders_with_values_become_columns(tmp_path: Path) -> None:
    write(tmp_path / "lang=en" / "year=2024" / "a.parquet", [{"id": 1}, {"id": 2}])
    write(tmp_path / "lang=z%20h" / "year=2025" / "a.parquet", [{"id": 3}])
    write(tmp_path / "lang=__HIVE_DEFAULT_PARTITION__" / "b.parquet", [{"id": 4}])
    corpus = Corpus.open(str(tmp_path))
    table = read(corpus)
    assert table.schema.equals(corpus.schemas[0])
    assert table.schema.types == [pa.int64(), pa.string(), pa.int64()]
    rows = {row["id"]: (row["lang"], row["year"]) for row in table.to_pylist()}
    assert rows == {1: ("en", 2024), 2: ("en", 2024), 3: ("z h", 2025), 4: (None, None)}
    assert read(corpus, ["lang", "id"]).column_names == ["lang", "id"]
    assert len(corpus.shared_units(100)) == 1
    assert corpus.identity == {"partition_columns": {"lang": "string", "year": "int64"}}
    plain = Corpus.open(Source((str(tmp_path),), partition_columns=False))
    assert read(plain).column_names == ["id"]
    assert plain.identity == {}


def test_a_column_of_the_file_goes_before_that_of_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "lang=en" / "a.parquet", [{"id": 1, "lang": "EN"}])
    corpus = Corpus.open(str(tmp_path))
    assert read(corpus).to_pylist() == [{"id": 1, "lang": "EN"}]
    assert corpus.identity == {}


def test_one_split_of_a_folder_may_be_chosen(tmp_path: Path) -> None:
    for place, name in enumerate(("train/a", "train/b", "test/a", "dev-a", "gen_prefs-0-of-1")):
        write(tmp_path / f"{name}.parquet", [{"id": place}])
    for split, ids in (("train", [0, 1]), ("test", [2]), ("validation", [3]), ("gen_prefs", [4])):
        chosen = Source((str(tmp_path),), split=split)
        assert sorted(read(Corpus.open(chosen))["id"].to_pylist()) == ids
        assert chosen.identity["split"] == split
    with pytest.raises(CorpusError, match="named as one of other; splits there: test, train, validation"):
        Corpus.open(Source((str(tmp_path),), split="other"))
    with pytest.raises(CorpusError, match="--config is for datasets of the Hub"):
        Corpus.open(Source((str(tmp_path),), config="en"))


def test_several_splits_are_said_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001", "other"):
        write(tmp_path / "data" / f"{name}.parquet", [{"id": 1}])
    with caplog.at_level(logging.WARNING):
        Corpus.open(str(tmp_path))
    assert "several splits, test (1 file) and train (2 files): all are read" in caplog.text
    caplog.clear()
    Corpus.open(f"{tmp_path}/data/train-*.parquet")
    assert caplog.text == ""
