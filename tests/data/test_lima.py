"""Gradients on real samples and real weights: LIMA on a model of 3 M parameters."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from headroom.corpora.instructions import Sample, write_samples
from headroom.corpora.paraphrase_rules import rephrase
from headroom.gradients.measure import measure
from headroom.gradients.pairs import cosine
from headroom.gradients.setup import prepare
from tests.unit.gradients.small_models import by_autograd
from tests.unit.gradients.test_measure import OWN

DATA = Path(os.environ.get("HEADROOM_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
SAMPLES = DATA / "lima" / "lima_256_apertium_roundtrip.json"
pytestmark = [
    pytest.mark.data,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not SAMPLES.is_file(), reason=f"no LIMA under {DATA} (set HEADROOM_DATA)"),
]
COUNT = 16
SETTINGS = {
    "compute": {"device": "cpu", "dtype": "float32", "threads": 1},
    "gradients": OWN | {"length": 400, "batch": 8, "block": 8, "template": "auto"},
    "backend": "auto",
}


def samples():
    rows = json.loads(SAMPLES.read_text())
    short = [row for row in rows if 150 < len(row["a"]) < 300]
    return short[:COUNT]


def measured(folder, queries, model="wikitext3M"):
    """The setup and the result of these queries among their originals."""
    originals = [Sample(row["id"], row["u"], row["a"]) for row in samples()]
    sets = {"originals": originals, "queries": queries}
    for name, found in sets.items():
        write_samples(folder / f"{name}.jsonl", found)
    files = {name: str(folder / f"{name}.jsonl") for name in sets}
    checkpoint = str(DATA / "models" / model)
    setup = prepare(checkpoint, files, SETTINGS, (0, 1), 0, folder / "features")
    return setup, measure(setup)


def top1(setup, result, layer=None):
    """Share of queries whose nearest original is their own."""
    chosen = slice(None) if layer is None else [layer]
    query_Q, original_N = result.query_QL[:, chosen].sum(1), result.original_NL[:, chosen].sum(1)
    dot_QN = result.dot_LQN[chosen].astype(np.float64).sum(0)
    cosine_QN = cosine(dot_QN, query_Q, np.broadcast_to(original_N, dot_QN.shape))
    order = setup.originals.grid.order
    ids = [setup.originals.encoded.ids[place] for place in order]
    found = [ids[place] for place in cosine_QN.argmax(1)]
    return np.mean([a == b for a, b in zip(found, setup.queries.encoded.ids, strict=True)])


def test_copies_are_found_by_every_layer_and_gradients_are_autograds(tmp_path):
    copies = [Sample(row["id"], row["u"], row["a"]) for row in samples()]
    setup, result = measured(tmp_path, copies)
    assert len(setup.queries.encoded.ids) >= COUNT - 2
    assert {top1(setup, result, layer) for layer in range(len(result.layers))} == {1.0}
    order = setup.originals.grid.order
    for row in (0, len(order) - 1):
        loop = by_autograd(
            setup.measurer.capture.model, setup.originals.encoded.samples[order[row]]
        )
        squares = [loop[1][layer].double().square().sum().item() for layer in result.layers]
        np.testing.assert_allclose(result.original_NL[row], squares, rtol=1e-4)
        own = result.dot_LQN[:, order[row], row]
        np.testing.assert_allclose(own, squares, rtol=1e-4)


def test_stronger_paraphrases_are_not_found_more_often(tmp_path):
    found = []
    for strength in (0.0, 0.5, 1.0):
        queries = [
            Sample(row["id"], *(rephrase(row[part], strength) for part in ("u", "a")))
            for row in samples()
        ]
        found.append(top1(*measured(tmp_path, queries)))
    machine = [Sample(row["id"], row["pu"], row["pa"]) for row in samples()]
    found.append(top1(*measured(tmp_path, machine)))
    assert found[0] == 1.0
    assert found == sorted(found, reverse=True)
    assert found[-1] > 0.8, "chance is 1/16"


def test_shuffled_answers_are_found_by_chance(tmp_path):
    rows = samples()
    turned = rows[5:] + rows[:5]
    queries = [Sample(a["id"], b["pu"], b["pa"]) for a, b in zip(rows, turned, strict=True)]
    assert top1(*measured(tmp_path, queries, "stories260K")) < 0.3
