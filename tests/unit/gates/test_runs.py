"""Gated runs on a toy language: what λ and a number of heads do, and that resuming is exact."""

import copy
import itertools

import pytest
import torch

from headroom.corpora.pair_tokens import Batches, PairTokens
from headroom.errors import InputError
from headroom.gates import runs
from headroom.gates import translator as translators
from headroom.gates.gated import Gated, kept_heads
from headroom.gates.importance import MICHEL_BATCHES, michel
from headroom.gates.reports import Reporter
from headroom.gates.runs import gate_run, uniform
from headroom.gates.translator import build, fit, pair_loss
from headroom.recipes import parse_step
from headroom.training import DivergedError, Plan

from .small_translators import translator

V, LONGEST = 12, 8
BASE = {
    "vocabulary": V,
    "hidden": 32,
    "layers": 2,
    "heads": 4,
    "ffn": 32,
    "dropout": 0.1,
    "batch_tokens": 160,
    "learning_rate": 5e-3,
    "schedule": "inverse_sqrt",
    "warmup": 30,
    "noam_step_factor": 1.0,
    "smoothing": 0.1,
    "steps": 6,
    "seed": 0,
    "report": None,
    "threads": 1,
}
SETTINGS = {
    "attentions": ["encoder"],
    "trains": "all",
    "beta": 0.5,
    "penalty": "seed",
    "log_a": 2.0,
    "steps": 10,
    "batch_tokens": 160,
    "learning_rate": 1e-3,
    "schedule": "constant",
    "warmup": 0,
    "noam_step_factor": 1.0,
    "smoothing": 0.1,
    "gate_learning_rate": 0.15,
    "multiplier_learning_rate": 0.01,
    "report": 4,
    "threads": 1,
    "base": BASE,
    "longest": LONGEST,
}


def reversals(count=240):
    """Sentences and their words in reverse."""
    generator = torch.Generator().manual_seed(0)
    sides = ([], [])
    for _ in range(count):
        length = int(torch.randint(2, 6, (1,), generator=generator))
        words = torch.randint(3, V, (length,), generator=generator)
        for side, order in zip(sides, (words, words.flip(0)), strict=True):
            side.append(torch.cat([order, torch.tensor([1])]))
    tensors = [
        tensor
        for side in sides
        for tensor in (torch.cat(side).int(), torch.tensor([0, *map(len, side)]).cumsum(0))
    ]
    return PairTokens(*tensors, too_long=0)


class Numbers:
    """A tokenizer of sentences such as ``5 9 3``."""

    bos_token_id, eos_token_id, pad_token_id = None, 1, 0

    def __call__(self, sentences, **options):
        return {"input_ids": [[*map(int, text.split()), 1] for text in sentences]}

    def batch_decode(self, tokens_BT, **options):
        return [" ".join(str(i) for i in row if i > 2) for row in tokens_BT.tolist()]


class Silent(Reporter):
    """Looks at gates only."""

    def _quality(self, model):
        return {}


PAIRS = reversals()
HOW = {"lowercase": False, "tokenize": "none", "batch_tokens": 64, "longest": LONGEST}
SILENT = Silent(None, [], [], HOW)


def translating():
    sources = ["5 9 3", "4 4 7 8 3", "11 10"]
    return Reporter(Numbers(), sources, [" ".join(s.split()[::-1]) for s in sources], HOW)


def run(folder, name, model=None, reporter=SILENT, kept=None, halvings=0, **changed):
    model = model or translator(vocabulary=V)
    settings = SETTINGS | changed
    step = parse_step(name)
    return gate_run(model, step, settings, PAIRS, reporter, folder, kept, halvings)


def open_heads(gated):
    gates = torch.cat(list(gated.gates().values()))
    return int((gates > 0).sum())


