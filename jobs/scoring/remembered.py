"""Scores that were computed before, found by a 128-bit hash of token ids: within a job and of earlier outputs.

A score is a function of the token ids, the model, the dtype and the kind of device, so that one computed before is the
one that would be computed now, to the bit. A job's output keeps the hashes and scores of each unit in a file of
`_scores/`; `--reuse` reads those of earlier outputs. A scoring actor remembers its last conversations besides
(`remembering_scorer.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from jobs.corpus.files import Unit
from jobs.corpus.storage import OBJECT_STORES, told
from jobs.errors import CorpusError, OutputError
from jobs.runs.exchange import gathered, results, scatter
from jobs.runs.ledger import Ledger
from serve_app.reward_model.scores import Outputs

if TYPE_CHECKING:
    import ray

SCORES = "_scores"
"""The folder in a job's output with a file of hashes and scores for each unit."""
FILES_PER_TASK = 64
ROWS_PER_SHARE = 1 << 20
MODEL_IDENTITY = ("model_fingerprint", "device", "dtype", "quantization")

REUSED, REPEATED, NOT_COMPUTED = "scores_reused", "scores_repeated", "tokens_not_computed"
"""Counts of a unit: scores of earlier outputs, those of a conversation that the actor had before, and their tokens."""

Key: TypeAlias = bytes
ScoreFile: TypeAlias = tuple[fs.FileSystem, str]


