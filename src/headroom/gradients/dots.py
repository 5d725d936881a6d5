"""The result of measuring: dot products of all pairs by layer, squared norms; parts and merging.

Shapes: L layers (named parameter tensors), Q queries, N originals. A partition holds some originals
and all queries; its places are those of the grid that originals are measured in.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headroom.checkpoints import replacing
from headroom.errors import InputError
from headroom.progress import progress

# Between partitions that ran on different machines, or with a halved batch: of a sample's whole
# squared norm, because of a layer that is nothing but rounding no digit agrees.
NORM_TOLERANCE = {"torch.float64": 1e-9, "torch.float32": 1e-4}
ROUGH = 5e-2  # the same for narrower types
ANEW = "to make it anew, delete {} and run again"


@dataclass(frozen=True)
class Dots:
    """Dot products of queries with originals by layer, and squared norms of both."""

    layers: tuple[str, ...]  # parameter names in the model's order; of states "0.mean", …
    sizes: tuple[int, ...]  # elements of each
    queries: tuple[str, ...]  # ids
    originals: tuple[str, ...]
    dot_LQN: np.ndarray  # float32 or float64
    query_LQ: np.ndarray  # squared norms, float64
    original_LN: np.ndarray
    notes: dict  # identity: model, backend, loss, …; plain values

    def __post_init__(self):
        L, Q, N = len(self.layers), len(self.queries), len(self.originals)
        shapes = (self.dot_LQN.shape, self.query_LQ.shape, self.original_LN.shape)
        if shapes != ((L, Q, N), (L, Q), (L, N)) or len(self.sizes) != L:
            raise ValueError(f"{L} layers, {Q} queries, {N} originals; shapes {shapes}")


def write(path: str | Path, dots: Dots) -> None:
    """Write a result; equal results give equal bytes, and nothing half-written has the name."""
    from safetensors.numpy import save_file

    arrays = {
        "dot": np.ascontiguousarray(dots.dot_LQN),
        "query": np.ascontiguousarray(dots.query_LQ, np.float64),
        "original": np.ascontiguousarray(dots.original_LN, np.float64),
    }
    names = ("layers", "sizes", "queries", "originals", "notes")
    values = {name: getattr(dots, name) for name in names}
    with replacing(path) as part:
        # One key: safetensors writes several in an order that differs from process to process.
        save_file(arrays, part, metadata={"dots": json.dumps(values, sort_keys=True)})


def read(path: str | Path) -> Dots:
    """Return the result that a file holds.

    Raises:
        InputError: if it is no such file.
    """
    values = _header(path)
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        arrays = [file.get_tensor(name) for name in ("dot", "query", "original")]
    named = [tuple(values[name]) for name in ("layers", "sizes", "queries", "originals")]
    return Dots(*named, *arrays, values["notes"])


def _header(path: str | Path) -> dict:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return json.loads((file.metadata() or {})["dots"])
    except (SafetensorError, KeyError, OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path} holds no dot products ({' '.join(str(error).split())}); {ANEW.format(path)}"
        ) from None


def write_part(
    path: str | Path, dots: Dots, start: int, stop: int, total: int, positions: Sequence[int]
) -> None:
    """Write a partition: originals at places start … stop − 1 of the grid's ``total``.

    Args:
        dots: of these originals in the grid's order; ``notes`` is the identity that all parts
            share, so nothing of a partition may be in it.
        start, stop: places in the grid's order, equal where the part is empty.
        total: originals in all parts.
        positions: place of each of these originals in the corpus.

    Raises:
        ValueError: if places, positions and originals don't fit each other.
    """
    fits = 0 <= start <= stop <= total and stop - start == len(dots.originals) == len(positions)
    if not fits or any(not 0 <= place < total for place in positions):
        raise ValueError(
            f"{len(dots.originals)} originals, {len(positions)} positions at places {start} to "
            f"{stop} of {total}"
        )
    notes = {"identity": dots.notes, "start": int(start), "stop": int(stop), "total": int(total)}
    notes["row_order"] = [int(place) for place in positions]
    write(path, Dots(**{**vars(dots), "notes": notes}))


def merge(paths: Sequence[str | Path]) -> Dots:
    """Return all parts as one result, originals in the corpus's order.

    The bytes don't depend on the number of parts or on their order. Memory: the result and a part.

    Raises:
        InputError: if a part is of another identity, or places are held twice or not at all.
    """
    headers = {str(path): _part_header(path) for path in paths}
    order = sorted(headers, key=lambda path: (headers[path]["start"], headers[path]["stop"], path))
    _require_one_identity(order, headers)
    _require_every_place_once(order, headers)
    first = headers[order[0]]
    L, Q, N = len(first["layers"]), len(first["queries"]), first["total"]
    originals, original_LN, dot_LQN, query_LQ = [""] * N, np.empty((L, N)), None, None
    for path in progress(order, "partitions", unit="partition"):
        if headers[path]["start"] == headers[path]["stop"]:
            continue
        part = read(path)
        places = headers[path]["row_order"]
        if dot_LQN is None:
            dot_LQN, query_LQ = np.empty((L, Q, N), part.dot_LQN.dtype), part.query_LQ
        _require_same_measure(path, part, dot_LQN, query_LQ)
        for place, name in zip(places, part.originals, strict=True):
            originals[place] = name
        original_LN[:, places] = part.original_LN
        for layer in range(L):  # fancy indices over all layers would hold the part twice
            dot_LQN[layer][:, places] = part.dot_LQN[layer]
        part = None  # else the next one is read while this one is still held
    if len({*originals}) < N:
        raise InputError("two partitions hold an original of the same id (allowed: each id once)")
    named = [tuple(first[name]) for name in ("layers", "sizes", "queries")]
    return Dots(*named, tuple(originals), dot_LQN, query_LQ, original_LN, first["identity"])


def _part_header(path: str | Path) -> dict:
    """Return identity, places and names of a part, flat."""
    values = _header(path)
    notes = values.pop("notes")
    keys = {"identity", "start", "stop", "total", "row_order"}
    if not keys <= {*notes}:
        raise InputError(f"{path} is no partition of dot products; {ANEW.format(path)}")
    return values | {key: notes[key] for key in keys}


def _require_one_identity(order: Sequence[str], headers: Mapping[str, Mapping]) -> None:
    """Hold every part against the one that most agree with, so that the odd one out is named."""
    if not order:
        raise InputError("no partition to merge (allowed: at least one)")
    kinds = ("identity", "total", "layers", "sizes", "queries")
    flat = {path: _flat({kind: headers[path][kind] for kind in kinds}) for path in order}
    keys = {path: json.dumps(flat[path], sort_keys=True) for path in order}
    counts = {path: [*keys.values()].count(keys[path]) for path in order}
    common = max(order, key=lambda path: counts[path])
    for path in order:
        if keys[path] == keys[common]:
            continue
        ours, theirs = flat[common], flat[path]
        name = next(n for n in sorted({*ours, *theirs}) if ours.get(n, ...) != theirs.get(n, ...))
        found, wanted = (_short(values.get(name)) for values in (theirs, ours))
        raise InputError(
            f"{path} is a partition of another run: {name.removeprefix('identity.')} is {found}, "
            f"in {common} it is {wanted}; {ANEW.format(path)}"
        )


def _flat(value: object, name: str = "") -> dict[str, object]:
    """Return nested mappings and lists as one mapping, keys and places joined by dots."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping):
        return {name: value}
    found: dict[str, object] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{name}.{key}" if name else str(key))
    return found


