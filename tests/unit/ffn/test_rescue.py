"""Mass rescue, dilution, functional rescue, and the seed's report with them."""

import numpy as np
import pytest
from scipy.sparse import csr_array

from headroom.errors import InputError
from headroom.ffn.rescue import (
    dilution,
    dilution_verdict,
    functional_rescue,
    mass_rescue,
    report,
    rescue_verdict,
)

HAND = np.array([[0.25, 0], [0, 0.25], [0.25, 0], [0, 0.25]])


def test_hand_case():
    a, kept = np.full(4, 0.25), [0, 1]
    plan = csr_array(HAND)
    assert mass_rescue(plan, a, kept) == 1
    assert dilution(plan, kept) == 0.5
    partial = csr_array(HAND * [[1], [1], [0], [1]])
    assert mass_rescue(partial, a, kept) == 0.5
    assert dilution(partial, kept) == 0.25  # channel 0 is alone in its row now
    # a kept channel that receives nothing is no division by zero
    empty = csr_array(HAND * [[1, 0]])
    assert dilution(empty, kept) == 0.75
    assert mass_rescue(empty, a, kept) == 0.5


@pytest.mark.parametrize("seed", range(3))
def test_figures_match_dense_maps_and_follow_a_permutation(seed):
    generator = np.random.default_rng(seed)
    n, k = 11, 4
    kept = generator.permutation(n)[:k]
    dense = generator.uniform(size=(n, k)) * (generator.uniform(size=(n, k)) < 0.6)
    dense[kept, np.arange(k)] += 0.1
    a = dense.sum(1) + generator.uniform(0, 0.2, n)
    plan = csr_array(dense)
    map_kn = dense.T / dense.T.sum(1, keepdims=True)
    assert dilution(plan, kept) == pytest.approx(1 - np.trace(map_kn[:, kept]) / k)
    pruned = [i for i in range(n) if i not in kept]
    rescued = mass_rescue(plan, a, kept)
    assert rescued == pytest.approx(sum(dense[i].sum() for i in pruned) / a[pruned].sum())
    order = generator.permutation(n)
    moved = np.argsort(order)[kept]
    assert dilution(csr_array(dense[order]), moved) == pytest.approx(dilution(plan, kept))
    assert mass_rescue(csr_array(dense[order]), a[order], moved) == pytest.approx(rescued)


def test_nothing_pruned_and_nothing_lost():
    plan = csr_array(np.eye(3) / 3)
    assert mass_rescue(plan, np.full(3, 1 / 3), [0, 1, 2]) is None
    assert dilution(plan, [0, 1, 2]) == 0
    assert functional_rescue(0.0, 0.0) is None
    assert [functional_rescue(e, 2.0) for e in (0.0, 2.0, 3.0)] == [1, 0, -0.5]


@pytest.mark.parametrize(
    ("value", "rescue", "diluted"),
    [
        (-0.5, "limited", "low"),
        (0.2 - 1e-9, "limited", "low"),
        (0.2, "limited", "moderate"),
        (0.2 + 1e-9, "moderate", "moderate"),
        (0.5 - 1e-9, "moderate", "moderate"),
        (0.5, "moderate", "high"),
        (0.5 + 1e-9, "good", "high"),
    ],
)
def test_thresholds(value, rescue, diluted):
    assert rescue_verdict(value) == rescue
    assert dilution_verdict(value) == diluted


def layer(pruned, kept, mass, diluted, fused, drop):
    return {"pruned": pruned, "kept": kept, "mass_rescue": mass, "dilution": diluted,
            "error_fused": fused, "error_drop": drop}  # fmt: skip


def test_report_text():
    layers = [layer(1000, 3000, 1.0, 0.1, 1.0, 4.0), layer(3000, 1000, 0.8, 0.5, 5.0, 4.0)]
    text = report(layers, {"Model": "tiny", "Fusion": "ot_mass"})
    first = (
        "Layer 00: Rescued 0.750 (75.0%) of the squared error of dropping, Transported 1.000"
        " (100.0%) of pruned mass, Diluted: 0.100 (10.0%) of a fused row from other channels"
    )
    assert text.splitlines()[0] == first
    assert "Layer 01: Harmed (rescue -0.250: 1.25 times the squared error of dropping)" in text
    for line in (
        "RESCUE EFFECT SUMMARY REPORT",
        "  Model: tiny",
        "  Fusion: ot_mass",
        "  Total layers analyzed: 2",
        "  Total pruned channels: 4,000",
        "  Total kept channels: 4,000",
        "  Functional rescue: 0.2500 (25.00%)",  # 1 − 6/8
        "  Mass rescue: 0.8500 (85.00%)",  # (1000 + .8 · 3000) / 4000
        "  Dilution ratio: 0.2000 (20.00%)",  # (.1 · 3000 + .5 · 1000) / 4000
        "  Functional rescue - Mean: 0.2500, Std over layers: 0.5000",
        "  Functional rescue - Range: [-0.2500, 0.7500]",
        "  Mass rescue - Mean: 0.9000, Std over layers: 0.1000",
        "  Dilution ratio - Range: [0.1000, 0.5000]",
        "  ~ Moderate rescue effect: 25.0% of the squared error of dropping is undone",
        "  ~ Moderate dilution cost: 20.0% of a fused row comes from other channels",
    ):
        assert line in text.splitlines(), line


def test_report_with_what_there_is():
    # no plan (ridge), no held-out text, nothing pruned, harmful
    ridge = report([layer(2, 2, None, None, 0.0, 1.0)], {})
    assert "✓ Good rescue effect: 100.0%" in ridge and "ilut" not in ridge and "Mass" not in ridge
    blind = report([{"layer": 7, "pruned": 2, "kept": 2, "mass_rescue": 1.0, "dilution": 0.6}], {})
    assert "Layer 07: Transported" in blind and "✗ High dilution" in blind
    assert "unctional" not in blind and "rescue effect:" not in blind
    whole = report([layer(0, 4, None, 0.0, 0.0, 0.0), layer(2, 2, 1.0, 0.1, 3.0, 2.0)], {})
    assert whole.startswith("Layer 00: nothing pruned\nLayer 01: Harmed (rescue -0.500: 1.5 times")
    assert "✗ Harmful: 1.5 times the squared error of dropping" in whole
    assert "✓ Low dilution cost: 3.3%" in whole
    assert "Interpretation:\n  nothing measured" in report([{"pruned": 1, "kept": 1}], {})
    with pytest.raises(InputError, match="at least one layer"):
        report([], {})
