"""A layer's weights, free scales and dead channels; the windows' way through a decoder."""

import dataclasses
from types import MethodType

import numpy as np
import pytest
import torch

from headroom.errors import InputError
from headroom.ffn.layers import canonical_scale, live_channels, named, read
from headroom.ffn.observe import hidden_gram, hidden_moments
from headroom.ffn.stream import LayerStream

from .small_ffns import FAMILIES, build, inputs, random_ffn, rebuilt, state_of, tokens, weight

SLIDING = {
    "llama": {"mlp_bias": True, "attention_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {
        "sliding_window": 4,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "qwen3": {},
}


def scaled(ffn, seed=0):
    """The same function in another scale, signs included."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randn(ffn.channels, generator=generator, dtype=torch.float64)
    return ffn.scaled(c.sign() * (0.1 + c.abs()))


def silu(x):
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("biases", [False, True])
def test_a_layer_computes_what_the_model_does(biases):
    model = build(mlp_bias=biases)
    x = inputs()[0]
    for index, layer in enumerate(model.model.layers):
        ffn = read(state_of(model), index, model.config.to_dict())
        assert torch.equal(ffn(x), layer.mlp(x))
        gate, up, down = (np.asarray(w) for w in (ffn.gate_nD, ffn.up_nD, ffn.down_Dn))
        bg, bu, bd = (np.asarray(b) if biases else 0 for b in
                      (ffn.gate_bias_n, ffn.up_bias_n, ffn.down_bias_D))  # fmt: skip
        h = silu(x.numpy() @ gate.T + bg) * (x.numpy() @ up.T + bu)
        np.testing.assert_allclose(ffn.hidden(x), h, atol=1e-12)
        np.testing.assert_allclose(ffn(x), h @ down.T + bd, atol=1e-12)
        mlp = {n: t for n, t in state_of(model).items() if f"layers.{index}.mlp" in n}
        back = dict(named(ffn, index))
        assert back.keys() == mlp.keys() and all(torch.equal(back[n], mlp[n]) for n in mlp)


def test_other_parts_are_refused():
    state = state_of(build())
    del state[weight(1, "gate")]
    with pytest.raises(InputError, match=r"layer 1 has no .*mlp\.gate_proj.*gated FFNs") as error:
        read(state, 1, {"hidden_act": "silu"})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("biases", [False, True])
def test_canonical_scale(biases):
    """Both norms are sqrt(‖u‖ ‖d‖), the largest |d| is positive, the function stays."""
    ffn, x = random_ffn(biases=biases), inputs()[0]
    one = ffn.scaled(canonical_scale(ffn))
    middle = (ffn.up_nD.norm(dim=1) * ffn.down_Dn.norm(dim=0)).sqrt()
    assert torch.allclose(one.up_nD.norm(dim=1), middle)
    assert torch.allclose(one.down_Dn.norm(dim=0), middle)
    down = one.down_Dn.numpy()
    assert (down[np.abs(down).argmax(0), np.arange(24)] > 0).all()
    assert torch.allclose(one(x), ffn(x)) and torch.allclose(scaled(ffn)(x), ffn(x))
    assert torch.equal(one.gate_nD, ffn.gate_nD)
    other = scaled(ffn)
    other = other.scaled(canonical_scale(other))
    assert torch.allclose(other.up_nD, one.up_nD) and torch.allclose(other.down_Dn, one.down_Dn)
    if biases:
        assert torch.allclose(other.up_bias_n, one.up_bias_n)


@pytest.mark.parametrize("biases", [False, True])
def test_dead_and_padded_channels(biases):
    ffn, x = random_ffn(biases=biases), inputs()[0]
    ffn.up_nD[3], ffn.down_Dn[:, 5] = 0, 0
    alive = [i for i in range(24) if i != 5 and (i != 3 or biases)]
    assert live_channels(ffn).tolist() == alive
    assert canonical_scale(ffn)[[3, 5]].tolist() == [1, 1]
    wide = ffn.padded(31)
    assert live_channels(wide).tolist() == alive and torch.allclose(wide(x), ffn(x))
    assert torch.allclose(ffn.pick(live_channels(ffn))(x), ffn(x))
    assert torch.isfinite(canonical_scale(wide)).all()
    assert [t.shape for _, t in named(wide, 0) if t.dim() == 2] == [(31, 16)] * 2 + [(16, 31)]


def test_moments_and_gram_in_the_activations_dtype():
    """Chunks and batches change nothing; a mean a million times the spread costs no digits."""
    ffn, parts = random_ffn(), inputs(parts=(300, 1), length=20)
    h = np.concatenate([ffn.hidden(x).flatten(0, 1).numpy() for x in parts])
    moments = hidden_moments(ffn, parts)
    np.testing.assert_allclose(moments.mean_C, h.mean(0), atol=1e-13)
    np.testing.assert_allclose(moments.squares_C, h.var(0) * len(h), rtol=1e-12)
    np.testing.assert_allclose(moments.energy_C, np.square(h).sum(0), rtol=1e-12)
    np.testing.assert_allclose(hidden_gram(ffn, parts), h.T @ h, atol=1e-9)
    low = [x.float() for x in parts]
    assert hidden_gram(ffn, low).dtype == torch.float64
    np.testing.assert_allclose(hidden_gram(ffn, low), h.T @ h, atol=2e-4 * len(h) ** 0.5)
    far = dataclasses.replace(ffn, activation=lambda z: 1e6 + z)
    far.up_nD[:] = 0
    far = dataclasses.replace(far, up_bias_n=torch.ones(24, dtype=torch.float64))
    z = np.concatenate([(x @ ffn.gate_nD.T).flatten(0, 1).numpy() for x in parts])
    np.testing.assert_allclose(hidden_moments(far, parts).squares_C, z.var(0) * len(z), rtol=1e-7)


def states_of(model, part):
    """What the plain forward pass leaves after each layer."""
    found = []
    hooks = [
        layer.register_forward_hook(lambda _, __, y: found.append(y))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(part)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("family", FAMILIES)
def test_stream_is_the_forward_pass_bit_for_bit(family, batch, dtype):
    model = build(family, layers=3, dtype=dtype, **SLIDING[family])
    windows = tokens(7)
    stream = LayerStream(model, windows, batch)
    wanted = [states_of(model, part) for part in windows.split(batch)]
    for index, layer in enumerate(model.model.layers):
        read_by_ffn = stream.attend(index)
        assert [len(x) for x in read_by_ffn] == [len(part) for part in windows.split(batch)]
        stream.advance(layer.mlp)
        for found, states in zip(stream.hidden, wanted, strict=True):
            assert torch.equal(found, states[index])
    if family in ("mistral", "qwen2"):  # the window is felt
        config = model.config.to_dict() | {"sliding_window": 64}
        full = states_of(rebuilt(config, state_of(model)), windows)[-1]
        assert not torch.allclose(full, torch.cat([s[-1] for s in wanted]), atol=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_compressed_stream_is_the_compressed_model(family):
    """Behind other FFNs the states are those of a model that really has them."""
    model = build(family, layers=3, dtype=torch.float32, **SLIDING[family])
    state, config = state_of(model), model.config.to_dict()
    kept = torch.tensor([0, 3, 4, 11, 20])
    ffns = [read(state, i, config).to(torch.float32).pick(kept) for i in range(3)]
    new = state | {name: t for i, ffn in enumerate(ffns) for name, t in named(ffn, i)}
    other = rebuilt(config | {"intermediate_size": 5}, new)
    windows = tokens(5)
    stream = LayerStream(model, windows, 2)
    wanted = [states_of(other, part) for part in windows.split(2)]
    for index, ffn in enumerate(ffns):
        stream.attend(index)
        stream.advance(ffn)
        for found, states in zip(stream.hidden, wanted, strict=True):
            assert torch.equal(found, states[index])
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


def test_stream_leaves_the_model_as_it_was():
    """Also after an exception, and where accelerate has put a forward of its own."""
    model = build(dtype=torch.float32)
    mlp, windows = model.model.layers[0].mlp, tokens(2)
    own = MethodType(type(mlp).forward, mlp)
    mlp.forward = own
    before = states_of(model, windows)[-1]
    stream = LayerStream(model, windows, 2)
    stream.attend(0)
    assert mlp.__dict__["forward"] is own
    assert "forward" not in model.model.layers[0].__dict__
    good, stream.hidden = stream.hidden, [torch.zeros(1, 2, 3)]
    with pytest.raises(RuntimeError):
        stream.attend(1)
    stream.hidden = good
    assert "forward" not in model.model.layers[1].mlp.__dict__
    assert torch.equal(states_of(model, windows)[-1], before)
