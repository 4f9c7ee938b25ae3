"""Corpora and outputs on an object store, against a stand-in for its HTTP API."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.corpus import storage
from jobs.corpus.files import Corpus
from jobs.corpus.reader import UnitReader
from jobs.corpus.storage import filesystem_of, identity_of
from jobs.errors import CorpusError, OutputError
from jobs.pairs import PairsConfig
from jobs.runs.ledger import Ledger, UnitStats
from jobs.scoring.scored_corpus import ScoredInput
from tests.jobs.object_store import SECRET, Store, object_store

TABLE = pa.table({"prompt": ["a", "b"], "response": ["c", "d"], "score": [1.0, 2.0]})


def parquet(table: pa.Table = TABLE) -> bytes:
    content = io.BytesIO()
    pq.write_table(table, content)
    return content.getvalue()


def one_row(number: int) -> pa.Table:
    return pa.table({"id": [number], "text": [f"row {number}"]})


def arrow(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


SMALL_FILES: dict[str, Callable[[int], bytes]] = {
    "parquet": lambda number: parquet(one_row(number)),
    "arrow": lambda number: arrow(one_row(number)),
    "jsonl": lambda number: f'{{"id": {number}, "text": "row {number}"}}\n'.encode(),
    "jsonl.gz": lambda number: gzip.compress(SMALL_FILES["jsonl"](number)),
    "csv": lambda number: f"id,text\n{number},row {number}\n".encode(),
}


def put_small_files(store: Store, number: int, suffix: str = "parquet") -> None:
    for place in range(number):
        store.put(f"bucket/small/{place:04d}.{suffix}", SMALL_FILES[suffix](place))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with object_store(monkeypatch) as store:
        store.put("bucket/in/a.parquet", parquet())
        yield store


def units_read(source: str) -> list[pa.Table | CorpusError]:
    corpus = Corpus.open(source)
    return [table for _, table in UnitReader(corpus.filesystem).read(corpus.units(1))]


def test_listings_with_milliseconds_are_of_the_same_files(store: Store) -> None:
    assert [table.num_rows for table in units_read("s3://bucket/in") if isinstance(table, pa.Table)] == [1, 1]
    listed, alone = Corpus.open("s3://bucket/in").files[0], Corpus.open("s3://bucket/in/a.parquet").files[0]
    assert listed.fingerprint == alone.fingerprint


def test_planning_asks_nothing_that_the_listing_told(store: Store) -> None:
    for number in range(20):
        store.put(f"bucket/in/{number}.parquet", parquet())
    store.requests.clear()
    assert Corpus.open("s3://bucket/in").num_rows == 42
    assert store.requests["HEAD"] <= 1
    assert store.requests["GET"] <= 21 + 2


def test_what_was_deleted_or_changed_is_told_apart_and_with_its_scheme(store: Store) -> None:
    corpus = Corpus.open("s3://bucket/in")
    units = corpus.units(1)
    store.put("bucket/in/a.parquet", parquet() + b"more")
    (_, changed), _ = UnitReader(corpus.filesystem).read(units)
    assert str(changed).startswith("s3://bucket/in/a.parquet changed while")
    del store.objects["bucket/in/a.parquet"]
    (_, gone), _ = UnitReader(corpus.filesystem).read(units)
    assert str(gone) == "s3://bucket/in/a.parquet was deleted while the job was running; restore it and restart"


@pytest.mark.parametrize(
    "source",
    [
        "s3://bucket/an y/数 [1]/a.parquet",
        "s3://bucket/an%20y/*/a.parquet",
        "s3://bucket/*/%E6%95%B0 [1]/*.parquet",
        "s3://bucket/an y/*%5B1]/a.parquet",
        "s3://bucket/an y",
        "s3://bucket/an y/?region=eu-west-1",
    ],
)
def test_uris_are_read_encoded_or_not(store: Store, source: str) -> None:
    store.put("bucket/an y/数 [1]/a.parquet", parquet())
    assert [file.path for file in Corpus.open(source).files] == ["bucket/an y/数 [1]/a.parquet"]


def test_a_percent_sign_stands_for_itself_where_nothing_is_encoded(store: Store) -> None:
    store.put("bucket/100%/a.parquet", parquet())
    assert Corpus.open("s3://bucket/100%").num_rows == Corpus.open("s3://bucket/100%25").num_rows == 2


@pytest.mark.parametrize("source", ["s3://bucket//in", "s3://bucket/in//a.parquet", "s3://bucket/in//*"])
def test_folders_without_a_name_are_an_error(store: Store, source: str) -> None:
    with pytest.raises(CorpusError, match="has no name"):
        Corpus.open(source)


@pytest.mark.parametrize("output", ["s3://bucket/in?region=eu-west-1", "s3://bucket/in/", "s3://bucket?scheme=http"])
def test_options_do_not_hide_that_the_input_is_in_the_output(store: Store, output: str) -> None:
    with pytest.raises(CorpusError, match="inside the output folder"):
        Corpus.open("s3://bucket/in", output=output)


def test_options_do_not_hide_that_the_output_is_in_the_input(store: Store) -> None:
    store.put("bucket/in/out/part-a.parquet", parquet())
    assert Corpus.open("s3://bucket/in", output="s3://bucket/in/out?region=eu-west-1").num_rows == 2
    assert Corpus.open("s3://bucket/in", output="s3://bucket/in/out?endpoint_override=elsewhere:1").num_rows == 4


@pytest.mark.parametrize(
    "location",
    [
        f"s3://key:{SECRET}@bucket/in",
        f"s3://key:{SECRET}%2F@bucket/*.parquet",
        f"abfs://container@account/in?client_secret={SECRET}",
        f"s3://bucket/in?endpoint_override=http://key:{SECRET}@host",
    ],
)
def test_secrets_in_uris_are_refused_and_not_repeated(location: str) -> None:
    for use in (Corpus.open, Ledger):
        with pytest.raises((CorpusError, OutputError), match="password or key") as caught:
            use(location)
        assert SECRET not in str(caught.value)
    assert SECRET not in identity_of(location)


def test_one_place_is_one_identity() -> None:
    same = ["s3://b/an x", "s3://b/an%20x/", "s3://b/an x/?region=eu-west-1", "s3://k:s@b/an x"]
    assert {identity_of(location) for location in same} == {"s3://b/an x"}


def test_a_folder_begun_by_an_earlier_version_resumes(store: Store) -> None:
    before = Ledger("s3://bucket/out/")
    before.begin({"identity": {"input": f"s3://key:{SECRET}@bucket/in/?region=us-east-1"}})
    assert Ledger("s3://bucket/out").check({"input": identity_of("s3://bucket/in")}, []) == {}
    with pytest.raises(OutputError, match="other settings") as caught:
        Ledger("s3://bucket/out").check({"input": identity_of("s3://bucket/else")}, [])
    assert SECRET not in str(caught.value)


def test_a_missing_bucket_and_a_wrong_key_show_before_anything_runs(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PairsConfig(input="s3://bucket/in", output="s3://buckte/out")
    with pytest.raises(OutputError, match="s3://buckte/out: there is no bucket buckte"):
        ScoredInput(options)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "wrong")
    with pytest.raises(OutputError, match="s3://bucket/out: its bucket bucket cannot be used"):
        Ledger("s3://bucket/out?region=eu-west-2")


def test_a_job_whose_folder_was_taken_over_stops_at_its_next_commit(store: Store, tmp_path: Path) -> None:
    corpus = Corpus.open("s3://bucket/in")
    (unit,) = corpus.units(10)
    ledgers = [Ledger("s3://bucket/out") for _ in range(2)]
    for ledger in ledgers:
        ledger.begin({"identity": {}})
    first, second = ledgers
    taken_over = "another job has taken over s3://bucket/out; this one stops"
    with pytest.raises(OutputError, match=taken_over):
        first.commit(unit, TABLE, UnitStats(rows=2))
    with pytest.raises(OutputError, match=taken_over):
        first.finish({"identity": {}})
    assert second.done([unit]) == {}
    second.commit(unit, TABLE, UnitStats(rows=2))
    second.finish({"identity": {}})
    assert list(second.done([unit])) == [unit.id]
    assert not any("_rayward_work" in path for path in store.objects)


def test_messages_name_the_scheme(store: Store) -> None:
    store.put("bucket/bad/a.parquet", b"no Parquet")
    for source, message in {
        "s3://bucket/bad": "s3://bucket/bad/a.parquet",
        "s3://bucket/none": "input s3://bucket/none does not exist",
    }.items():
        with pytest.raises(CorpusError, match=message):
            Corpus.open(source)
    assert filesystem_of("s3://bucket/in/")[1] == "bucket/in"


def shared(corpus: Corpus, rows_per_unit: int) -> list[pa.Table | CorpusError]:
    """The units that small files share, read."""
    return [table for _, table in UnitReader(corpus.filesystem).read(corpus.shared_units(rows_per_unit))]


@pytest.mark.parametrize("suffix", SMALL_FILES)
def test_a_small_file_is_read_by_a_look_at_it_and_one_request(
    store: Store, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    put_small_files(store, 7, suffix)
    corpus = Corpus.open("s3://bucket/small")
    store.requests.clear()
    (table,) = shared(corpus, 100)
    assert store.requests == {"HEAD": 7, "GET": 7}
    assert isinstance(table, pa.Table)
    assert table.equals(pa.concat_tables(map(one_row, range(7))))
    monkeypatch.setattr(storage, "SMALL_FILE_BYTES", 8)
    store.requests.clear()
    assert shared(corpus, 100) == [table]
    assert store.requests["HEAD"] == 7


def test_small_texts_are_planned_by_a_look_and_one_request_several_at_once(store: Store) -> None:
    put_small_files(store, 60, "jsonl")
    store.requests.clear()
    store.latency_s = 0.05
    assert Corpus.open("s3://bucket/small").num_rows == 60
    assert store.requests["HEAD"] <= 60 + 1
    assert store.requests["GET"] <= 60 + 2
    assert store.most_at_once >= 20


def test_of_a_large_file_only_the_columns_that_are_wanted_are_read(store: Store) -> None:
    noise = np.random.default_rng(0).integers(1 << 60, size=500_000)
    store.put("bucket/large/a.parquet", parquet(pa.table({"noise": noise, "one": pa.repeat(1, len(noise))})))
    corpus = Corpus.open("s3://bucket/large")
    store.sent_bytes = 0
    read = [table for _, table in UnitReader(corpus.filesystem, columns=["one"]).read(corpus.units(1 << 20))]
    assert sum(len(table) for table in read if isinstance(table, pa.Table)) == len(noise)
    assert store.sent_bytes < storage.SMALL_FILE_BYTES


def test_a_thousand_files_of_one_row_are_three_thousand_requests(store: Store) -> None:
    put_small_files(store, 1000)
    store.requests.clear()
    corpus = Corpus.open("s3://bucket/small")
    assert store.requests["GET"] <= 1000 + 2
    assert store.requests["HEAD"] <= 1
    store.requests.clear()
    tables = shared(corpus, 256)
    assert [table.num_rows for table in tables if isinstance(table, pa.Table)] == [256, 256, 256, 232]
    assert store.requests == {"HEAD": 1000, "GET": 1000}


def test_as_many_small_files_wait_at_once_as_the_client_has_connections(store: Store) -> None:
    put_small_files(store, 100)
    corpus = Corpus.open("s3://bucket/small")
    store.latency_s, store.most_at_once = 0.05, 0
    (table,) = shared(corpus, 256)
    assert isinstance(table, pa.Table)
    assert table["id"].to_pylist() == list(range(100))
    assert 20 <= store.most_at_once <= storage.REMOTE_AT_ONCE


@pytest.mark.parametrize("suffix", SMALL_FILES)
def test_a_small_file_that_was_deleted_or_changed_is_the_error_of_its_unit(store: Store, suffix: str) -> None:
    put_small_files(store, 5, suffix)
    corpus = Corpus.open("s3://bucket/small")
    path = f"bucket/small/0003.{suffix}"
    content, changed = store.objects[path]
    store.objects[path] = content, changed + 1
    (error,) = shared(corpus, 100)
    assert str(error) == f"s3://{path} changed while the job was running; start again with a new --output"
    del store.objects[path]
    (error,) = shared(corpus, 100)
    assert str(error) == f"s3://{path} was deleted while the job was running; restore it and restart"


def test_a_compressed_text_is_not_a_request_for_every_64_kib(store: Store) -> None:
    noise = np.random.default_rng(0)
    lines = [f'{{"id": {row}, "text": "{noise.bytes(1000).hex()}"}}\n' for row in range(2000)]
    store.put("bucket/large/a.jsonl.gz", gzip.compress("".join(lines).encode()))
    assert len(store.objects["bucket/large/a.jsonl.gz"][0]) > 2 * storage.SMALL_FILE_BYTES
    corpus = Corpus.open("s3://bucket/large")
    assert store.requests["GET"] <= 3 + 2
    store.requests.clear()
    tables = [table for _, table in UnitReader(corpus.filesystem).read(corpus.units(1 << 20))]
    assert sum(len(table) for table in tables if isinstance(table, pa.Table)) == 2000
    assert store.requests["GET"] <= 2
