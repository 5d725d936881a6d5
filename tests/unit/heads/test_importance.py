"""Head scores against numpy, and what stays for a budget."""

import numpy as np
import pytest
import torch
from small_models import build, config_of, inputs_of, state_of, tokens

from headroom.accumulators import Moments
from headroom.checkpoints import geometry
from headroom.heads.importance import (
    SCORES,
    flap,
    kept_heads,
    moments,
    removed,
    wanda_sp,
)
from headroom.heads.weights import Calibration, heads_output, project, read
from headroom.recipes import Remove, parse_step

D = 12


@pytest.fixture(scope="module")
def layer():
    """Weights, calibration and the z that stock attention gives o_proj, all columns apart."""
    model = build("qwen2", 4, 2)
    seen = []
    projection = model.model.layers[1].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(tokens())
    hook.remove()
    inputs, config = inputs_of(model), config_of(model)
    weights = read(state_of(model), geometry(config), 1, config)
    calibration = Calibration(inputs["layer.1"], inputs["cos"], inputs["sin"], batch=4)
    return weights, calibration, seen[0].flatten(0, 1).double().numpy(), projection.weight


def test_scores_against_numpy(layer):
    weights, calibration, z, projection = layer
    w = projection.detach().double().numpy()  # (D, H·d)
    observed = moments(weights, calibration)
    wanda, fluctuation = (
        [],
        np.array([z[:, c].var(ddof=1) * (w[:, c] ** 2).sum() for c in range(48)]),
    )
    standard = (fluctuation - fluctuation.mean()) / fluctuation.std(ddof=1)
    for head in range(4):
        columns = range(head * D, (head + 1) * D)
        wanda.append(sum(np.abs(w[:, c]).mean() * np.linalg.norm(z[:, c]) for c in columns))
    assert np.allclose(wanda_sp(weights, observed), wanda, rtol=1e-5)
    assert np.allclose(flap(weights, observed), standard.reshape(4, D).mean(1), atol=1e-5)
    assert abs(flap(weights, observed).sum()) < 1e-9  # standardised over the layer
    assert set(SCORES) == {"wanda_sp", "flap"}


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_moments_do_not_depend_on_batches(layer, batch):
    weights, calibration, z, _ = layer
    found = moments(
        weights, Calibration(*(calibration.x_STD, calibration.cos_Td, calibration.sin_Td), batch)
    )
    assert found.count == len(z)
    assert np.allclose(found.mean_C.flatten(), z.mean(0), atol=1e-6)
    assert np.allclose(found.squares_C.flatten() / len(z), z.var(0), rtol=1e-5)


def test_variance_survives_a_large_mean():
    """Σz² − N·mean² would lose every digit here."""
    generator = torch.Generator().manual_seed(0)
    z = 1e8 + torch.randn(600, 2, 3, generator=generator, dtype=torch.float64)
    zero = torch.zeros(2, 3, dtype=torch.float64)
    found = Moments(0, zero, zero)
    for part in z.split([1, 99, 500]):
        found = found.merged(part)
    assert torch.allclose(found.squares_C / 599, (z - 1e8).var(0), rtol=1e-6)


def test_constant_heads_have_no_fluctuation(layer):
    weights = layer[0]
    still = Moments(10, torch.ones(4, D).double(), torch.zeros(4, D).double())
    assert torch.equal(flap(weights, still), torch.zeros(4).double())
    assert (wanda_sp(weights, still) > 0).all()


def test_kept_heads():
    score = torch.tensor([5.0, 1, 2, 0, 0, 9, 3, 3, 3])  # three groups of three
    assert kept_heads(score, (3, 2), 3) == ((0, 2), (3, 5), (6, 7))
    assert kept_heads(score, (2, 1), 3) == ((0,), (5,))
    assert kept_heads(score, (1, 3), 3) == ((3, 4, 5),)
    assert kept_heads(score, (3, 3), 3) == ((0, 1, 2), (3, 4, 5), (6, 7, 8))


def test_removal_takes_out_the_contribution_of_the_heads(layer):
    """What is left = the sum over kept heads of z_h W_O,h, group by group."""
    weights, calibration, z, projection = layer
    small = removed(weights, ((2,),))
    x, cos, sin = calibration.x_STD, calibration.cos_Td, calibration.sin_Td
    found = project(small, heads_output(small, x, cos, sin)).flatten(0, 1)
    columns = slice(2 * D, 3 * D)
    wanted = z[:, columns] @ projection.detach().double().numpy()[:, columns].T
    assert np.allclose(found, wanted, atol=1e-4)
    assert (small.heads, small.groups) == (1, 1)


def test_recipes_name_scores_and_methods():
    assert parse_step("remove-flap-refit-b4x2") == Remove("flap", "refit", "b4x2")
