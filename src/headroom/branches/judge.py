"""Judge runs on the same held-out texts, so many of them side by side."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from headroom.branches.layout import columns
from headroom.branches.model import inputs
from headroom.branches.runs import TRAINED
from headroom.branches.runs import Stack as Planned
from headroom.branches.saved import load_stack
from headroom.branches.texts import Texts, load_texts
from headroom.checkpoints import check_manifest, read_json, resolve_device
from headroom.errors import InputError
from headroom.progress import progress


@torch.no_grad()
def evaluate_stack(
    settings: Mapping, stack: Planned, folder: str, texts: str, branches: int, halvings: int
) -> pd.DataFrame:
    """Judge the trained members of a stack on the same texts, so many of them side by side.

    In float32 on every device: what is compared are small differences.

    Returns:
        A row a run and text: run, branches, text, document, nll (nats, summed over the text's
        predicted tokens), tokens.
    """
    own = settings["branches"]
    torch.set_num_threads(settings["compute"]["threads"])
    device = resolve_device(settings["compute"]["device"])
    check_manifest(folder)
    folders = {run.name: Path(folder) / run.name for run in stack.runs}
    trained = {
        name: path
        for name, path in folders.items()
        if read_json(path / "run.json")["status"] == TRAINED
    }
    store = load_texts(texts)
    nll_KN = np.zeros((len(trained), len(store.lengths)))
    if trained:
        model = load_stack(list(trained.values())).to(device).eval()
        packs = evaluation_packs(len(store.lengths), branches)
        size = max(1, (own["evaluation"]["micro_texts"] // branches) >> halvings)
        offsets_N = _offsets(store, own["offsets"]["evaluation"])
        for start in progress(range(0, len(packs), size), "evaluation", unit="batch"):
            chosen = packs[start : start + size]
            batch = columns(store, chosen, [offsets_N[pack].tolist() for pack in chosen])
            found_KP = model.losses(inputs(batch, device)).double().cpu().numpy()
            owner_P = batch.text_BS[batch.labels_BS >= 0]
            for nll_N, found_P in zip(nll_KN, found_KP, strict=True):
                nll_N += np.bincount(owner_P, weights=found_P, minlength=len(nll_N))
    return _losses(dict(zip(trained, nll_KN, strict=True)), store, branches)


def _losses(found: Mapping[str, np.ndarray], texts: Texts, branches: int) -> pd.DataFrame:
    count = len(texts.lengths)
    columns_of = {
        "run": np.repeat(list(found), count),
        "branches": branches,
        "text": np.tile(np.arange(count), len(found)),
        "document": np.tile(texts.documents, len(found)),
        "nll": np.concatenate([np.zeros(0), *found.values()]),
        "tokens": np.tile(texts.lengths - 1, len(found)),
    }
    return pd.DataFrame(columns_of)


def _offsets(texts: Texts, wanted: bool) -> np.ndarray:
    """Return at what time each text begins, the same at every number of branches."""
    if not wanted:
        return np.zeros(len(texts.lengths), dtype=np.int64)
    return np.random.default_rng(0).integers(texts.lengths + 1)


def evaluation_packs(texts: int, branches: int) -> list[list[int]]:
    """Return the samples of an evaluation: consecutive texts, so many of them in each.

    Raises:
        InputError: if the last sample would hold fewer.
    """
    if texts % branches:
        raise InputError(
            f"config key branches.texts.evaluation is {texts}, which leaves {texts % branches} "
            f"texts over at {branches} branches (allowed: multiples of {branches})"
        )
    return np.arange(texts).reshape(-1, branches).tolist()
