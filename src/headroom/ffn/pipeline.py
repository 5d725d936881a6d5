"""A whole pruning: keep sets, transport plans, fused layers, and what each layer lost.

Shapes: L layers, n channels as stored, m live ones, k kept, N windows, T tokens, D model width.
Channel numbers count the live channels of a layer (all of them, unless it was padded).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from headroom.ffn.families import check_family
from headroom.ffn.fusion import SEQUENTIAL, Layer, Transport, fuse, pruned_of
from headroom.ffn.importance import Channels, kept_channels, score_channels, widths
from headroom.ffn.layers import FFN, canonical_scale, named
from headroom.ffn.planning import plan_key, plan_layers
from headroom.ffn.rescue import dilution, functional_rescue, mass_rescue
from headroom.ffn.stream import LayerStream
from headroom.ffn.task import Pruned, Selection, Source
from headroom.recipes import Prune, format_step


def score_layers(source: Source, score: str, seed: int) -> list[Tensor]:
    """Return a registered score of each layer's live channels."""
    scores = []
    for index in range(source.layers):
        ffn, live_m = source.dense(index)
        live_m = live_m.cpu()
        channels = Channels(
            ffn=ffn.scaled(canonical_scale(ffn)).to("cpu"),
            activations=source.activations_of(index, live_m),
            gradients=source.gradients_of(index, live_m),
            seed=seed,
            layer=index,
        )
        scores.append(score_channels(score, channels))
    return scores


def select(source: Source, step: Prune, scores: list[Tensor]) -> Selection:
    """Return the channels that a step keeps in each layer, by its score."""
    angles = [float(layer["angle"]) for layer in source.activations]
    stored, multiple = source.config["intermediate_size"], source.settings["multiple"]
    sizes = widths(step.ratio, scores, angles, multiple, stored)
    kept = [kept_channels(score_m, width) for score_m, width in zip(scores, sizes, strict=True)]
    return Selection(scores, kept, max(map(len, kept)))


def prune_model(
    source: Source,
    steps: Sequence[Prune],
    progress: Callable[[range], Iterable[int]] = iter,
) -> list[Pruned]:
    """Prune a checkpoint in several ways, each from the dense one, in one pass over its layers.

    One layer's activations and Gram are in memory at a time; the pruned tensors wait on the CPU.

    Args:
        steps: all of one seed.
        progress: wraps the layers' numbers.

    Raises:
        InputError: for what a step can't do with this checkpoint or text.
    """
    found = _selected(source, steps)
    transports = plan_layers(source, found)
    texts = (source.windows_NT, source.heldout_NT)
    dense, heldout = (LayerStream(source.model, text, source.batch) for text in texts)
    own = {
        number: [LayerStream(source.model, text, source.batch) for text in texts]
        for number, one in enumerate(found)
        if one.step.fusion.endswith(SEQUENTIAL) and not one.unchanged
    }
    for index in progress(range(source.layers)):
        ffn, _ = source.dense(index)
        layer = Layer(ffn, dense.attend(index), source.settings["ridge"])
        judge = LayerJudge(ffn, heldout.attend(index))
        for number, one in enumerate(found):
            behind = [stream.attend(index) for stream in own.get(number, ())]
            seen, judged = behind or (None, None)
            place = (plan_key(one.step), index)
            transport = transports.get(place) if one.step.transports else None
            small = _prune_layer(source, one, index, layer, transport, seen)
            one.layers.append(_entry(one, index, layer, transport, small, judge, judged))
            for stream in own.get(number, ()):
                stream.advance(small.to(layer.inputs[0].dtype))
        mlp = source.model.base_model.layers[index].mlp
        dense.advance(mlp)
        heldout.advance(mlp)
    return found


def _selected(source: Source, steps: Sequence[Prune]) -> list[Pruned]:
    """Return the steps with their keep sets; a score is computed once for all ratios."""
    scores: dict[str, list[Tensor]] = {}
    chosen: dict[tuple, Selection] = {}
    found = []
    for step in steps:
        key = (step.score, step.ratio)
        if step.score not in scores:
            scores[step.score] = score_layers(source, step.score, int(step.resolved("seed")[1:]))
        if key not in chosen:
            chosen[key] = select(source, step, scores[step.score])
        found.append(Pruned(step, chosen[key], _config(source.config, step, chosen[key].width)))
    return found


