"""The study's results as JSON by ids, written query by query: {query: {original: value}}."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from headroom.checkpoints import replacing
from headroom.gradients.pairs import Pairs, similarity

INDENT = 4


def similarities(path: str | Path, pairs: Pairs) -> None:
    """Write {query: {original: cosine of the full gradients}} over each query's pool."""
    found_QC = similarity(pairs)
    _write(
        path,
        (
            (query, dict(zip(names, map(float, found_C), strict=True)))
            for (query, names), found_C in zip(_pools(pairs), found_QC, strict=True)
        ),
    )


def dot_products(path: str | Path, pairs: Pairs) -> None:
    """Write {query: {original: {layer: dot product}}} over each query's pool."""
    _write(
        path,
        (
            (
                query,
                {
                    name: _by_layer(pairs, pairs.dot_LQC[:, row, place])
                    for place, name in enumerate(names)
                },
            )
            for row, (query, names) in enumerate(_pools(pairs))
        ),
    )


def query_norms(path: str | Path, pairs: Pairs) -> None:
    """Write {query: {layer: squared norm}}."""
    _norms(path, pairs, pairs.queries, pairs.query_LQ)


def original_norms(path: str | Path, pairs: Pairs) -> None:
    """Write {original: {layer: squared norm}}."""
    _norms(path, pairs, pairs.originals, pairs.original_LN)


def _norms(path: str | Path, pairs: Pairs, ids: Iterable[str], norm_LN: np.ndarray) -> None:
    columns = zip(ids, norm_LN.T, strict=True)
    _write(path, ((name, _by_layer(pairs, norm_L)) for name, norm_L in columns))


def _pools(pairs: Pairs) -> Iterable[tuple[str, list[str]]]:
    """Yield each query with the ids of its candidates."""
    for query, candidate_C in zip(pairs.queries, pairs.candidate_QC, strict=True):
        yield query, [pairs.originals[place] for place in candidate_C]


def _by_layer(pairs: Pairs, value_L: np.ndarray) -> dict[str, float]:
    return dict(zip(pairs.layers, map(float, value_L), strict=True))


def _write(path: str | Path, entries: Iterable[tuple[str, dict]]) -> None:
    """Write what ``json.dumps(dict(entries), indent=4)`` would return, one entry at a time."""
    with replacing(path) as part, part.open("w", encoding="utf-8") as file:
        comma = ""
        file.write("{")
        for name, value in entries:
            text = json.dumps({name: value}, indent=INDENT, allow_nan=False)
            file.write(comma + text.removeprefix("{").removesuffix("\n}"))
            comma = ","
        file.write("\n}" if comma else "}")
