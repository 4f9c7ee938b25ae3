"""JSONL, CSV, TSV and Arrow files are cut into units as Parquet is; a line that cannot be read is a row that tells."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.corpus.candidates import CandidateColumns, candidate_rows
from jobs.corpus.conversations import ConversationColumns, conversations, prompts
from jobs.corpus.features import described
from jobs.corpus.files import Corpus, Unit
from jobs.corpus.formats import LINE_ERROR, Format, format_of
from jobs.corpus.preferences import PreferenceColumns, preference_pairs
from jobs.corpus.reader import UnitReader, read_tasks
from jobs.corpus.storage import folder_of
from jobs.errors import CorpusError
from serve_app.reward_model import Conversation, ConversationError
from tests.conftest import chat
from tests.jobs.conftest import write

PAIRS = ConversationColumns(prompt="prompt", response="response")


@pytest.fixture(params=[1, 30, 1000, 1 << 24], ids=lambda size: f"blocks of {size}")
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of text smaller than a line, of some lines, and of a whole file."""
    monkeypatch.setattr("jobs.corpus.lines.BLOCK_BYTES", request.param)
    monkeypatch.setattr("jobs.corpus.delimited.BLOCK_BYTES", request.param)
    return int(request.param)


def read(corpus: Corpus, units: list[Unit]) -> pa.Table:
    tables = [table for _, table in UnitReader(corpus.filesystem).read(units)]
    for unit, table in zip(units, tables, strict=True):
        assert isinstance(table, pa.Table), table
        assert table.num_rows == unit.num_rows
    return pa.concat_tables(tables)


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def csv(rows: list[dict[str, Any]]) -> bytes:
    cells = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in cells).encode()


def arrow_file(rows: list[dict[str, Any]]) -> bytes:
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return bytes(sink.getvalue())


def arrow_stream(rows: list[dict[str, Any]]) -> bytes:
    sink, table = pa.BufferOutputStream(), pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return bytes(sink.getvalue())


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue())


ROWS: list[dict[str, Any]] = [
    {"id": number, "prompt": f"Why {number}?\nSay.", "response": f"so, since {number}"} for number in range(40)
]
FILES: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {
    "a.jsonl": lines,
    "a.ndjson": lambda rows: lines(rows).replace(b"\n", b"\r\n").rstrip(),
    "a.jsonl.gz": lambda rows: gzip.compress(lines(rows)),
    "a.jsonl.zst": lambda rows: zstd(lines(rows)),
    "a.csv": csv,
    "a.csv.gz": lambda rows: gzip.compress(csv(rows)),
    "a.tsv": lambda rows: csv(rows).replace(b'","', b'"\t"'),
    "a.arrow": arrow_file,
    "b.arrow": arrow_stream,
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_has_the_same_rows_in_units(tmp_path: Path, block_bytes: int, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name](ROWS))
    corpus = Corpus.open(str(tmp_path))
    assert corpus.num_rows == len(ROWS)
    units = corpus.units(6)
    assert max(unit.num_rows for unit in units) <= 6
    assert len({unit.id for unit in units}) == len(units)
    assert read(corpus, units).to_pylist() == ROWS
    for chosen in (units[2:4] + units[5:], units[::3], units[-1:]):  # as after a restart
        wanted = [row for unit in chosen for row in ROWS[unit.first_row : unit.first_row + unit.num_rows]]
        assert read(corpus, chosen).to_pylist() == wanted
    assert not any(task[0].splits_group for task in read_tasks(units, 3))
    if name.endswith((".gz", ".zst", "b.arrow")):
        assert len(read_tasks(units, 100)) == 1  # read from its start, once
    else:
        (whole,) = Corpus.open(str(tmp_path / name)).units(1000)
        assert read(corpus, [whole])["prompt"].to_pylist() == [row["prompt"] for row in ROWS]
    found = conversations(read(corpus, units[:1]), PAIRS)
    assert found[0] == Conversation.parse(chat("Why 0?\nSay.", "so, since 0"))


