"""Train a stack: runs that read the same batches, each with weights and rotary turns of its own.

What a member learns is what it would learn alone: products of matrices, norms and clipping never
mix members, and one that diverges takes no sibling with it. K members, P labelled positions.
"""

import contextlib
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from headroom.branches.layout import columns
from headroom.branches.model import Stack, inputs
from headroom.training import LossSum

if TYPE_CHECKING:
    from headroom.branches.texts import Texts

EPSILON = 1e-6  # of the norm that gradients are clipped by, as torch's


class Members(nn.Module):
    """A stack in training, and at which step each member diverged (0: it has not).

    Both are part of the training state, so that a resumed run leaves the same members out.
    """

    def __init__(self, stack: Stack):
        """Begin with every member at work."""
        super().__init__()
        self.stack = stack
        members = len(stack.rotations)
        self.register_buffer("failed", torch.zeros(members, dtype=torch.bool))
        self.register_buffer("diverged", torch.zeros(members, dtype=torch.long))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def sum_losses(self, nll_KP: Tensor) -> tuple[Tensor, int, dict[str, float]]:
        """Return the loss of a micro-batch, its predicted tokens and each member's sum.

        The loss is Σ_k Σ_p nll_kp over the members that are at work: each gets the gradient of its
        own sum. What the progress bar shows is their mean.
        """
        loss_K = nll_KP.sum(1)
        self.failed |= ~loss_K.detach().isfinite()
        loss = loss_K.masked_fill(self.failed, 0.0).sum()
        sums = loss_K.tolist()
        at_work = [value for value, out in zip(sums, self.failed.tolist(), strict=True) if not out]
        shown = sum(at_work) / len(at_work) if at_work else math.inf
        named = {f"member{k}": value for k, value in enumerate(sums)}
        return loss, nll_KP.shape[1], {"loss": shown, **named}

    @torch.no_grad()
    def clip(self, optimizer: torch.optim.Optimizer, most: float) -> float:
        """Clip each member's gradients to a norm of its own, silence those that are not finite.

        g_k ← g_k · min(1, most / (‖g_k‖ + ε)): a norm over all members together would let each
        one's gradient shorten the others'.

        Returns:
            The largest norm of those at work; infinite if none is left.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norm_K = member_norms(gradients)
        self.step += 1
        self.failed |= ~norm_K.isfinite()
        fresh = self.failed & (self.diverged == 0)
        if fresh.any():
            self.diverged[fresh] = self.step
            names = [self.stack.rotations[k].name for k in fresh.nonzero().flatten().tolist()]
            print(f"diverged at step {int(self.step)}: {', '.join(names)}", file=sys.stderr)
        lost = bool(self.failed.any())
        factor_K = (most / (norm_K + EPSILON)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor_K.view(-1, *[1] * (gradient.ndim - 1)))
            if lost:
                gradient[self.failed] = 0.0  # NaN times zero is NaN
        return math.inf if self.failed.all() else float(norm_K[~self.failed].max())


def member_norms(gradients: Sequence[Tensor]) -> Tensor:
    """Return ‖g_k‖ over all parameters of each member, (K,) float32.

    Each row is reduced by itself, so that a member's bits don't depend on its siblings.

    Args:
        gradients: (K, …) each.
    """
    members, tensors = len(gradients[0]), len(gradients)
    rows = [gradient[k] for k in range(members) for gradient in gradients]
    norms = torch._foreach_norm(rows)
    return torch.stack(
        [
            torch.linalg.vector_norm(torch.stack(norms[k * tensors : (k + 1) * tensors]))
            for k in range(members)
        ]
    )


def sum_of_losses(texts: "Texts", device: str, precision: torch.dtype) -> LossSum:
    """Return the function by which a micro-batch of (texts, offsets) samples is judged.

    Args:
        precision: float32, or bfloat16 by autocast, where weights and losses stay in float32.
    """

    def loss_sum(members: Members, samples: Sequence) -> tuple[Tensor, int, dict[str, float]]:
        chosen, offsets = zip(*samples, strict=True)
        batch = inputs(columns(texts, chosen, offsets), device)
        with autocast(device, precision):
            nll_KP = members.stack.losses(batch)
        return members.sum_losses(nll_KP)

    return loss_sum


def autocast(device: str, precision: torch.dtype) -> contextlib.AbstractContextManager:
    """Return the context of mixed precision; float32 needs none."""
    if precision == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, precision)


def adamw(stack: nn.Module, weight_decay: float, learning_rate: float) -> torch.optim.AdamW:
    """Return AdamW (.9, .999) that decays every weight (Loshchilov and Hutter 2019)."""
    return torch.optim.AdamW(
        stack.parameters(),
        lr=learning_rate,
        betas=(0.9, 0.999),
        weight_decay=weight_decay,
        fused=True,
    )
