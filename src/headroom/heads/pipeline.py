"""A whole merge or removal: plans of all layers, changed tensors, configuration and log.

Shapes: L layers, H query heads, G key/value heads; G', n of a budget.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from headroom.checkpoints import Geometry, geometry
from headroom.errors import InputError
from headroom.heads.budgets import merged_config, resolve_budget
from headroom.heads.clustering import resolve_threshold
from headroom.heads.costs import ErrorCosts
from headroom.heads.importance import SCORES, kept_heads, moments, removed
from headroom.heads.merging import (
    METHODS,
    Layer,
    carrier,
    live_heads,
    refit_output,
    relative_error,
)
from headroom.heads.plans import (
    Plan,
    budget_plan,
    dissimilar_control,
    has_control,
    overlap,
    pair_costs,
    random_budget_plan,
    random_control,
    threshold_plan,
)
from headroom.heads.weights import AttentionWeights, Calibration, named, read
from headroom.progress import progress
from headroom.recipes import Merge, Remove

NOTE = "attention inputs of every layer are those of the parent before any of its layers changed"


class InputFile(Mapping):
    """The attention inputs in a safetensors file, each read when asked for."""

    def __init__(self, path: str | Path):
        from safetensors import safe_open

        self.file = safe_open(path, framework="pt")

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.file.keys()  # noqa: SIM118 (safe_open is no mapping)

    def __iter__(self) -> Iterator[str]:
        return iter(self.file.keys())

    def __len__(self) -> int:
        return len(self.file.keys())


@dataclass(frozen=True)
class Task:
    """One step on one checkpoint: what each of its layers needs."""

    tensors: Mapping[str, Tensor]
    config: dict
    step: Merge | Remove
    similarity_LHH: np.ndarray | None
    inputs: Mapping[str, Tensor] | None
    settings: dict
    device: str
    batch: int

    @cached_property
    def shape(self) -> Geometry:
        """The checkpoint's sizes."""
        return geometry(self.config)

    @cached_property
    def budget(self) -> tuple[int, int] | None:
        """(G', n), or None where a threshold selects."""
        if isinstance(self.step, Remove):
            return resolve_budget(
                self.step.budget, self.shape.heads, self.shape.groups, unite=False
            )
        if not self.step.selection.startswith("b"):
            return None
        return resolve_budget(self.step.selection, self.shape.heads, self.shape.groups)

    @cached_property
    def threshold(self) -> float | None:
        """The least similarity of heads that merge, or None where a budget selects."""
        return None if self.budget else resolve_threshold(self.step.selection, self.similarity_LHH)

    @cached_property
    def config_new(self) -> dict:
        """The configuration of what comes out."""
        if self.budget is None:
            return self.config
        groups, each = self.budget
        return merged_config(self.config, groups * each, groups)

    def layer(self, index: int) -> Layer:
        """Read one layer and its calibration inputs."""
        weights = read(self.tensors, self.shape, index, self.config, self.device)
        if self.inputs is None:
            return Layer(weights, None, self.settings["ridge"])
        tables = self.inputs["cos"], self.inputs["sin"]
        calibration = Calibration(self.inputs[f"layer.{index}"], *tables, self.batch)
        return Layer(weights, calibration, self.settings["ridge"])

    def similarity(self, index: int) -> np.ndarray | None:
        """The criterion's similarities of one layer."""
        return None if self.similarity_LHH is None else self.similarity_LHH[index]


