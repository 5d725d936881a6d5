"""Whole prunings: what must lose nothing, what must not matter, which widths layers get."""

import dataclasses

import numpy as np
import pytest
import torch

from headroom.errors import InputError
from headroom.evaluation.cost import effective_parameters
from headroom.ffn import pipeline, planning
from headroom.ffn.layers import canonical_scale, live_channels, named, read
from headroom.ffn.observe import hidden_moments
from headroom.ffn.planning import wait_for_room
from headroom.ffn.stream import LayerStream
from headroom.ffn.task import Selection
from headroom.recipes import FUSIONS, parse_step

from .small_ffns import (
    build,
    child,
    logits,
    pruned,
    rebuilt,
    selection,
    source_of,
    state_of,
    tokens,
    weight,
)
from .test_importance import turned

TRANSPORTING = [name for name in FUSIONS if name.startswith("ot_")]


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


def layer_errors(one):
    return [np.sqrt(entry["error_fused"] / entry["energy"]) for entry in one.layers]


@pytest.fixture
def keeping(monkeypatch):
    """Let steps keep given channels, the same in every layer."""

    def keep(kept):
        def chosen(source, step, scores):
            return Selection(scores, [torch.tensor(kept)] * source.layers, len(kept))

        monkeypatch.setattr(pipeline, "select", chosen)

    return keep


# ratio 0


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("kind", "rga")
def test_ratio_zero_is_the_parent(family, kind):
    """Spec 2: nothing is written anew, for every fusion; what fusions can't do is not asked."""
    source = source_of(build(family))
    before = state_of(source.model)
    for one in pruned(source, *(f"prune-flap-{fusion}-{kind}0.00" for fusion in FUSIONS)):
        assert one.tensors == {} and one.config == source.config and one.plans == {}
        assert [(e["kept"], e["pruned"], e["error_fused"]) for e in one.layers] == [(24, 0, 0)] * 2
    assert all(torch.equal(before[n], t) for n, t in source.model.state_dict().items())


@pytest.mark.parametrize("ratio", ["r1.00", "g1.00", "a1.50", "r2.00"])
def test_nothing_left_is_refused(ratio):
    with pytest.raises(InputError, match=r"ratio") as error:
        parse_step(f"prune-flap-drop-{ratio}")
    assert "\n" not in str(error.value)


def test_ratios_too_small_for_a_channel_change_nothing():
    source = source_of(build())
    for one in pruned(source, *(f"prune-flap-{fusion}-r0.01" for fusion in FUSIONS)):
        assert torch.equal(logits(child(source, one)), logits(source.model)), one.step
        assert one.config["intermediate_size"] == 24


# planted duplicates


def planted(clusters, family="llama", dtype=torch.float64, twist=False, **more):
    """Every cluster's channels are its first one, or that in other scales and signs."""
    model = build(family, channels=sum(map(len, clusters)), dtype=dtype, **more)
    state, config = state_of(model), model.config.to_dict()
    generator = torch.Generator().manual_seed(8)
    for index in range(2):
        ffn = read(state, index, config)
        source = torch.arange(ffn.channels)
        for cluster in clusters:
            source[cluster] = cluster[0]
        ffn = ffn.pick(source)
        if twist:
            c = torch.randn(ffn.channels, generator=generator, dtype=torch.float64)
            ffn = ffn.scaled(c.sign() * (0.2 + c.abs()))
        state |= {name: tensor.to(dtype) for name, tensor in named(ffn, index)}
    return rebuilt(config, state)


