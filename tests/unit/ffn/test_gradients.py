"""Gradient statistics of channels, against plain autograd and naive loops.

Shapes: N windows, T tokens, D model width, n FFN channels, L layers, V vocabulary.
"""

import math
import weakref

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from headroom.errors import InputError
from headroom.ffn import gradients
from headroom.ffn.gradients import (
    KINDS,
    STATISTICS,
    channel_statistics,
    mean_singular_value,
    measure_gradients,
    next_token_loss,
    visit_saliencies,
    weight_statistics,
)

LAYERS, WIDTH, CHANNELS = 2, 16, 24


def tiny(family="llama", dtype=torch.float64, **changes):
    """A random model whose FFNs matter (the default initialisation makes them near nothing)."""
    torch.manual_seed(1)
    config = CONFIG_MAPPING[family](
        vocab_size=40, hidden_size=WIDTH, intermediate_size=CHANNELS, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=32,
        **changes,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.3)
    return model


def ffns(model):
    return [layer.mlp for layer in model.model.layers]


@pytest.fixture
def windows_NT():
    return torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(2))


def saliencies(model, tokens_1T):
    found = {}
    visit_saliencies(model, tokens_1T, lambda i, kind, S_n3D: found.update({(kind, i): S_n3D}))
    return found


def reference(model, tokens_1T):
    """Weight gradients the plain way: every parameter wants one, everything is kept."""
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
        for layer in model.model.layers
    ]
    result = model(input_ids=tokens_1T, labels=tokens_1T, use_cache=False)
    for hook in hooks:
        hook.remove()
    singular = [torch.linalg.svdvals(Y_BTD.reshape(len(Y_BTD), -1)).mean() for Y_BTD in outputs]
    losses = {"fo": sum(singular), "snip": result.loss}
    found = {}
    for kind, loss in losses.items():
        for i, mlp in enumerate(ffns(model)):
            weights = [mlp.down_proj.weight, mlp.up_proj.weight, mlp.gate_proj.weight]
            grads = torch.autograd.grad(loss, weights, retain_graph=True)
            down, up, gate = ((w * g).detach().numpy() for w, g in zip(weights, grads, strict=True))
            found[kind, i] = np.stack([down, up.T, gate.T])  # (3, D, n), as the seed has it
    return found


def naive(S_3Dn):
    """Every statistic as the definition reads, a channel at a time."""
    _, D, n = S_3Dn.shape
    threshold = S_3Dn.mean() + S_3Dn.std(ddof=1)
    found = {name: np.zeros(n) for name in STATISTICS}
    for c in range(n):
        S_3D = S_3Dn[:, :, c]
        found["channel"][c] = sum(S_3D[:, j].sum() for j in range(D)) / D
        found["channel_abs"][c] = abs(found["channel"][c])
        found["mean"][c] = S_3D.mean()
        found["max"][c] = S_3D.max()
        found["std"][c] = S_3D.std(ddof=1)
        found["p95"][c] = np.quantile(S_3D, 0.95)
        found["consistency"][c] = -np.mean([S_3D[:, j].std(ddof=1) for j in range(D)])
        found["structural"][c] = np.linalg.svd(S_3D)[1][0]
        found["mutual"][c] = np.mean(
            [
                abs(np.corrcoef(S_3D.ravel(), S_3Dn[:, :, other].ravel())[0, 1])
                for other in range(n)
                if other != c
            ]
        )
        found["important_ratio"][c] = (threshold < S_3D).mean()
    return found


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {}), ("llama", {"mlp_bias": True}), ("mistral", {}), ("qwen2", {}), ("qwen3", {}),
     ("llama", {"tie_word_embeddings": True})],
)  # fmt: skip
def test_statistics_are_those_of_plain_autograd_averaged_over_windows(family, changes, windows_NT):
    model = tiny(family, **changes)
    expected = {}
    for tokens_1T in windows_NT.split(1):
        found = reference(model, tokens_1T)
        for key, S_n3D in saliencies(model, tokens_1T).items():
            wanted_n3D = found[key].transpose(2, 0, 1)
            # HF computes norms and its loss in float32 even here, hence not 1e-12.
            np.testing.assert_allclose(S_n3D, wanted_n3D, rtol=0, atol=1e-5 * wanted_n3D.std())
        for (kind, i), S_3Dn in found.items():
            for name, value_n in naive(S_3Dn).items():
                expected.setdefault((i, f"{kind}.{name}"), []).append(value_n)
    result = channel_statistics(model, windows_NT)
    assert [set(part) for part in result] == [{f"{k}.{s}" for k in KINDS for s in STATISTICS}] * 2
    for (i, name), values in expected.items():
        value_n = result[i][name]
        assert value_n.dtype == torch.float64 and value_n.shape == (CHANNELS,)
        wanted_n = np.mean(values, 0)
        scale = np.abs(wanted_n).max()
        np.testing.assert_allclose(value_n, wanted_n, rtol=0, atol=2e-6 * scale, err_msg=name)