def test_columns_are_read_alone_in_their_order(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.csv", "a.arrow"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(FILES[name](ROWS))
        corpus = Corpus.open(str(folder))
        for _, table in UnitReader(corpus.filesystem, columns=["response", "id"]).read(corpus.units(7)):
            assert isinstance(table, pa.Table)
            assert table.column_names == ["response", "id"]


def test_the_schema_is_that_of_all_lines(tmp_path: Path, block_bytes: int) -> None:
    rows: list[dict[str, Any]] = [
        {"n": 1, "when": "2020-01-01", "deep": {"a": [1]}, "empty": {}, "nothing": None},
        {"n": 2.5, "when": "2020-01-02T03:04:05", "deep": {"b": "x"}, "empty": {}, "nothing": None},
        {"n": None, "when": "soon", "late": [{"x": 1}], "deep": None},
    ]
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    corpus = Corpus.open(str(tmp_path))
    table = read(corpus, corpus.units(1))
    assert table.schema.equals(
        pa.schema(
            [
                ("n", pa.float64()),
                ("when", pa.string()),
                ("deep", pa.struct([("a", pa.list_(pa.int64())), ("b", pa.string())])),
                ("empty", pa.null()),
                ("nothing", pa.null()),
                ("late", pa.list_(pa.struct([("x", pa.int64())]))),
            ]
        )
    )
    assert table["when"].to_pylist() == [row["when"] for row in rows]
    assert table["n"].to_pylist() == [1.0, 2.5, None]
    assert table["late"].to_pylist() == [None, None, [{"x": 1}]]
    pq.write_table(table, tmp_path / "out.parquet")


BROKEN = [
    b'{"prompt": "a", "response": "b", "n": 1}',
    b"",
    b'{"prompt": "a", "resp',
    b'["a", "b"]',
    b'{"prompt": "a", "response": "b", "n": "one"}',
    b'  {"prompt": "a", "response": "c"}  ',
    b"   ",
    b'{"prompt": "\xff", "response": "c"}',
    b'{"prompt": "a", "response": "\\ud800"}',
    b'{"prompt": "a", "response": "d", "n": 7}',
]


def test_a_line_that_cannot_be_read_is_a_row_that_names_it(tmp_path: Path, block_bytes: int) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(BROKEN))
    corpus = Corpus.open(str(tmp_path))
    assert corpus.num_rows == 8
    units = corpus.units(3)
    table = read(corpus, units)
    assert read(corpus, units[1:]).equals(table.slice(units[1].first_row))
    reasons = table[LINE_ERROR].to_pylist()
    begins = [None, "line 3 is not JSON: ", "line 4 is a list, not an object", None, None, "line 8", "line 9", None]
    begins[3] = "line 5: n is a string ('one'), and int64 in the lines before"
    for reason, wanted in zip(reasons, begins, strict=True):
        assert (reason is None) is (wanted is None), (reason, wanted)
        assert wanted is None or reason.startswith(wanted)
    assert table["response"].to_pylist() == ["b", None, None, None, "c", None, None, "d"]
    found = conversations(table, PAIRS)
    assert [isinstance(row, ConversationError) for row in found] == [reason is not None for reason in reasons]
    assert str(found[2]) == "line 4 is a list, not an object"
    assert str(prompts(table, PAIRS)[2]) == str(found[2])


def test_a_broken_line_is_the_error_of_pairs_and_candidates(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "responses": ["b", "c"]}]
    (tmp_path / "a.jsonl").write_bytes(lines(rows) + b"{\n")
    corpus = Corpus.open(str(tmp_path))
    table = read(corpus, corpus.units(10))
    assert [
        str(side)[:18] for side in preference_pairs(table, PreferenceColumns("chosen", "rejected", "prompt"))[1]
    ] == ["line 2 is not JSON"] * 2
    assert str(candidate_rows(table, CandidateColumns("responses", "prompt"))[1]).startswith("line 2 is not JSON")


def test_a_column_of_ones_own_is_no_line_error(tmp_path: Path) -> None:
    table = pa.table({"messages": [chat("hi", "yes")], LINE_ERROR: ["mine"]})
    assert isinstance(conversations(table, ConversationColumns("messages"))[0], Conversation)
    (tmp_path / "a.jsonl").write_bytes(lines([{"line_error": 1}]) + b"{\n")
    with pytest.raises(CorpusError, match="a column 'line_error' of its own; rename it"):
        Corpus.open(str(tmp_path))


def test_cells_of_csv_are_numbers_where_all_are_written_so(tmp_path: Path, block_bytes: int) -> None:
    (tmp_path / "a.csv").write_bytes(
        b"\xef\xbb\xbfid,zip,score,none,text,date,mixed\n"
        b'1,007,1.5,,"",2020-01-01,1\n'
        b'-2,12,-2e-05,,NA,2020-01-02,"a ""b"",\nc"\n'
        b",13,,,null,2020-01-03,\n"
    )
    corpus = Corpus.open(str(tmp_path))
    assert read(corpus, corpus.units(2)).to_pydict() == {
        "id": [1, -2, None],
        "zip": ["007", "12", "13"],
        "score": [1.5, -2e-05, None],
        "none": [None, None, None],
        "text": ["", "NA", "null"],
        "date": ["2020-01-01", "2020-01-02", "2020-01-03"],
        "mixed": ["1", 'a "b",\nc', None],
    }


