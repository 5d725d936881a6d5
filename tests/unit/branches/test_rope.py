"""The pairs' table, angles to the bit as Llama's, turns as complex numbers."""

import cmath
from itertools import product

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from headroom.branches.rope import Rotary, frequencies, pair_kinds
from headroom.branches.runs import Rotation
from headroom.errors import InputError

FLAT, TIME, BRANCH = range(3)
THETA = 1e6


@pytest.mark.parametrize(
    "ratio, counts",  # branch, time, flat
    [
        (0, (0, 0, 32)),
        (0.25, (4, 4, 24)),
        (0.5, (8, 8, 16)),
        (0.75, (12, 12, 8)),
        (0.875, (14, 14, 4)),
        (1, (16, 16, 0)),
    ],
)
@pytest.mark.parametrize("band", ["low", "high"])
def test_counts_of_a_head_of_64(ratio, counts, band):
    kinds = pair_kinds(64, ratio, "flat", band).tolist()
    assert (kinds.count(BRANCH), kinds.count(TIME), kinds.count(FLAT)) == counts
    assert FLAT not in pair_kinds(64, ratio, "time", band).tolist()


@pytest.mark.parametrize("head_size", [16, 32, 64, 128])
@pytest.mark.parametrize("ratio", [0, 0.01, 0.2, 0.25, 0.5, 0.75, 0.875, 1])
def test_pairs_take_turns_from_the_band_s_highest_frequency(head_size, ratio):
    pairs = head_size // 2
    turned = round(pairs * ratio)
    for band, first in (("low", pairs - turned), ("high", 0)):
        expected = [FLAT] * pairs
        for place in range(turned):
            expected[first + place] = TIME if place % 2 else BRANCH
        assert pair_kinds(head_size, ratio, "flat", band).tolist() == expected


def test_refusals_name_what_is_allowed():
    for wrong in ((64, 0.5, "column", "low"), (64, 0.5, "flat", "middle"), (64, 1.5), (63, 0.5)):
        with pytest.raises(InputError, match=r"rotation .*allowed"):
            pair_kinds(*wrong)


@pytest.mark.parametrize("head_size", [16, 32, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("coordinate", ["flat", "time"])
def test_ratio_0_is_llama_s_rotary_to_the_bit(head_size, theta, coordinate):
    config = LlamaConfig(
        hidden_size=head_size,
        num_attention_heads=1,
        head_dim=head_size,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    stock = LlamaRotaryEmbedding(config)
    assert torch.equal(frequencies(head_size, theta), stock.inv_freq)
    generator = torch.Generator().manual_seed(0)
    for samples, columns in ((1, 1), (1, 37), (3, 501)):
        flat, time, branch = torch.randint(0, 9000, (3, samples, columns), generator=generator)
        rotations = [Rotation(0.0, coordinate), Rotation(0.5), Rotation(1.0)]
        cos, sin = Rotary(head_size, theta, rotations)(flat, time, branch)
        wanted = stock(torch.zeros(1), flat if coordinate == "flat" else time)
        assert torch.equal(torch.cat((cos[0], cos[0]), -1), wanted[0])
        assert torch.equal(torch.cat((sin[0], sin[0]), -1), wanted[1])


def test_each_member_turns_with_its_own_coordinates():
    rotations = [
        Rotation(0.25),
        Rotation(0.5, "time"),
        Rotation(0.75, "flat", "high"),
        Rotation(1.0, stride=64),
    ]
    head_size, (samples, columns) = 16, (2, 5)
    generator = torch.Generator().manual_seed(1)
    flat, time = torch.randint(0, 300, (2, samples, columns), generator=generator)
    branch = torch.randint(0, 8, (samples, columns), generator=generator)
    cos, sin = Rotary(head_size, THETA, rotations)(flat, time, branch)
    for k, own in enumerate(rotations):
        kinds = pair_kinds(head_size, own.ratio, own.coordinate, own.band).tolist()
        for b, s in product(range(samples), range(columns)):
            coordinates = (flat[b, s], time[b, s], branch[b, s] * own.stride)
            for j, kind in enumerate(kinds):
                turn = cmath.exp(1j * THETA ** (-2 * j / head_size) * int(coordinates[kind]))
                assert abs(complex(cos[k, b, s, j], sin[k, b, s, j]) - turn) < 2e-4
