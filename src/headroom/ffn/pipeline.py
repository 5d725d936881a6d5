"""A whole pruning: keep sets, transport plans, fused layers, and what each layer lost.

Shapes: L layers, n channels as stored, m live ones, k kept, N windows, T tokens, D model width.
Channel numbers count the live channels of a layer (all of them, unless it was padded).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from headroom.errors import InputError
from headroom.ffn.fusion import SEQUENTIAL, Layer, Transport, fuse, pruned_of
from headroom.ffn.importance import Channels, kept_channels, score_channels, widths
from headroom.ffn.layers import FFN, canonical_scale, live_channels, named, read
from headroom.ffn.marginals import Evidence, marginals
from headroom.ffn.rescue import dilution, functional_rescue, mass_rescue
from headroom.ffn.stream import LayerStream
from headroom.ffn.transport import CostView, costs, solve
from headroom.recipes import Prune, format_step


@dataclass(frozen=True)
class Source:
    """The checkpoint that is pruned and the text it is pruned by; every step has one seed."""

    model: torch.nn.Module
    tensors: Mapping[str, Tensor]
    config: Mapping
    activations: Sequence[Mapping[str, Tensor]]  # a layer each, of all n channels
    gradients: Sequence[Mapping[str, Tensor]] | None
    windows_NT: Tensor  # calibration
    heldout_NT: Tensor  # what functional errors are measured on
    settings: Mapping  # ridge, multiple, transport
    batch: int = 8
    workers: int = 1  # plans that are solved at once

    @property
    def layers(self) -> int:
        """L."""
        return self.config["num_hidden_layers"]

    def dense(self, index: int) -> tuple[FFN, Tensor]:
        """Return a layer's live channels and their numbers as stored."""
        ffn = read(self.tensors, index, self.config, str(self.model.device))
        live_m = live_channels(ffn)
        return ffn.pick(live_m), live_m


@dataclass(frozen=True)
class Selection:
    """Which channels of each layer stay, by which scores."""

    scores: list[Tensor]
    kept: list[Tensor]
    width: int  # of the new checkpoint: the widest layer's


@dataclass
class Pruned:
    """What one step makes of a checkpoint."""

    step: Prune
    selection: Selection
    config: dict
    tensors: dict[str, Tensor] = field(default_factory=dict)  # those that differ, as stored
    layers: list[dict] = field(default_factory=list)
    plans: dict[int, csr_array] = field(default_factory=dict)

    @property
    def unchanged(self) -> bool:
        """Whether nothing goes, so that the parent's tensors stay bit for bit."""
        return float(self.step.ratio[1:]) == 0


