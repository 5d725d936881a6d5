"""Similarity of heads: streamed maps equal stored ones, closed forms and invariances hold.

Shapes: L layers, H query heads, G key/value heads, n = H / G, d head size, N windows, T tokens.
"""

import math

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from headroom.attention import attention_modules, tapped
from headroom.errors import InputError
from headroom.heads import grams
from headroom.heads.grams import Gram, States, Workspace
from headroom.heads.similarity import (
    METRICS,
    Metric,
    arccos_kernel,
    cosine,
    similarity_pass,
    stream,
    trace_pays,
)
from headroom.recipes import WITH_SINK

SIZES = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 2}
CORPUS_METRICS = ("relu", "softmax", "scores", "output")
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True}),
    "mistral": (MistralForCausalLM, MistralConfig, {"head_dim": 10}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 16}),
}


def build(family: str = "llama", heads: int = 6, groups: int = 3, spread: float = 0.25, **extra):
    """A random model whose maps differ: wide weights, and biases and norm weights that count."""
    torch.manual_seed(3)
    model_class, config_class, own = FAMILIES[family]
    counts = {"num_attention_heads": heads, "num_key_value_heads": groups}
    config = config_class(**{**SIZES, **counts, **own, **extra})
    model = model_class(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.normal_(std=spread)
            elif name.endswith("bias"):
                weight.normal_(std=0.5)
            else:
                weight.uniform_(0.5, 1.5)
    return model


def windows(count: int = 3, length: int = 37):
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(5))


