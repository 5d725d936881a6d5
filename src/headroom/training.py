"""The one training loop: accumulation, schedule, exact resume, out-of-memory and NaN behaviour."""

import hashlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from headroom.errors import InputError
from headroom.progress import Bar
from headroom.progress import progress as shown

STATE_FILE = "state.pt"
DIGEST_BYTES = hashlib.sha256().digest_size  # of the state, at the end of its file
MOST_HALVINGS = 3
SAVING_SHARE = 0.05  # of the time at most

Schedule = Callable[[int], float]  # step, from 0 -> factor of the peak learning rate
Batches = Callable[[int], Sequence]  # step -> the samples of its global batch
# -> Σ loss and valid tokens of a micro-batch, and maybe other sums by name for the log.
LossSum = Callable[[nn.Module, Sequence], tuple[Tensor, int] | tuple[Tensor, int, dict]]
Watch = Callable[[int], dict | None]  # steps done -> what to note of the run, if anything
# Clips gradients to a largest norm and returns one that is finite if the step may be taken.
Clip = Callable[[torch.optim.Optimizer, float], float]


class DivergedError(RuntimeError):
    """The loss is no number any more; the same settings would diverge again.

    ``progress`` is what the run had done before.
    """

    def __init__(self, message: str, progress: "Progress"):
        super().__init__(message)
        self.progress = progress


