"""Published dot products of OLMo-1B on LIMA give the published accuracies and comparisons."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from headroom.gradients.analysis import accuracies, layer_comparison
from headroom.gradients.pairs import Pairs, block, component, places_in, similarity
from headroom.gradients.retrieval import ranks, summary

DATA = Path(os.environ.get("HEADROOM_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
REFERENCE = DATA / "lima" / "reference"

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(
        not REFERENCE.is_dir(), reason=f"no lima/reference in {DATA} (set HEADROOM_DATA)"
    ),
]


def published(name):
    return json.loads((REFERENCE / f"seed_{name}.json").read_text())


@pytest.fixture(scope="module")
def pairs():
    found = np.load(REFERENCE / "seed_layer_dot_products_paraphrased.npz")
    layers = tuple(map(str, found["layers"]))
    order = np.argsort(found["original_id"])
    places = np.searchsorted(found["original_id"], found["candidate_id"], sorter=order)
    candidate_QC = order[places]
    assert (found["original_id"][candidate_QC] == found["candidate_id"]).all()
    same_QN = found["query_id"][:, None] == found["original_id"]
    assert (same_QN.sum(1) == 1).all()
    sizes = published("parameters_per_layer")
    return Pairs(
        layers,
        tuple(sizes[name] for name in layers),
        tuple(map(str, found["query_id"])),
        tuple(map(str, found["original_id"])),
        np.moveaxis(found["dot"], 2, 0),
        found["query_selfdot"].T,
        found["original_selfdot"].T,
        candidate_QC,
        places_in(candidate_QC, same_QN.argmax(1)),
    )


def test_full_gradient_finds_981_of_988(pairs):
    found = summary(ranks(similarity(pairs), pairs.truth_Q))
    assert found["n"] == 988 and found["top1"] == 981 / 988
    assert round(found["top1_low"], 3) == 0.985 and round(found["top1_high"], 3) == 0.997


def test_accuracy_of_each_layer_is_the_published_one(pairs):
    wanted = published("accuracy_per_layer_paraphrased")
    assert dict(zip(pairs.layers, accuracies(pairs).tolist(), strict=True)) == wanted


def test_layer_comparison_is_the_published_one(pairs):
    wanted = published("layer_comparison_full_gradient_paraphrased")
    found = dict(zip(pairs.layers, layer_comparison(pairs).tolist(), strict=True))
    assert found == pytest.approx(wanted, abs=1e-8)
    kinds = [component(name) for name in pairs.layers]
    means = [np.mean([found[n] for n, k in zip(pairs.layers, kinds, strict=True) if k == "k"])]
    assert round(means[0], 3) == 0.875 and kinds.count("other") == 0
    assert [block(name) for name in pairs.layers][-1] == 15
