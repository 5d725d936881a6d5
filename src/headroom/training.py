"""The one training loop: accumulation, schedule, exact resume, out-of-memory and NaN behaviour."""

import hashlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from headroom.errors import InputError

STATE_FILE = "state.pt"
DIGEST_BYTES = hashlib.sha256().digest_size  # of the state, at the end of its file
MOST_HALVINGS = 3

Schedule = Callable[[int], float]  # step, from 0 -> factor of the peak learning rate
Batches = Callable[[int], Sequence]  # step -> the samples of its global batch
LossSum = Callable[[nn.Module, Sequence], tuple[Tensor, int]]  # -> Σ nll, valid tokens


class DivergedError(RuntimeError):
    """The loss is no number any more; the same settings would diverge again."""


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


def constant(step: int) -> float:
    """Return 1: the peak rate at every step."""
    return 1.0


@dataclass(frozen=True)
class Plan:
    """How long and in what portions to train.

    ``micro_batch`` samples go through the model at once; their gradients add up to those of the
    global batch whatever its size, because sums are divided by the global batch's valid tokens.
    """

    steps: int
    micro_batch: int
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
    pending_nll: float = 0.0  # since the last line of the log
    pending_tokens: int = 0


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    batches: Batches,
    loss_sum: LossSum,
    plan: Plan,
    state: Path,
) -> list[dict]:
    """Train in place and return the log.

    What a step reads is a function of its number, so a run that was stopped anywhere and goes on
    from ``state`` ends with the same bits. The caller's random state is left as it was.

    Args:
        model: in training mode, on its device.
        optimizer: its peak learning rate is set in each group.
        schedule: factor of the peak by step.
        batches: samples of a step; a slice of them is a micro-batch.
        loss_sum: sum of nll over a micro-batch and its number of valid tokens.
        plan: steps, portions, clipping.
        state: folder of the state; a damaged or foreign one is left aside and said so.

    Returns:
        Every ``log_every`` steps: step, mean nll since (nats a token), learning rate, tokens.

    Raises:
        DivergedError: if a loss or a gradient is not finite; the weights are still those before.
        InputError: if a micro-batch of the smallest size does not fit the GPU.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    signature = _signature(model, optimizer, plan)
    size = max(1, plan.micro_batch >> plan.halvings)
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(plan.seed)
        progress = _load(state, model, optimizer, signature)
        bar = tqdm(total=plan.steps, initial=progress.step, file=sys.stderr, mininterval=1.0)
        first, saved = progress.tokens, time.monotonic()
        while progress.step < plan.steps:
            _set_rates(optimizer, peaks, schedule(progress.step))
            nll, count, size = _gradients(model, batches(progress.step), loss_sum, size, plan)
            _update(model, optimizer, plan, progress, nll, count)
            _show(bar, nll / count, progress.tokens - first)
            if time.monotonic() - saved > plan.save_seconds and progress.step < plan.steps:
                _save(state, model, optimizer, signature, progress)
                saved = time.monotonic()
        bar.close()
    return progress.log


def _show(bar: tqdm, nll: float, tokens: int) -> None:
    speed = tokens / max(1e-9, bar.format_dict["elapsed"])
    bar.set_postfix_str(f"nll {nll:.3f}, {speed:.0f} tokens/s", refresh=False)
    bar.update()


def _set_rates(optimizer: torch.optim.Optimizer, peaks: Sequence[float], factor: float) -> None:
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * factor


def _gradients(
    model: nn.Module, samples: Sequence, loss_sum: LossSum, size: int, plan: Plan
) -> tuple[float, int, int]:
    """Leave the gradients of the mean nll of a global batch; halve micro-batches that don't fit.

    Returns the sum of nll, the valid tokens and the size of the micro-batches.
    """
    while True:
        before = _random_state()
        total, count, fits = 0.0, 0, True
        try:
            for start in range(0, len(samples), size):
                loss, valid = loss_sum(model, samples[start : start + size])
                loss.backward()
                total, count = total + float(loss.detach()), count + valid
        except torch.OutOfMemoryError:
            fits = False  # what follows waits until the error has let go of the tensors it holds
        if fits:
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            torch._foreach_div_(gradients, float(count))
            return total, count, size
        loss = None
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        if size == 1 or size <= plan.micro_batch >> MOST_HALVINGS:
            raise InputError(
                f"the GPU has too little memory for a micro-batch of {size} of {plan.micro_batch} "
                f"samples (allowed: a smaller batch or window, or a larger GPU)"
            )
        size = max(1, size // 2)
        _set_random_state(before)
        print(f"out of GPU memory: micro-batch halved to {size}", file=sys.stderr)


def _update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    plan: Plan,
    progress: Progress,
    nll: float,
    count: int,
) -> None:
    """Clip, refuse what is not finite, step, and note it in the log."""
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), plan.clip))
    if not math.isfinite(nll) or not math.isfinite(norm):
        raise DivergedError(
            f"at step {progress.step + 1} the loss is {nll / count:.4g} and the norm of its "
            f"gradient {norm:.4g} (lower the learning rate)"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    progress.step += 1
    progress.tokens += count
    progress.pending_nll += nll
    progress.pending_tokens += count
    if progress.step % plan.log_every == 0 or progress.step == plan.steps:
        progress.log.append(
            {
                "step": progress.step,
                "nll": progress.pending_nll / progress.pending_tokens,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "tokens": progress.tokens,
            }
        )
        progress.pending_nll, progress.pending_tokens = 0.0, 0


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


def _save(folder: Path, model: nn.Module, optimizer, signature: str, progress: Progress) -> None:
    """Write the state and its digest beside, force them to disk, then give them their name."""
    buffer = io.BytesIO()
    content = {
        "signature": signature,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "progress": asdict(progress),
        "random": _random_state(),
    }
    torch.save(content, buffer)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{STATE_FILE}.partial"
    with partial.open("wb") as file:
        file.write(buffer.getbuffer())
        file.write(hashlib.sha256(buffer.getbuffer()).digest())
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, folder / STATE_FILE)


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