def warmup_cosine(steps: int, warmup: int, floor: float = 0.1) -> Schedule:
    """Return a linear warm-up to 1, then a cosine down to ``floor`` at the last step."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - 1 - warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return factor


def inverse_sqrt(warmup: int) -> Schedule:
    """Return a linear warm-up to 1 at step ``warmup``, then √(warmup / step)."""
    return lambda step: min((step + 1) / max(1, warmup), math.sqrt(max(1, warmup) / (step + 1)))


def noam(width: int, warmup: int, step_factor: float = 1.0) -> Schedule:
    """Return width^−½ · min(s^−½, s · warmup^−1.5), s = step_factor · steps begun.

    Vaswani et al. 2017, equation 3; the peak is at step warmup / step_factor.
    """

    def factor(step: int) -> float:
        s = step_factor * (step + 1)
        return width**-0.5 * min(s**-0.5, s * max(1, warmup) ** -1.5)

    return factor


def constant(step: int) -> float:
    """Return 1: the peak rate at every step."""
    return 1.0


@dataclass(frozen=True)
class Plan:
    """How long and in what portions to train.

    ``micro_batch`` samples go through the model at once (None: all of a step's); their gradients
    add up to those of the global batch, because sums are divided by that one's valid tokens.
    """

    steps: int
    micro_batch: int | None = None
    clip: float = 1.0  # largest norm of all gradients together
    save_seconds: float = 30.0
    log_every: int = 10  # steps
    halvings: int = 0  # of the micro-batch, from the start
    seed: int = 0  # of what the model draws while it trains, such as dropout


@dataclass
class Progress:
    """What a run has done so far, beside its model and optimizer."""

    step: int = 0  # the next one
    tokens: int = 0
    log: list[dict] = field(default_factory=list)
    notes: list[dict] = field(default_factory=list)  # what ``watch`` found
    pending: dict[str, float] = field(default_factory=dict)  # sums since the log's last line
    pending_tokens: int = 0


def clip_together(optimizer: torch.optim.Optimizer, most: float) -> float:
    """Clip the gradients of the groups without ``clip: False``; return a norm, finite if all are.

    A group of another kind (gates, multipliers) must not decide how far the weights go.
    """
    free = [p for g in optimizer.param_groups if not g.get("clip", True) for p in g["params"]]
    clipped = [p for g in optimizer.param_groups if g.get("clip", True) for p in g["params"]]
    norm = float(nn.utils.clip_grad_norm_(clipped, most))
    others = float(nn.utils.get_total_norm([p.grad for p in free if p.grad is not None]))
    return norm if math.isfinite(others) else others


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule | Sequence[Schedule],
    batches: Batches,
    loss_sum: LossSum,
    plan: Plan,
    state: Path,
    watch: Watch | None = None,
    clip: Clip = clip_together,
) -> Progress:
    """Train in place and return what was noted on the way.

    A run that goes on from ``state`` ends with the same bits; the caller's random state stays.

    Args:
        model: in training mode, on its device.
        optimizer: peak learning rates in its groups; one with ``clip: False`` isn't clipped.
        schedule: factor of the peak by step, one for all groups or one a group.
        batches: samples of a step; a slice of them is a micro-batch.
        loss_sum: sum of the loss over a micro-batch, its number of valid tokens, and other sums.
        plan: steps, portions, clipping.
        state: folder of the state; a damaged or foreign one is left aside.
        watch: called at the start and after each step; what it draws changes nothing.
        clip: how gradients are clipped to ``plan.clip``.

    Returns:
        ``log``: every ``log_every`` steps means a token, rates, tokens; ``notes``: watch's rows.

    Raises:
        DivergedError: if a loss or a gradient is not finite; the weights are still those before.
        InputError: if a micro-batch of the smallest size does not fit the GPU.
    """
    rates = _rates(optimizer, schedule)
    signature = _signature(model, optimizer, plan)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(plan.seed)
        progress = _load(state, model, optimizer, signature)
        first, due = progress.tokens, time.monotonic() + plan.save_seconds
        _note(watch if not progress.step else None, progress)
        with shown(desc="training", total=plan.steps, unit="step", initial=progress.step) as bar:
            for loss in _steps(model, optimizer, rates, batches, loss_sum, plan, progress, clip):
                _show(bar, loss, progress.tokens - first)
                _note(watch, progress)
                if time.monotonic() >= due and progress.step < plan.steps:
                    due = _save(state, model, optimizer, signature, progress, plan)
    return progress


def _rates(
    optimizer: torch.optim.Optimizer, schedule: Schedule | Sequence[Schedule]
) -> list[tuple[float, Schedule]]:
    """Pair the peak of each group with its schedule, before a state or a step changes it."""
    groups = optimizer.param_groups
    schedules = [schedule] * len(groups) if callable(schedule) else schedule
    return [(group["lr"], factor) for group, factor in zip(groups, schedules, strict=True)]


def _steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rates: Sequence[tuple[float, Schedule]],
    batches: Batches,
    loss_sum: LossSum,
    plan: Plan,
    progress: Progress,
    clip: Clip,
) -> Iterator[float]:
    """Do the steps that are left and yield the mean loss of each."""
    halvings = plan.halvings
    while progress.step < plan.steps:
        for group, (peak, factor) in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * factor(progress.step)
        samples = batches(progress.step)
        sums, tokens, halvings = _gradients(model, samples, loss_sum, halvings, plan)
        _update(optimizer, clip(optimizer, plan.clip), progress, sums, tokens, plan)
        yield sums["loss"] / tokens


def _note(watch: Watch | None, progress: Progress) -> None:
    if watch is None:
        return
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        row = watch(progress.step)
    if row is not None:
        progress.notes.append({"step": progress.step, **row})


def _show(bar: Bar, loss: float, tokens: int) -> None:
    speed = tokens / max(1e-9, bar.format_dict["elapsed"])
    bar.set_postfix_str(f"loss {loss:.3f}, {speed:.0f} tokens/s", refresh=False)
    bar.update()


def _gradients(
    model: nn.Module, samples: Sequence, loss_sum: LossSum, halvings: int, plan: Plan
) -> tuple[dict[str, float], int, int]:
    """Leave the gradients of the mean loss of a global batch; halve micro-batches that don't fit.

    Returns the sums (that of the loss under ``loss``), the valid tokens and how often was halved.
    """
    whole = min(plan.micro_batch or len(samples), len(samples))
    while True:
        before = _random_state()
        size = max(1, whole >> halvings)
        sums, count, fits = {"loss": 0.0}, 0, True
        try:
            for start in range(0, len(samples), size):
                loss, valid, *others = loss_sum(model, samples[start : start + size])
                loss.backward()
                for name, value in ({"loss": float(loss.detach())} | dict(*others)).items():
                    sums[name] = sums.get(name, 0.0) + value
                count += valid
        except torch.OutOfMemoryError:
            fits = False  # what follows waits until the error has let go of the tensors it holds
        if fits:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            torch._foreach_div_(gradients, float(count))
            return sums, count, halvings
        loss = None
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if size == 1 or halvings >= MOST_HALVINGS:
            raise InputError(
                f"the GPU has too little memory for a micro-batch of {size} of {whole} "
                f"samples (allowed: a smaller batch or window, or a larger GPU)"
            )
        halvings += 1
        _set_random_state(before)
        print(f"out of GPU memory: micro-batch halved to {max(1, size // 2)}", file=sys.stderr)


def _update(
    optimizer: torch.optim.Optimizer,
    norm: float,
    progress: Progress,
    sums: dict[str, float],
    count: int,
    plan: Plan,
) -> None:
    """Refuse what is not finite, step, and note it in the log."""
    if not math.isfinite(sums["loss"]) or not math.isfinite(norm):
        raise DivergedError(
            f"at step {progress.step + 1} the loss is {sums['loss'] / count:.4g} and the norm of "
            f"its gradient {norm:.4g} (lower the learning rate)",
            progress,
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    progress.step += 1
    progress.tokens += count
    progress.pending_tokens += count
    for name, value in sums.items():
        progress.pending[name] = progress.pending.get(name, 0.0) + value
    if progress.step % plan.log_every == 0 or progress.step == plan.steps:
        means = {name: value / progress.pending_tokens for name, value in progress.pending.items()}
        rates = [group["lr"] for group in optimizer.param_groups]
        progress.log.append(
            {
                "step": progress.step,
                **means,
                "learning_rate": rates[0],
                "learning_rates": rates,
                "tokens": progress.tokens,
            }
        )
        progress.pending, progress.pending_tokens = {}, 0


def _signature(model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan) -> str:
    """Digest of what a state must agree with: shapes, optimizer settings and plan.

    The micro-batch may differ: it changes no gradient beyond rounding, and a retry halves it.
    """
    portions = ("micro_batch", "halvings", "save_seconds")
    parts = {
        "plan": {name: value for name, value in asdict(plan).items() if name not in portions},
        "optimizer": type(optimizer).__name__,
        "groups": [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ],
        "model": {name: [list(t.shape), str(t.dtype)] for name, t in model.state_dict().items()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _random_state() -> dict:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


class _Digested:
    """A file that digests what is written to it, so that a large state is never held twice."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _save(
    folder: Path, model: nn.Module, optimizer, signature: str, progress: Progress, plan: Plan
) -> float:
    """Write the state and its digest beside, force them to disk, then give them their name.

    Returns when the next one is due: saving must not take more than a small share of the time.
    """
    started = time.monotonic()
    content = {
        "signature": signature,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
        "random": _random_state(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{STATE_FILE}.partial"
    with partial.open("wb") as file:
        digested = _Digested(file)
        torch.save(content, digested)
        file.write(digested.digest.digest())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / STATE_FILE)
    ended = time.monotonic()
    if plan.save_seconds <= 0:  # asked for after every step
        return ended
    return ended + max(plan.save_seconds, (ended - started) / SAVING_SHARE)


def _load(folder: Path, model: nn.Module, optimizer, signature: str) -> Progress:
    """Put a saved state in place; one that is damaged or of another run is left aside."""
    path = folder / STATE_FILE
    if not path.is_file():
        return Progress()
    content = memoryview(path.read_bytes())
    payload, digest = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(payload).digest() != digest:
        print(f"{path} is damaged: training starts anew", file=sys.stderr)
        return Progress()
    state = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    if state["signature"] != signature:
        print(f"{path} belongs to another training: this one starts anew", file=sys.stderr)
        return Progress()
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    _set_random_state(state["random"])
    progress = Progress(**state["progress"])
    print(f"resuming after step {progress.step}", file=sys.stderr)
    return progress