def _short(value: object, most: int = 80) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= most else f"{text[:most]}…"


def _require_every_place_once(order: Sequence[str], headers: Mapping[str, Mapping]) -> None:
    total, reached, last = headers[order[0]]["total"], 0, None
    if total == 0:
        raise InputError("no partition holds an original (allowed: at least one original)")
    for path in (path for path in order if headers[path]["start"] < headers[path]["stop"]):
        start, stop = headers[path]["start"], headers[path]["stop"]
        if start > reached:
            break
        if start < reached:
            raise InputError(
                f"{path} holds originals {start} to {stop - 1} of the grid, but {last} holds them "
                f"up to {reached - 1}: partitions overlap; {ANEW.format(path)}"
            )
        reached, last = stop, path
    else:
        start = total
    if reached < total:
        before = f"after {last}" if last else "at the start"
        raise InputError(
            f"no partition holds originals {reached} to {start - 1} of the grid's {total} "
            f"(missing {before}); run the missing partition, then merge again"
        )
    places = sorted(place for path in order for place in headers[path]["row_order"])
    if places != list(range(total)):
        raise InputError(
            f"partitions give {total} originals {len({*places})} places in the corpus "
            f"(allowed: each place once); to make them anew, delete {order[0]} and its neighbours "
            f"and run again"
        )


def _require_same_measure(path: str, part: Dots, dot_LQN: np.ndarray, query_LQ: np.ndarray):
    if part.dot_LQN.dtype != dot_LQN.dtype:
        raise InputError(
            f"{path} is a partition of another run: dtype is {part.dot_LQN.dtype}, in the first "
            f"one it is {dot_LQN.dtype}; {ANEW.format(path)}"
        )
    dtype = part.notes["identity"].get("dtype", "torch.float32")
    bound_Q = NORM_TOLERANCE.get(dtype, ROUGH) * query_LQ.sum(0)
    if not (np.abs(part.query_LQ - query_LQ) <= bound_Q).all():
        raise InputError(
            f"{path} is a partition of another run: its queries have other squared norms; "
            f"{ANEW.format(path)}"
        )
