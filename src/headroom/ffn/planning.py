"""Transport plans of all layers: costs here, solvers in threads.

Shapes: n channels as stored, m live ones, k kept.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from headroom.ffn.fusion import Layer, Transport
from headroom.ffn.marginals import Evidence, marginals
from headroom.ffn.stream import LayerStream
from headroom.ffn.task import Pruned, Source
from headroom.ffn.transport import ACTIVATION_COSTS, CostView, costs, solve
from headroom.recipes import Prune


def plan_key(step: Prune) -> tuple:
    """Return what decides a plan: steps that share it share their plans."""
    return step.score, step.ratio, step.strategy, step.cost, step.solver


def plan_layers(source: Source, prunings: Sequence[Pruned]) -> dict[tuple, Transport]:
    """Return the transport of every layer for each distinct plan among the steps.

    Costs are made here, plans solved in threads (POT releases the lock), a few at a time because
    each holds n × k numbers. Only the costs in ``ACTIVATION_COSTS`` read text.
    """
    wanted = {
        plan_key(one.step): one for one in prunings if one.step.transports and not one.unchanged
    }
    if not wanted:
        return {}
    reading = any(one.step.cost in ACTIVATION_COSTS for one in wanted.values())
    workers = source.workers
    if source.model.device.type == "cuda" and any(
        o.step.solver == "sinkhorn" for o in wanted.values()
    ):
        workers = 1  # it holds several n × k matrices on the GPU
    stream = LayerStream(source.model, source.windows_NT, source.batch) if reading else None
    jobs: dict[Future, tuple] = {}
    with ThreadPoolExecutor(workers) as pool:
        for index in range(source.layers):
            ffn, live_m = source.dense(index)
            layer = Layer(ffn, stream.attend(index) if stream else [], source.settings["ridge"])
            for key, one in wanted.items():
                if len(one.selection.kept[index]) == ffn.channels:
                    continue  # nothing goes from this layer
                wait_for_room(jobs, workers)
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
    if step.cost in ACTIVATION_COSTS:
        signs = torch.where(layer.correlation(device_k) < 0, -1.0, 1.0).cpu().numpy()
    statistics = {n: v.numpy() for n, v in source.gradients_of(index, live_m).items()}
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
    """Solve one layer's transport.

    A partial one leaves kept channels where they are (T_jj = min(a_j, b_j), at no cost), so that
    its ``mass`` is a share of what moves: the pruned channels' mass, and what a kept one has above
    its target.
    """
    a_m, b_k = marginals(step.resolved("strategy"), evidence, kept_k, cost_mk)
    staying = np.zeros_like(b_k)
    if step.solver == "partial":
        staying = np.minimum(a_m[kept_k], b_k)
    moving_m = a_m.copy()
    moving_m[kept_k] -= staying
    plan = solve(step.resolved("solver"), moving_m, b_k - staying, cost_mk, settings)
    if step.solver == "partial":
        places = (kept_k, np.arange(len(kept_k)))
        plan = csr_array(plan + csr_array((staying, places), shape=plan.shape))
    if signs is None:
        return Transport(plan, a_m, b_k)
    found = plan.tocoo()
    pairs = (found.row, found.col)
    return Transport(plan, a_m, b_k, csr_array((signs[pairs], pairs), shape=plan.shape))
