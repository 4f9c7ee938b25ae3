"""Keys and values of recent prefixes, kept on the device between calls, so that a prefix that comes again is not read.

What is kept: every complete block of 16 tokens of every sequence that was scored, since no token tells where others
will go on. A block is found by its tokens and the block before it, so a sequence finds its longest kept prefix at any
depth, and two are never mistaken for each other. Where room lacks, the blocks used least recently go first, and of one
sequence its last ones: what sixteen answers begin with is used sixteen times, and outlives the answers.

Bits: a row's keys and values follow from its position and the tokens up to it, whatever stands beside it. So those that
are kept are those that would be computed, and attention takes them as it takes those of a spine. A pass whose scores
are not all finite leaves nothing behind: keys may carry a neighbour's infinities.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serve_app.reward_model.architecture import DecoderConfig
from serve_app.reward_model.packing import PackedBatch, on_device

CACHE_BLOCK_TOKENS = 16
CPU_CACHE_BYTES = 256 * 2**20
"""`"auto"` on CPU."""
CUDA_CACHE_SHARE = 1 / 16
"""`"auto"` on CUDA, of the memory that is free once the weights are there."""
TOKEN = np.dtype("<i4")
Rows = NDArray[np.int64]
CacheBytes = int | Literal["auto"]


@dataclass(eq=False, slots=True)
class _Block:
    """Tokens `16 n` to `16 n + 15` of some sequences, `n` blocks behind the start: their keys are in place `place`.

    It is found once it `is_kept`: before, the pass that computes its keys is under way. `used` is the number of the
    last call that had it.
    """

    key: tuple[int, bytes]
    number: int
    place: int
    used: int
    is_kept: bool = False


@dataclass(slots=True)
class CachedPass:
    """What one forward pass takes from a cache and leaves there, layer after layer.

    Places are rows of the cache's tensors, int64 on the device: `loaded` go to the rows behind the batch's own, and the
    keys of rows `computed` to those of `stored`.
    """

    cache: PrefixCache
    paths: list[list[_Block]]
    num_rows: int
    loaded: Tensor
    computed: Tensor
    stored: Tensor
    layer: int = 0

    def exchange(self, k_TE: Tensor, v_TE: Tensor) -> None:
        """Put the next layer's kept keys and values behind the batch's own rows, and keep what is new.

        In this order: a new block may begin with rows that were loaded, where a sequence departs in its middle.
        """
        stop = self.num_rows + len(self.loaded)
        loaded, computed, stored = (places.to(k_TE.device) for places in (self.loaded, self.computed, self.stored))
        for rows, kept in zip((k_TE, v_TE), self.cache.tensors(self.layer, k_TE), strict=True):
            if len(loaded):
                rows[self.num_rows : stop] = kept.index_select(0, loaded)  # which may be columns of more
            if len(stored):
                kept.index_copy_(0, stored, rows.index_select(0, computed))
        self.layer += 1

    def settle(self, *, is_sound: bool) -> None:
        """Let others find what the pass left, or let go of it where its scores are not all finite."""
        self.cache.settle(self.paths, is_sound=is_sound)


class PrefixCache:
    """Blocks of keys and values, and which tokens they are of. Not thread-safe: the scorer's calls take turns.

    A call's own blocks, found or new, are never given up during that call. `num_read` counts the tokens that were read
    from the cache so far.
    """

    def __init__(self, num_bytes: int, config: DecoderConfig, dtype: torch.dtype) -> None:
        """A cache of at most `num_bytes`, for keys and values of `dtype`.

        Raises:
            ValueError: that is not enough for one block.
        """
        size = self.block_bytes(config, dtype)
        self.num_blocks = num_bytes // size
        if self.num_blocks < 1:
            raise ValueError(
                f"prefix_cache_bytes={num_bytes} holds no block of {CACHE_BLOCK_TOKENS} tokens, which takes {size} "
                "bytes; 0 keeps nothing"
            )
        self.num_read = 0
        self._longest = config.longest_unstretched
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self._numbers = itertools.count(1)
        self._call = 0
        self._blocks: dict[tuple[int, bytes], _Block] = {}
        self._num_taken = 0  # places that were ever taken, and of these the free ones
        self._free: list[int] = []
        self._kept: OrderedDict[_Block, None] = OrderedDict()
        self.forget()

    @staticmethod
    def block_bytes(config: DecoderConfig, dtype: torch.dtype) -> int:
        """Bytes of one block's keys and values."""
        return CACHE_BLOCK_TOKENS * 2 * config.num_layers * config.kv_size * dtype.itemsize

    @property
    def num_kept(self) -> int:
        """Tokens whose keys and values are kept."""
        return len(self._kept) * CACHE_BLOCK_TOKENS

    def clear(self) -> None:
        """Forget everything, and give the memory back until a pass needs it again."""
        self._tensors.clear()
        self.forget()

    def forget(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self._kept.clear()
        self._num_taken = 0
        self._free = []

    def begin_call(self) -> None:
        """What is found and kept from now on stays until the next call begins."""
        self._call += 1

    def find(self, sequence: Sequence[int], most: int) -> int:
        """Tokens of the longest kept prefix, at most `most`."""
        path = self._path(sequence, most)
        self._use(path)
        return min(most, len(path) * CACHE_BLOCK_TOKENS)

    def begin(self, sequences: Sequence[Sequence[int]], batch: PackedBatch) -> CachedPass:
        """The part of the cache in a forward pass over `batch`."""
        loaded = [
            self._rows(sequences[rows.sequence], rows.span.position, rows.span.num_keys)
            for rows in batch.cached.values()
        ]
        self.num_read += batch.num_cached
        paths: list[list[_Block]] = []
        computed: list[Rows] = []
        stored: list[Rows] = []
        path_rows = batch.paths()
        for member, end in zip(batch.members, batch.ends, strict=True):
            if not self._keeps(sequences[member]):
                continue
            path, new = self._extended(sequences[member])
            paths.append(path)
            for place, block in new:
                first = place * CACHE_BLOCK_TOKENS
                computed.append(path_rows[end][first : first + CACHE_BLOCK_TOKENS])
                stored.append(_rows_of(block))
        device = batch.token_ids_T.device
        return CachedPass(
            self,
            paths,
            num_rows=len(batch.token_ids_T),
            loaded=_index(loaded, device),
            computed=_index(computed, device),
            stored=_index(stored, device),
        )

    def tensors(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [blocks * 16, E] each, on the device of `like` [rows, E]."""
        found = self._tensors.get(layer)
        if found is None:
            size = (self.num_blocks * CACHE_BLOCK_TOKENS, like.shape[1])
            found = self._tensors[layer] = (like.new_empty(size), like.new_empty(size))
        return found

    def settle(self, paths: Sequence[Sequence[_Block]], *, is_sound: bool) -> None:
        """Let later calls find the blocks of paths, or let go of those that are new.

        A pass that began before may have let go of a block meanwhile; nobody finds those behind it.
        """
        for path in paths:
            known = list(itertools.takewhile(self._knows, path))
            for block in known if is_sound else ():
                block.is_kept = True
            for block in filter(self._knows, path):
                if not block.is_kept:
                    self._drop(block)
            self._use([block for block in known if block.is_kept])

    def _path(self, sequence: Sequence[int], most: int) -> list[_Block]:
        """The kept blocks that hold the sequence's first tokens, at most as many as `most` tokens need."""
        path: list[_Block] = []
        if self._keeps(sequence):
            for key in self._keys(sequence, most, path):
                block = self._blocks.get(key)
                if block is None or not block.is_kept:
                    break
                path.append(block)
        return path

    def _extended(self, sequence: Sequence[int]) -> tuple[list[_Block], list[tuple[int, _Block]]]:
        """The blocks of a sequence, as many as there is room for, and those that are new with their places in it."""
        path: list[_Block] = []
        new: list[tuple[int, _Block]] = []
        for key in self._keys(sequence, len(sequence), path):
            block = self._blocks.get(key)
            if block is None:
                place = self._place()
                if place is None:
                    break
                block = self._blocks[key] = _Block(key, next(self._numbers), place, self._call)
                new.append((len(path), block))
            path.append(block)
        return path, new

    def _keys(self, sequence: Sequence[int], most: int, path: list[_Block]) -> Iterator[tuple[int, bytes]]:
        """The key of each block that begins before token `most`, the ones before it being on `path`."""
        tokens = np.asarray(sequence, dtype=TOKEN).tobytes()
        size = CACHE_BLOCK_TOKENS * TOKEN.itemsize
        for first in range(0, min(most * TOKEN.itemsize, len(tokens) - size + 1), size):
            yield (path[-1].number if path else 0, tokens[first : first + size])

    def _knows(self, block: _Block) -> bool:
        return self._blocks.get(block.key) is block

    def _keeps(self, sequence: Sequence[int]) -> bool:
        """Whether a sequence shares: not where its rotary angles are its own."""
        return self._longest is None or len(sequence) <= self._longest

    def _use(self, path: Sequence[_Block]) -> None:
        """Note that kept blocks are used; a block stands behind those that follow it in a sequence."""
        for block in reversed(path):
            block.used = self._call
            self._kept[block] = None
            self._kept.move_to_end(block)

    def _place(self) -> int | None:
        """A free place; that of the block used least recently, if no call under way has it."""
        if not self._free and self._num_taken < self.num_blocks:
            self._num_taken += 1
            return self._num_taken - 1
        if not self._free and self._kept and (oldest := next(iter(self._kept))).used < self._call:
            self._drop(oldest)
        return self._free.pop() if self._free else None

    def _drop(self, block: _Block) -> None:
        del self._blocks[block.key]
        self._kept.pop(block, None)
        self._free.append(block.place)

    def _rows(self, sequence: Sequence[int], first: int, stop: int) -> Rows:
        """Where the keys of a sequence's tokens `first` to `stop` - 1 are kept."""
        path = self._path(sequence, stop)
        if len(path) * CACHE_BLOCK_TOKENS < stop:
            raise RuntimeError(f"the prefix cache has not the {stop} tokens any more that it was to have")
        return np.concatenate([_rows_of(block) for block in path])[first:stop]


def cache_bytes(wanted: CacheBytes, device: torch.device) -> int:
    """Bytes of a cache: `wanted`, or for `"auto"` a small share of the device's memory."""
    if wanted != "auto":
        if not isinstance(wanted, int) or wanted < 0:
            raise ValueError(f"prefix_cache_bytes is 'auto' or a whole number of bytes, 0 for none, not {wanted!r}")
        return wanted
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    free, _total = torch.cuda.mem_get_info(device)
    return int(CUDA_CACHE_SHARE * free)


def _rows_of(block: _Block) -> Rows:
    first = block.place * CACHE_BLOCK_TOKENS
    return np.arange(first, first + CACHE_BLOCK_TOKENS, dtype=np.int64)


def _index(rows: Sequence[Rows], device: torch.device) -> Tensor:
    joined = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
    return on_device(torch.from_numpy(joined), device)
