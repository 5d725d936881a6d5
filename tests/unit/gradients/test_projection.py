"""Random projections: unbiased, with the predicted error, the same in every process."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from headroom.gradients.capture import Capture, pad
from headroom.gradients.features import Parameter, dots, exact, squares, two_sided
from headroom.gradients.projection import (
    concentration,
    project,
    projected_error,
    two_sided_variance,
)
from headroom.gradients.uses import Lookup, Outer

from .small_models import samples, small

pytestmark = pytest.mark.usefixtures("one_thread")
BLOCKS = {"a": (300, 16), "b": (500, 64), "c": (900, 200)}  # elements, k


def vectors(p: int, correlation: float, seed: int) -> torch.Tensor:
    """Two vectors of p elements whose cosine is given, of unequal lengths."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(p, 2, generator=draw, dtype=torch.float64))[0].T
    other = correlation * basis[0] + (1 - correlation**2) ** 0.5 * basis[1]
    return torch.stack([3 * basis[0], 0.5 * other])


@pytest.mark.parametrize("correlation", [0.0, 0.6])
def test_dense_projection_is_unbiased(correlation):
    g, h = vectors(400, correlation, 0)
    both = torch.stack([g, h])
    found = []
    for seed in range(200):
        a, b = project(both, "layer", 32, seed)
        found.append(float(a @ b))
    error = np.std(found, ddof=1) / len(found) ** 0.5
    assert abs(np.mean(found) - float(g @ h)) < 4 * error
    bound = float((g @ g) * (h @ h) + (g @ h) ** 2) / 32
    assert np.var(found) < 1.4 * bound


def projected_cosines(blocks: dict, seeds: int) -> tuple[np.ndarray, list, list]:
    """Cosines of the concatenated projections, and squared norms by block."""
    pairs = {name: vectors(p, 0.0, place) for place, (name, (p, _)) in enumerate(blocks.items())}
    first, second = ([float(pair[row].square().sum()) for pair in pairs.values()] for row in (0, 1))
    size = (sum(first) * sum(second)) ** 0.5
    found = []
    for seed in range(seeds):
        total = 0.0
        for name, pair in pairs.items():
            a, b = project(pair, name, blocks[name][1], seed)
            total += float(a @ b)
        found.append(total / size)
    return np.array(found), first, second


@pytest.mark.parametrize("blocks", [{"b": BLOCKS["b"]}, BLOCKS], ids=["one", "unequal k"])
def test_error_of_orthogonal_gradients_is_the_predicted_one(blocks):
    found, first, second = projected_cosines(blocks, 300)
    k = np.array([k for _, k in blocks.values()])
    exact_L = np.zeros(len(k), bool)
    predicted = projected_error(np.array(first), np.array(second), k, exact_L)
    if len(blocks) == 1:
        assert predicted == pytest.approx(1 / k[0] ** 0.5)
    assert np.sqrt(np.mean(found**2)) == pytest.approx(predicted, rel=0.15)


def test_what_is_no_longer_than_k_is_kept():
    both = vectors(30, 0.3, 1)
    assert project(both, "layer", 30, 0) is both
    kept = np.array([True, False])
    found = projected_error(np.ones(2), np.ones(2), np.array([30, 16]), kept)
    assert found == pytest.approx(1 / 16**0.5 / 2)


def test_projection_is_linear_over_its_row_blocks():
    """Longer than a block of rows: each has signs of its own, and the scale is right."""
    both = vectors(20_000, 0.5, 2).float()
    found = [project(both, "long", 512, seed) for seed in range(12)]
    sizes = torch.stack([part.square().sum(1) for part in found]).mean(0)
    assert torch.allclose(sizes, both.square().sum(1), rtol=0.08)
    one = project(both[:, :8192].contiguous(), "long", 512, 0)
    whole = project(torch.nn.functional.pad(both[:, :8192], (0, 20_000 - 8192)), "long", 512, 0)
    assert torch.allclose(one, whole, atol=1e-6)


