"""Fusions of one layer against least squares, dense matrix products and planted structure."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from headroom.errors import InputError
from headroom.ffn.fusion import (
    FUSIONS,
    START,
    Layer,
    Transport,
    bias,
    drop,
    fuse,
    normalised,
    ot_column,
    ot_mass,
    ot_ridge,
    pruned_of,
    refitted,
    ridge,
)
from headroom.ffn.layers import named
from headroom.ffn.rescue import dilution, mass_rescue
from headroom.recipes import REFITS

from .small_ffns import hidden_of, inputs, layer_of, output_error, random_ffn

KEPT = torch.tensor([0, 2, 3, 7, 11, 12, 19, 23])
GONE = [i for i in range(24) if i not in KEPT.tolist()]
HAND = csr_array(np.array([[0.25, 0], [0, 0.25], [0.25, 0], [0, 0.25]]))
TINY = 1e-12


def tensors(ffn):
    return [tensor for _, tensor in named(ffn, 0)]


def random_transport(n=24, k=8, seed=0, signs=False, empty=()):
    generator = np.random.default_rng(seed)
    plan = generator.random((n, k)) * (generator.random((n, k)) < 0.4) + 1e-3
    plan[:, list(empty)] = 0
    plan /= plan.sum()
    sign = np.where(generator.random((n, k)) < 0.5, -1.0, 1.0) if signs else None
    return Transport(
        csr_array(plan), plan.sum(1), plan.sum(0), None if sign is None else csr_array(sign)
    )


def least_squares(layer, small, seen, weight):
    """Ridge towards the smaller layer's own W_d, by numpy's SVD on stacked rows, canonical."""
    z, y = (
        hidden_of(small, seen),
        np.concatenate([layer.dense(x).flatten(0, 1) for x in layer.inputs]),
    )
    down = small.down_Dn.numpy().T
    missing = y - z @ down - (0 if small.down_bias_D is None else small.down_bias_D.numpy())
    scale = np.sqrt(np.linalg.norm(down, axis=1) / np.linalg.norm(small.up_nD.numpy(), axis=1))
    rows = np.vstack([z * scale, np.sqrt(weight) * np.eye(len(scale))])
    wanted = np.vstack([missing, np.zeros_like(down)])
    return (down + scale[:, None] * np.linalg.lstsq(rows, wanted, rcond=None)[0]).T


def mean_energy(layer):
    """mean diag G in the canonical scale."""
    ffn = layer.dense
    scale = np.sqrt((ffn.down_Dn.norm(dim=0) / ffn.up_nD.norm(dim=1)).numpy())
    return np.square(hidden_of(ffn, layer.inputs) * scale).sum(0).mean()


def test_registries_agree():
    assert tuple(START) == REFITS and set(START) <= set(FUSIONS)
    assert all(START[name] in FUSIONS.values() for name in START)


# the maps


def test_hand_case():
    """Spec 7: half of each kept channel is its own; without row 3's mass half is rescued."""
    kept, a = [0, 1], np.full(4, 0.25)
    assert normalised(HAND, "rows").toarray().tolist() == [[0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5]]
    assert normalised(HAND, "columns").toarray().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert dilution(HAND, kept) == 0.5 and mass_rescue(HAND, a, kept) == 1
    lazy = HAND.toarray()
    lazy[3] = 0
    lazy = csr_array(lazy)
    assert mass_rescue(lazy, a, kept) == 0.5
    assert normalised(lazy, "columns").toarray()[:, 3].tolist() == [0, 0]
    nothing = csr_array((3, 2), dtype=float)
    assert not normalised(nothing, "rows").toarray().any()