def score_layers(source: Source, score: str, seed: int) -> list[Tensor]:
    """Return a registered score of each layer's live channels."""
    scores = []
    for index in range(source.layers):
        ffn, live_m = source.dense(index)
        live_m = live_m.cpu()
        channels = Channels(
            ffn=ffn.scaled(canonical_scale(ffn)).to("cpu"),
            activations={n: _live(v, live_m) for n, v in source.activations[index].items()},
            gradients=_gradients(source, index, live_m),
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


def _live(values: Tensor, live_m: Tensor) -> Tensor:
    return values if values.numel() == 1 else values[live_m]


def _gradients(source: Source, index: int, live_m: Tensor) -> dict[str, Tensor]:
    if source.gradients is None:
        return {}
    return {name: _live(values, live_m) for name, values in source.gradients[index].items()}


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
    dense = LayerStream(source.model, source.windows_NT, source.batch)
    heldout = LayerStream(source.model, source.heldout_NT, source.batch)
    own = {
        number: LayerStream(source.model, source.windows_NT, source.batch)
        for number, one in enumerate(found)
        if one.step.fusion.endswith(SEQUENTIAL) and not one.unchanged
    }
    for index in progress(range(source.layers)):
        ffn, _ = source.dense(index)
        layer = Layer(ffn, dense.attend(index), source.settings["ridge"])
        judge = LayerJudge(ffn, heldout.attend(index))
        for number, one in enumerate(found):
            seen = own[number].attend(index) if number in own else None
            carried = one.step.fusion.startswith("ot_")
            transport = transports.get((_plan_key(one.step), index)) if carried else None
            small = _prune_layer(source, one, index, layer, transport, seen)
            one.layers.append(_entry(one, index, layer, transport, small, judge))
            if number in own:
                own[number].advance(small.to(layer.inputs[0].dtype))
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
    if float(step.ratio[1:]) == 0:
        return dict(config)
    new = {**config, "intermediate_size": width}
    if step.fusion == "bias":
        if config["model_type"] != "llama":
            raise InputError(
                f"recipe step {format_step(step)}: fusion bias needs an FFN with biases, which "
                f"{config['model_type']} has not (allowed: llama)"
            )
        new["mlp_bias"] = True
    return new


def _plan_key(step: Prune) -> tuple:
    return step.score, step.ratio, step.strategy, step.cost, step.solver


def plan_layers(source: Source, prunings: Sequence[Pruned]) -> dict[tuple, Transport]:
    """Return the transport of every layer for each distinct plan among the steps.

    Costs are made here, plans solved in threads (POT releases the lock), a few at a time because
    each holds n × k numbers. Only the ``activation`` cost reads text.
    """
    wanted = {
        _plan_key(one.step): one
        for one in prunings
        if one.step.fusion.startswith("ot_") and not one.unchanged
    }
    if not wanted:
        return {}
    reading = any(one.step.cost == "activation" for one in wanted.values())
    stream = LayerStream(source.model, source.windows_NT, source.batch) if reading else None
    jobs: dict[Future, tuple] = {}
    with ThreadPoolExecutor(source.workers) as pool:
        for index in range(source.layers):
            ffn, live_m = source.dense(index)
            layer = Layer(ffn, stream.attend(index) if stream else [], source.settings["ridge"])
            for key, one in wanted.items():
                if len(one.selection.kept[index]) == ffn.channels:
                    continue  # nothing goes from this layer
                wait_for_room(jobs, source.workers)
                job = pool.submit(_solved, *_problem(source, one, index, layer, live_m.cpu()))
                jobs[job] = (key, index)
            if stream:
                stream.advance(source.model.base_model.layers[index].mlp)
        return {place: job.result() for job, place in jobs.items()}


def wait_for_room(jobs: Mapping[Future, object], most: int) -> None:
    """Wait until fewer than ``most`` jobs are running; raise what a finished one raised."""
    running = {job for job in jobs if not job.done()}
    if len(running) >= most:
        wait(running, return_when=FIRST_COMPLETED)
    for job in jobs:
        if job.done() and job.exception() is not None:
            raise job.exception()


def _problem(source: Source, one: Pruned, index: int, layer: Layer, live_m: Tensor) -> tuple:
    """Return what solving one layer's transport takes: step, evidence, cost, signs, settings."""
    step, kept_k = one.step, one.selection.kept[index]
    ffn = layer.canonical
    biases = [b[:, None] for b in (ffn.gate_bias_n, ffn.up_bias_n) if b is not None]
    features_mF = torch.cat([ffn.gate_nD, ffn.up_nD, ffn.down_Dn.T, *biases], dim=1)
    view = CostView(
        torch.nn.functional.normalize(features_mF, dim=1, eps=1e-300),
        (lambda kept: layer.correlation(kept).abs()) if layer.inputs else None,
    )
    device_k = kept_k.to(features_mF.device)
    cost_mk = costs(step.resolved("cost"), view, device_k)
    signs = None
    if step.resolved("cost") == "activation":
        signs = torch.where(layer.correlation(device_k) < 0, -1.0, 1.0).cpu().numpy()
    statistics = {n: v.numpy() for n, v in _gradients(source, index, live_m).items()}
    evidence = Evidence(one.selection.scores[index].numpy(), statistics)
    device = str(features_mF.device)
    return (
        step,
        evidence,
        kept_k.numpy(),
        cost_mk,
        signs,
        {**source.settings["transport"]} | {"device": device},
    )


def _solved(
    step: Prune,
    evidence: Evidence,
    kept_k: np.ndarray,
    cost_mk: np.ndarray,
    signs: np.ndarray | None,
    settings: dict,
) -> Transport:
    """Solve one layer's transport; ``mass`` is the share of the pruned channels' mass."""
    a_m, b_k = marginals(step.resolved("strategy"), evidence, kept_k, cost_mk)
    own = a_m[kept_k].sum()
    settings = settings | {"mass": own + settings["mass"] * (1 - own)}
    plan = solve(step.resolved("solver"), a_m, b_k, cost_mk, settings)
    if signs is None:
        return Transport(plan, a_m, b_k)
    found = plan.tocoo()
    pairs = (found.row, found.col)
    return Transport(plan, a_m, b_k, csr_array((signs[pairs], pairs), shape=plan.shape))


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

    def error(self, small: FFN) -> float:
        """Return ‖Y − Y'‖²."""
        running = small.to(self.inputs[0].dtype)
        pairs = zip(self.inputs, self.outputs, strict=True)
        return sum(
            float((running(x_BTD) - y_BTD).double().square().sum()) for x_BTD, y_BTD in pairs
        )

    def error_of_dropping(self, kept_k: Tensor) -> float:
        """Return the error of keeping K and nothing else, computed once a keep set."""
        key = kept_k.numpy().tobytes()
        if key not in self.dropped:
            self.dropped[key] = self.error(self.dense.pick(kept_k.to(self.dense.gate_nD.device)))
        return self.dropped[key]


def _entry(
    one: Pruned,
    index: int,
    layer: Layer,
    transport: Transport | None,
    small: FFN,
    judge: LayerJudge,
) -> dict:
    """Return the record of one layer: counts, shares of the transport, functional errors."""
    kept_k = one.selection.kept[index]
    gone = len(pruned_of(layer.dense.channels, kept_k)) if not one.unchanged else 0
    error = 0.0 if one.unchanged else judge.error(small)
    dropped = 0.0 if one.unchanged else judge.error_of_dropping(kept_k)
    moved, kept = transport is not None, kept_k.tolist()
    return {
        "layer": index,
        "kept": layer.dense.channels - gone,
        "pruned": gone,
        "mass_rescue": mass_rescue(transport.plan_nk, transport.source_n, kept_k)
        if moved
        else None,
        "dilution": dilution(transport.plan_nk, kept) if moved else None,
        "functional_rescue": functional_rescue(error, dropped),
        "error_fused": error,
        "error_drop": dropped,
        "energy": judge.energy,
    }
