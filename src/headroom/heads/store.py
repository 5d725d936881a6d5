"""Files of the heads study: similarities with and without the sink. Light: numpy alone."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from headroom.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping


def save_similarity(
    path: str | Path, variants: "Mapping[str, np.ndarray]", groups: int, metadata: dict
) -> None:
    """Write similarities, shape (layers, heads, heads) each, and what they were computed from.

    Args:
        path: the file.
        variants: ``similarity`` and, where the metric has it, ``similarity_nosink``, and the Gram
            matrices that they come from.
        groups: key/value heads of the model.
        metadata: plain values (tokens, sequences, window, metric).
    """
    from safetensors.numpy import save_file

    notes = json.dumps({**metadata, "groups": groups}, sort_keys=True, default=str)
    arrays = {name: np.ascontiguousarray(value) for name, value in variants.items()}
    # One key: safetensors writes several in an order that differs from process to process.
    save_file(arrays, path, metadata={"notes": notes})


def load_similarity(path: str | Path, sink: bool = True) -> np.ndarray:
    """Return the similarities, float64, with the attention sink or without it.

    Raises:
        InputError: if the metric has no variant without the sink.
    """
    from safetensors import safe_open

    name = "similarity" if sink else "similarity_nosink"
    with safe_open(path, framework="numpy") as file:
        if name not in file.keys():  # noqa: SIM118 (safe_open is no mapping)
            metric = json.loads(file.metadata()["notes"]).get("metric")
            raise InputError(
                f"criterion {metric}_nosink: metric {metric} is the same without the sink; "
                f"write {metric}"
            )
        return file.get_tensor(name)


def load_variants(path: str | Path) -> tuple[dict[str, np.ndarray], int]:
    """Return the similarities by what a figure calls them, and the number of key/value heads."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        variants = {"": file.get_tensor("similarity")}
        if "similarity_nosink" in file.keys():  # noqa: SIM118
            variants["no sink"] = file.get_tensor("similarity_nosink")
        return variants, json.loads(file.metadata()["notes"])["groups"]