def bits(module, without=()):
    """The weights, those whose names begin in a given way left out, as comparable bytes."""
    return {
        name: tensor.numpy().tobytes()
        for name, tensor in module.state_dict().items()
        if not name.startswith(tuple(without))
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A translator that has begun to learn to reverse."""
    settings = BASE | {"dropout": 0.0, "smoothing": 0.0, "steps": 120}
    model = build(settings, LONGEST, 0)
    log = fit(model, settings, PAIRS, tmp_path_factory.mktemp("state")).log
    assert log[-1]["nll"] < 0.8 * log[0]["nll"]
    return model


@pytest.fixture
def saving(monkeypatch):
    """Save the state after every step, and log every one."""

    def plan(**settings):
        return Plan(**settings, save_seconds=-1.0, log_every=1)

    for module in (runs, translators):
        monkeypatch.setattr(module, "Plan", plan)


class Killed(BaseException):
    """What no handler may catch."""


def kill_at(patch, batch):
    """End the process in the midst of its n-th batch, from 0, of whichever training."""
    seen = []

    def killing(*arguments):
        loss_sum = pair_loss(*arguments)

        def counted(model, samples):
            seen.append(1)
            if len(seen) > batch:
                raise Killed
            return loss_sum(model, samples)

        return counted

    for module in (runs, translators):
        patch.setattr(module, "pair_loss", killing)


def test_a_higher_price_leaves_no_more_heads(trained, tmp_path):
    found = {}
    for price in ("0.00", "0.05", "0.10", "0.20", "0.50", "2.00"):
        model = copy.deepcopy(trained)
        gated, _ = run(tmp_path / price, f"gate-l{price}", model, steps=50, smoothing=0.0)
        found[price] = open_heads(gated)
    left = list(found.values())
    assert left[0] == 8 and left[-1] <= 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(left))
    assert left[0] > left[2] >= left[-1]


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_a_target_is_met_exactly(trained, tmp_path, count):
    model = copy.deepcopy(trained)
    gated, progress = run(tmp_path, f"gate-k{count}", model, steps=20, report=12)
    assert open_heads(gated) == count
    # At step 12 the heads were chosen: those with the highest log_a of all.
    notes = {note["step"]: note for note in progress.notes}
    order = torch.tensor(notes[12]["log_a"]).flatten().sort(descending=True).indices[:count]
    log_a = torch.cat(list(gated.log_a)).detach()
    assert (log_a.abs() == 10).all()  # nothing moves them any more
    kept = (log_a == 10).nonzero().flatten()
    assert kept.tolist() == sorted(order.tolist())


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_target_is_met_in_the_shortest_of_runs(tmp_path, steps):
    gated, _ = run(tmp_path, "gate-k3", steps=steps)
    assert open_heads(gated) == 3


def test_all_attentions_share_a_target(tmp_path):
    gated, _ = run(tmp_path, "gate-k7", attentions=["encoder", "decoder", "cross"], steps=4)
    assert gated.heads == 24 and open_heads(gated) == 7


def test_a_target_beyond_the_heads_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"gates\.target_heads: 9 heads.*at most 8") as refusal:
        run(tmp_path, "gate-k9")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["gate-k3", "mask-random-k3"])
def test_nothing_to_train_is_refused(tmp_path, name):
    with pytest.raises(InputError, match=r"gates\.trains: none") as refusal:
        run(tmp_path, name, trains="none")
    assert "\n" not in str(refusal.value)


def test_what_the_first_step_costs(saving, tmp_path):
    """λ · 1.53668 with two layers of eight heads at log_a = 0, and the loss is the sum."""
    model = translator(vocabulary=V, heads=8)
    _, progress = run(tmp_path, "gate-l0.05", model, log_a=0.0, steps=1)
    (line,) = progress.log
    assert line["penalty"] == pytest.approx(0.076834, abs=1e-6)
    assert line["loss"] == pytest.approx(line["cross_entropy"] + line["penalty"], rel=1e-6)
    assert line["learning_rates"] == pytest.approx([1e-3, 0.15])


def test_equal_seeds_give_equal_runs(tmp_path):
    runs_of = {}
    for place, name in enumerate(("gate-l0.05", "gate-l0.05", "gate-l0.05-s1")):
        torch.manual_seed(place)  # the caller's random state decides nothing
        gated, progress = run(tmp_path / str(place), name, reporter=translating())
        runs_of[place] = (progress.log, progress.notes, bits(gated))
    assert runs_of[0] == runs_of[1]
    assert all(a != b for a, b in zip(runs_of[0], runs_of[2], strict=True))


KEPT = {"model.encoder.layers.1.self_attn": [2], "model.encoder.layers.0.self_attn": [0, 3]}
# Step, batch in which the process ends, step that the resumed one says it goes on after. Heads are
# chosen before batch 6 of a run of 10; training from scratch has 6 batches before those of the
# run, and after the last of a training no state is written.
ENDS = [
    *(("gate-l0.05", batch, batch) for batch in (0, 4, 9)),
    *(("gate-k3", batch, batch) for batch in (5, 6, 7)),
    *(("mask-scratch-k3", batch, after) for batch, after in ((3, 3), (6, 5), (8, 2))),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nobody stopped, made when they are asked for."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = run(tmp_path_factory.mktemp("whole"), name, None, translating(), KEPT)
        return made[name]

    return get


@pytest.mark.parametrize(("name", "batch", "after"), ENDS)
def test_stopped_and_resumed_is_as_if_never_stopped(
    saving, whole, tmp_path, monkeypatch, capsys, name, batch, after
):
    gated, progress = whole(name)
    with pytest.raises(Killed), monkeypatch.context() as patch:
        kill_at(patch, batch)
        run(tmp_path, name, None, translating(), KEPT)
    torch.manual_seed(batch)  # another process has another random state
    capsys.readouterr()
    resumed, again = run(tmp_path, name, None, translating(), KEPT)
    assert (f"resuming after step {after}\n" in capsys.readouterr().err) == (after > 0)
    assert [line["step"] for line in again.log] == list(range(1, 11))
    assert again.log == progress.log and again.notes == progress.notes
    assert bits(resumed) == bits(gated)


def test_a_state_from_before_the_choice_leads_to_the_same_one(saving, whole, tmp_path, monkeypatch):
    """Ended while sentences are translated after step 8, with a state of step 4."""
    gated, progress = whole("gate-k3")
    last = []

    def plan(**settings):
        return Plan(**settings, save_seconds=3.5, log_every=1)

    class Ending(Reporter):
        def _quality(self, model):
            last.append(1)
            if len(last) == 3:
                raise Killed
            return super()._quality(model)

    reporter = translating()
    clock = iter(range(1000))
    with pytest.raises(Killed), monkeypatch.context() as patch:
        patch.setattr(runs, "Plan", plan)
        patch.setattr("headroom.training.time.monotonic", lambda: float(next(clock)))
        ending = Ending(Numbers(), reporter.sources, reporter.references, HOW)
        run(tmp_path, "gate-k3", reporter=ending)
    state = torch.load(tmp_path / "gates" / "state.pt", weights_only=True)
    assert state["progress"]["step"] == 4
    resumed, again = run(tmp_path, "gate-k3", reporter=reporter)
    assert (again.log, again.notes) == (progress.log, progress.notes)
    assert bits(resumed) == bits(gated)


LAYERS = "model.encoder.layers."
POSITIONS = ("embed_positions.weight", "final_logits_bias")  # no parameters that train


@pytest.mark.parametrize("trains", ["all", "encoder", "none"])
def test_what_is_frozen_keeps_its_bits(tmp_path, trains):
    model = translator(vocabulary=V)
    before = bits(model)
    attentions = ["encoder", "decoder", "cross"]
    gated, _ = run(tmp_path, "gate-l0.05", model, trains=trains, attentions=attentions, steps=4)
    after = bits(model)
    changed = {name for name in before if after[name] != before[name]}
    free = {
        "all": {name for name in before if not name.endswith(POSITIONS)},
        "encoder": {name for name in before if name.startswith(LAYERS)},
        "none": set(),
    }
    assert changed == free[trains]
    assert all((values != 2).all() for values in gated.log_a)


def test_micro_batches_have_the_noise_of_their_batch(tmp_path):
    """Without dropout portions change rounding alone, far less than other noise changes."""
    found = []
    for place, (name, halvings) in enumerate(
        [("gate-l0.05", 0), ("gate-l0.05", 2), ("gate-l0.05-s1", 0)]
    ):
        model = translator(vocabulary=V).double()
        model.config.dropout = 0.0
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        gated, _ = run(tmp_path / str(place), name, model, halvings=halvings, smoothing=0.0)
        found.append((torch.cat(list(gated.log_a)), gated.model.state_dict()))
    (gates, weights), (split_gates, split_weights), (other, _) = found
    assert (gates - split_gates).abs().max() < 1e-5 < 1e-2 < (gates - other).abs().max()
    assert max(float((weights[n] - split_weights[n]).abs().max()) for n in weights) < 1e-5


def test_noise_is_a_function_of_seed_and_step():
    gated = Gated(translator(), ["encoder"], 0.5, 2.0)
    drawn = {
        tuple(torch.cat(uniform(gated, seed, step)).tolist())
        for seed, step in ((0, 5), (0, 5), (1, 5), (0, 6), (5, 0))
    }
    assert len(drawn) == 4 and all(len(set(values)) == 8 for values in drawn)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    model = translator(vocabulary=V)
    with torch.no_grad():
        model.model.shared.weight[7] = float("nan")
    before = bits(model)
    with pytest.raises(DivergedError, match="step 1"):
        run(tmp_path, "gate-l0.05", model)
    assert bits(model) == before
    assert model.config._attn_implementation == "sdpa"


def test_random_heads_are_so_many_and_the_seeds_own(tmp_path):
    def kept(name, folder):
        gated, progress = run(tmp_path / folder, name, steps=2)
        assert open_heads(gated) == 3 and {
            len(line["learning_rates"]) for line in progress.log
        } == {1}
        return kept_heads(gated.gates())

    first = kept("mask-random-k3", "a")
    assert kept("mask-random-k3", "b") == first
    assert any(kept(f"mask-random-k3-s{seed}", str(seed)) != first for seed in (1, 2))


def test_michel_keeps_the_most_important(trained, tmp_path):
    count = 3
    batches = Batches(PAIRS, SETTINGS["batch_tokens"], 0)
    read = [batches(number) for number in range(MICHEL_BATCHES)]
    scores = michel(copy.deepcopy(trained), ["encoder"], read, pair_loss(PAIRS, 0, 0.0))
    ranked = sorted((-float(s), place) for place, s in enumerate(torch.cat(scores)))[:count]
    gated, _ = run(tmp_path, f"mask-michel-k{count}", copy.deepcopy(trained), steps=2)
    found = torch.cat(list(gated.gates().values())).nonzero().flatten().tolist()
    assert found == sorted(place for _, place in ranked)


def test_from_scratch_has_the_heads_given_from_its_first_step(tmp_path):
    """What a closed head would read with is as it was drawn, while all others have moved."""
    given = translator(vocabulary=V)
    before = bits(given)
    gated, _ = run(tmp_path, "mask-scratch-k3", given, kept=KEPT)
    assert kept_heads(gated.gates()) == KEPT
    assert bits(given) == before and gated.model is not given
    drawn = build(BASE, LONGEST, BASE["seed"] + 1)
    for name, heads in KEPT.items():
        for part in ("q_proj", "k_proj", "v_proj"):
            first, last = (m.get_submodule(f"{name}.{part}").weight for m in (drawn, gated.model))
            moved = (first != last).view(4, 8, 32).flatten(1).any(1)
            assert moved.nonzero().flatten().tolist() == heads
