"""Hard-concrete gates: the study's table, closed forms, and their distribution from its CDF."""

import math

import pytest
import torch

from headroom.gates.hard_concrete import PENALTIES, THRESHOLD, gate, p_open, sample, strongest

BETAS = (0.33, 0.5, 2 / 3)
# log_a -> p_open at each β, the gate that a model is judged with.
TABLE = {
    -math.log(11): ((0.16706, 0.23166, 0.31018), 0.0),
    -1.0: ((0.44801, 0.54957, 0.64534), 0.22273),
    0.0: ((0.68811, 0.76834, 0.83182), 0.5),
    1.0: ((0.85709, 0.90015, 0.93077), 0.77727),
    math.log(11): ((0.96043, 0.97332, 0.98195), 1.0),
}


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def cdf(s, log_a, beta):
    """P(a stretched-out concrete variable is below s), in plain Python (Maddison et al. 2017)."""
    return 1 / (1 + math.exp(log_a - beta * (math.log(s) - math.log1p(-s))))


@pytest.mark.parametrize(("log_a", "row"), TABLE.items())
def test_the_table(log_a, row):
    expected, judged = row
    for beta, value in zip(BETAS, expected, strict=True):
        found = float(p_open(numbers(log_a), beta))
        assert found == pytest.approx(value, abs=1e-4)
        # Clipping from (−.1, 1.1) makes 0 of what is below .1 / 1.2.
        assert found == pytest.approx(1 - cdf(0.1 / 1.2, log_a, beta), abs=1e-12)
    assert float(gate(numbers(log_a))) == pytest.approx(judged, abs=1e-4)


def test_samples():
    u = numbers(0.1, 0.25, 0.5, 0.75, 0.9)
    found = sample(torch.zeros(5, dtype=torch.float64), u, 0.5)
    assert found.tolist() == pytest.approx([0, 0.02, 0.5, 0.98, 1], abs=1e-9)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("log_a", [-1.0, 0.0, 2.0])
def test_samples_are_the_quantiles_of_the_distribution(log_a, beta):
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    found = sample(torch.full_like(u, log_a), u, beta)
    inside = [(g, p) for g, p in zip(found.tolist(), u.tolist(), strict=True) if 0 < g < 1]
    assert len(inside) > 10
    for g, p in inside:
        assert cdf((g + 0.1) / 1.2, log_a, beta) == pytest.approx(p, abs=1e-12)
    assert ((found == 0) <= (u < 1 - p_open(numbers(log_a), beta))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_the_ends(dtype):
    log_a = torch.tensor([-50.0, 0.0, 50.0], dtype=dtype).repeat(2).requires_grad_()
    u = torch.tensor([0.0] * 3 + [1.0] * 3, dtype=dtype)
    for beta in BETAS:
        for values in (sample(log_a, u, beta), gate(log_a), p_open(log_a, beta)):
            (gradient,) = torch.autograd.grad(values.sum(), log_a)
            assert values.isfinite().all() and gradient.isfinite().all()
            assert values.min() >= 0 and values.max() <= 1
        assert sample(log_a, u, beta)[[0, 5]].tolist() == [0, 1]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("log_a", [-2.3979, 0.0, 1.0])
def test_drawn_gates_are_open_as_often_as_p_open_says(log_a, beta):
    u = torch.rand(1_000_000, generator=torch.Generator().manual_seed(1))
    share = (sample(torch.tensor(log_a), u, beta) > 0).double().mean()
    assert float(share) == pytest.approx(float(p_open(torch.tensor(log_a), beta)), abs=0.002)


def test_open_iff_log_a_is_above_the_threshold():
    assert pytest.approx(-math.log(11)) == THRESHOLD
    near = numbers(*(THRESHOLD + d for d in (-5, -1e-3, -1e-9, 1e-9, 1e-3, 5)))
    assert (gate(near) > 0).tolist() == [False] * 3 + [True] * 3


def test_penalties_and_their_gradient():
    log_a = [torch.zeros(8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    open_LH = [p_open(values, 0.5) for values in log_a]
    price = 0.05 * PENALTIES["seed"](open_LH)
    assert float(price.detach()) == pytest.approx(0.076834, abs=1e-6)
    assert float(price.detach() / 0.05) == pytest.approx(1.53668, abs=1e-5)
    for gradient_H in torch.autograd.grad(price, log_a):
        assert gradient_H.tolist() == pytest.approx([0.00111247] * 8, abs=1e-8)


def test_penalties_of_layers_with_unlike_heads():
    open_LH = [numbers(0.2, 0.4), numbers(0.1, 0.3, 0.5, 0.9)]
    assert float(PENALTIES["seed"](open_LH)) == pytest.approx(0.3 + 0.45)
    assert float(PENALTIES["voita"](open_LH)) == pytest.approx((0.6 + 1.8) / 2)


@pytest.mark.parametrize("count", range(8))
def test_strongest_are_exactly_so_many_and_the_first_of_equals(count):
    log_a = [numbers(1.0, 3.0, 1.0), numbers(1.0, -2.0, 3.0, 1.0)]
    ranked = [(0, 1), (1, 2), (0, 0), (0, 2), (1, 0), (1, 3), (1, 1)]
    found = strongest(log_a, count)
    assert [len(chosen) for chosen in found] == [3, 4]
    places = {(layer, h) for layer, chosen in enumerate(found) for h in chosen.nonzero().flatten()}
    assert {(layer, int(h)) for layer, h in places} == set(ranked[:count])
