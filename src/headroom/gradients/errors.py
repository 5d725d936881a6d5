"""How far an approximate backend is from exact gradients, on a few samples of the run itself.

Shapes: L layers, Q queries, N originals.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from headroom.errors import InputError
from headroom.gradients.capture import pad
from headroom.gradients.encoding import Encoded
from headroom.gradients.grid import make_grid
from headroom.gradients.measure import measure
from headroom.gradients.pairs import cosine
from headroom.gradients.projection import concentration, projected_error, two_sided_variance
from headroom.gradients.result import Result
from headroom.gradients.setup import Setup, Side, plan_part, prepare
from headroom.gradients.similarity import Measurer
from headroom.gradients.uses import materialise

SOME = 4  # samples whose gradients' concentration is looked at


def write_errors(
    checkpoint: str, sets: Mapping[str, str], settings: Mapping, halvings: int, output: str
) -> None:
    """Write a row a layer, and one of the full gradient: measured and predicted errors.

    layer, parameters, dimension (of what is kept of a sample), rms (of cosine minus exact cosine,
    over all pairs), predicted (were the pairs orthogonal; random signs alone), norm_rms (of
    ‖·‖²/‖g‖² − 1), norm_predicted (two-sided alone), concentration τ, and how many queries and
    originals were compared. A backend that no formula is known for has no prediction.

    Args:
        checkpoint, sets, settings, halvings: as in :func:`measure.measure_part`.
        output: the CSV file.

    Raises:
        InputError: where exact gradients of so many samples don't fit into memory.
    """
    setup = _few(prepare(checkpoint, sets, settings, (0, 1), halvings, Path("unused")), settings)
    capture, own = setup.measurer.capture, settings["gradients"]
    exact = Measurer(capture, dict.fromkeys(capture.shapes, "exact"), own, setup.measurer.size)
    with torch.no_grad():
        found = measure(setup)
        wanted = measure(replace(setup, measurer=exact, plan=_tiled(setup, exact, own)))
    frame = _compared(setup, found, wanted, own)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(output, index=False)


def _few(setup: Setup, settings: Mapping) -> Setup:
    """Return the setup of some samples of all lengths."""
    own = settings["gradients"]
    sides = [_some(side, own["compared"]) for side in (setup.originals, setup.queries)]
    few = replace(setup, originals=sides[0], queries=sides[1], blocks=range(1))
    return replace(few, plan=_tiled(few, setup.measurer, own))


def _tiled(setup: Setup, measurer: Measurer, own: Mapping):
    own = {**own, "disk_gb": 0.0, "block": setup.originals.grid.block}
    try:
        return plan_part(setup.originals, setup.queries, measurer, range(1), own)
    except InputError as error:
        raise InputError(f"config key gradients.compared is {own['compared']}: {error}") from None


def _some(side: Side, count: int) -> Side:
    order = side.grid.order
    rows = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).astype(int))
    places = [order[row] for row in rows]
    encoded = Encoded(
        [side.encoded.ids[place] for place in places],
        [side.encoded.samples[place] for place in places],
        {},
    )
    return Side(encoded, make_grid(encoded.lengths, side.grid.batch, count), side.digest)


def _compared(setup: Setup, found: Result, wanted: Result, own: Mapping) -> pd.DataFrame:
    shapes, backend = setup.measurer.capture.shapes, setup.identity["backend"]
    taus = _concentrations(setup) if backend == "two_sided" else {}
    rows = []
    for place, (layer, shape) in enumerate(shapes.items()):
        row = {"layer": layer, "parameters": int(np.prod(shape))}
        row |= _sizes(backend, shape, taus.get(layer), own)
        rows.append(row | _errors(found, wanted, [place]))
    frame = pd.DataFrame(rows)
    whole = {"layer": "full", "parameters": int(frame.parameters.sum())}
    whole |= {"dimension": int(frame.dimension.sum())} | _errors(found, wanted, None)
    if backend == "projection":
        kept = frame.dimension.to_numpy()
        whole["predicted"] = projected_error(
            wanted.query_QL, wanted.original_NL, kept, kept == frame.parameters.to_numpy()
        )
    frame = pd.concat([frame, pd.DataFrame([whole])], ignore_index=True)
    return frame.assign(queries=len(wanted.query_QL), originals=len(wanted.original_NL))


def _sizes(backend: str, shape: tuple, tau: float | None, own: Mapping) -> dict:
    """What is kept of a layer, and the error that theory gives it."""
    size = int(np.prod(shape))
    if backend == "projection":
        kept = min(size, own["projection"]["dimension"])
        return {"dimension": kept, "predicted": 0.0 if kept == size else kept**-0.5}
    if backend == "two_sided" and len(shape) == 2:
        sides = [own["two_sided"][name] for name in ("outer", "inner")]
        kept = [min(side, whole) for side, whole in zip(sides, shape, strict=True)]
        outer, inner = (
            None if part == whole else part for part, whole in zip(kept, shape, strict=True)
        )
        variance = two_sided_variance(tau or 0.0, inner, outer)
        found = {"concentration": tau, "norm_predicted": variance**0.5}
        return {"dimension": kept[0] * kept[1], **found}
    if backend == "two_sided":
        return {"dimension": size, "norm_predicted": 0.0}
    return {"dimension": size}


def _concentrations(setup: Setup) -> dict[str, float]:
    """Mean τ of some originals' gradients, by layer; one sample at a time."""
    capture, found = setup.measurer.capture, {}

    def take(layer: str, uses) -> None:
        shape = capture.shapes[layer]
        if len(shape) == 2:
            gradient = materialise(uses, shape).view(-1, *shape)
            found.setdefault(layer, []).append(float(concentration(gradient)))

    for sample in setup.originals.encoded.samples[:: max(1, len(setup.rows) // SOME)][:SOME]:
        capture(pad([sample], str(setup.measurer.device)), take)
    return {layer: float(np.nanmean(taus)) for layer, taus in found.items()}


def _errors(found: Result, wanted: Result, places: list[int] | None) -> dict[str, float]:
    chosen = slice(None) if places is None else places
    cosines, norms = [], []
    for result in (found, wanted):
        query_Q = result.query_QL[:, chosen].sum(1)
        original_N = result.original_NL[:, chosen].sum(1)
        dot_QN = result.dot_LQN[chosen].astype(np.float64).sum(0)
        cosines.append(cosine(dot_QN, query_Q, np.broadcast_to(original_N, dot_QN.shape)))
        norms.append(np.concatenate([query_Q, original_N]))
    ratio = norms[0][norms[1] > 0] / norms[1][norms[1] > 0]
    return {
        "rms": float(np.sqrt(np.square(cosines[0] - cosines[1]).mean())),
        "norm_rms": float(np.sqrt(np.square(ratio - 1).mean())) if len(ratio) else 0.0,
    }
