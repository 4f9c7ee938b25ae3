"""Scores that were computed before, found by a 128-bit hash of token ids: within a job and of earlier outputs.

A score is a function of the token ids, the model, the dtype and the kind of processor, so that one computed before is
the one that would be computed now, to the bit. The processor is part of the hash: a worker finds what its own kind
computed, and no other's. A job's output keeps the hashes and scores of each unit in a file of
`_scores/`; `--reuse` reads those of earlier outputs. What a running job remembers besides is in `score_memory.py`.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from jobs.corpus.files import Unit
from jobs.corpus.storage import OBJECT_STORES, files_at_once, told
from jobs.errors import CorpusError, OutputError
from jobs.runs.exchange import gathered, scatter
from jobs.runs.ledger import Ledger
from serve_app.reward_model.scores import Outputs

if TYPE_CHECKING:
    import ray

logger = logging.getLogger(__name__)

SCORES = "_scores"
"""The folder in a job's output with a file of hashes and scores for each unit."""
FORM, FORM_KEY = b"2", b"rayward.scores"
"""The form of such a file, in its metadata. The first one had none, and hashes without the processor."""
FILES_PER_TASK = 64
BYTES_PER_SHARE = 24 << 20
"""Of files; a hash and a score take some 24 bytes there."""
MODEL_IDENTITY = ("model_fingerprint", "device", "dtype", "quantization")

Key: TypeAlias = bytes
ScoreFile: TypeAlias = tuple[fs.FileSystem, str]


def key_of(token_ids: Sequence[int], processor: str) -> Key:
    """The BLAKE2b digest of token ids that are scored on a kind of processor: of a billion conversations two share one
    with a probability of 1e-21."""
    content = np.asarray(token_ids, np.uint32).tobytes()
    return hashlib.blake2b(content, digest_size=16, key=_short(processor)).digest()


@lru_cache
def _short(processor: str) -> bytes:
    """BLAKE2b's key takes 64 bytes."""
    return hashlib.blake2b(processor.encode(), digest_size=16).digest()


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


def write_scores(ledger: Ledger, unit: Unit, table: pa.Table) -> None:
    """Write the hashes and scores of a unit, before the unit itself is committed.

    Raises:
        OutputError: they cannot be written.
    """
    sink, table = pa.BufferOutputStream(), table.replace_schema_metadata({FORM_KEY: FORM})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    if ledger.filesystem.type_name not in OBJECT_STORES:  # there a folder is a name
        ledger.filesystem.create_dir(f"{ledger.folder}/{SCORES}")
    ledger.write(f"{ledger.folder}/{SCORES}/{unit.id}.arrow", sink.getvalue())


@dataclass(frozen=True, slots=True)
class EarlierOutput:
    """The output of a job: its folder, the identity of its run, and its files of hashes and scores with their bytes.

    `processors` are the kinds that they were computed on; none where the job has not ended yet, which tells them.
    """

    folder: str
    identity: Mapping[str, Any]
    processors: tuple[str, ...]
    files: tuple[ScoreFile, ...]
    num_bytes: int

    @classmethod
    def of(cls, ledger: Ledger, folder: str) -> EarlierOutput | None:
        """What is in a folder; None where no job has begun one."""
        manifest = ledger.read_manifest()
        if manifest is None:
            return None
        selector = fs.FileSelector(f"{ledger.folder}/{SCORES}", allow_not_found=True)
        infos = [info for info in ledger.filesystem.get_file_info(selector) if info.extension == "arrow"]
        files = tuple((ledger.filesystem, path) for path in sorted(info.path for info in infos))
        processors = tuple(manifest.get("processors", ()))
        return cls(folder, manifest["identity"], processors, files, sum(info.size for info in infos))


