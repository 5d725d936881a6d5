"""Per-sample gradients against a loop of autograd, alone and in padded batches."""

import pytest
import torch

from headroom.errors import InputError
from headroom.gradients.capture import Capture, answer_losses, pad
from headroom.gradients.features import Parameter, dots, exact, ghost, squares
from headroom.gradients.uses import materialise

from .small_models import MODELS, by_autograd, samples, small

pytestmark = pytest.mark.usefixtures("one_thread")
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_exact_and_ghost_are_the_autograd_loop_in_every_layer(name, dtype):
    model, bound = small(name, dtype), BOUNDS[dtype]
    first, second = samples(), samples((6, 11, 8), seed=2)
    wanted = [[by_autograd(model, sample)[1] for sample in part] for part in (first, second)]
    floor = 1e-5 * torch.cat(list(wanted[0][0].values())).norm().double()
    capture = Capture(model)
    uses = [capture.uses(pad(part, "cpu")) for part in (first, second)]
    for layer, shape in capture.shapes.items():
        g, h = (torch.stack([one[layer] for one in part]).double() for part in wanted)
        # OPT's key biases have gradient 0: softmax doesn't see them. What is left is rounding.
        sizes = [part.norm(dim=1).clamp_min(floor) for part in (g, h)]
        norms = sizes[0][:, None] * sizes[1]
        for backend in (exact, ghost):
            f, k = (backend(Parameter(layer, shape), u[layer], {}) for u in uses)
            assert ((dots(f, k) - g @ h.T).abs() <= bound * norms).all(), (layer, backend)
            assert ((squares(f) - g.square().sum(1)).abs() <= bound * sizes[0].square()).all()
    parameters = [Parameter(*item) for item in capture.shapes.items()]
    full = sum(dots(*(exact(p, u[p.name], {}) for u in uses)) for p in parameters)
    together = [torch.stack([torch.cat(list(one.values())) for one in part]) for part in wanted]
    exact_full = together[0].double() @ together[1].double().T
    assert torch.allclose(full, exact_full, rtol=1e-4, atol=1e-6 * exact_full.abs().max())


def test_padding_order_and_company_change_nothing():
    model = small("llama_tied")
    capture = Capture(model)
    some = samples((7, 12, 5, 9))
    together = capture.uses(pad(some, "cpu"))
    turned = capture.uses(pad(some[::-1], "cpu"))
    for layer, shape in capture.shapes.items():
        g = materialise(together[layer], shape)
        scale = g.norm(dim=1, keepdim=True)
        back = materialise(turned[layer], shape).flip(0)
        assert ((g - back).norm(dim=1, keepdim=True) <= 1e-6 * scale).all()
        for row, sample in enumerate(some):
            alone = materialise(capture.uses(pad([sample], "cpu"))[layer], shape)[0]
            assert (g[row] - alone).norm() <= 2e-6 * scale[row]


def test_only_answer_tokens_are_learned():
    model = small("llama_tied")
    capture = Capture(model)
    tokens = samples((12,))[0][0]
    loss = capture(pad([(tokens, 6)], "cpu"), lambda name, uses: None).losses_n
    assert loss.item() == pytest.approx(by_autograd(model, (tokens, 6))[0].item(), rel=1e-5)
    batch = pad([(tokens, 6)], "cpu")
    labels = batch.tokens_nT.clone()
    # The label of a token is what follows it: change labels alone, not what the model reads.
    logits = model(batch.tokens_nT).logits
    before = answer_losses(logits, batch)
    labels[0, 3] += 1
    assert torch.equal(before, answer_losses(logits, batch._replace(tokens_nT=labels)))
    labels[0, 8] += 1
    assert not torch.equal(before, answer_losses(logits, batch._replace(tokens_nT=labels)))


def test_what_hooks_cannot_see_is_named():
    model = small("llama_untied")
    head = model.lm_head

    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = torch.nn.Parameter(torch.stack([head.weight.detach()] * 2))

        def forward(self, states):
            return states @ self.weights.mean(0).T

    model.lm_head = Hidden()
    with pytest.raises(InputError, match=r"gradient of lm_head.weights can't be taken apart"):
        Capture(model).check(pad(samples(), "cpu"))


@pytest.mark.parametrize("name", MODELS)
def test_the_check_passes_what_is_right(name):
    Capture(small(name)).check(pad(samples(), "cpu"))


def test_a_loss_that_is_no_number_is_refused():
    model = small("llama_tied")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        Capture(model).uses(pad(samples(), "cpu"))
