"""Columns of few values as codes: domains, languages, and what people preferred."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

__all__ = ["LABELS", "MAX_VALUES", "codes_of", "label_codes", "values_of"]

MAX_VALUES = 200
NO_VALUE = "(none)"
LABELS = {"chosen": 1, "true": 1, "1": 1, "rejected": 0, "false": 0, "0": 0}


def values_of(column: pa.ChunkedArray) -> frozenset[str]:
    """The distinct values as text, `(none)` for null; some `MAX_VALUES + 1` of them where there are more."""
    unique = pc.cast(column, pa.large_string()).unique()
    return frozenset(_named(value) for value in unique.slice(0, MAX_VALUES + 1).to_pylist())


def codes_of(column: pa.ChunkedArray, values: Sequence[str]) -> NDArray[np.int64]:
    """The place in `values` of each row's value."""
    places = {value: place for place, value in enumerate(values)}
    encoded, known = _encoded(column)
    return np.array([*(places[_named(value)] for value in known), places.get(NO_VALUE, -1)], np.int64)[encoded]


def label_codes(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """1 for what was preferred, 0 for what was not, -1 where the row has no label; values are as in `LABELS`."""
    encoded, known = _encoded(column)
    return np.array([*(LABELS[value.casefold()] for value in known), -1], np.int64)[encoded]


def _encoded(column: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str]]:
    """The place of each row's value in the list of distinct ones, which null stands behind."""
    text = pa.concat_arrays([pa.array([], pa.large_string()), *pc.cast(column, pa.large_string()).chunks])
    encoded = text.dictionary_encode()
    known = encoded.dictionary.to_pylist()
    return encoded.indices.fill_null(len(known)).to_numpy(zero_copy_only=False).astype(np.int64), known


def _named(value: str | None) -> str:
    return NO_VALUE if value is None else value
