"""Per-sample gradients of all parameters from one padded batched backward pass.

Weights are frozen and the gradient flows from the embeddings' outputs, so autograd builds no weight
gradient. Hooks keep what each layer read and what came back to it (uses); the loss summed over
samples gives every sample's own gradient, because samples of a batch never meet.

Samples are padded on the right and no attention mask is given: in a causal model no token sees what
follows, so pads change nothing and have gradient 0.

Shapes: n samples, T tokens.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from headroom.errors import InputError
from headroom.gradients.uses import Lookup, Outer, Use, Uses, Vector, materialise, wide

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # of the self-check
Take = Callable[[str, Uses], None]
ROUGH = 5e-2  # the same for narrower types
NOISE = 1e-3  # times the tolerance: the share of the full gradient that is rounding, not a gradient


class Batch(NamedTuple):
    """Samples padded on the right."""

    tokens_nT: Tensor
    answers_n: Tensor  # place of the first answer token
    lengths_n: Tensor


class Backward(NamedTuple):
    """What one pass over a batch leaves."""

    losses_n: Tensor
    states: tuple[Tensor, ...]  # (n, T, D): embeddings' and every layer's output


def pad(samples: Sequence[tuple[Sequence[int], int]], device: str) -> Batch:
    """Return a batch of (tokens, place of the first answer token); pads are token 0."""
    lengths = [len(tokens) for tokens, _ in samples]
    tokens_nT = torch.zeros(len(samples), max(lengths), dtype=torch.long)
    for row, (tokens, _) in zip(tokens_nT, samples, strict=True):
        row[: len(tokens)] = torch.as_tensor(tokens, dtype=torch.long)
    answers = [answer for _, answer in samples]
    return Batch(*(t.to(device) for t in (tokens_nT, torch.tensor(answers), torch.tensor(lengths))))


def answer_losses(logits_nTV: Tensor, batch: Batch) -> Tensor:
    """Return each sample's mean cross-entropy over its answer tokens: (n,), nats.

    loss = −1/|answer| Σ_{t in answer} log p(token_t | tokens before). Prompt tokens and pads take
    no part; the mean is the sample's own, so it doesn't hang on the batch.
    """
    place_T = torch.arange(batch.tokens_nT.shape[1], device=logits_nTV.device)
    # Token t is predicted at t − 1. No slice of the logits: its gradient would be written twice.
    inside_nT = (place_T >= batch.answers_n[:, None] - 1) & (place_T < batch.lengths_n[:, None] - 1)
    logits = logits_nTV[inside_nT]
    labels = batch.tokens_nT.roll(-1, dims=1)[inside_nT]
    each = F.cross_entropy(wide(logits), labels, reduction="none")
    sample = inside_nT.nonzero()[:, 0]
    sums_n = each.new_zeros(len(inside_nT)).index_add(0, sample, each)
    return sums_n / inside_nT.sum(1)


class Capture:
    """A model whose backward passes leave the uses of its parameters."""

    def __init__(self, model: "PreTrainedModel"):
        """Freeze the model and find what each module's parameters are used for."""
        self.model = model.requires_grad_(False).eval()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        modules = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
        self.owners = {id(m.weight): m for m in modules if isinstance(m, nn.Embedding)}
        others = [m for m in modules if not isinstance(m, nn.Embedding)]
        multiplied = {id(p) for m in others for p in m.parameters(recurse=False)}
        # Embeddings, and whether they are multiplied too (tied to the head).
        self.embeddings = {self.names[key]: key in multiplied for key in self.owners}
        self.readers = {m: reader for m in modules if (reader := _reader(m)) is not None}

    def __call__(self, batch: Batch, take: Take) -> Backward:
        """Run one forward and backward pass and hand over each parameter's uses.

        Args:
            batch: of samples.
            take: called with a parameter's name and its uses as soon as they are complete, from the
                last layer to the first, so that what it doesn't keep is freed on the way.

        Raises:
            InputError: for a loss that is not finite.
        """
        flow = _Flow(self, take, len(batch.tokens_nT))
        with ExitStack() as hooks, torch.enable_grad():
            for module in self.readers:
                hooks.callback(module.register_forward_hook(flow.called).remove)
            hooks.enter_context(mock.patch.object(F, "embedding", self._lookup(flow)))
            losses_n, states = self._losses(batch)
            total = losses_n.sum()
        if not losses_n.isfinite().all():
            raise InputError(
                "the loss of a sample is not finite (NaN weights, or a dtype that is too narrow; "
                "allowed: compute.dtype float32)"
            )
        torch.autograd.grad(total, flow.leaves, allow_unused=True)
        flow.finish()
        return Backward(losses_n.detach(), states)

    def uses(self, batch: Batch) -> dict[str, Uses]:
        """Return the uses of all parameters at once, in the model's order (small batches)."""
        found: dict[str, Uses] = {}
        self(batch, found.__setitem__)
        return {name: found[name] for name in self.shapes if name in found}

    def _lookup(self, flow: "_Flow") -> Callable:
        """PyTorch's embedding that keeps what is looked up.

        A module's hook would see its arguments alone, which need not be the rows that are read
        (OPT adds an offset), and its result, which need not be the rows (Gemma scales them).
        """
        embedding = F.embedding

        def lookup(
            index: Tensor, weight: Tensor, padding_idx: int | None = None, *others
        ) -> Tensor:
            output = embedding(index, weight, padding_idx, *others)
            if (module := self.owners.get(id(weight))) is not None:
                flow.called(module, (index,), output)
            return output

        return lookup

    def _losses(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
        options = {}
        if len(self.owners) > 1:  # learned positions, else looked up once for all samples
            T = batch.tokens_nT.shape[1]
            options["position_ids"] = torch.arange(T, device=batch.tokens_nT.device).expand(
                len(batch.tokens_nT), T
            )
        output = self.model(batch.tokens_nT, use_cache=False, output_hidden_states=True, **options)
        states = tuple(state.detach() for state in output.hidden_states)
        return answer_losses(output.logits, batch), states

    def check(self, batch: Batch) -> None:
        """Hold what was captured against autograd, for every parameter.

        Σ_i w_i g_i = ∇ Σ_i w_i loss_i with unequal w_i: what a hook can't see (fused experts,
        weights used outside of their module) shows here, and so does a gradient booked on another
        sample, on the model and samples at hand.

        Raises:
            InputError: naming the first parameter that differs.
        """
        weights_n = torch.linspace(1, 2, len(batch.tokens_nT), device=batch.tokens_nT.device)
        found: dict[str, Tensor] = {}

        def take(name: str, uses: Uses) -> None:
            each = materialise(uses, self.shapes[name])
            found[name] = (weights_n.to(each) @ each).view(self.shapes[name])

        self(batch, take)
        self.model.requires_grad_(True)
        try:
            parameters = dict(self.model.named_parameters())
            with torch.enable_grad():
                losses_n = self._losses(batch)[0]
                total = losses_n @ weights_n.to(losses_n)
                wanted = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        finally:
            self.model.requires_grad_(False)
        total = sum(g.double().square().sum() for g in wanted if g is not None).sqrt()
        for (name, parameter), gradient in zip(parameters.items(), wanted, strict=True):
            exact = torch.zeros_like(parameter) if gradient is None else gradient
            own = found.get(name, torch.zeros_like(exact))
            error, size = (own - exact).double().norm(), exact.double().norm()
            if not error <= TOLERANCE.get(parameter.dtype, ROUGH) * (size + NOISE * total):
                raise InputError(
                    f"the gradient of {name} can't be taken apart by sample (off by {error:.2g} of "
                    f"{size:.2g}; allowed: models whose parameters are those of linear layers, "
                    f"embeddings and norms)"
                )


class _Flow:
    """Calls of one forward pass, and what comes back to each parameter on the way back."""

    def __init__(self, capture: Capture, take: Take, n: int):
        self.capture, self.take, self.n = capture, take, n
        self.leaves: list[Tensor] = []
        self.pending: Counter[str] = Counter()  # uses of a parameter that have not arrived yet
        self.found: dict[str, list[Use]] = {}

    def called(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        """Keep what a module read and wait for the gradient of what it gave."""
        if not inputs or not isinstance(output, Tensor):
            return  # its parameters stay without a gradient, and the check names them
        own = [self._name(module, name) for name, _ in module.named_parameters(recurse=False)]
        self.pending.update(own)
        read = inputs[0].detach()
        if not output.requires_grad:
            output.requires_grad_(True)
            self.leaves.append(output)
        output.register_hook(lambda gradient: self._arrive(module, read, gradient))

    def _name(self, module: nn.Module, own: str) -> str:
        return self.capture.names[id(getattr(module, own))]

    @torch.no_grad()
    def _arrive(self, module: nn.Module, read: Tensor, gradient: Tensor) -> None:
        reader = self.capture.readers.get(module, _embedding)
        for own, use in reader(module, read, gradient, self.n):
            name = self._name(module, own)
            self.found.setdefault(name, []).append(use)
            self.pending[name] -= 1
            if not self.pending[name]:
                self.take(name, tuple(self.found.pop(name)))

    @torch.no_grad()
    def finish(self) -> None:
        """Hand over what has a use that the loss never came back to."""
        for name in list(self.found):
            self.take(name, tuple(self.found.pop(name)))


# A module's uses: (module, input, gradient of its output, n) -> (parameter's own name, use).
Reader = Callable[[nn.Module, Tensor, Tensor, int], "list[tuple[str, Use]]"]


def _reader(module: nn.Module) -> Reader | None:
    """How a module's gradients are read; None for one that can't be (the check will name it)."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return _linear
    if isinstance(module, Conv1D):
        return _conv1d
    if isinstance(module, nn.Embedding):
        return None  # its lookups are kept where they happen
    if all(parameter.dim() == 1 for parameter in module.parameters(recurse=False)):
        return _norm
    return None


def _by_sample(tensor: Tensor, n: int) -> Tensor:
    """(n, T, ·), of a tensor that may come with both flattened to one."""
    return tensor.reshape(n, -1, tensor.shape[-1])


def _rows(gradient_nTo: Tensor) -> slice:
    """The tokens that any sample has a gradient at: the head has none before the answers."""
    T = gradient_nTo.shape[1]  # looked at token by token: elsewhere the first look ends it
    first = next((t for t in range(T) if gradient_nTo[:, t].any()), 0)
    last = next((t for t in reversed(range(first, T)) if gradient_nTo[:, t].any()), 0)
    return slice(first, last + 1)


def _linear(module: nn.Module, read: Tensor, gradient: Tensor, n: int) -> list[tuple[str, Use]]:
    gradient_nTo, read_nTi = _by_sample(gradient, n), _by_sample(read, n)
    rows = _rows(gradient_nTo)
    gradient_nTo, read_nTi = gradient_nTo[:, rows], read_nTi[:, rows]
    return [("weight", Outer(gradient_nTo, read_nTi)), *_bias(module, gradient_nTo)]


def _conv1d(module: nn.Module, read: Tensor, gradient: Tensor, n: int) -> list[tuple[str, Use]]:
    (_, use), *bias = _linear(module, read, gradient, n)
    return [("weight", Outer(use.right_nTi, use.left_nTo)), *bias]


def _bias(module: nn.Module, gradient_nTo: Tensor) -> list[tuple[str, Use]]:
    if module.bias is None:
        return []
    return [("bias", Vector(wide(gradient_nTo).sum(1)))]


def _embedding(module: nn.Module, read: Tensor, gradient: Tensor, n: int) -> list[tuple[str, Use]]:
    """An embedding's uses; the row of its padding token has no gradient, as in PyTorch."""
    gradient_nTi = _by_sample(gradient, n)
    index_nT = read.expand(n, -1)
    if module.padding_idx is not None:
        gradient_nTi = gradient_nTi.masked_fill((index_nT == module.padding_idx)[..., None], 0)
    return [("weight", Lookup(index_nT, gradient_nTi))]


def _norm(module: nn.Module, read: Tensor, gradient: Tensor, n: int) -> list[tuple[str, Use]]:
    """A norm's uses: y = w ∘ x̂ + b, so ∂y/∂w = x̂ = y(w=1, b=0) − y(w=0, b=0)."""
    own: Mapping[str, Tensor] = dict(module.named_parameters(recurse=False))
    zeros = {name: torch.zeros_like(p) for name, p in own.items()}
    base = functional_call(module, zeros, (read,))
    found = []
    for name in own:
        changed = {**zeros, name: torch.ones_like(own[name])}
        slope = functional_call(module, changed, (read,)) - base
        value = (wide(slope) * wide(gradient)).reshape(n, -1, own[name].shape[0])
        found.append((name, Vector(value.sum(1))))
    return found
