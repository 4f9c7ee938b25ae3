"""Columns that a job does not know come out as they went in: values, types and what the schema says of them."""

from __future__ import annotations

import datetime as dt
import decimal
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.corpus.features import described
from jobs.corpus.files import Corpus
from jobs.corpus.reader import UnitReader
from jobs.errors import CorpusError
from jobs.runs.ledger import Ledger, UnitStats
from jobs.runs.pipeline import _parcel, _table

DATES = [dt.datetime(9999, 12, 31), None, dt.datetime(1, 1, 1)]


def passed(folder: Path, *, rows_per_unit: int = 2) -> pa.Table:
    """The corpus in `folder` as a job that adds a score writes it."""
    corpus = Corpus.open(str(folder))
    ledger = Ledger(str(folder.parent / "out"))
    ledger.begin({"identity": {}})
    paths = []
    for unit, table in UnitReader(corpus.filesystem).read(corpus.units(rows_per_unit)):
        if isinstance(table, CorpusError):
            raise table
        table = _table(_parcel(unit, table=table))  # as it travels between processes
        table = table.append_column("score", pa.array([0.5] * table.num_rows, pa.float32()))
        ledger.commit(unit, table, UnitStats(rows=unit.num_rows))
        paths.append(ledger.path(unit))
    return pa.concat_tables([pq.read_table(path) for path in paths])


def written(folder: Path, table: pa.Table, **options: Any) -> Path:
    folder.mkdir()
    pq.write_table(table, folder / "a.parquet", row_group_size=3, **options)
    return folder


def tensors() -> pa.Array:
    kind = pa.fixed_shape_tensor(pa.float32(), [2])
    storage = pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]], pa.list_(pa.float32(), 2))
    return pa.ExtensionArray.from_storage(kind, storage)


def every_type() -> pa.Table:
    kinds: list[tuple[pa.DataType, list[Any]]] = [
        *((kind, [1, None, 0, 100]) for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64())),
        *((kind, [1, None, 0, 255]) for kind in (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())),
        (pa.uint64(), [2**64 - 1, None, 0, 1]),
        (pa.bool_(), [True, None, False, True]),
        *((kind, [1.5, None, float("inf"), -0.0]) for kind in (pa.float32(), pa.float64())),
        (pa.float16(), [np.float16(1.5), None, np.float16(0), np.float16(2)]),
        *((kind, ["a", None, "", "\u6570"]) for kind in (pa.string(), pa.large_string(), pa.string_view())),
        *((kind, [b"\xff", None, b"", b"a"]) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
        (pa.binary(2), [b"ab", None, b"cd", b"\0\0"]),
        (pa.date32(), [dt.date(9999, 12, 31), None, dt.date(1, 1, 1), dt.date(2020, 1, 1)]),
        (pa.time32("ms"), [1, None, 3, 4]),
        (pa.time64("us"), [1, None, 3, 4]),
        (pa.time64("ns"), [1, None, 3, 4]),
        *((pa.timestamp(unit), [1000, None, 3000, -1000]) for unit in ("ms", "us", "ns")),
        (pa.timestamp("us", tz="Asia/Tokyo"), [*DATES, dt.datetime(2020, 1, 1)]),
        *((pa.duration(unit), [1, None, 3, -4]) for unit in ("s", "ms", "us", "ns")),
        (pa.decimal128(20, 2), [decimal.Decimal("1.10"), None, decimal.Decimal("-3.25"), decimal.Decimal(0)]),
        (pa.decimal256(60, 3), [decimal.Decimal(1), None, decimal.Decimal(2), decimal.Decimal(3)]),
        (pa.null(), [None] * 4),
        (pa.list_(pa.int16()), [[1, None], None, [], [2]]),
        (pa.large_list(pa.large_string()), [["a", None], None, [], ["b"]]),
        (pa.list_(pa.float32(), 2), [[1.0, 2.0], None, [3.0, 4.0], [5.0, 6.0]]),
        (pa.list_(pa.list_(pa.struct({"x": pa.int8()}))), [[[{"x": 1}], []], None, [], [[None]]]),
        (pa.map_(pa.string(), pa.list_(pa.int32())), [[("a", [1])], None, [], [("b", None)]]),
        (
            pa.struct({"a.b": pa.list_(pa.struct({"c": pa.int8()})), "t": pa.timestamp("us")}),
            [{"a.b": [{"c": 1}], "t": DATES[0]}, None, {"a.b": None, "t": None}, {"a.b": [], "t": DATES[2]}],
        ),
        (pa.uuid(), [b"0" * 16, None, b"1" * 16, b"2" * 16]),
        (pa.json_(), ['{"a":1}', None, "[]", "1"]),
    ]
    columns = {f"{number} {kind}": pa.array(values, kind) for number, (kind, values) in enumerate(kinds)}
    columns["words"] = pa.array(["x", None, "y", "x"]).dictionary_encode()
    columns["ordered"] = pa.DictionaryArray.from_arrays(pa.array([1, 0, None, 1], pa.int8()), ["b", "a"], ordered=True)
    columns["nested words"] = pa.StructArray.from_arrays([columns["words"]], ["w"])
    columns["list of uuid"] = pa.ListArray.from_arrays([0, 1, 1, 2, 4], pa.array([b"0" * 16, None] * 2, pa.uuid()))
    columns["tensor"] = tensors()
    columns["x.y"] = pa.array([1, 2, 3, 4])
    columns[""] = pa.array([1, 2, 3, 4])
    columns["__index_level_0__"] = pa.array([5, 6, 7, 8])
    table = pa.table(columns)
    field = table.schema.field("x.y").with_metadata({"unit": "metres"})
    return table.set_column(table.schema.get_field_index("x.y"), field, table.column("x.y"))


