"""Analyses against direct computations, tables and page, the export against ``json.dumps``."""

import json

import numpy as np
import pytest

from headroom.errors import InputError
from headroom.gradients import export, tables
from headroom.gradients.analysis import (
    greedy_forward_selection,
    halves,
    hubness,
    layer_comparison,
    matching_and_others,
    most_divergent,
    parameter_distribution,
    self_similarity,
    uncentred_cosine,
)
from headroom.gradients.pairs import from_dots, similarity
from headroom.gradients.pools import pool
from headroom.gradients.retrieval import best_of_all, nearest_by_layer, ranks

from .test_pairs import dots_of, ids

LAYERS = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
]
SETTINGS = {"confidence": 0.95, "resamples": 100, "seed": 0, "permutations": 20}


@pytest.fixture(scope="module")
def gradients():
    """Noisy copies; a layer further down is noisier, and the last two have equal elements."""
    rng = np.random.default_rng(0)
    sizes, noise = (40, 30, 50, 20, 20), (1.0, 2.0, 1.2, 4.0, 3.0)
    original = [rng.normal(size=(30, n)) for n in sizes]
    query = [
        o[:24] + s * rng.normal(size=(24, n))
        for o, n, s in zip(original, sizes, noise, strict=True)
    ]
    return query, original


@pytest.fixture(scope="module")
def dots(gradients):
    return dots_of(*gradients, ids("s", 24), ids("s", 30), LAYERS)


@pytest.fixture(scope="module")
def pairs(dots):
    return from_dots(dots)


def cosines(q, o):
    q, o = (x / np.linalg.norm(x, axis=1)[:, None] for x in (q, o))
    return q @ o.T


def test_layers_against_direct_computations(gradients, pairs):
    query, original = gradients
    full = cosines(np.hstack(query), np.hstack(original))
    own = [cosines(q, o) for q, o in zip(query, original, strict=True)]
    wanted = [(c * full).sum() / np.sqrt((c**2).sum() * (full**2).sum()) for c in own]
    np.testing.assert_allclose(layer_comparison(pairs), wanted, rtol=1e-12)
    diagonal = np.stack([np.diag(c) for c in own], axis=1)
    np.testing.assert_allclose(self_similarity(pairs), diagonal, rtol=1e-12)
    assert most_divergent(diagonal, 2) == list(np.argsort(diagonal.mean(1))[:2])
    matching, others = matching_and_others(pairs)
    np.testing.assert_allclose(matching, diagonal.mean(0))
    np.testing.assert_allclose(others, [(c.sum() - np.trace(c)) / (24 * 29) for c in own])
    shares = parameter_distribution(pairs)
    assert shares.elements.tolist() == [40, 30, 50, 20, 20] and shares.share.sum() == 1
    squares = np.stack([(o**2).sum(1) for o in original])
    np.testing.assert_allclose(shares.norm_share, (squares / squares.sum(0)).mean(1))
    hubs = hubness(pairs)
    assert hubs.count_N.tolist() == np.bincount(full.argmax(1), minlength=30).tolist()


def test_a_pool_without_the_truth_has_no_self_similarity(dots):
    candidate_QC = np.tile(np.arange(5), (24, 1))
    pairs = from_dots(dots, candidate_QC)
    found = self_similarity(pairs)
    assert np.isfinite(found[:5]).all() and np.isnan(found[5:]).all()
    assert len(most_divergent(found, 9)) == 5
    assert len(tables.self_similarity_table(pairs)) == 5 * len(LAYERS)


@pytest.mark.parametrize("criterion", ["similarity", "accuracy"])
def test_greedy_selection_is_the_best_addition_at_each_step(pairs, criterion):
    choosing, holding = halves(24, 7)
    assert sorted([*choosing, *holding]) == list(range(24))
    full = similarity(pairs)

    def score(layers, rows):
        found = similarity(pairs, layers)
        if criterion == "similarity":
            return uncentred_cosine(found[rows], full[rows])
        return (ranks(found, pairs.truth_Q)[rows] <= 1).mean()

    left, before, elements = [3, 4, 1, 0, 2], [], 0  # small tensors first
    for step in greedy_forward_selection(pairs, criterion, 9, seed=7):
        scores = [score([*before, layer], choosing) for layer in left]
        best = left.pop(int(np.argmax(scores)))
        before.append(best)
        elements += pairs.sizes[best]
        assert step.layer == best and step.chosen == pytest.approx(max(scores), abs=1e-12)
        assert step.held_out == pytest.approx(score(before, holding), abs=1e-12)
        assert step.parameters_share == elements / 160
    assert not left and step.parameters_share == 1
    assert len(greedy_forward_selection(pairs, criterion, 2)) == 2
    with pytest.raises(InputError, match="allowed: similarity, accuracy"):
        greedy_forward_selection(pairs, "speed", 2)


