"""A model's scorer that computes each sequence of token ids once; it imports torch, so that workers alone import it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from jobs.scoring.remembered import NOT_COMPUTED, REPEATED, REUSED, Key, ScoreIndex, key_of
from serve_app.reward_model import ScoringError
from serve_app.reward_model.scorer import SequenceScorer
from serve_app.reward_model.scores import Outputs

MAX_REMEMBERED = 1 << 18
"""Sequences that are remembered, in some 50 MB."""


class RememberingScorer(SequenceScorer):
    """A model's scorer that computes each sequence once: what it scored before, or an earlier output has, is found."""

    def __init__(self, scorer: SequenceScorer, index: ScoreIndex) -> None:
        super().__init__(scorer.decoder, token_budget=scorer.token_budget)
        self.prefix_cache = scorer.prefix_cache
        self._index = index
        self._known: OrderedDict[Key, Outputs] = OrderedDict()
        self._unit: dict[Key, Outputs] = {}
        self._counts = dict.fromkeys((REUSED, REPEATED, NOT_COMPUTED), 0)
        self._told: Callable[[int, int], None] | None = None

    def outputs(self, sequences: Sequence[Sequence[int]]) -> list[Outputs | ScoringError]:
        """The outputs of each sequence, in order, with the bits that computing all of them would give."""
        keys = [key_of(sequence) for sequence in sequences]
        firsts = {key: place for place, key in reversed(list(enumerate(keys)))}
        found = {key: self._known[key] for key in firsts if key in self._known}
        earlier = self._index.find([key for key in firsts if key not in found])
        missing = sorted(place for key, place in firsts.items() if key not in found and key not in earlier)
        computed = dict(zip(missing, super().outputs([sequences[place] for place in missing]), strict=True))
        scored = {keys[place]: one for place, one in computed.items() if not isinstance(one, ScoringError)}
        known = found | earlier | scored
        # An error is a row's own, so that one which another row has too is made again.
        again = [place for place, key in enumerate(keys) if key not in known and place not in computed]
        computed |= dict(zip(again, super().outputs([sequences[place] for place in again]), strict=True))
        self._remember(known)
        self._count(keys, sequences, computed, earlier)
        if self._told is not None:
            self._told(len(sequences), sum(len(sequences[place]) for place in computed))
        return [computed[place] if place in computed else known[key] for place, key in enumerate(keys)]

    def _remember(self, known: Mapping[Key, Outputs]) -> None:
        self._unit |= known
        for key, outputs in known.items():
            self._known[key] = outputs
            self._known.move_to_end(key)
        while len(self._known) > MAX_REMEMBERED:
            self._known.popitem(last=False)

    def _count(
        self,
        keys: Sequence[Key],
        sequences: Sequence[Sequence[int]],
        computed: Mapping[int, Outputs | ScoringError],
        earlier: Mapping[Key, Outputs],
    ) -> None:
        for place, key in enumerate(keys):
            if place not in computed:
                self._counts[REUSED if key in earlier else REPEATED] += 1
                self._counts[NOT_COMPUTED] += len(sequences[place])

    def begin(self, told: Callable[[int, int], None] | None = None) -> None:
        """Forget what was noted of the unit before. `told` is called with the number of sequences that are scored, now
        and then, and with the tokens read for them."""
        self._told = told
        self._unit = {}
        self._counts = dict.fromkeys(self._counts, 0)

    def noted(self) -> tuple[pa.Table, dict[str, int]]:
        """The hashes and scores of the unit since `begin`, and its counts but for zeros."""
        values = pa.array([list(outputs) for outputs in self._unit.values()], pa.list_(pa.float32()))
        table = pa.table({"key": pa.array(list(self._unit), pa.binary(16)), "outputs": values})
        return table, {name: count for name, count in self._counts.items() if count}


def remembering(load: Callable[[], Any], index: ScoreIndex) -> Any:
    """The model that `load` makes, with a scorer that remembers."""
    model = load()
    if hasattr(model, "scorer"):
        model.scorer = RememberingScorer(model.scorer, index)
    return model