def test_every_arrow_type_comes_out_as_it_went_in(tmp_path: Path) -> None:
    folder = written(tmp_path / "in", every_type())
    before, after = pq.read_table(folder / "a.parquet"), passed(folder)
    assert after.column_names == [*before.column_names, "score"]
    for name in before.column_names:
        assert after.schema.field(name).equals(before.schema.field(name), check_metadata=True), name
        assert after.column(name).combine_chunks().to_pylist() == before.column(name).combine_chunks().to_pylist(), name


@pytest.mark.parametrize("store_schema", [True, False])
def test_old_timestamps_keep_every_date(tmp_path: Path, store_schema: bool) -> None:
    kind = pa.timestamp("us")
    table = pa.table({"at": pa.array(DATES, kind), "list": pa.array([[date] for date in DATES], pa.list_(kind))})
    options: dict[str, Any] = {"use_deprecated_int96_timestamps": True, "store_schema": store_schema}
    assert passed(written(tmp_path / "in", table, **options)).select(["at", "list"]).equals(table)


def test_old_timestamps_keep_nanoseconds(tmp_path: Path) -> None:
    table = pa.table({"at": pa.array([1, None, -1, 5000], pa.timestamp("ns"))})
    assert passed(written(tmp_path / "in", table, use_deprecated_int96_timestamps=True)).select(["at"]).equals(table)


def test_old_timestamps_that_no_unit_holds_are_refused(tmp_path: Path) -> None:
    table = pa.table({"at": pa.array([1, 2, 3, 4], pa.timestamp("ns"))})
    path = written(tmp_path / "in", table, use_deprecated_int96_timestamps=True, use_dictionary=False) / "a.parquet"
    content, day_of_1970, day_of_9999 = (
        path.read_bytes(),
        (2440588).to_bytes(4, "little"),
        (5373484).to_bytes(4, "little"),
    )
    last = content.rindex(day_of_1970)
    path.write_bytes(content[:last] + day_of_9999 + content[last + 4 :])
    with pytest.raises(CorpusError, match="INT96 timestamps in at hold both"):
        passed(tmp_path / "in")


LABELS = {
    "label": {"names": ["bad", "good"], "_type": "ClassLabel"},
    "at": {"dtype": "timestamp[ns]", "_type": "Value"},
    "gone": {"dtype": "string", "_type": "Value"},
}


def test_features_of_datasets_stay_and_those_of_new_columns_are_added(tmp_path: Path) -> None:
    metadata = {"huggingface": json.dumps({"info": {"features": LABELS}, "fingerprint": "1"}), "pandas": "{}"}
    label, dates = pa.array([0, 1, 1]), pa.array(DATES, pa.timestamp("us"))
    after = passed(written(tmp_path / "in", pa.table({"label": label, "at": dates}, metadata=metadata)))
    assert after.schema.metadata[b"pandas"] == b"{}"
    assert json.loads(after.schema.metadata[b"huggingface"]) == {
        "info": {
            "features": {
                "label": LABELS["label"],
                "at": {"dtype": "timestamp[us]", "_type": "Value"},
                "score": {"dtype": "float32", "_type": "Value"},
            }
        }
    }


def test_datasets_reads_the_features_of_new_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    messages = pa.list_(pa.struct({"role": pa.string(), "n": pa.list_(pa.float64())}))
    schema = pa.schema({"label": pa.int64(), "m": messages, "half": pa.float16()})
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": {"label": LABELS["label"]}}})})
    path = str(tmp_path / "a.parquet")
    table = pa.Table.from_pylist([{"label": 1}], schema=schema)
    pq.write_table(table.replace_schema_metadata(described(schema)), path)
    read = datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path / "cache"))
    assert read.features["label"].names == ["bad", "good"]
    assert read.features.arrow_schema.types == schema.types


@pytest.mark.parametrize("content", ["{", "[]", "null", '{"info": 3}', '{"info": {"features": []}}'])
def test_metadata_of_another_form_stays(content: str) -> None:
    schema = pa.schema({"a": pa.int64()}, metadata={"huggingface": content})
    assert described(schema) == schema.metadata