def test_a_row_of_csv_with_other_cells_than_the_header_says_so(tmp_path: Path, block_bytes: int) -> None:
    (tmp_path / "a.csv").write_bytes(b"prompt,response\n1,2,3\na,b\nc\nd,e\nf,g\n1,2,3,4\n")
    corpus = Corpus.open(str(tmp_path))
    table = read(corpus, corpus.units(4))
    assert table["prompt"].to_pylist() == [None, "a", None, "d", "f", None]
    assert table[LINE_ERROR].to_pylist() == [
        "row 1 has 3 cells, the header 2",
        None,
        "row 3 has 1 cells, the header 2",
        None,
        None,
        "row 6 has 4 cells, the header 2",
    ]
    (tmp_path / "a.csv").write_bytes(b"a,a\n1,2\n")
    with pytest.raises(CorpusError, match="has a name twice: a, a"):
        Corpus.open(str(tmp_path))
    (tmp_path / "a.csv").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"not readable CSV:\n.*there is no header"):
        Corpus.open(str(tmp_path))


def test_files_without_rows_have_a_unit_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"prompt,response")
    corpus = Corpus.open(str(tmp_path))
    (unit,) = corpus.units(4)
    assert read(corpus, [unit]).column_names == ["prompt", "response"]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.jsonl").write_bytes(b"not\njson\n")
    with pytest.raises(CorpusError, match=r"not readable JSONL:\n.*no line is a JSON object"):
        Corpus.open(str(tmp_path / "in"))


def test_a_folder_of_several_formats_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", ROWS)
    (tmp_path / "b.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "README.md").write_text("no data")
    with pytest.raises(
        CorpusError, match=r"2 formats, Parquet \(.*a\.parquet\) and JSONL \(.*b\.jsonl\); name one kind"
    ):
        Corpus.open(str(tmp_path))
    assert Corpus.open(f"{tmp_path}/*.jsonl").num_rows == len(ROWS)


def test_datasets_saved_to_disk_keep_their_features(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
         "label": datasets.ClassLabel(names=["good", "bad"])}
    )  # fmt: skip
    rows = {"messages": [chat("hi", str(number)) for number in range(9)], "label": [number % 2 for number in range(9)]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "saved"), num_shards={"train": 2})
    (tmp_path / "saved" / "train" / "cache-1f.arrow").write_bytes(b"of map")
    corpus = Corpus.open(str(tmp_path / "saved"))
    assert [file.name for file in corpus.files] == [f"train/data-0000{n}-of-00002.arrow" for n in (0, 1)]
    table = read(corpus, corpus.units(2))
    assert table["label"].to_pylist() == rows["label"]
    assert b'"names": ["good", "bad"]' in described(table.schema)[b"huggingface"]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.parquet", "parquet"), ("A.JSONL", "jsonl"), ("a.jsonl.gz", "jsonl"), ("a.tsv.zst", "tsv"), ("a.csv", "csv"),
        ("a.arrow", "arrow"), ("a.parquet.gz", None), ("a.gz", None), ("a.json", None), ("jsonl", None),
    ],
)  # fmt: skip
def test_a_name_tells_the_format(name: str, form: Format | None) -> None:
    assert format_of(name) == form
    assert folder_of(f"/in/{name}") == ("/in" if form else f"/in/{name}")


def test_both_ways_of_parsing_lines_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that is odd must not change what its neighbours are read as."""
    rows: list[dict[str, Any]] = [
        {"i": 2**62, "f": 3, "s": "2020-01-01", "b": True, "l": [], "d": {"x": None, "y": [1.5, 2]}},
        {"i": -1, "f": 0.1, "s": "é\u2028\n\"\\", "b": None, "l": [{"k": "v"}, None], "d": None},
        {"f": 1e300, "l": None},
        {},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(lines(rows))
    corpus = Corpus.open(str(tmp_path))
    fast = read(corpus, corpus.units(10))
    monkeypatch.setattr("jobs.corpus.lines._parsed", lambda *_: None)
    assert read(corpus, corpus.units(10)).equals(fast)
    slow = Corpus.open(str(tmp_path))
    assert slow.schemas == corpus.schemas
    assert fast["i"].to_pylist() == [2**62, -1, None, None]