@pytest.mark.parametrize("bias", [False, True])
def test_channel_sums_need_only_activations_and_their_gradients(bias, windows_NT):
    model, tokens_1T = tiny(mlp_bias=bias), windows_NT[:1]
    kept = {}
    outputs = []
    for i, mlp in enumerate(ffns(model)):
        for name in ("gate_proj", "up_proj", "down_proj"):

            def keep(_, args, output, key=(i, name)):
                output.retain_grad()
                kept[key] = (args[0], output)

            getattr(mlp, name).register_forward_hook(keep)
        model.model.layers[i].register_forward_hook(lambda _, __, output: outputs.append(output))
    for kind in KINDS:
        outputs.clear()
        logits_1TV = model(input_ids=tokens_1T, use_cache=False).logits
        if kind == "fo":
            sum(output.norm() for output in outputs).backward()
        else:
            next_token_loss(logits_1TV, tokens_1T).backward()
        signals = {key: (args.detach(), output) for key, (args, output) in kept.items()}
        found = saliencies(model, tokens_1T)
        for i, mlp in enumerate(ffns(model)):
            sums_n3 = found[kind, i].sum(2)
            h_Tn = signals[i, "down_proj"][0][0]
            delta_TD = signals[i, "down_proj"][1].grad[0]
            down_n = (h_Tn * (delta_TD @ mlp.down_proj.weight)).sum(0)
            expected = [down_n]
            for name in ("up_proj", "gate_proj"):
                output = signals[i, name][1]
                pre_Tn = output.detach()[0] - (getattr(mlp, name).bias if bias else 0)
                expected.append((pre_Tn * output.grad[0]).sum(0))
            expected_n3 = torch.stack(expected, 1)
            torch.testing.assert_close(sums_n3, expected_n3.detach(), rtol=1e-6, atol=1e-9)
            same = torch.allclose(sums_n3[:, 0], sums_n3[:, 1], rtol=1e-6, atol=1e-9)
            assert same is not bias, "up repeats down exactly where there is no bias to subtract"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_snip_loss_is_the_models_own(dtype, windows_NT):
    model = tiny(dtype=dtype)
    with torch.no_grad():
        result = model(input_ids=windows_NT, labels=windows_NT)
    loss = next_token_loss(result.logits, windows_NT)
    assert loss.dtype == dtype
    torch.testing.assert_close(loss.to(result.loss), result.loss, rtol=1e-6, atol=0)