def naive(model, windows_NT, metric: str, sink: bool = True):
    """Store all maps in float64 and compare them head by head."""
    layers = []

    def keep(module, q_BHTd, k_BGTd, v_BGTd, z_BTHd):
        layers.append((module, q_BHTd.double(), k_BGTd.double(), z_BTHd.double()))

    with torch.no_grad(), tapped(model, keep):
        model(windows_NT)
    found = []
    for module, q_BHTd, k_BGTd, z_BTHd in layers:
        H, T = q_BHTd.shape[1:3]
        maps = []
        for head in range(H):
            if metric == "output":
                d = z_BTHd.shape[3]
                columns_Dd = module.o_proj.weight.detach().double()[:, head * d : (head + 1) * d]
                maps.append((z_BTHd[:, :, head] @ columns_Dd.T).flatten())
                continue
            k_BTd = k_BGTd[:, head // (H // k_BGTd.shape[1])]
            s_BTT = q_BHTd[:, head] @ k_BTd.transpose(1, 2)
            future_TT = torch.ones(T, T, dtype=torch.bool).triu(1)
            if metric == "softmax":
                s_BTT = s_BTT / math.sqrt(q_BHTd.shape[3])
                s_BTT = s_BTT.masked_fill(future_TT, -math.inf).softmax(-1)
            elif metric == "relu":
                s_BTT = s_BTT.clamp(min=0)
            s_BTT = s_BTT.masked_fill(future_TT, 0)
            maps.append((s_BTT if sink else s_BTT[:, 1:, 1:]).flatten())
        found.append([[float(a @ b) for b in maps] for a in maps])
    return torch.tensor(found, dtype=torch.float64)


def close(a, b, tolerance=1e-6):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("metric", CORPUS_METRICS)
def test_streaming_equals_stored_maps(family, metric):
    model, windows_NT = build(family), windows()
    found = similarity_pass(model, windows_NT, metric, tile=16, batch=2)
    expected = naive(model, windows_NT, metric)
    close(cosine(found["gram_LHH"]), cosine(expected))
    close(found["gram_LHH"] / expected.amax((1, 2), True), expected / expected.amax((1, 2), True))
    off_LHH = cosine(expected) - torch.eye(6, dtype=torch.float64)
    assert off_LHH.abs().max() < 0.99 and off_LHH.std() > 0.02  # heads that can be told apart
    assert (found["tokens"], found["sequences"]) == (111, 3)
    assert found["gram_LHH"].dtype == torch.float64


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("form", ["direct", "trace"])
def test_groups_share_keys(groups, form):
    model, windows_NT = build(heads=8, groups=groups), windows(2, 23)
    for metric in ("relu", "scores"):
        found = similarity_pass(model, windows_NT, metric, form=form, tile=8)
        close(cosine(found["gram_LHH"]), cosine(naive(model, windows_NT, metric)))


@pytest.mark.parametrize(
    ("metric", "form"),
    [("relu", "auto"), ("softmax", "auto"), ("scores", "direct"), ("scores", "trace")],
)
def test_without_the_sink(metric, form):
    model, windows_NT = build(), windows()
    found = similarity_pass(model, windows_NT, metric, tile=8, form=form)
    close(cosine(found["gram_nosink_LHH"]), cosine(naive(model, windows_NT, metric, sink=False)))
    assert (cosine(found["gram_nosink_LHH"]) - cosine(found["gram_LHH"])).abs().max() > 1e-3


def test_a_strong_sink_does_not_drown_the_rest():
    """A sink 1e5 times as strong in every head: the rest keeps its own six digits."""
    generator = torch.Generator().manual_seed(0)
    q_BHTd, k_BGTd = (torch.randn(1, h, 40, 8, generator=generator) for h in (4, 2))
    q_BHTd[..., 0] = 1
    k_BGTd[:, :, 1:, 0] = 0
    k_BGTd[:, :, 0, 0] = 1e5
    for name in ("relu", "scores"):
        gram = Gram(4, torch.device("cpu"))
        METRICS[name].add(States(0, None, q_BHTd, k_BGTd, None, True), gram, Workspace(tile=8))
        s_HTT = (q_BHTd.double() @ k_BGTd.double().repeat_interleave(2, 1).transpose(2, 3))[0]
        maps_HX = (s_HTT.clamp(min=0) if name == "relu" else s_HTT).tril()[:, 1:, 1:].flatten(1)
        close(cosine(gram.rest_HH), cosine(maps_HX @ maps_HX.T))
        assert cosine(gram.full_HH).min() > 0.999


def test_only_map_metrics_of_a_corpus_report_without_the_sink():
    model, windows_NT = build(), windows(1, 8)
    reported = {m for m in METRICS if "gram_nosink_LHH" in similarity_pass(model, windows_NT, m)}
    assert reported == {"relu", "softmax", "scores"}


@pytest.mark.parametrize("metric", METRICS)
def test_tile_and_batch_size_change_nothing(metric):
    model, windows_NT = build(), windows(5, 33)
    results = [
        cosine(similarity_pass(model, windows_NT, metric, tile=tile, batch=batch)["gram_LHH"])
        for tile, batch in ((None, 8), (1, 1), (7, 2), (33, 5), (1000, 3))
    ]
    for result in results[1:]:
        close(result, results[0])


def test_long_prefix_sums_are_cut_into_blocks(monkeypatch):
    model, windows_NT = build(), windows(1, 61)
    expected = cosine(similarity_pass(model, windows_NT, "scores", form="direct")["gram_LHH"])
    monkeypatch.setattr(grams, "TRACE_FLOATS", 2 * (3 * 8) ** 2)
    found = similarity_pass(model, windows_NT, "scores", form="trace", tile=8)
    close(cosine(found["gram_LHH"]), expected)


def test_softmax_with_large_scores_takes_the_rows_maximum():
    model, windows_NT = build(spread=1.5), windows()
    found = similarity_pass(model, windows_NT, "softmax", tile=8)
    close(cosine(found["gram_LHH"]), cosine(naive(model, windows_NT, "softmax")), 1e-5)


def test_the_cheaper_form_of_scores_is_chosen():
    # A token costs 2d(HGd + H² + G²d) FLOPs in the trace form and T(Hd + H²) in the direct one.
    assert trace_pays(8, 4, 8, 512)
    assert not trace_pays(32, 8, 128, 2048) and trace_pays(32, 8, 128, 4096)
    model, windows_NT = build(), windows()
    auto, trace, direct = (
        similarity_pass(model, windows_NT, "scores", form=form)["gram_LHH"]
        for form in ("auto", "trace", "direct")
    )
    assert torch.equal(auto, trace if trace_pays(6, 3, 8, 37) else direct)
    assert not torch.equal(trace, direct)


def permute_heads(model, order):
    """Rename query heads inside their groups."""
    with torch.no_grad():
        for _, module in attention_modules(model):
            d = module.head_dim
            module.q_proj.weight.copy_(
                module.q_proj.weight.unflatten(0, (-1, d))[order].flatten(0, 1)
            )
            module.q_proj.bias.copy_(module.q_proj.bias.unflatten(0, (-1, d))[order].flatten())
            module.o_proj.weight.copy_(
                module.o_proj.weight.unflatten(1, (-1, d))[:, order].flatten(1)
            )


@pytest.mark.parametrize("metric", METRICS)
def test_permuting_heads_permutes_the_matrix(metric):
    model, windows_NT = build(), windows()
    before = cosine(similarity_pass(model, windows_NT, metric)["gram_LHH"])
    order = torch.tensor([1, 0, 2, 3, 5, 4])
    permute_heads(model, order)
    after = cosine(similarity_pass(model, windows_NT, metric)["gram_LHH"])
    close(after, before[:, order][:, :, order])
    assert (after - before).abs().max() > 0.01


def change_gauge(model):
    """K_m → z_m K_m, Q_m → conj(z_m)⁻¹ Q_m in each rotation plane (m, m + d/2) of each group."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _, module in attention_modules(model):
            d, n = module.head_dim, module.num_key_value_groups
            G = module.k_proj.out_features // d
            noise_2Gp = torch.randn(2, G, d // 2, generator=generator, dtype=torch.float64)
            z_Gp = torch.polar(torch.exp(0.7 * noise_2Gp[0]), 3 * noise_2Gp[1])
            factors = (z_Gp, (1 / z_Gp.conj()).repeat_interleave(n, 0))
            for linear, factor_Hp in zip((module.k_proj, module.q_proj), factors, strict=True):
                for tensor in (linear.weight, linear.bias):
                    x_Hd = tensor.double().unflatten(0, (-1, 2, d // 2)).reshape(
                        len(factor_Hp), 2, d // 2, -1
                    )  # fmt: skip
                    turned = torch.complex(x_Hd[:, 0], x_Hd[:, 1]) * factor_Hp[..., None]
                    tensor.copy_(torch.stack([turned.real, turned.imag], 1).reshape(tensor.shape))


@pytest.mark.parametrize("metric", ["relu", "softmax", "scores"])
def test_a_change_of_gauge_leaves_the_maps(metric):
    model, windows_NT = build(), windows()
    before = similarity_pass(model, windows_NT, metric)["gram_LHH"]
    weight = attention_modules(model)[0][1].q_proj.weight.detach().clone()
    change_gauge(model)
    assert (attention_modules(model)[0][1].q_proj.weight - weight).abs().max() > 0.1
    close(cosine(similarity_pass(model, windows_NT, metric)["gram_LHH"]), cosine(before), 1e-5)


def copy_head(model, source: int, target: int, scale: float = 1.0):
    """Make one query head a (scaled) copy of another; their groups' keys and values too."""
    with torch.no_grad():
        for _, module in attention_modules(model):
            d, n = module.head_dim, module.num_key_value_groups
            for name, per in (("q_proj", 1), ("k_proj", n), ("v_proj", n)):
                for tensor in getattr(module, name).parameters():
                    rows = tensor.unflatten(0, (-1, d))
                    rows[target // per] = rows[source // per] * (scale if per == 1 else 1)
            columns = module.o_proj.weight.unflatten(1, (-1, d))
            columns[:, target] = columns[:, source]


@pytest.mark.parametrize("metric", METRICS)
def test_a_planted_duplicate_scores_one(metric):
    model, windows_NT = build(), windows()
    copy_head(model, 0, 3)  # across groups
    similarity = cosine(similarity_pass(model, windows_NT, metric)["gram_LHH"])
    close(similarity[:, 0, 3], torch.ones(2, dtype=torch.float64))
    assert similarity[:, 0, 2].max() < 0.99


@pytest.mark.parametrize("metric", METRICS)
def test_a_zero_head_gives_no_nan(metric):
    model, windows_NT = build(), windows()
    copy_head(model, 1, 1, scale=0.0)
    with torch.no_grad():
        for _, module in attention_modules(model):
            module.o_proj.weight[:, 8:16] = 0
    found = similarity_pass(model, windows_NT, metric)
    similarity = cosine(found["gram_LHH"])
    assert similarity.isfinite().all()
    assert (similarity.diagonal(dim1=1, dim2=2) == 1).all()
    if metric != "softmax":  # equal probabilities are a map like any other
        assert (similarity[:, 1, [0, 2, 3, 4, 5]] == 0).all()


@pytest.mark.parametrize("metric", METRICS)
def test_the_matrix_is_a_cosine(metric):
    similarity = cosine(similarity_pass(build(), windows(), metric)["gram_LHH"])
    assert torch.equal(similarity, similarity.transpose(1, 2))
    assert torch.linalg.eigvalsh(similarity).min() > -1e-9
    if metric in ("relu", "softmax", "relu_random"):
        assert similarity.min() >= 0


def test_positive_scaling_of_queries_leaves_relu():
    model, windows_NT = build(), windows()
    before = cosine(similarity_pass(model, windows_NT, "relu")["gram_LHH"])
    with torch.no_grad():
        attention_modules(model)[1][1].q_proj.weight[:8] *= 3
        attention_modules(model)[1][1].q_proj.bias[:8] *= 3
    close(cosine(similarity_pass(model, windows_NT, "relu")["gram_LHH"]), before)


@pytest.mark.parametrize("d", [16, 64])
def test_relu_random_tends_to_the_arc_cosine_kernel(d):
    model = build(head_dim=d, hidden_size=6 * d)
    with torch.no_grad():  # head 1 shares most of head 0's weights, head 2 is its opposite
        module = attention_modules(model)[0][1]
        q_HdD = module.q_proj.weight.unflatten(0, (6, d))
        k_GdD = module.k_proj.weight.unflatten(0, (3, d))
        q_HdD[1] = q_HdD[0] + 0.5 * q_HdD[1]
        q_HdD[2], k_GdD[1] = q_HdD[0], -k_GdD[0]
    generator = torch.Generator().manual_seed(0)
    window_NT = torch.zeros(1, 64, dtype=torch.long)
    draws = [
        similarity_pass(model, window_NT, "relu_random", generator=generator)["gram_LHH"][0]
        for _ in range(24)
    ]
    samples = cosine(torch.stack(draws))
    q_HdD = module.q_proj.weight.detach().double().unflatten(0, (6, d))
    k_HdD = module.k_proj.weight.detach().double().unflatten(0, (3, d)).repeat_interleave(2, 0)
    forms_HX = (q_HdD.transpose(1, 2) @ k_HdD).flatten(1)
    expected = arccos_kernel(cosine(forms_HX @ forms_HX.T))
    error = samples.std(0) / math.sqrt(len(samples))
    assert ((samples.mean(0) - expected).abs() <= 0.3 / d + 4 * error).all()
    assert (
        expected[0, 1] > 0.8 and expected[0, 2] < 1e-6 and abs(expected[0, 4] - 1 / math.pi) < 0.1
    )


def test_relu_random_equals_stored_maps_of_the_same_draws():
    """One draw a window and layer, shared by the heads; no mask, norm, rotation or bias."""
    model = build()
    found = similarity_pass(model, windows(2, 19), "relu_random")["gram_LHH"]
    generator = torch.Generator().manual_seed(0)
    for layer, (_, module) in enumerate(attention_modules(model)):
        gram_HH = torch.zeros(6, 6, dtype=torch.float64)
        for _ in range(2):
            x_TD = torch.randn(19, 48, generator=generator).double()
            q_HTd, k_GTd = (
                torch.stack((x_TD @ linear.weight.detach().double().T).split(8, 1))
                for linear in (module.q_proj, module.k_proj)
            )
            maps_HX = torch.stack(
                [(q_HTd[h] @ k_GTd[h // 2].T).clamp(min=0).flatten() for h in range(6)]
            )
            gram_HH += maps_HX @ maps_HX.T
        close(cosine(found[layer]), cosine(gram_HH))


def test_arccos_kernel_by_hand():
    rho = torch.tensor([-1.0, 0.0, 0.5, 1.0])
    expected = [0, 1 / math.pi, (math.sqrt(0.75) + math.pi / 3) / math.pi, 1]
    close(arccos_kernel(rho), torch.tensor(expected, dtype=torch.float64), 1e-12)


def test_relu_random_is_drawn_from_the_generator():
    model, windows_NT = build(), windows()
    one, same, other = (
        similarity_pass(model, windows_NT, "relu_random", generator=generator)["gram_LHH"]
        for generator in (None, torch.Generator().manual_seed(0), torch.Generator().manual_seed(1))
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_metric_is_one_function_and_one_entry(monkeypatch):
    def squared(states, gram, work):
        stream(states, gram, work, torch.square)

    monkeypatch.setitem(METRICS, "squared", Metric(squared))
    model, windows_NT = build(), windows(2, 9)
    found = similarity_pass(model, windows_NT, "squared")["gram_LHH"]
    layers = []
    with tapped(model, lambda module, q, k, v, z: layers.append((q.double(), k.double()))):
        model(windows_NT)
    maps = [(q @ k.repeat_interleave(2, 1).mT).tril() ** 2 for q, k in layers]
    expected = torch.stack([torch.einsum("naij,nbij->ab", m, m) for m in maps]).detach()
    close(cosine(found), cosine(expected))


def test_the_recipes_know_which_metrics_have_a_variant_without_the_sink():
    assert {metric for metric in METRICS if METRICS[metric].sink} == set(WITH_SINK)


def test_refusals():
    model = build("mistral", sliding_window=8)
    similarity_pass(model, windows(1, 8), "relu")
    with pytest.raises(InputError, match="sliding_window 8"):
        similarity_pass(model, windows(1, 9), "relu")
    with pytest.raises(InputError, match=r"rleu.*relu_random"):
        similarity_pass(model, windows(1, 8), "rleu")
    # Gaussian tokens are no text: neither its window nor its positions limit them.
    assert similarity_pass(model, windows(1, 9), "relu_random")["tokens"] == 9
    with torch.no_grad():
        attention_modules(model)[1][1].q_proj.weight[0, 0] = math.nan
    with pytest.raises(InputError, match="layer 1"):
        similarity_pass(model, windows(1, 8), "relu")