@dataclass(frozen=True, slots=True)
class EarlierScores:
    """Scores of earlier jobs' outputs, or the job's own. A damaged file is an error, or left out with a warning."""

    outputs: tuple[EarlierOutput, ...] = ()
    is_an_error: bool = True

    @classmethod
    def of(cls, folders: Sequence[str]) -> EarlierScores:
        """What is in the folders.

        Raises:
            OutputError: one is no job's output, or keeps no scores.
        """
        found = []
        for folder in folders:
            output = EarlierOutput.of(Ledger(folder), folder)
            if output is None:
                raise OutputError(f"--reuse {folder}: there is no output of a job")
            if not output.files:
                raise OutputError(
                    f"--reuse {folder}: it keeps no hashes of its conversations ({SCORES}/): an earlier version wrote "
                    "it, or --no-remember-scores was given"
                )
            found.append(output)
        return cls(tuple(found))

    @classmethod
    def before(cls, ledger: Ledger) -> EarlierScores:
        """What the job itself scored into its folder before it was started again."""
        output = EarlierOutput.of(ledger, ledger.location)
        return cls() if output is None else cls((output,), is_an_error=False)

    @property
    def processors(self) -> frozenset[str]:
        """The kinds of processors of which there are scores; empty where an output does not say it."""
        if not all(output.processors for output in self.outputs):
            return frozenset()
        return frozenset(processor for output in self.outputs for processor in output.processors)

    def index(self, identity: Mapping[str, Any]) -> ScoreIndex:
        """The index of all files. Many are read by tasks on the connected Ray: none holds more than a share, or some
        files.

        Raises:
            OutputError: an output has scores of another model than `identity` names.
            CorpusError: a file cannot be read.
        """
        import ray

        for output in self.outputs:
            _check_model(output, identity)
        files = [file for output in self.outputs for file in output.files]
        if not files:
            return ScoreIndex()
        num_shares = math.ceil(sum(output.num_bytes for output in self.outputs) / BYTES_PER_SHARE)
        if num_shares == 1:  # a task takes longer to start than this
            pieces_here = _split(files, None, num_shares=1, is_an_error=self.is_an_error)
            return ScoreIndex((ray.put(_sorted_share(0, pieces_here)[0]),))
        tasks = [files[at : at + FILES_PER_TASK] for at in range(0, len(files), FILES_PER_TASK)]
        split = partial(_split, num_shares=num_shares, is_an_error=self.is_an_error)
        pieces = scatter(split, tasks, num_parts=num_shares)
        made = scatter(_sorted_share, range(num_shares), num_parts=1, pieces=gathered(pieces, num_shares))
        return ScoreIndex(tuple(ref for (ref,) in made))


Share: TypeAlias = tuple[NDArray[np.uint64], NDArray[np.float32]]


def _check_model(output: EarlierOutput, identity: Mapping[str, Any]) -> None:
    before = output.identity
    if differing := [name for name in MODEL_IDENTITY if before.get(name) != identity.get(name)]:
        facts = (f"{name} is {before.get(name)} there and {identity.get(name)} now" for name in differing)
        raise OutputError(f"--reuse {output.folder}: its scores are of another model: {'; '.join(facts)}")


def _read(file: ScoreFile, *, is_an_error: bool) -> Share:
    filesystem, path = file
    try:
        with filesystem.open_input_file(path) as source:
            table = pa.ipc.open_file(source).read_all()
        _check_form(table.schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        text = f"{told(filesystem, path)} cannot be read: {error}"
        if is_an_error:
            raise CorpusError(f"{text}. Without that file its conversations are computed again") from error
        logger.warning("%s; its conversations are computed again", text)
        return _joined([])
    return _joined([_share(batch) for batch in table.to_batches() if len(batch)])


def _check_form(schema: pa.Schema) -> None:
    if (schema.metadata or {}).get(FORM_KEY) != FORM:
        raise ValueError("another version of rayward wrote it, and its hashes do not tell kinds of processors apart")


def _share(batch: pa.RecordBatch) -> Share:
    keys, outputs = batch.column("key"), batch.column("outputs")
    own = slice(keys.offset, keys.offset + len(keys))
    return _words(keys.buffers()[1])[own], outputs.flatten().to_numpy().reshape(len(outputs), -1)


def _split(files: Sequence[ScoreFile], _: object, *, num_shares: int, is_an_error: bool) -> list[Share]:
    with ThreadPoolExecutor(files_at_once(files[0][0])) as pool:
        keys, values = _joined(list(pool.map(partial(_read, is_an_error=is_an_error), files)))
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