def test_mean_singular_value_of_one_row_is_its_norm():
    Y_BTD = torch.randn(1, 7, 5, dtype=torch.float64, requires_grad=True)
    wanted = torch.linalg.svdvals(Y_BTD.reshape(1, -1)).mean()
    torch.testing.assert_close(mean_singular_value(Y_BTD), wanted)
    for ours, theirs in zip(
        torch.autograd.grad(mean_singular_value(Y_BTD), Y_BTD),
        torch.autograd.grad(wanted, Y_BTD),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert mean_singular_value(Y_BTD.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="batch of 2"):
        mean_singular_value(torch.ones(2, 3, 4))


def test_taylor_sign_and_size_of_one_channel(windows_NT):
    """Scaling what S multiplies by 1 + ε moves the loss by ε·ΣS: the sign, the factor D."""
    model, tokens_1T, channel, step = tiny(), windows_NT[:1], 3, 1e-2
    mlp = ffns(model)[0]
    S_n3D = saliencies(model, tokens_1T)["snip", 0]
    statistic_n = channel_statistics(model, tokens_1T)[0]["snip.channel"]
    down, up, gate = mlp.down_proj.weight, mlp.up_proj.weight, mlp.gate_proj.weight

    @torch.no_grad()
    def slope(*views):
        losses = []
        for factor in (1 + step, 1 - step):
            before = [view.clone() for view in views]
            for view in views:
                view *= factor
            losses.append(next_token_loss(model(input_ids=tokens_1T).logits, tokens_1T))
            for view, old in zip(views, before, strict=True):
                view.copy_(old)
        return (losses[0] - losses[1]) / (2 * step)

    down_slope = slope(down[:, channel])
    assert abs(down_slope) > 1e-3, "a slope that rounding can't make"
    torch.testing.assert_close(down_slope, S_n3D[channel, 0].sum(), rtol=2e-3, atol=0)
    whole = slope(down[:, channel], up[channel], gate[channel])
    torch.testing.assert_close(whole, WIDTH * statistic_n[channel], rtol=2e-3, atol=0)


def assert_same(found, wanted, order_n=None):
    order_n = torch.arange(CHANNELS) if order_n is None else order_n
    for part, other in zip(found, wanted, strict=True):
        for name, value_n in part.items():
            expected_n = other[name][order_n]
            scale = float(expected_n.abs().max())
            torch.testing.assert_close(value_n, expected_n, rtol=0, atol=1e-5 * scale, msg=name)


@torch.no_grad()
def test_statistics_follow_permuted_channels_and_ignore_free_scales(windows_NT):
    wanted = channel_statistics(tiny(), windows_NT)
    model, order_n = tiny(), torch.randperm(CHANNELS)
    for mlp in ffns(model):
        for weight in (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T):
            weight.copy_(weight[order_n].clone())
    assert_same(channel_statistics(model, windows_NT), wanted, order_n)
    model = tiny()
    for mlp in ffns(model):
        scale_n = (torch.rand(CHANNELS) + 0.5) * (torch.randint(2, (CHANNELS,)) * 2 - 1)
        mlp.up_proj.weight.mul_(scale_n[:, None])
        mlp.down_proj.weight.div_(scale_n)
    assert_same(channel_statistics(model, windows_NT), wanted)


def test_more_windows_are_the_mean_of_each_and_matter(windows_NT):
    model = tiny()
    each = [channel_statistics(model, tokens_1T)[0] for tokens_1T in windows_NT.split(1)]
    seen = []

    def progress(items):
        seen.append(len(items))
        return items

    result = channel_statistics(model, windows_NT, progress=progress)
    for name, value_n in result[0].items():
        torch.testing.assert_close(value_n, sum(part[name] for part in each) / 3, msg=name)
    assert seen == [3]
    both = result[0]["snip.channel"], result[0]["snip.channel_abs"]
    assert (both[1] >= both[0].abs() - 1e-12).all() and not torch.allclose(both[1], both[0].abs())


def test_chunks_change_nothing_and_dead_channels_give_finite_figures(monkeypatch):
    S_n3D = torch.randn(CHANNELS, 3, WIDTH)
    S_n3D[4], S_n3D[5] = 0, 0.1  # pruned to zero; constant, whose mean is not exactly 0.1
    S_n3D[6] *= 1e-30  # nearly dead: its squares are below float32
    wanted = weight_statistics(S_n3D)
    assert wanted["mutual"][6] > 0.01, "a correlation has no unit"
    assert wanted["mutual"][4] == wanted["mutual"][5] == 0
    assert all(value_n.isfinite().all() for value_n in wanted.values())
    monkeypatch.setattr(gradients, "ENTRIES", 7 * CHANNELS)
    for name, value_n in weight_statistics(S_n3D).items():
        torch.testing.assert_close(value_n, wanted[name], msg=name)


def test_half_precision_models_get_float32_statistics(windows_NT):
    wanted = channel_statistics(tiny(dtype=torch.float32), windows_NT)
    model = tiny(dtype=torch.bfloat16)
    assert {S.dtype for S in saliencies(model, windows_NT[:1]).values()} == {torch.float32}
    found = channel_statistics(model, windows_NT)
    for kind in KINDS:
        pair = torch.stack([part[0][f"{kind}.structural"] for part in (found, wanted)])
        assert torch.corrcoef(pair)[0, 1] > 0.99


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails, windows_NT):
    model = tiny()
    model.lm_head.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    live, last = [], []

    def receive(layer, kind, S_n3D):
        assert not last or last.pop()() is None, "one layer's weight gradients at a time"
        last.append(weakref.ref(S_n3D))
        live.append((layer, kind))
        if fails and len(live) == 3:
            raise RuntimeError("on the way")

    if fails:
        with pytest.raises(RuntimeError, match="on the way"):
            visit_saliencies(model, windows_NT[:1], receive)
    else:
        with torch.no_grad():  # a caller without gradients is no obstacle
            visit_saliencies(model, windows_NT[:1], receive)
        assert live == [(1, "fo"), (0, "fo"), (1, "snip"), (0, "snip")]
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad is wanted[name]
        assert parameter.grad is None
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)


def test_gradients_that_are_not_finite_are_refused(windows_NT):
    model = tiny()
    with torch.no_grad():
        ffns(model)[1].up_proj.weight[2, 3] = math.inf
    with pytest.raises(InputError, match=r"not finite .*layer"):
        channel_statistics(model, windows_NT[:1])


def test_the_job_writes_what_the_function_returns(tmp_path, windows_NT, monkeypatch):
    from safetensors.torch import load_file

    tiny(dtype=torch.float32).save_pretrained(tmp_path / "model")
    asked = []
    monkeypatch.setattr(
        gradients, "calibration_windows", lambda *asks: asked.append(asks) or windows_NT
    )
    settings = {
        "compute": {"device": "cpu", "dtype": "float32", "threads": torch.get_num_threads()},
        "ffn": {"calibration": {"window": 9, "sequences": 7, "gradient_sequences": 3}},
    }
    output = str(tmp_path / "gradients.safetensors")
    measure_gradients(str(tmp_path / "model"), "stream", 5, settings, output)
    assert asked == [("stream", 9, 3, 5)]
    wanted = channel_statistics(tiny(dtype=torch.float32), windows_NT)
    found = load_file(output)
    assert set(found) == {f"{i}.{name}" for i in range(LAYERS) for name in wanted[i]}
    for key, value_n in found.items():
        layer, name = key.split(".", 1)
        torch.testing.assert_close(value_n, wanted[int(layer)][name], rtol=1e-5, atol=1e-9)