SCRIPT = """
import sys, torch
from headroom.gradients.projection import gaussian, project
torch.set_num_threads(1)
values = torch.arange(2 * 9000, dtype=torch.float32).reshape(2, 9000).sin()
sys.stdout.buffer.write(project(values, "model.layers.0.weight", 48, 7).numpy().tobytes())
sys.stdout.buffer.write(gaussian("model.layers.0.weight/outer", 64, 8, 7).numpy().tobytes())
"""


def test_other_processes_and_hash_seeds_project_alike():
    path = os.pathsep.join(filter(None, sys.path))
    found = {
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("0", "1234")
    }
    assert len(found) == 1 and len(found.pop()) == 4 * 2 * 48 + 8 * 64 * 8


def settings(seed: int, inner: int, outer: int) -> dict:
    return {"two_sided": {"inner": inner, "outer": outer, "seed": seed}}


def outer_use(rank: int, o: int = 24, i: int = 20) -> tuple[Outer]:
    draw = torch.Generator().manual_seed(rank)
    sides = (torch.randn(1, rank, size, generator=draw, dtype=torch.float64) for size in (o, i))
    return (Outer(*sides),)


@pytest.mark.parametrize("rank", [1, 6])
@pytest.mark.parametrize(("inner", "outer"), [(6, 9), (20, 9)], ids=["both", "inner kept"])
def test_two_sided_variance_is_the_formula(rank, inner, outer):
    uses, parameter = outer_use(rank), Parameter("layer", (24, 20))
    gradient = exact(parameter, uses, {})
    size = float(gradient.square().sum())
    found = np.array(
        [
            float(squares(two_sided(parameter, uses, settings(seed, inner, outer)))) / size
            for seed in range(3000)
        ]
    )
    tau = float(concentration(gradient.view(1, 24, 20)))
    if rank == 1:
        assert tau == pytest.approx(1)
    predicted = two_sided_variance(tau, None if inner >= 20 else inner, outer)
    assert abs(found.mean() - 1) < 4 * (predicted / len(found)) ** 0.5
    assert found.var() == pytest.approx(predicted, rel=0.15)


def looked_up(seed: int) -> tuple[Lookup]:
    draw = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 24, (2, 7), generator=draw)
    return (Lookup(index, torch.randn(2, 7, 20, generator=draw, dtype=torch.float64)),)


def test_lookups_are_thinned_as_the_matrix_they_stand_for():
    """An embedding's gradient written out and sandwiched: P_oᵀ G P_i."""
    from headroom.gradients.projection import gaussian

    uses, parameter = looked_up(3), Parameter("embedding", (24, 20))
    found = two_sided(parameter, uses, settings(5, 6, 9)).view(2, 9, 6)
    gradient = exact(parameter, uses, {}).view(2, 24, 20)
    left, right = gaussian("embedding/outer", 24, 9, 5), gaussian("embedding/inner", 20, 6, 5)
    assert torch.allclose(found, left.T @ gradient @ right, atol=1e-12)
    kept = two_sided(parameter, uses, settings(5, 6, 24)).view(2, 24, 6)
    assert torch.allclose(kept, gradient @ right, atol=1e-12)


def test_two_sided_dots_of_lookups_and_tied_embeddings_are_unbiased():
    model = small("llama_tied", torch.float64)
    capture = Capture(model)
    uses = capture.uses(pad(samples((7, 9)), "cpu"))
    name = "model.embed_tokens.weight"
    assert [type(use) for use in uses[name]] == [Outer, Lookup]
    alone = looked_up(4)
    for parameter, some in (
        (Parameter(name, capture.shapes[name]), uses[name]),
        (Parameter("embedding", (24, 20)), alone),
    ):
        whole = exact(parameter, some, {})
        wanted = dots(whole, whole)
        found = torch.stack(
            [
                dots(part, part)
                for seed in range(200)
                for part in [two_sided(parameter, some, settings(seed, 6, 8))]
            ]
        )
        error = found.std(0) / len(found) ** 0.5
        assert ((found.mean(0) - wanted).abs() < 4 * error).all()