CLUSTERS = {
    "equal": [[0, 5, 9], [1, 4, 11], [2, 3, 6], [7, 8, 10]],
    "unequal": [[3, 0, 5, 6], [1, 4], [2], [7]],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("twist", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("clusters", CLUSTERS)
def test_duplicates_are_fused_without_loss(clusters, twist, biases, dtype, keeping):
    """Spec 3: by mass, with pushed masses; never by columns."""
    found = CLUSTERS[clusters]
    model = planted(found, dtype=dtype, twist=twist, mlp_bias=biases)
    keeping(sorted(cluster[-1] for cluster in found))
    source, bound = source_of(model), 1e-10 if dtype == torch.float64 else 1e-5
    costs = ("", "-sqeuclidean", "-cityblock", "-activation")
    steps = [f"prune-random-{f}-r0.50{c}" for f in ("ot_mass", "ot_column") for c in costs]
    for one in pruned(source, *steps):
        errors = layer_errors(one)
        if one.step.fusion == "ot_column":
            assert min(errors) > 0.1
            assert relative(logits(child(source, one)), logits(model)) > 0.1
            continue
        assert max(errors) < bound, one.step
        assert relative(logits(child(source, one)), logits(model)) < 10 * bound
        assert all(e["mass_rescue"] > 1 - 1e-9 for e in one.layers)
        assert all(e["functional_rescue"] > 1 - bound for e in one.layers)
    if clusters == "equal":  # then the uniform target is the same
        one = pruned(source, "prune-random-ot_mass-r0.50-uniform")[0]
        assert max(layer_errors(one)) < bound


@pytest.mark.parametrize("kept", [[0, 5, 1, 2, 7], [3, 4, 2, 7], [0, 3, 1, 4, 2, 7]])
def test_several_of_a_cluster_may_stay(kept, keeping):
    model = planted(CLUSTERS["unequal"], twist=True)
    keeping(sorted(kept))
    one = pruned(source_of(model), "prune-random-ot_mass-r0.50")[0]
    assert max(layer_errors(one)) < 1e-10


@pytest.mark.parametrize("same", [True, False])
def test_activation_cost_joins_channels_that_fire_alike(same, keeping):
    """A twin of the other sign with another output: |corr| is 1, weights are far apart.

    Averaged by mass it loses nothing where the twins' canonical scales agree; refitted, never.
    """
    model = build(channels=12)
    state, config = state_of(model), model.config.to_dict()
    for index in range(2):
        ffn = read(state, index, config)
        ffn.gate_nD[6:], ffn.up_nD[6:] = ffn.gate_nD[:6], -ffn.up_nD[:6]
        if same:
            ffn.down_Dn[:, 6:] *= ffn.down_Dn[:, :6].norm(dim=0) / ffn.down_Dn[:, 6:].norm(dim=0)
        state |= dict(named(ffn, index))
    model = rebuilt(config, state)
    source = source_of(model, ridge=1e-12)
    keeping([0, 2, 4, 7, 9, 11])
    steps = [
        f"prune-random-{name}-r0.50" for name in ("ot_mass", "ot_ridge", "ot_ridge_sequential")
    ]
    mass, *refits = pruned(source, *(f"{step}-activation" for step in steps))
    for good in [mass, *refits] if same else refits:
        assert max(layer_errors(good)) < 1e-6
        assert relative(logits(child(source, good)), logits(model)) < 1e-5
    assert min(layer_errors(pruned(source, steps[0])[0])) > 0.1


def test_channels_that_differ_in_their_bias_alone_are_no_duplicates(keeping):
    model = planted([[0, 1], [2, 3], [4, 5]], mlp_bias=True)
    state = state_of(model)
    for index in range(2):
        for part in ("gate", "up"):
            state[weight(index, part, "bias")][[0, 1]] = torch.tensor([3.0, -3.0]).double()
    model = rebuilt(model.config.to_dict(), state)
    keeping([0, 1, 2, 4])
    one = pruned(source_of(model), "prune-random-ot_mass-r0.30")[0]
    assert max(layer_errors(one)) < 1e-10


# what must not matter


@pytest.mark.parametrize("step", [
    *(f"prune-flap-{fusion}-r0.30" for fusion in FUSIONS),
    "prune-flap-ot_mass-r0.30-balanced-cityblock",
    "prune-flap-ot_mass-r0.30-weight_aware-sqeuclidean-sinkhorn",
    "prune-flap-ot_ridge-r0.30-uniform-activation",
    "prune-flap-ot_mass-r0.30-uniform-partial",
    "prune-leverage-ot_ridge_sequential-g0.30",
    "prune-fo_snip-ridge-a0.30",
])  # fmt: skip
def test_order_and_scale_of_channels_do_not_matter(step):
    """Spec 5, of a whole model: the pruned one computes the same."""
    model = build(channels=20, mlp_bias=True, dtype=torch.float64)
    gradients = any(word in step for word in ("balanced", "weight_aware", "fo_snip"))
    source = source_of(model, gradients)
    one = pruned(source, step)[0]
    wanted = logits(child(source, one))
    assert relative(wanted, logits(model)) > 0.01
    for permute, scale in ((True, False), (False, True)):
        other, orders = turned(model, 6, permute, scale)
        assert relative(logits(other), logits(model)) < 1e-12
        turned_source = source_of(other, gradients)
        two = pruned(turned_source, step)[0]
        for a, b, order in zip(one.selection.kept, two.selection.kept, orders, strict=True):
            assert set(a.tolist()) == set(order[b].tolist())
        # entropic plans end within a tolerance and are rounded in the channels' order
        close = 1e-2 if "sinkhorn" in step else 1e-7
        assert relative(logits(child(turned_source, two)), wanted) < close
        for a, b in zip(one.layers, two.layers, strict=True):
            assert a.keys() == b.keys()
            for key in a:
                assert a[key] == (b[key] if b[key] is None else pytest.approx(b[key], rel=close))


def test_company_and_batches_do_not_matter():
    """Steps made in one pass are those made alone; batches and threads change only rounding."""
    source = source_of(build())
    steps = [f"prune-flap-{fusion}-r0.30" for fusion in FUSIONS]
    steps += ["prune-random-ridge_sequential-g0.30", "prune-flap-ot_mass-r0.30-activation"]
    together = pruned(source, *steps)
    for one, step in zip(together, steps, strict=True):
        alone = pruned(source, step)[0]
        assert alone.layers == one.layers and alone.config == one.config
        assert all(torch.equal(alone.tensors[n], t) for n, t in one.tensors.items())
    for one, other in zip(
        together, pruned(dataclasses.replace(source, batch=7, workers=2), *steps), strict=True
    ):
        assert one.tensors.keys() == other.tensors.keys()
        for name, tensor in one.tensors.items():
            torch.testing.assert_close(tensor, other.tensors[name], rtol=1e-9, atol=1e-9)


def test_solvers_that_fail_are_heard():
    source = source_of(build(), transport={"mass": 0.8, "iterations": 1})
    with pytest.raises(InputError, match=r"ffn\.transport\.iterations"):
        pruned(source, "prune-flap-ot_mass-r0.30-uniform")
    with pytest.raises(InputError, match=r"correlations"):
        planning.costs("activation", planning.CostView(torch.eye(3).double()), torch.tensor([0]))
    wait_for_room({}, 1)


# refits in a model


def inputs_of(model, index):
    """What an FFN reads, and what it gives, by plain hooks."""
    found = {}
    mlp = model.model.layers[index].mlp
    hooks = [
        mlp.register_forward_hook(lambda _, a, y: found.update(x=a[0], y=y)),
        mlp.down_proj.register_forward_pre_hook(lambda _, a: found.update(h=a[0])),
    ]
    with torch.no_grad():
        model(tokens())
    for hook in hooks:
        hook.remove()
    return {name: value.flatten(0, 1).numpy() for name, value in found.items()}


@pytest.mark.parametrize("fusion", ["ridge_sequential", "ot_ridge_sequential"])
def test_sequential_refits_are_least_squares_behind_the_compressed_prefix(fusion):
    """From what the compressed model's own layer 1 gives to what the dense one gave (numpy)."""
    source = source_of(build(layers=3), ridge=1e-12)
    one = pruned(source, f"prune-flap-{fusion}-r0.50")[0]
    small = child(source, one)
    for index in range(3):
        z, y = inputs_of(small, index)["h"], inputs_of(source.model, index)["y"]
        wanted = np.linalg.lstsq(z, y, rcond=None)[0].T
        np.testing.assert_allclose(one.tensors[weight(index, "down")], wanted, atol=1e-6)
    plain = pruned(source, f"prune-flap-{fusion.removesuffix('_sequential')}-r0.50")[0]
    first, last = weight(0, "down"), weight(2, "down")
    torch.testing.assert_close(one.tensors[first], plain.tensors[first], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(one.tensors[last], plain.tensors[last], atol=0.01)


def test_errors_are_those_of_the_written_layers():
    """On held-out text, each layer behind a dense prefix; a sequential refit behind its own."""
    source = source_of(build(dtype=torch.float32))
    for one in pruned(source, *(f"prune-flap-{fusion}-r0.30" for fusion in FUSIONS)):
        sequential = one.step.fusion.endswith("_sequential")
        reading = child(source, one) if sequential else source.model
        assert [e["layer"] for e in one.layers] == [0, 1]
        for index, entry in enumerate(one.layers):
            found = {}
            mlp = source.model.model.layers[index].mlp
            hook = mlp.register_forward_hook(lambda _, a, y, f=found: f.update(x=a[0], y=y))
            with torch.no_grad():
                source.model(source.heldout_NT)
            hook.remove()
            own = reading.model.layers[index].mlp
            hook = own.register_forward_hook(lambda _, a, y, f=found: f.update(x=a[0]))
            with torch.no_grad():
                reading(source.heldout_NT)
            hook.remove()
            errors = []
            for state in (source.tensors | one.tensors, None):
                ffn = read(state or source.tensors, index, source.config)
                ffn = ffn if state else ffn.pick(one.selection.kept[index])
                errors.append(float((ffn(found["x"].double()) - found["y"]).square().sum()))
            assert entry["error_fused"] == pytest.approx(errors[0], rel=1e-3)
            assert entry["error_drop"] == pytest.approx(errors[1], rel=1e-3)
            assert entry["energy"] == pytest.approx(float(found["y"].square().sum()), rel=1e-5)
            rescue = 1 - errors[0] / errors[1]
            assert entry["functional_rescue"] == pytest.approx(rescue, abs=1e-3)
            assert (entry["kept"], entry["pruned"]) == (17, 7)
            assert (entry["dilution"] is not None) == one.step.fusion.startswith("ot_")


@pytest.mark.parametrize("fusion", ["ridge", "ridge_sequential", "ot_mass"])
def test_errors_and_prefixes_are_those_of_the_stored_precision(fusion):
    """A bfloat16 parent computed in float32: what is judged and followed is what is written."""
    model = build(dtype=torch.float32)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(tensor.bfloat16())
    stored = {name: tensor.bfloat16() for name, tensor in state_of(model).items()}
    source = dataclasses.replace(source_of(model), tensors=stored)
    one = pruned(source, f"prune-flap-{fusion}-r0.30")[0]
    assert {tensor.dtype for tensor in one.tensors.values()} == {torch.bfloat16}
    stream, behind = (LayerStream(model, source.heldout_NT, 3) for _ in range(2))
    for index, entry in enumerate(one.layers):
        small = read(one.tensors, index, source.config).to(torch.float32)
        parts, mlp = stream.attend(index), model.model.layers[index].mlp
        seen = behind.attend(index)
        pairs = list(zip(seen if fusion == "ridge_sequential" else parts, parts, strict=True))
        with torch.no_grad():
            error = sum(float((small(a) - mlp(b)).double().square().sum()) for a, b in pairs)
        assert entry["error_fused"] == pytest.approx(error, rel=1e-6)
        stream.advance(mlp)
        behind.advance(small)
    if fusion != "ridge_sequential":
        return
    wide = {name: tensor.float() for name, tensor in (stored | one.tensors).items()}
    small = rebuilt(one.config, wide)
    z, y = inputs_of(small, 1)["h"].astype(float), inputs_of(model, 1)["y"].astype(float)
    ffn = read(stored, 1, source.config)
    scale = canonical_scale(ffn)
    penalty = 1e-3 * (
        hidden_moments(ffn.to(torch.float32), [torch.from_numpy(inputs_of(model, 1)["x"])[None]])
        .scaled(scale)
        .energy_C.mean()
    )
    kept = one.selection.kept[1]
    start, s = ffn.down_Dn[:, kept].numpy().T, scale[kept].numpy()
    gram = (z * s).T @ (z * s) + float(penalty) * np.eye(len(s))
    wanted = start + s[:, None] * np.linalg.solve(gram, (z * s).T @ (y - z @ start))
    got = one.tensors[weight(1, "down")]
    rounded = torch.from_numpy(wanted.T).bfloat16()
    assert float((got != rounded).double().mean()) < 0.01  # a tie of the rounding, at most


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_families_without_biases_refuse_them(family):
    with pytest.raises(InputError, match=rf"prune-flap-bias-r0.30: .*{family} .*llama") as error:
        pruned(source_of(build(family)), "prune-flap-bias-r0.30")
    assert "\n" not in str(error.value)


def test_bias_leaves_no_mean_error_in_a_model():
    """The first layer reads the same in both models, so its mean output is the dense one's."""
    source = source_of(build())
    small = child(source, pruned(source, "prune-flap-bias-r0.50")[0])
    assert small.config.mlp_bias
    one, two = (inputs_of(m, 0)["y"] for m in (source.model, small))
    np.testing.assert_allclose(one.mean(0), two.mean(0), atol=1e-12)
    assert abs(one - two).max() > 0.1


# widths by layer


@pytest.mark.parametrize("ratio", ["g0.50", "a0.40"])
@pytest.mark.parametrize("fusion", ["drop", "bias", "ot_mass", "ridge_sequential"])
def test_layers_of_unlike_width_are_padded_with_nothing(ratio, fusion):
    model = build(layers=4, channels=25)
    with torch.no_grad():
        for factor, layer in zip((0.2, 1, 2, 4), model.model.layers, strict=True):
            layer.mlp.down_proj.weight[:, ::3] *= factor
    source = source_of(model)
    one, same = (pruned(source, f"prune-flap-{fusion}-{s}")[0] for s in (ratio, "r0.40"))
    kept = [len(k) for k in one.selection.kept]
    uniform = 25 - int(25 * float(ratio[1:]))
    assert sum(kept) == 4 * uniform and len(set(kept)) > 1
    assert [e["kept"] for e in one.layers] == kept and [e["pruned"] for e in one.layers] == [
        25 - k for k in kept
    ]
    width = one.config["intermediate_size"]
    assert width == max(kept) == one.selection.width
    small, state = child(source, one), source.tensors | one.tensors
    ffns = [read(state, i, one.config) for i in range(4)]
    assert [len(live_channels(ffn)) for ffn in ffns] == kept
    dense = sum(p.numel() for p in model.parameters())
    each = 3 * 16 + (2 if fusion == "bias" else 0)
    added = 4 * 16 if fusion == "bias" else 0
    live = dense - 4 * 25 * 48 + sum(kept) * each + added
    assert effective_parameters(state, one.config) == live
    assert sum(p.numel() for p in small.parameters()) == live + (4 * width - sum(kept)) * each
    # without the padding it computes the same
    wanted = logits(small)
    for layer, ffn in zip(small.model.layers, ffns, strict=True):
        layer.mlp.forward = ffn.pick(live_channels(ffn))
    torch.testing.assert_close(logits(small), wanted, rtol=1e-10, atol=1e-10)
    # and it can be pruned again: nothing dead is kept, nothing alive goes for it
    again = source_of(child(source, one))
    for step in ("prune-flap-ridge-r0.30", "prune-flap-ot_mass-g0.30", "prune-random-drop-a0.50"):
        two = pruned(again, step)[0]
        state = again.tensors | two.tensors
        found = [len(live_channels(read(state, i, two.config))) for i in range(4)]
        assert found == [len(k) for k in two.selection.kept]
        assert two.config["intermediate_size"] == max(found)
        if "-r0" in step:
            assert found == [min(k, width - int(0.3 * width)) for k in kept]
        assert torch.isfinite(logits(child(again, two))).all()
    assert len(same.layers) == 4


def test_widths_are_rounded_up():
    source = source_of(build(channels=40), multiple=8)
    for step, width in (("r0.30", 32), ("r0.50", 24), ("r0.80", 8), ("r0.99", 8)):
        one = pruned(source, f"prune-flap-ridge-{step}")[0]
        assert one.config["intermediate_size"] == width == len(one.selection.kept[1])
        assert child(source, one).model.layers[0].mlp.up_proj.out_features == width
    for one in pruned(source, "prune-flap-drop-g0.50", "prune-flap-drop-a0.50"):
        assert all(len(kept) % 8 == 0 for kept in one.selection.kept)


def test_a_layer_that_says_nothing():
    """All of its channels are dead: it is left alone, in every method."""
    model = build(layers=3)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()
    source = source_of(model)
    for one in pruned(source, *(f"prune-flap-{f}-r0.50" for f in FUSIONS)):
        assert [e["kept"] for e in one.layers] == [12, 0, 12]
        assert set(one.plans) == ({0, 2} if one.step.fusion.startswith("ot_") else set())
        assert torch.isfinite(logits(child(source, one))).all()


# any size


@pytest.mark.parametrize("layers", [2, 32, 40])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_any_depth_without_an_edit(family, layers):
    """Spec 9, on random sizes."""
    generator = np.random.default_rng(layers)
    channels = int(generator.integers(13, 30))
    tied = bool(generator.integers(2))
    model = build(
        family, layers, 8 * int(generator.integers(2, 4)), channels, torch.float32,
        tie_word_embeddings=tied,
    )  # fmt: skip
    source = source_of(model)
    steps = [f"prune-flap-{f}-r0.30" for f in ("drop", "ridge", "ot_mass", "ot_ridge_sequential")]
    steps += ["prune-random-drop-r0.50", "prune-leverage-ridge_sequential-g0.20"]
    first, second = pruned(source, *steps), pruned(source, *steps)
    for one, two in zip(first, second, strict=True):
        for a, b in zip(one.selection.kept, two.selection.kept, strict=True):
            assert torch.equal(a, b)
        assert all(torch.equal(two.tensors[n], t) for n, t in one.tensors.items())
        assert torch.isfinite(logits(child(source, one))).all()
        if one.step.ratio.startswith("r"):
            ratio = float(one.step.ratio[1:])
            assert one.config["intermediate_size"] == channels - int(channels * ratio)


def test_keep_sets_ignore_the_fusion():
    source = source_of(build())
    found = pruned(source, *(f"prune-wanda_sp-{fusion}-r0.30" for fusion in FUSIONS))
    chosen = selection(source, "prune-wanda_sp-drop-r0.30")
    for one in found:
        for a, b in zip(one.selection.kept, chosen.kept, strict=True):
            assert torch.equal(a, b)
    assert set(TRANSPORTING) == {o.step.fusion for o in found if o.plans}


@pytest.mark.parametrize(
    "ends", ["", "-uniform", "-importance_to_uniform", "-uniform_to_importance"]
)
def test_a_partial_plan_moves_its_share_of_what_moves(ends):
    """Kept channels stay where they are at no cost; of the rest the dearest stays behind."""
    source = source_of(build(), transport={"mass": 0.6})
    one = pruned(source, f"prune-flap-ot_mass-r0.30{ends}-partial")[0]
    whole = pruned(source, f"prune-flap-ot_mass-r0.30{ends}")[0]
    for index, plan in one.plans.items():
        kept = one.selection.kept[index].tolist()
        full = whole.plans[index]
        a, b = full.sum(1), full.sum(0)
        staying = np.minimum(a[kept], b).sum()
        assert plan.sum() == pytest.approx(staying + 0.6 * (1 - staying), abs=1e-9)
        own = plan.toarray()[kept, np.arange(len(kept))]
        assert (own >= np.minimum(a[kept], b) - 1e-12).all()
        assert (plan.sum(1) <= a + 1e-9).all() and (plan.sum(0) <= b + 1e-9).all()
    if ends in ("", "-uniform"):  # kept channels have nothing above their targets
        assert [e["mass_rescue"] for e in one.layers] == pytest.approx([0.6, 0.6])