def key_of(token_ids: Sequence[int]) -> Key:
    """The BLAKE2b digest of token ids: of a billion conversations two share one with a probability of 1e-21."""
    return hashlib.blake2b(np.asarray(token_ids, np.uint32).tobytes(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class ScoreIndex:
    """Hashes and scores in order, in shares by hash, each an object of Ray's store that is read where it is needed."""

    shares: tuple[ray.ObjectRef[Any], ...] = ()

    def find(self, keys: Sequence[Key]) -> dict[Key, Outputs]:
        """The scores of the keys that are known."""
        import ray

        if not self.shares:
            return {}
        wanted = _words(b"".join(keys))
        share_of = wanted[:, 0] % np.uint64(len(self.shares))
        found: dict[Key, Outputs] = {}
        for share in np.unique(share_of).tolist():
            known, values = ray.get(self.shares[int(share)])
            for place in np.flatnonzero(share_of == share).tolist():
                at = _place(known, wanted[place])
                if at is not None:
                    found[keys[place]] = tuple(values[at].tolist())
        return found


def _words(content: bytes | pa.Buffer) -> NDArray[np.uint64]:
    words: NDArray[np.uint64] = np.frombuffer(content, np.uint64).reshape(-1, 2)
    return words


def _place(known: NDArray[np.uint64], key: NDArray[np.uint64]) -> int | None:
    """Where a key stands among sorted ones."""
    first = int(np.searchsorted(known[:, 0], key[0]))
    while first < len(known) and known[first, 0] == key[0]:
        if known[first, 1] == key[1]:
            return first
        first += 1
    return None


class Memory(Protocol):
    """A scorer that remembers: see `remembering_scorer.py`."""

    def begin(self, told: Callable[[int, int], None] | None = None) -> None:
        """Forget what was noted of the unit before. `told` is called with the number of sequences that are scored, now
        and then, and with the tokens read for them."""
        ...

    def noted(self) -> tuple[pa.Table, dict[str, int]]:
        """The hashes and scores of the unit since `begin`, and its counts but for zeros."""
        ...


def memory_of(model: object) -> Memory | None:
    """The scorer of a model that remembers; None for another."""
    scorer = getattr(model, "scorer", None)
    return scorer if hasattr(scorer, "noted") else None


def write_scores(ledger: Ledger, unit: Unit, table: pa.Table) -> None:
    """Write the hashes and scores of a unit, before the unit itself is committed.

    Raises:
        OutputError: they cannot be written.
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    if ledger.filesystem.type_name not in OBJECT_STORES:  # there a folder is a name
        ledger.filesystem.create_dir(f"{ledger.folder}/{SCORES}")
    ledger.write(f"{ledger.folder}/{SCORES}/{unit.id}.arrow", sink.getvalue())


@dataclass(frozen=True, slots=True)
class EarlierScores:
    """Outputs of earlier jobs: the folder, the identity of its run, and its files of hashes and scores."""

    outputs: tuple[tuple[str, Mapping[str, Any], tuple[ScoreFile, ...]], ...] = ()

    @classmethod
    def of(cls, folders: Sequence[str]) -> EarlierScores:
        """What is in the folders.

        Raises:
            OutputError: one is no job's output, or keeps no scores.
        """
        found = []
        for folder in folders:
            ledger = Ledger(folder)
            manifest = ledger.read_manifest()
            if manifest is None:
                raise OutputError(f"--reuse {folder}: there is no output of a job")
            selector = fs.FileSelector(f"{ledger.folder}/{SCORES}", allow_not_found=True)
            paths = sorted(info.path for info in ledger.filesystem.get_file_info(selector) if info.extension == "arrow")
            if not paths:
                raise OutputError(
                    f"--reuse {folder}: it keeps no hashes of its conversations ({SCORES}/): an earlier version wrote "
                    "it, or --no-remember-scores or --via-serve was given"
                )
            found.append((folder, manifest["identity"], tuple((ledger.filesystem, path) for path in paths)))
        return cls(tuple(found))

    def index(self, identity: Mapping[str, Any]) -> ScoreIndex:
        """The index of all files, made by tasks on the connected Ray: none holds more than a share, or some files.

        Raises:
            OutputError: an output has scores of another model than `identity` names.
            CorpusError: a file cannot be read.
        """
        for folder, before, _ in self.outputs:
            if differing := [name for name in MODEL_IDENTITY if before.get(name) != identity.get(name)]:
                facts = (f"{name} is {before.get(name)} there and {identity.get(name)} now" for name in differing)
                raise OutputError(f"--reuse {folder}: its scores are of another model: {'; '.join(facts)}")
        files = [file for _, _, own in self.outputs for file in own]
        if not files:
            return ScoreIndex()
        tasks = [files[at : at + FILES_PER_TASK] for at in range(0, len(files), FILES_PER_TASK)]
        num_shares = max(1, -(-sum(results(scatter(_num_rows, tasks, num_parts=1))) // ROWS_PER_SHARE))
        pieces = scatter(partial(_split, num_shares=num_shares), tasks, num_parts=num_shares)
        made = scatter(_sorted_share, range(num_shares), num_parts=1, pieces=gathered(pieces, num_shares))
        return ScoreIndex(tuple(ref for (ref,) in made))


Share: TypeAlias = tuple[NDArray[np.uint64], NDArray[np.float32]]


def _num_rows(files: Sequence[ScoreFile], _: object) -> list[int]:
    return [sum(len(_read(*file)[0]) for file in files)]


def _read(filesystem: fs.FileSystem, path: str) -> Share:
    try:
        with filesystem.open_input_file(path) as source:
            table = pa.ipc.open_file(source).read_all().combine_chunks()
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{told(filesystem, path)} cannot be read: {error}") from error
    keys = b"".join(table.column("key").to_pylist())
    rows = table.column("outputs").to_pylist()
    width = len(rows[0]) if rows else 1
    return _words(keys), np.array(rows, np.float32).reshape(-1, width)


def _split(files: Sequence[ScoreFile], _: object, *, num_shares: int) -> list[Share]:
    keys, values = _joined([_read(*file) for file in files])
    share_of = keys[:, 0] % np.uint64(num_shares)
    return [(keys[own], values[own]) for own in (np.flatnonzero(share_of == share) for share in range(num_shares))]


def _sorted_share(_: int, pieces: Sequence[Share]) -> list[Share]:
    keys, values = _joined(pieces)
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    return [(keys[order], values[order])]


def _joined(pieces: Sequence[Share]) -> Share:
    filled = [piece for piece in pieces if len(piece[0])]
    if not filled:
        return np.empty((0, 2), np.uint64), np.empty((0, 1), np.float32)
    return np.concatenate([keys for keys, _ in filled]), np.concatenate([values for _, values in filled])