def test_tables_and_page(dots, pairs):
    rng = np.random.default_rng(0)
    states = dots_of(
        [rng.normal(size=(24, 4))] * 2,
        [rng.normal(size=(30, 4))] * 2,
        ids("s", 24),
        ids("s", 30),
        ["0.mean", "0.last"],
    )
    own = np.eye(24, 30)
    baselines = {"bm25_prompt": own, "length": np.zeros((24, 30))}
    table = tables.retrieval_table(pairs, from_dots(states), baselines, SETTINGS)
    assert list(table.kind.value_counts(sort=False).items()) == [
        *(("full", 1), ("component", 3), ("block", 2), ("layer", 5), ("state", 2), ("baseline", 2))
    ]
    assert table.top1.tolist()[-2:] == [1.0, 0.0]  # a tie of all is no hit
    assert table.mrr.tolist()[-1] == pytest.approx(1 / 15.5)
    assert table.verdict.tolist()[-1] == "worse" and table.verdict[0] == "reference"
    same = table[(table.kind == "component") & (table.name == "embed")].iloc[0]
    layer = table[table.name == LAYERS[0]].iloc[0]
    assert same.mrr == layer.mrr and same.difference_low == layer.difference_low
    assert table[table.kind == "block"].parameters.tolist() == [80, 40]
    layers = tables.layers_table(pairs)
    assert layers.top1.tolist() == table[table.kind == "layer"].top1.tolist()
    greedy = tables.greedy_table(pairs, 2)
    assert greedy.step.tolist() == [1, 2, 1, 2] and set(greedy.layer) <= {*LAYERS}

    truth_Q = pairs.truth_Q
    scores = rng.random((24, 30))
    injected = pool("bm25", 5, True, scores, truth_Q)
    some = from_dots(dots, injected.candidate_QC)
    best = best_of_all(nearest_by_layer(some), some, SETTINGS["permutations"])
    table = tables.retrieval_table(some, None, baselines, SETTINGS)
    candidates = {"pool": "bm25", "k": 5, "inject_truth": True}
    hubs = hubness(some)
    html = tables.page("tiny <1>", table, best, injected, candidates, hubs, SETTINGS)
    assert f"<b>Truth injected: for {24 - injected.found} queries" in html
    assert "tiny &lt;1&gt;" in html and "beats length alone" in html
    assert "BM25 on the prompt (100.0 %" in html
    plain = pool("bm25", 5, False, scores, truth_Q)
    said = tables.page(
        "t", table, best, plain, {**candidates, "inject_truth": False}, hubs, SETTINGS
    )
    assert "Truth injected" not in said
    assert f"the other {24 - plain.found} count as misses" in said


def test_export_is_what_json_would_write(tmp_path, dots):
    pairs = from_dots(
        dots, np.random.default_rng(0).permuted(np.tile(np.arange(30), (24, 1)), axis=1)[:, :3]
    )
    full = similarity(pairs)
    names = [[dots.originals[place] for place in row] for row in pairs.candidate_QC]
    wanted = {
        "similarities": {
            q: dict(zip(names[i], full[i].tolist(), strict=True))
            for i, q in enumerate(pairs.queries)
        },
        "dot_products": {
            q: {
                name: dict(zip(LAYERS, pairs.dot_LQC[:, i, c].tolist(), strict=True))
                for c, name in enumerate(names[i])
            }
            for i, q in enumerate(pairs.queries)
        },
        "query_norms": {
            q: dict(zip(LAYERS, pairs.query_LQ[:, i].tolist(), strict=True))
            for i, q in enumerate(pairs.queries)
        },
        "original_norms": {
            o: dict(zip(LAYERS, pairs.original_LN[:, i].tolist(), strict=True))
            for i, o in enumerate(pairs.originals)
        },
    }
    for name, value in wanted.items():
        path = tmp_path / f"{name}.json"
        getattr(export, name)(path, pairs)
        assert path.read_text() == json.dumps(value, indent=4)