@pytest.mark.parametrize("signs", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("fusion", [ot_mass, ot_column])
def test_transports_are_products_with_dense_maps(fusion, biases, signs):
    layer = layer_of(random_ffn(biases=biases))
    transport = random_transport(signs=signs, empty=[5])
    small = fusion(layer, KEPT, transport)
    ffn, plan = layer.canonical, transport.plan_nk.toarray()
    by_mass = plan / np.where(plan.sum(0) > 0, plan.sum(0), np.inf)
    by_source = plan / plan.sum(1)[:, None]
    sign = transport.sign_nk.toarray() if signs else np.ones_like(plan)
    rows = by_mass if fusion is ot_mass else by_source
    wanted = {
        "gate_nD": rows.T @ ffn.gate_nD.numpy(),
        "up_nD": (rows * sign).T @ ffn.up_nD.numpy(),
        "down_Dn": ffn.down_Dn.numpy() @ (by_source * sign),
    }
    if biases:
        wanted["gate_bias_n"] = rows.T @ ffn.gate_bias_n.numpy()
        wanted["up_bias_n"] = (rows * sign).T @ ffn.up_bias_n.numpy()
        wanted["down_bias_D"] = ffn.down_bias_D.numpy()
    for name, value in wanted.items():
        np.testing.assert_allclose(getattr(small, name), value, atol=1e-12, err_msg=name)
    assert torch.isfinite(small(layer.inputs[0])).all()
    assert not small.gate_nD[5].any() and not small.down_Dn[:, 5].any()


def test_identity_plans_keep_the_function():
    layer = layer_of(random_ffn(biases=True))
    plan = csr_array(np.eye(24) / 24)
    one = Transport(plan, plan.sum(1), plan.sum(0))
    for name in FUSIONS:
        small = fuse(name, layer, torch.arange(24), one)
        assert output_error(layer.dense, small, layer.inputs) < 1e-14, name
        if name.startswith("ot_"):  # where nothing goes nothing is transported
            small = fuse(name, layer, torch.arange(24), None)
            pairs = zip(tensors(small), tensors(layer.dense), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)


def test_kept_rows_stay_bit_for_bit():
    layer = layer_of(random_ffn(biases=True))
    for fusion in (drop, bias, ridge):
        small = fusion(layer, KEPT, None)
        for part in ("gate_nD", "up_nD", "gate_bias_n", "up_bias_n"):
            assert torch.equal(getattr(small, part), getattr(layer.dense, part)[KEPT])
    assert torch.equal(drop(layer, KEPT, None).down_Dn, layer.dense.down_Dn[:, KEPT])
    assert pruned_of(24, KEPT).tolist() == GONE


# refits


@pytest.mark.parametrize("share", [1e-3, 1.0])
@pytest.mark.parametrize("biases", [False, True])
def test_ridge_is_ridge_regression(share, biases):
    layer = layer_of(random_ffn(biases=biases), share)
    weight = share * mean_energy(layer)
    np.testing.assert_allclose(layer.weight, weight, rtol=1e-10)
    direct, refit = ridge(layer, KEPT, None), refitted(layer, drop(layer, KEPT, None), layer.inputs)
    wanted = least_squares(layer, drop(layer, KEPT, None), layer.inputs, weight)
    np.testing.assert_allclose(direct.down_Dn, wanted, atol=1e-10)
    np.testing.assert_allclose(refit.down_Dn, wanted, atol=1e-10)
    transport = random_transport()
    found, start = ot_ridge(layer, KEPT, transport), ot_mass(layer, KEPT, transport)
    wanted = least_squares(layer, start, layer.inputs, weight)
    np.testing.assert_allclose(found.down_Dn, wanted, atol=1e-10)
    assert torch.equal(found.gate_nD, start.gate_nD) and torch.equal(found.up_nD, start.up_nD)


def test_ridge_without_ridge_is_least_squares():
    layer = layer_of(random_ffn(), TINY)
    z = hidden_of(layer.dense, layer.inputs)
    y = z @ layer.dense.down_Dn.numpy().T
    wanted = np.linalg.lstsq(z[:, KEPT], y, rcond=None)[0].T
    small = drop(layer, KEPT, None)
    for found in (ridge(layer, KEPT, None), refitted(layer, small, layer.inputs)):
        np.testing.assert_allclose(found.down_Dn, wanted, atol=1e-8)
    huge = layer_of(random_ffn(), 1e12)  # an endless ridge leaves what was there
    np.testing.assert_allclose(ridge(huge, KEPT, None).down_Dn, small.down_Dn, atol=1e-9)


@pytest.mark.parametrize("biases", [False, True])
def test_refits_see_what_a_compressed_prefix_gives(biases):
    """Other inputs than the dense layer's: regression from those to the dense output."""
    layer = layer_of(random_ffn(biases=biases), 1e-2)
    seen = [x + 0.3 * torch.randn(x.shape, dtype=x.dtype) for x in layer.inputs]
    small = drop(layer, KEPT, None)
    wanted = least_squares(layer, small, seen, 1e-2 * mean_energy(layer))
    found = fuse("ridge_sequential", layer, KEPT, None, seen)
    np.testing.assert_allclose(found.down_Dn, wanted, atol=1e-10)
    assert not np.allclose(wanted, ridge(layer, KEPT, None).down_Dn, atol=1e-2)
    transport = random_transport()
    found = fuse("ot_ridge_sequential", layer, KEPT, transport, seen)
    start = ot_mass(layer, KEPT, transport)
    wanted = least_squares(layer, start, seen, 1e-2 * mean_energy(layer))
    np.testing.assert_allclose(found.down_Dn, wanted, atol=1e-10)
    same = fuse("ridge_sequential", layer, KEPT, None, layer.inputs)
    np.testing.assert_allclose(same.down_Dn, ridge(layer, KEPT, None).down_Dn, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_no_map_that_feeds_only_down_is_better(seed):
    """Spec 4, on the calibration text: drop's map is one of them."""
    layer = layer_of(random_ffn(seed=seed), TINY)
    small = drop(layer, KEPT, None)
    best = output_error(layer.dense, ridge(layer, KEPT, None), layer.inputs)
    assert best < output_error(layer.dense, small, layer.inputs)
    generator = np.random.default_rng(seed)
    maps = [random_transport(seed=seed), random_transport(seed=seed, signs=True)]
    columns = [ot_mass(layer, KEPT, t).down_Dn for t in maps]
    columns += [
        layer.dense.down_Dn @ torch.from_numpy(generator.normal(0, size, (24, 8)))
        for size in (0.1, 1)
    ]
    optimum = ridge(layer, KEPT, None).down_Dn
    columns += [optimum + 1e-2 * torch.from_numpy(generator.normal(size=(16, 8))) for _ in range(3)]
    for down in columns:
        other = dataclasses.replace(small, down_Dn=down)
        assert best <= output_error(layer.dense, other, layer.inputs)


def dependent(biases=False, seed=0):
    """Pruned channels share a kept one's gate, their up rows are combinations: h_P = H_K M."""
    ffn = random_ffn(biases=biases, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    gates = [KEPT[:4], KEPT[4:]]  # two gates, four up rows each
    owner = torch.randint(2, (24,), generator=generator)
    for kept, number in zip(gates, (0, 1), strict=True):
        owner[kept] = number
    for channel in range(24):
        kept = gates[int(owner[channel])]
        mix = torch.randn(4, generator=generator, dtype=torch.float64)
        pairs = [(ffn.gate_nD, ffn.up_nD)]
        pairs += [(ffn.gate_bias_n, ffn.up_bias_n)] if biases else []
        for gate, up in pairs:
            gate[channel] = gate[kept[0]]
            if channel not in KEPT.tolist():
                up[channel] = (mix @ up[kept].reshape(4, -1)).reshape(up[channel].shape)
    return ffn


@pytest.mark.parametrize("biases", [False, True])
def test_linear_dependence_is_refitted_away(biases):
    """Spec 3: exact for ridge, on other text too; not for drop."""
    layer, other = layer_of(dependent(biases), TINY), inputs(seed=77)
    z = hidden_of(layer.dense, layer.inputs)
    assert np.linalg.matrix_rank(z) == 8
    for name in ("ridge", "ridge_sequential"):
        small = fuse(name, layer, KEPT, None, layer.inputs)
        assert output_error(layer.dense, small, layer.inputs) < 1e-6
        assert output_error(layer.dense, small, other) < 1e-6
    assert output_error(layer.dense, drop(layer, KEPT, None), other) > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refits_on_low_precision_activations(dtype):
    """The default ridge serves them; below their digits none is there, and that is said."""
    ffn = dependent()
    full = ridge(layer_of(ffn), KEPT, None)
    layer = layer_of(ffn, dtype=dtype)
    low = ridge(layer, KEPT, None)
    close = {torch.float32: 1e-4, torch.bfloat16: 0.05}[dtype]
    assert output_error(full, low, inputs()) < close
    again = refitted(layer, drop(layer, KEPT, None), layer.inputs)
    assert output_error(full, again, inputs()) < close
    twins = random_ffn().pick(torch.arange(24) // 2 * 2)
    for bare in (layer_of(twins, 1e-30, dtype=dtype), layer_of(twins, 1e-30)):
        for fusion in ("ridge", "ridge_sequential"):
            with pytest.raises(InputError, match=r"config key ffn\.ridge .*allowed: a larger"):
                fuse(fusion, bare, torch.arange(12), None, bare.inputs)


def test_silence_and_nothing_to_prune():
    """No activation at all: refits keep what is there instead of NaN."""
    ffn = random_ffn()
    quiet = Layer(ffn, [torch.zeros(1, 4, 16, dtype=torch.float64)], 1e-3)
    for name in ("ridge", "ridge_sequential"):
        small = fuse(name, quiet, KEPT, None, quiet.inputs)
        assert torch.equal(small.down_Dn, ffn.down_Dn[:, KEPT])
    layer = layer_of(ffn)
    assert torch.equal(ridge(layer, torch.arange(24), None).down_Dn, ffn.down_Dn)


# bias


@pytest.mark.parametrize("biases", [False, True])
def test_bias_leaves_no_mean_error(biases):
    """mean(Y' − Y) = 0; the spread of the error is drop's (FLAP)."""
    layer = layer_of(random_ffn(biases=biases))
    small, plain = bias(layer, KEPT, None), drop(layer, KEPT, None)
    errors = [
        np.concatenate([(f(x) - layer.dense(x)).flatten(0, 1) for x in layer.inputs])
        for f in (small, plain)
    ]
    assert abs(errors[0].mean(0)).max() < 1e-13 < 0.01 < abs(errors[1].mean(0)).max()
    np.testing.assert_allclose(errors[0].std(0), errors[1].std(0), atol=1e-12)
    h = hidden_of(layer.dense, layer.inputs)[:, GONE].mean(0)
    old = layer.dense.down_bias_D.numpy() if biases else 0
    lost = layer.dense.down_Dn[:, GONE].numpy() @ h
    np.testing.assert_allclose(small.down_bias_D, old + lost, atol=1e-13)
    if not biases:
        assert not small.gate_bias_n.any() and not small.up_bias_n.any()
        assert small.up_bias_n.shape == (8,)


# correlations


def test_correlations_are_numpys():
    ffn = random_ffn(biases=True)
    ffn.up_nD[4], ffn.up_bias_n[4] = 0, 0  # says nothing
    layer = layer_of(ffn)
    with np.errstate(all="ignore"):
        wanted = np.corrcoef(hidden_of(ffn.scaled(layer.scale_n), layer.inputs).T)[:, KEPT]
    wanted[4] = 0
    found = layer.correlation(KEPT)
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert found.abs().max() <= 1
