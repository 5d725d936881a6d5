"""Files of the ffn study: keep sets and transport plans. Light: numpy and scipy alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from headroom.errors import InputError

if TYPE_CHECKING:
    from scipy.sparse import csr_array


def save_plan(
    path: str | Path,
    kept: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
    plans: "Mapping[int, csr_array]",
) -> None:
    """Write keep sets and scores of all layers, and the plan nearest to the middle layer.

    ``{layer}.kept`` and ``{layer}.score``; ``plan.layer``, ``plan.rows``, ``plan.columns``,
    ``plan.mass``, ``plan.shape`` where something is transported. Channels are numbered among the
    live ones of the parent's layer.
    """
    from safetensors.numpy import save_file

    found: dict[str, np.ndarray] = {}
    for index, (kept_k, score_n) in enumerate(zip(kept, scores, strict=True)):
        found |= {f"{index}.kept": kept_k, f"{index}.score": score_n}
    if plans:
        index = min(plans, key=lambda layer: abs(layer - len(kept) // 2))
        plan = plans[index].tocoo()
        found |= {
            "plan.layer": np.array([index]),
            "plan.rows": plan.row.astype(np.int64),
            "plan.columns": plan.col.astype(np.int64),
            "plan.mass": plan.data.astype(np.float64),
            "plan.shape": np.array(plan.shape),
        }
    save_file({name: np.ascontiguousarray(value) for name, value in found.items()}, path)


def load_plan(path: str | Path) -> "tuple[csr_array, np.ndarray, np.ndarray, int]":
    """Return the plan that a file holds, the kept channels, the scores and the layer.

    Raises:
        InputError: if nothing was transported.
    """
    from safetensors.numpy import load_file
    from scipy.sparse import coo_array

    found = load_file(path)
    if "plan.layer" not in found:
        raise InputError(f"{path} holds no transport plan: nothing was transported")
    layer, shape = int(found["plan.layer"][0]), tuple(map(int, found["plan.shape"]))
    pairs = (found["plan.rows"], found["plan.columns"])
    plan = coo_array((found["plan.mass"], pairs), shape=shape).tocsr()
    return plan, found[f"{layer}.kept"], found[f"{layer}.score"], layer
