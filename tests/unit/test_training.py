"""The training loop: exact resume, equal gradients, and how it fails."""

import copy
import math

import pytest
import torch
from torch import nn

from headroom import training
from headroom.errors import InputError
from headroom.training import (
    DivergedError,
    Plan,
    constant,
    inverse_sqrt,
    noam,
    train,
    warmup_cosine,
)

PAD = 0


def build(seed=0, dropout=0.0, dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = [nn.Embedding(20, 8), nn.Linear(8, 16), nn.Tanh(), nn.Dropout(dropout)]
        return nn.Sequential(*layers, nn.Linear(16, 20)).to(dtype).train()


def batches(step):
    """Eight ragged samples, padded, that depend on the step alone."""
    generator = torch.Generator().manual_seed(100 + step)
    tokens = torch.randint(1, 20, (8, 12), generator=generator)
    lengths = torch.randint(3, 13, (8, 1), generator=generator)
    return tokens.where(torch.arange(12) < lengths, PAD)


def loss_sum(model, tokens):
    targets = tokens[:, 1:]
    logits = model(tokens[:, :-1])
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=PAD
    )
    return loss, int((targets != PAD).sum())


def optimizer_of(model, rate=1e-2):
    return torch.optim.AdamW(model.parameters(), lr=rate, fused=True)


def run(folder, model=None, loss=loss_sum, steps=12, optimizer=None, watch=None, **plan):
    model = model or build(dropout=0.2)
    plan = Plan(**{"steps": steps, "micro_batch": 4, "log_every": 5, "save_seconds": -1.0} | plan)
    progress = train(
        model,
        optimizer or optimizer_of(model),
        warmup_cosine(steps, 3),
        batches,
        loss,
        plan,
        folder,
        watch,
    )
    return model, progress if watch else progress.log


def equal(first, second):
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class Killed(BaseException):
    """What no handler in the loop may catch."""


def killed_at(calls):
    """A loss that ends the process in its n-th call, so between or within steps."""
    seen = []

    def loss(model, tokens):
        seen.append(1)
        if len(seen) > calls:
            raise Killed
        return loss_sum(model, tokens)

    return loss