def _config(config: Mapping, step: Prune, width: int) -> dict:
    """Return the ``config.json`` of the pruned checkpoint."""
    if step.keeps_all:
        return dict(config)
    new = {**config, "intermediate_size": width}
    if step.fusion == "bias":
        check_family(f"recipe step {format_step(step)}", [step], config["model_type"])
        new["mlp_bias"] = True
    return new


def _prune_layer(
    source: Source,
    one: Pruned,
    index: int,
    layer: Layer,
    transport: Transport | None,
    seen: Sequence[Tensor] | None,
) -> FFN:
    """Fuse one layer, round it to the stored precision, keep its tensors, return it."""
    if one.unchanged:
        return layer.dense
    kept_k = one.selection.kept[index].to(layer.dense.gate_nD.device)
    small = fuse(one.step.fusion, layer, kept_k, transport, seen).padded(one.selection.width)
    dtype = source.tensors[next(named(small, index))[0]].dtype
    small = small.to(dtype)
    one.tensors |= {name: tensor.cpu().contiguous() for name, tensor in named(small, index)}
    if transport is not None:
        one.plans[index] = transport.plan_nk
    return small.to(torch.float64)


class LayerJudge:
    """The functional error of smaller versions of one layer, on held-out text."""

    def __init__(self, dense: FFN, inputs: Sequence[Tensor]):
        """Compute the dense layer's output."""
        self.dense, self.inputs = dense, inputs
        running = dense.to(inputs[0].dtype)
        self.outputs = [running(x_BTD).double() for x_BTD in inputs]
        self.energy = sum(float(y_BTD.square().sum()) for y_BTD in self.outputs)
        self.dropped: dict[bytes, float] = {}

    def error(self, small: FFN, seen: Sequence[Tensor] | None = None) -> float:
        """Return ‖Y − Y'‖², where the smaller layer reads what the dense one does, or ``seen``."""
        running = small.to(self.inputs[0].dtype)
        pairs = zip(seen or self.inputs, self.outputs, strict=True)
        return sum(
            float((running(x_BTD) - y_BTD).double().square().sum()) for x_BTD, y_BTD in pairs
        )

    def error_of_dropping(self, kept_k: Tensor, seen: Sequence[Tensor] | None = None) -> float:
        """Return the error of keeping K and nothing else; of dense inputs once a keep set."""
        key = kept_k.numpy().tobytes()
        if seen is None and key in self.dropped:
            return self.dropped[key]
        error = self.error(self.dense.pick(kept_k.to(self.dense.gate_nD.device)), seen)
        if seen is None:
            self.dropped[key] = error
        return error


def _entry(
    one: Pruned,
    index: int,
    layer: Layer,
    transport: Transport | None,
    small: FFN,
    judge: LayerJudge,
    judged: Sequence[Tensor] | None,
) -> dict:
    """Return the record of one layer: counts, shares of the transport, functional errors.

    A sequential refit is judged on what it reads: held-out states behind its compressed prefix.
    """
    kept_k = one.selection.kept[index]
    gone = len(pruned_of(layer.dense.channels, kept_k)) if not one.unchanged else 0
    error = 0.0 if one.unchanged else judge.error(small, judged)
    dropped = 0.0 if one.unchanged else judge.error_of_dropping(kept_k, judged)
    moved, kept = transport is not None, kept_k.tolist()
    return {
        "layer": index,
        "kept": layer.dense.channels - gone,
        "pruned": gone,
        "mass_rescue": mass_rescue(transport.plan_nk, transport.source_n, kept) if moved else None,
        "dilution": dilution(transport.plan_nk, kept) if moved else None,
        "functional_rescue": functional_rescue(error, dropped),
        "error_fused": error,
        "error_drop": dropped,
        "energy": judge.energy,
    }
