"""Gated runs: training with a price on open heads, towards a number of heads, or with fixed ones.

What a run does at a step depends on the step's number and its weights alone, so a resumed run ends
with the same bits.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from headroom.corpora.pair_tokens import Batches, PairTokens
from headroom.errors import InputError
from headroom.gates import hard_concrete
from headroom.gates.gated import Gated
from headroom.gates.importance import CHOICES
from headroom.gates.reports import Reporter
from headroom.gates.translator import ADAM, build, fit, pair_loss, schedule_of
from headroom.recipes import Gate, Mask
from headroom.training import Plan, Progress, constant, train

DECIDED = 0.6  # share of a constrained run's steps after which the heads are chosen
RAMP = 0.5  # share of those over which the target falls


class Charge:
    """λ · penalty for every open head, gates drawn anew at each step."""

    def __init__(self, gated: Gated, weight: float, penalty: str, seed: int):
        """Price the gates of a model."""
        self.gated, self.weight, self.seed = gated, weight, seed
        self.penalty = hard_concrete.PENALTIES[penalty]

    def begin(self, step: int) -> None:
        """Draw what the gates of this step are made of."""
        self.uniform = uniform(self.gated, self.seed, step)

    def cost(self) -> Tensor:
        """Set the gates and return what they cost, nats a token."""
        self.gated.draw(self.uniform)
        return self.weight * self.penalty(self.gated.p_open())


class Constraint:
    """A Lagrangian towards ``count`` open heads, then exactly those that are most open.

    λ₁ (s − t) + λ₂ (s − t)² with s the expected share of open heads and t the wanted one, which
    falls linearly from 1; λ ascends (Xia et al. 2022). As a probability of .23 already means a
    closed gate, s alone meets no count: after ``DECIDED`` of the steps the ``count`` heads with the
    highest log_a are opened wholly, the others closed, and the steps that are left train the
    weights. The multipliers must stay so small that the loss can tell heads apart on the way.
    """

    def __init__(self, gated: Gated, count: int, steps: int, seed: int):
        """Bind the number of open heads of a model.

        Raises:
            InputError: for more heads than there are.
        """
        if count > gated.heads:
            raise InputError(
                f"config key gates.target_heads: {count} heads, but {gated.heads} are gated "
                f"(allowed: at most {gated.heads})"
            )
        self.gated, self.count, self.seed = gated, count, seed
        self.decided = min(round(DECIDED * steps), steps - 1)

    def begin(self, step: int) -> None:
        """Move the target; choose the heads when it is time."""
        if step == self.decided:
            self.gated.fix(hard_concrete.strongest(self.gated.log_a, self.count))
        self.settled = step >= self.decided
        self.uniform = uniform(self.gated, self.seed, step)
        done = min(1.0, step / max(1, RAMP * self.decided))
        self.target = 1 - done * (1 - self.count / self.gated.heads)

    def cost(self) -> Tensor:
        """Set the gates and return the Lagrangian, nats a token; 0 once the heads are chosen."""
        if self.settled:
            self.gated.settle()
            return torch.zeros((), device=self.gated.multipliers.device)
        self.gated.draw(self.uniform)
        excess = torch.cat(self.gated.p_open()).mean() - self.target
        first, second = self.gated.multipliers
        return first * excess + second * excess**2


class Fixed:
    """Heads chosen beforehand."""

    def __init__(self, gated: Gated, kept: Sequence[Tensor]):
        """Close all but the kept heads of a model."""
        self.gated = gated
        gated.fix(kept)

    def begin(self, step: int) -> None:
        """Every step is alike."""

    def cost(self) -> Tensor:
        """Set the gates; they cost nothing."""
        self.gated.settle()
        return torch.zeros((), device=self.gated.multipliers.device)


Pressure = Charge | Constraint | Fixed


def uniform(gated: Gated, seed: int, step: int) -> list[Tensor]:
    """Draw one number in [0, 1) a gate, a function of the seed and the step alone."""
    generator = np.random.default_rng([seed, step])
    return [
        torch.from_numpy(generator.random(len(values), dtype=np.float32)).to(values.device)
        for values in gated.log_a
    ]


def gate_run(
    model: nn.Module,
    step: Gate | Mask,
    settings: Mapping,
    pairs: PairTokens,
    reporter: Reporter,
    state: Path,
    kept: Mapping[str, Sequence[int]] | None = None,
    halvings: int = 0,
) -> tuple[Gated, Progress]:
    """Train a translator with gates as a recipe step says.

    Args:
        model: the translator; changed in place. For ``mask-scratch`` only its sizes count.
        step: the recipe step.
        settings: ``gates`` of the configuration; for ``mask-scratch`` with ``base``, the
            translator's ``train``, and its ``longest``.
        pairs: the training pairs' tokens.
        reporter: translates held-out sentences on the way.
        state: folder of the training states.
        kept: for ``mask-scratch`` the heads that stay, from 0, by gated attention.
        halvings: how often micro-batches are halved from the start.

    Returns:
        the gated model, its gates as they are judged set, and what was noted on the way.

    Raises:
        InputError: for a target of more heads than there are, or nothing to train.
    """
    torch.set_num_threads(settings["threads"])
    seed = int(step.resolved("seed")[1:])
    scratch = isinstance(step, Mask) and step.choice == "scratch"
    if scratch:
        base = {**settings["base"], "seed": settings["base"]["seed"] + 1 + seed}
        model = build(base, settings["longest"], base["seed"]).to(model.device)
    gated = Gated(model, settings["attentions"], settings["beta"], settings["log_a"])
    pressure = pressure_of(step, gated, settings, pairs, kept, seed)
    with gated.hooked():
        if scratch:
            gated.settle()
            fit(model, base, pairs, state / "base", halvings=halvings)
        progress = _train(gated, pressure, settings, pairs, reporter, state, halvings, seed)
        gated.settle()
    gated.eval()
    return gated, progress


def pressure_of(
    step: Gate | Mask,
    gated: Gated,
    settings: Mapping,
    pairs: PairTokens,
    kept: Mapping[str, Sequence[int]] | None,
    seed: int,
) -> Pressure:
    """Return what acts on the gates in a run; arguments as in :func:`gate_run`."""
    if isinstance(step, Gate):
        number = step.strength[1:]
        if step.strength.startswith("l"):
            return Charge(gated, float(number), settings["penalty"], seed)
        return Constraint(gated, int(number), settings["steps"], seed)
    if step.choice == "scratch":
        return Fixed(gated, _chosen(gated, kept))
    scores = CHOICES[step.choice](gated, settings, pairs, seed)
    return Fixed(gated, hard_concrete.strongest(scores, int(step.count[1:])))


def _chosen(gated: Gated, kept: Mapping[str, Sequence[int]]) -> list[Tensor]:
    chosen = []
    for name, values in zip(gated.names, gated.log_a, strict=True):
        mask = torch.zeros(len(values), dtype=torch.bool)
        mask[list(kept[name])] = True
        chosen.append(mask)
    return chosen


def trainable(model: nn.Module, what: str) -> list[nn.Parameter]:
    """Return the weights that train beside the gates and freeze the rest.

    ``all``; ``encoder``: its layers, not the embeddings, which the decoder shares; ``none``.
    """
    parts = {"all": model, "encoder": model.get_encoder().layers, "none": nn.ModuleList()}
    chosen = [p for p in parts[what].parameters() if p.requires_grad]  # sinusoids never train
    wanted = set(map(id, chosen))
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    return chosen


def _groups(gated: Gated, pressure: Pressure, settings: Mapping) -> list[dict]:
    """Parameter groups: weights; gates at their own rate; multipliers, which ascend.

    Raises:
        InputError: if nothing would train once the heads are chosen.
    """
    weights = trainable(gated.model, settings["trains"])
    if not weights and not isinstance(pressure, Charge):
        raise InputError(
            "config key gates.trains: none leaves nothing to train once heads are chosen, by "
            "gates.target_heads or a control (allowed: all, encoder)"
        )
    groups = [{"params": weights, "lr": settings["learning_rate"]}] if weights else []
    learned = isinstance(pressure, Charge | Constraint)
    rate = settings["gate_learning_rate"]
    gated.log_a.requires_grad_(learned)
    if learned:
        groups.append({"params": list(gated.log_a), "lr": rate, "clip": False})
    if isinstance(pressure, Constraint):
        rates = {"lr": settings["multiplier_learning_rate"], "clip": False, "maximize": True}
        groups.append({"params": [gated.multipliers], **rates})
    return groups


def _train(
    gated: Gated,
    pressure: Pressure,
    settings: Mapping,
    pairs: PairTokens,
    reporter: Reporter,
    state: Path,
    halvings: int,
    seed: int,
) -> Progress:
    model, steps = gated.model, settings["steps"]
    torch.set_num_threads(settings["threads"])  # a start from scratch has set its own
    batches = Batches(pairs, settings["batch_tokens"], seed)
    plain = pair_loss(pairs, model.config.pad_token_id, settings["smoothing"])

    def begun(step: int) -> Sequence[int]:
        pressure.begin(step)
        return batches(step)

    def loss_sum(gated: Gated, samples: Sequence[int]) -> tuple[Tensor, int, dict]:
        extra = pressure.cost()
        loss, count, sums = plain(gated.model, samples)
        sums |= {
            "cross_entropy": float(loss.detach()),
            "penalty": float(extra.detach()) * count,
        }
        return loss + extra * count, count, sums

    groups = _groups(gated, pressure, settings)
    schedules: list[Callable[[int], float]] = [constant] * len(groups)
    if settings["trains"] != "none":
        schedules[0] = schedule_of(settings, model.config.d_model)
    return train(
        gated.train(),
        torch.optim.Adam(groups, **ADAM),
        schedules,
        begun,
        loss_sum,
        Plan(steps=steps, halvings=halvings, seed=seed),
        state / "gates",
        reporter.watch(gated, batches, settings["report"] or batches.steps_per_epoch, steps),
    )
