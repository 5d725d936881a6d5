"""Pairs: cosines of concatenations against the concatenated vectors, and names of parameters."""

import numpy as np
import pytest

from headroom.errors import InputError
from headroom.gradients.dots import Dots
from headroom.gradients.pairs import block, component, from_dots, groups, places_in, similarity

SIZES = (4, 9, 2)
LAYERS = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.10.mlp.down_proj.weight",
)


def dots_of(query, original, queries, originals, layers=LAYERS):
    """Dots of gradients given as lists of (samples, elements) by layer."""
    return Dots(
        tuple(layers),
        tuple(q.shape[1] for q in query),
        tuple(queries),
        tuple(originals),
        np.stack([q @ o.T for q, o in zip(query, original, strict=True)]),
        np.stack([(q**2).sum(1) for q in query]),
        np.stack([(o**2).sum(1) for o in original]),
        {},
    )


@pytest.fixture
def gradients():
    rng = np.random.default_rng(0)
    scales = (1e-90, 1e3, 1.0)  # squares of squares of the first leave the range of float64
    query = [s * rng.normal(size=(5, n)) for s, n in zip(scales, SIZES, strict=True)]
    original = [s * rng.normal(size=(7, n)) for s, n in zip(scales, SIZES, strict=True)]
    query[1][3] = 0
    return query, original


def ids(prefix, count):
    return [f"{prefix}{i}" for i in range(count)]


@pytest.mark.parametrize("layers", [None, [0], [1], [2, 0]])
def test_similarity_is_the_cosine_of_the_concatenation(gradients, layers):
    query, original = gradients
    pairs = from_dots(dots_of(query, original, ids("s", 5), ids("s", 7)))
    places = layers or range(3)
    q, o = (np.concatenate([part[i] for i in places], axis=1) for part in (query, original))
    q, o = ((x / np.maximum(np.linalg.norm(x, axis=1), 1e-300)[:, None]) for x in (q, o))
    found = similarity(pairs, layers)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, q @ o.T, atol=1e-12)
    assert (found[3] == 0).all() == (layers == [1])
    pairs.dot_LQC[1, 0, 0] = np.nan
    if layers is None:
        with pytest.raises(InputError, match="not finite"):
            similarity(pairs)


def test_candidates_are_cut_out_and_truths_found(gradients):
    query, original = gradients
    dots = dots_of(query, original, ["s6", "s2", "none", "s0", "s1"], ids("s", 7))
    every = from_dots(dots)
    assert every.truth_Q.tolist() == [6, 2, -1, 0, 1] and every.shared_pool
    candidate_QC = np.array([[6, 0], [1, 2], [3, 4], [1, 2], [5, 1]])
    pairs = from_dots(dots, candidate_QC)
    assert pairs.truth_Q.tolist() == [0, 1, -1, -1, 1] and not pairs.shared_pool
    wanted = np.take_along_axis(similarity(every), candidate_QC, axis=1)
    np.testing.assert_array_equal(similarity(pairs), wanted)
    assert places_in(np.array([[-1, 3]]), np.array([-1])).tolist() == [-1]
    with pytest.raises(InputError, match="1 ids of the originals come twice"):
        from_dots(dots_of(query, original, ids("s", 5), ["s0", *ids("s", 6)]))


def test_groups_add_up_to_the_whole(gradients):
    found = groups(from_dots(dots_of(*gradients, ids("s", 5), ids("s", 7))))
    assert found == {
        ("full", "full"): [0, 1, 2],
        ("component", "embed"): [0],
        ("component", "q"): [1],
        ("component", "down"): [2],
        ("block", "0"): [1],
        ("block", "10"): [2],
    }


@pytest.mark.parametrize(
    ("name", "kind", "number"),
    [
        ("model.layers.3.self_attn.k_proj.weight", "k", 3),
        ("model.layers.3.self_attn.q_proj.bias", "bias", 3),
        ("model.layers.11.self_attn.q_norm.weight", "norm", 11),
        ("model.layers.0.post_attention_layernorm.weight", "norm", 0),
        ("model.layers.0.mlp.gate_proj.weight", "gate", 0),
        ("model.layers.0.mlp.gate.weight", "other", 0),
        ("model.norm.weight", "norm", None),
        ("lm_head.weight", "head", None),
        ("transformer.wte.weight", "embed", None),
        ("transformer.wpe.weight", "position", None),
        ("transformer.h.7.attn.c_attn.weight", "qkv", 7),
        ("transformer.h.7.attn.c_proj.weight", "o", 7),
        ("transformer.h.7.mlp.c_fc.weight", "up", 7),
        ("transformer.h.7.mlp.c_proj.weight", "down", 7),
        ("transformer.h.7.ln_1.weight", "norm", 7),
        ("transformer.h.7.ln_1.bias", "bias", 7),
        ("transformer.ln_f.weight", "norm", None),
        ("gpt_neox.layers.2.attention.query_key_value.weight", "qkv", 2),
        ("gpt_neox.layers.2.attention.dense.weight", "o", 2),
    ],
)
def test_parameter_names(name, kind, number):
    assert (component(name), block(name)) == (kind, number)