@pytest.mark.parametrize("calls", [0, 1, 2, 7, 22, 23])
def test_resume_anywhere_gives_the_same_bits(tmp_path, calls):
    whole, log = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "cut", loss=killed_at(calls))
    torch.manual_seed(calls)  # another process has another random state
    model, resumed_log = run(tmp_path / "cut", loss=killed_at(24 - 2 * (calls // 2)))
    assert equal(model, whole)
    assert resumed_log == log


def test_resume_saves_rarely_and_repeats_the_rest(tmp_path, monkeypatch):
    whole, log = run(tmp_path / "whole")
    clock = iter(range(10000))
    monkeypatch.setattr(training.time, "monotonic", lambda: float(next(clock)))
    with pytest.raises(Killed):
        run(tmp_path / "cut", loss=killed_at(15), save_seconds=5.0)
    state = torch.load(tmp_path / "cut" / "state.pt", weights_only=True)
    assert 0 < state["progress"]["step"] < 7
    model, resumed_log = run(tmp_path / "cut", save_seconds=5.0)
    assert equal(model, whole) and resumed_log == log


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "foreign"])
def test_damaged_and_foreign_states_are_left_aside(tmp_path, capsys, damage):
    whole, log = run(tmp_path / "whole")
    with pytest.raises(Killed):
        options = {"seed": 1} if damage == "foreign" else {}
        run(tmp_path / "cut", loss=killed_at(15), **options)
    path = tmp_path / "cut" / "state.pt"
    content = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        content[len(content) // 3] ^= 1
        path.write_bytes(content)
    elif damage == "empty":
        path.write_bytes(b"")
    model, new_log = run(tmp_path / "cut")
    assert equal(model, whole) and new_log == log
    message = "another training" if damage == "foreign" else "damaged"
    assert message in capsys.readouterr().err


def test_another_learning_rate_is_another_training(tmp_path, capsys):
    with pytest.raises(Killed):
        run(tmp_path, loss=killed_at(15))
    model = build(dropout=0.2)
    run(tmp_path, model, optimizer=optimizer_of(model, rate=2e-2))
    assert "another training" in capsys.readouterr().err


def test_the_callers_random_state_stays_and_decides_nothing(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, _ = run(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert equal(first, run(tmp_path / "b")[0])
    assert not equal(first, run(tmp_path / "c", seed=1)[0])


@pytest.mark.parametrize("micro", [1, 2, 3, 4, 8])
def test_micro_batches_give_the_gradients_of_the_whole_batch(micro):
    model = build()
    total, count = loss_sum(model, batches(0))
    expected = torch.autograd.grad(total / count, list(model.parameters()))
    plan = Plan(steps=1, micro_batch=micro)
    sums, tokens, _ = training._gradients(model, batches(0), loss_sum, 0, plan)
    assert tokens == count
    assert sums["loss"] == pytest.approx(float(total.detach()), rel=1e-13)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-15)


def test_halvings_train_the_same_model(tmp_path):
    whole, _ = run(tmp_path / "a", build(), micro_batch=8)
    halved, _ = run(tmp_path / "b", build(), micro_batch=8, halvings=2)
    for a, b in zip(whole.parameters(), halved.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def fits(most):
    """A loss for which more than so many samples are too many, as late as it can be."""
    calls = []

    def loss(model, tokens):
        calls.append(1)
        torch.rand(1)  # what a failed attempt drew must not count
        if len(tokens) > most and (len(tokens) == 8 or len(calls) % 2):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss_sum(model, tokens)

    return loss


def test_out_of_memory_halves_inside_the_job(tmp_path, capsys):
    expected, log = run(tmp_path / "a", loss=fits(8), micro_batch=2)
    model, found = run(tmp_path / "b", loss=fits(2), micro_batch=8)
    assert equal(model, expected) and found == log
    err = capsys.readouterr().err
    assert err.count("halved") == 2


def test_out_of_memory_ends_after_three_halvings(tmp_path):
    sizes = []

    def never(model, tokens):
        sizes.append(len(tokens))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(InputError, match="too little memory"):
        run(tmp_path / "a", loss=never, micro_batch=8)
    assert sizes == [8, 4, 2, 1]
    sizes.clear()
    with pytest.raises(InputError):  # two of the three were used by earlier attempts
        run(tmp_path / "b", loss=never, micro_batch=8, halvings=2)
    assert sizes == [2, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_divergence_raises_at_once_and_spoils_no_weight(tmp_path, bad):
    model, calls = build(), []

    def loss(model, tokens):
        calls.append(1)
        total, count = loss_sum(model, tokens)
        return total * (bad if len(calls) == 5 else 1.0), count

    with pytest.raises(DivergedError, match="step 3"):
        run(tmp_path, model, loss)
    assert len(calls) == 6
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_infinite_gradient_of_a_finite_loss_raises(tmp_path):
    def loss(model, tokens):
        total, count = loss_sum(model, tokens)
        return total + (model[1].weight * 0).pow(0.5).sum(), count  # d√0 is infinite, times 0 NaN

    model = build()
    with pytest.raises(DivergedError, match="step 1 "):
        run(tmp_path, model, loss)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_clip_bounds_the_step(tmp_path):
    model = build()
    before = copy.deepcopy(model)
    plain = torch.optim.SGD(model.parameters(), lr=1.0)
    run(tmp_path, model, steps=1, optimizer=plain, clip=1e-3)
    moved = [
        (a - b).pow(2).sum() for a, b in zip(model.parameters(), before.parameters(), strict=True)
    ]
    rate = warmup_cosine(1, 3)(0)
    assert float(sum(moved).detach()) ** 0.5 == pytest.approx(1e-3 * rate, rel=1e-3)


def test_log_is_the_token_weighted_mean_since_the_line_before(tmp_path):
    model = build()
    reference, losses = copy.deepcopy(model), []
    _, log = run(tmp_path, model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), steps=7)
    for step in range(7):
        total, count = loss_sum(reference, batches(step))
        losses.append((float(total.detach()), count))
    assert [line["step"] for line in log] == [5, 7]
    for line, part in zip(log, (losses[:5], losses[5:]), strict=True):
        assert line["loss"] == pytest.approx(sum(a for a, _ in part) / sum(b for _, b in part))
    assert log[-1]["tokens"] == sum(count for _, count in losses)
    assert set(log[0]) == {"step", "loss", "learning_rate", "learning_rates", "tokens"}


def test_schedules():
    cosine = [warmup_cosine(100, 10)(step) for step in range(100)]
    assert cosine[0] == pytest.approx(0.1) and cosine[9] == cosine[10] == 1.0
    assert cosine[-1] == pytest.approx(0.1) and cosine[10:] == sorted(cosine[10:], reverse=True)
    assert warmup_cosine(111, 10)(60) == pytest.approx(0.55)  # half-way: the mean of 1 and 0.1
    assert max(inverse_sqrt(100)(step) for step in range(1000)) == inverse_sqrt(100)(99) == 1.0
    assert inverse_sqrt(100)(399) == pytest.approx(0.5)
    assert constant(0) == constant(10**6) == 1.0


def test_noam_is_the_published_schedule():
    rates = noam(512, 4000)
    expected = {1: 1.7469e-7, 4000: 6.98771e-4, 16000: 3.49386e-4}
    for step, rate in expected.items():
        assert rates(step - 1) == pytest.approx(rate, rel=1e-4)
    faster = noam(512, 4000, 4.0)
    assert max(range(3000), key=faster) + 1 == 1000


def test_groups_follow_their_own_schedules(tmp_path):
    model = build()
    first, *others = model.parameters()
    groups = [{"params": [first], "lr": 0.5}, {"params": others, "lr": 0.25}]
    schedules = [constant, lambda step: 1 / (step + 1)]
    plan = Plan(steps=4, log_every=1)
    optimizer = torch.optim.SGD(groups)
    log = train(model, optimizer, schedules, batches, loss_sum, plan, tmp_path).log
    assert [line["learning_rates"] for line in log] == [[0.5, 0.25 / n] for n in (1, 2, 3, 4)]
    assert [line["learning_rate"] for line in log] == [0.5] * 4


def test_a_group_may_stay_out_of_clipping_but_must_be_finite(tmp_path):
    def moved(scale):
        model = build()
        first, *others = model.parameters()
        before = [p.detach().clone() for p in others]
        groups = [{"params": others}, {"params": [first], "clip": False}]

        def loss(model, tokens):
            total, count = loss_sum(model, tokens)
            return total + scale * first.sum() * count, count

        train(
            model,
            torch.optim.SGD(groups, lr=0.1),
            constant,
            batches,
            loss,
            Plan(steps=1, clip=1e-3),
            tmp_path / f"{scale}",
        )
        return [a.detach() - b for a, b in zip(others, before, strict=True)]

    for small, large in zip(moved(0.0), moved(1e6), strict=True):
        torch.testing.assert_close(small, large)
    with pytest.raises(DivergedError):
        moved(math.inf)


def test_what_a_watch_notes_survives_a_resume_and_what_it_draws_changes_nothing(tmp_path):
    def noisy(step):
        torch.rand(step + 1)
        return {"square": step * step} if step % 2 == 0 else None

    plain, _ = run(tmp_path / "plain")
    model, progress = run(tmp_path / "a", watch=noisy)
    assert equal(model, plain)
    expected = [{"step": n, "square": n * n} for n in range(0, 13, 2)]
    assert progress.notes == expected
    with pytest.raises(Killed):
        run(tmp_path / "b", loss=killed_at(9), watch=noisy)
    again, resumed = run(tmp_path / "b", watch=noisy)
    assert resumed.notes == expected and equal(again, plain)


def test_other_sums_are_logged_as_means_over_tokens(tmp_path):
    def loss(model, tokens):
        total, count = loss_sum(model, tokens)
        return total, count, {"twice": 2 * float(total.detach())}

    _, log = run(tmp_path, loss=loss, micro_batch=3)
    assert all(line["twice"] == pytest.approx(2 * line["loss"]) for line in log)
