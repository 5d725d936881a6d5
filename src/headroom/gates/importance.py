"""Other ways to choose heads than gates: what the gates' choice is held against."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from headroom.attention import head_count, tapped
from headroom.corpora.pair_tokens import Batches, PairTokens
from headroom.gates.gated import Gated, gated_modules
from headroom.gates.translator import pair_loss
from headroom.progress import progress
from headroom.training import LossSum

MICHEL_BATCHES = 32  # of training pairs
MICHEL_PAIRS = 32  # that go through the model at once; sums over pairs are the same


def michel(
    model: nn.Module, attentions: Sequence[str], batches: Sequence[Sequence], loss_sum: LossSum
) -> list[Tensor]:
    """Return the importance of each gated head (Michel et al. 2019, equation 2).

    I_h = E_x |Att_h(x)ᵀ ∂L(x)/∂Att_h(x)| = E_x |∂L(x)/∂ξ_h| at ξ = 1, ξ_h multiplying the output
    of head h; L(x) is the loss of one sentence pair, summed over its tokens. Divided by the layer's
    ℓ2 norm over heads.

    Args:
        model: in evaluation mode.
        attentions: the kinds of attention that are gated.
        batches: samples of ``loss_sum``, several batches.
        loss_sum: sums the loss of a batch.

    Returns:
        one tensor (H,) a gated attention module.
    """
    modules = gated_modules(model, attentions)
    places = {id(module): place for place, module in enumerate(modules.values())}
    totals = [torch.zeros(head_count(module), dtype=torch.float64) for module in modules.values()]
    ones: list[Tensor] = []

    def scale(module: nn.Module, q, k, v, z_BTHd: Tensor) -> Tensor | None:
        if id(module) not in places:
            return None
        ones[places[id(module)]] = xi_BH = torch.ones(
            z_BTHd.shape[0], z_BTHd.shape[2], device=z_BTHd.device, requires_grad=True
        )
        return z_BTHd * xi_BH[:, None, :, None]

    with tapped(model, scale):
        for samples in progress(batches, "importance of heads", unit="batch"):
            ones[:] = [torch.empty(0)] * len(places)
            loss, *_ = loss_sum(model, samples)
            for total_H, gradient_BH in zip(totals, torch.autograd.grad(loss, ones), strict=True):
                total_H += gradient_BH.double().abs().sum(0).cpu()
    return [total_H / total_H.norm().clamp(min=1e-30) for total_H in totals]


def gradient_importance(
    gated: Gated, settings: Mapping, pairs: PairTokens, seed: int
) -> list[Tensor]:
    """Return Michel's importance on the first batches that a run with this seed reads."""
    batches = Batches(pairs, settings["batch_tokens"], seed)
    loss = pair_loss(pairs, gated.model.config.pad_token_id, 0.0)
    read = [
        samples[start : start + MICHEL_PAIRS]
        for samples in map(batches, range(MICHEL_BATCHES))
        for start in range(0, len(samples), MICHEL_PAIRS)
    ]
    return michel(gated.model.eval(), settings["attentions"], read, loss)


def by_chance(gated: Gated, settings: Mapping, pairs: PairTokens, seed: int) -> list[Tensor]:
    """Return a random number a head."""
    drawn = np.random.default_rng(seed).random(gated.heads)
    return list(torch.from_numpy(drawn).split([len(values) for values in gated.log_a]))


# Gated model, gates' settings, training pairs, seed -> a score a head (H,) by gated attention; the
# highest stay.
Choice = Callable[[Gated, Mapping, PairTokens, int], list[Tensor]]

CHOICES: dict[str, Choice] = {
    "michel": gradient_importance,
    "random": by_chance,
}