def merge_model(
    tensors: Mapping[str, Tensor],
    config: dict,
    step: Merge | Remove,
    similarity_LHH: np.ndarray | None,
    inputs: Mapping[str, Tensor] | None,
    settings: dict,
    *,
    chosen: Sequence[Plan] | None = None,
    device: str = "cpu",
    batch: int = 4,
) -> tuple[dict, dict[str, Tensor], dict]:
    """Merge or remove heads of a checkpoint, one layer in memory at a time.

    Args:
        tensors, config: the checkpoint's, by name; its ``config.json``.
        step: what to do.
        similarity_LHH: the criterion's; None for ``error`` and for a removal.
        inputs: ``layer.{i}`` (S, T, D), ``cos`` and ``sin`` (T, d); None where nothing needs them.
        settings: ``ridge``, and ``cross_group`` (merge or refuse).
        chosen: plans of the same step without its control, where they are known already.
        device, batch: where layers are computed; sequences at a time.

    Returns:
        The new configuration, the tensors that differ from the parent's (in their stored dtype, on
        the CPU), and the log (plain values, no times).

    Raises:
        InputError: if the model can't be brought to the budget, or inputs don't suit.
    """
    task = Task(tensors, config, step, similarity_LHH, inputs, settings, device, batch)
    config_new = task.config_new
    check_inputs(inputs, config)
    changed, entries = {}, {}
    for index in progress(range(task.shape.layers), "layers", unit="layer"):
        new, entries[str(index)] = _layer(task, index, None if chosen is None else chosen[index])
        changed |= new
    return config_new, changed, _log(task, entries)


def plan_layers(
    tensors: Mapping[str, Tensor],
    config: dict,
    step: Merge,
    similarity_LHH: np.ndarray | None,
    inputs: Mapping[str, Tensor] | None,
    settings: dict,
    *,
    device: str = "cpu",
    batch: int = 4,
) -> list[Plan]:
    """Return the plan of every layer as :func:`merge_model` would choose it, without any control.

    For several controls of one merge, which then need not search again (``chosen``).
    """
    plain = replace(step, control="")
    task = Task(tensors, config, plain, similarity_LHH, inputs, settings, device, batch)
    check_inputs(inputs, config)
    layers = progress(range(task.shape.layers), "plans", unit="layer")
    return [choose(task, task.layer(index), index) for index in layers]


def check_inputs(inputs: Mapping[str, Tensor] | None, config: dict) -> None:
    """Refuse inputs longer than a sliding window: attention over them would not be plainly causal.

    Raises:
        InputError: naming the key that makes them shorter.
    """
    window = config.get("sliding_window")
    if config.get("model_type") in ("qwen2", "qwen3") and not config.get("use_sliding_window"):
        window = None
    if inputs is not None and window and inputs["cos"].shape[0] > window:
        raise InputError(
            f"config key heads.calibration.window is {inputs['cos'].shape[0]}, longer than the "
            f"model's sliding window (allowed: at most {window})"
        )


def choose(task: Task, layer: Layer, index: int, worst: bool = False) -> Plan:
    """Return a layer's plan by similarity or by error; with ``worst`` a budget's costliest."""
    weights, step = layer.weights, task.step
    if task.budget is None:
        cross = task.settings.get("cross_group", "merge")
        return threshold_plan(task.similarity(index), task.threshold, weights.groups, cross)
    if step.criterion == "error":
        costs = ErrorCosts(layer, align=step.method != "average", refit=step.method == "refit")
    else:
        costs = pair_costs(task.similarity(index), weights.groups)
    return budget_plan(costs, task.budget, weights.heads, weights.groups, worst)


def controlled(task: Task, layer: Layer, index: int, plan: Plan) -> Plan:
    """Return the control's plan for one layer: as many heads become one, but other ones.

    ``random{seed}`` draws by seed and layer; ``dissimilar`` takes the most costly.
    """
    control, budget = task.step.control, task.budget
    seed = int(control.removeprefix("random")) if control != "dissimilar" else 0
    generator = np.random.default_rng([seed, index])
    if budget is not None and control == "dissimilar":
        return choose(task, layer, index, worst=True)
    if budget is not None:
        return random_budget_plan(budget, layer.weights.heads, layer.weights.groups, generator)
    if control == "dissimilar":
        return dissimilar_control(plan, task.similarity(index), generator)
    return random_control(plan, generator)


def _layer(task: Task, index: int, known: Plan | None) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors of one layer that change, rounded to their stored dtype, and its log."""
    layer = task.layer(index)
    if isinstance(task.step, Merge):
        merged, entry = _merge(task, layer, index, known)
    else:
        merged, entry = _remove(task, layer)
    if layer.calibration is not None:
        entry["relative_error"] = 0.0
    if merged is None:
        return {}, entry | {"heads_live": len(live_heads(layer.weights))}
    tensors = task.tensors
    new = {name: t.to("cpu", tensors[name].dtype) for name, t in named(merged, index).items()}
    stored = read(new, geometry(task.config_new), index, task.config_new, task.device)
    if layer.calibration is not None:
        entry["relative_error"] = relative_error(layer.weights, stored, layer.calibration)
    entry["heads_live"] = len(live_heads(stored))
    return _differing(new, tensors), entry


def _differing(new: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that differ from the parent's."""
    old = {name: tensors[name].cpu() for name in new}
    return {
        name: tensor
        for name, tensor in new.items()
        if tensor.shape != old[name].shape or not torch.equal(tensor, old[name])
    }


def _merge(
    task: Task, layer: Layer, index: int, known: Plan | None
) -> tuple[AttentionWeights | None, dict]:
    """Return one layer merged, None where nothing becomes one, and its log."""
    step = task.step
    plan = known or choose(task, layer, index)
    entry: dict = {}
    if step.control:
        original = plan
        plan = controlled(task, layer, index, original)
        entry["control"] = {"kind": step.control, "overlap": overlap(plan, original)}
        if task.budget is None and original.changes and not has_control(original):
            entry["control"]["note"] = "no control exists: every relabelling selects the same heads"
    if step.method == "average" and not plan.reduce:
        plan = plan.within_parts()
    merged = METHODS[step.method](layer, plan) if plan.changes else None
    return merged, entry | _plan_log(layer, plan, step, task.similarity(index))


def _plan_log(layer: Layer, plan: Plan, step: Merge, similarity_HH: np.ndarray | None) -> dict:
    many = [cluster for cluster in plan.clusters if len(cluster) > 1]
    pairs = [list(pair) for pair in plan.pairs()]
    if similarity_HH is not None:
        pairs = [[a, b, float(similarity_HH[a, b])] for a, b in pairs]
    carried = not plan.reduce and step.method != "average"
    return {
        "num_pairs_merged": len(pairs),
        "pairs": pairs,
        "clusters": [list(cluster) for cluster in many],
        "key_value_parts": [list(part) for part in plan.groups if len(part) > 1],
        "carriers": [carrier(layer, cluster) for cluster in many] if carried else [],
    }


def _remove(task: Task, layer: Layer) -> tuple[AttentionWeights | None, dict]:
    """Return one layer without its least important heads, None where all stay, and its log."""
    weights = layer.weights
    score_H = SCORES[task.step.score](weights, moments(weights, layer.inputs))
    kept = kept_heads(score_H, task.budget, weights.groups)
    stay = [head for group in kept for head in group]
    gone = [head for head in range(weights.heads) if head not in stay]
    entry = {"num_pairs_merged": 0, "pairs": [], "removed": gone, "scores": score_H.tolist()}
    if not gone:
        return None, entry
    small = removed(weights, kept)
    if task.step.method == "refit":
        small = refit_output(weights, small, layer.inputs, layer.ridge)
    return small, entry


def _log(task: Task, entries: dict[str, dict]) -> dict:
    """Return the merge log: what was asked, what it meant here, layers, totals."""
    budget, inputs = task.budget, task.inputs
    log: dict = {
        "step": {"verb": task.step.verb, **asdict(task.step)},
        "threshold": task.threshold,
        "budget": budget and {"key_value_heads": budget[0], "each": budget[1]},
        "merged_layers": entries,
        "total_merged_pairs": sum(entry["num_pairs_merged"] for entry in entries.values()),
        "total_heads_live": sum(entry["heads_live"] for entry in entries.values()),
    }
    if inputs is not None:
        sequences, window = inputs["layer.0"].shape[:2]
        log["inputs"] = {"sequences": sequences, "window": window, "note": NOTE}
    return log
