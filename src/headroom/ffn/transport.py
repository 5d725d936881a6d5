"""Transport of channels: what moving one to another costs, and the plans of least cost.

Shapes: n channels of a layer, k kept ones, F = 3 D features. Costs in torch (on the features'
device), plans in float64 as sparse n × k arrays. POT takes seconds to import, so it is imported
late; its exact solver releases the GIL, so layers can be solved in threads.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_array, csr_array, diags_array
from torch import Tensor

from headroom.errors import InputError
from headroom.ffn.marginals import nearest

ELEMENTS = 2**28  # of the largest intermediate
MARGINAL = 1e-9  # by how much a plan may miss its marginals
SHARE = 1e-10  # of a source's mass: entropic dust below it is swept together
DEFAULTS = {
    "iterations": 10_000_000,  # of the network simplex
    "epsilon": 0.01,  # share of the mean cost, of the entropy
    "sinkhorn_iterations": 5000,  # a step of the ladder
    # L2 error of the marginals; rounding mends it. 1e-6 takes pushed masses beyond 8000 iterations
    # (what leaks between their nearly separate clusters hardly mixes) and gains no 0.1 % of cost
    "tolerance": 1e-4,
    "mass": 0.8,  # share of the mass that a partial plan transports
}


@dataclass(frozen=True)
class CostView:
    """What costs may look at.

    ``features_nF``: float64, canonical [gate row | up row | down column], rows L2-normalised (zero
    rows stay zero). ``correlation``: the kept channels' numbers -> |corr(h_i, h_j)| (n, k),
    sign-aligned; None where there are no activations.
    """

    features_nF: Tensor
    correlation: Callable[[Tensor], Tensor] | None = None


def _by_rows(view: CostView, kept_k: Tensor, block: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Fill the cost (n, k) in chunks of rows; equal channels cost nothing, itself exactly so."""
    features_nF = view.features_nF
    kept_kF = features_nF[kept_k]
    n, k = len(features_nF), len(kept_k)
    cost_nk = features_nF.new_empty(n, k)
    step = max(1, ELEMENTS // max(k, features_nF.shape[1]))
    for start in range(0, n, step):
        rows_F = features_nF[start : start + step]
        cost_nk[start : start + step] = block(rows_F, kept_kF).clamp_(min=0)
    cost_nk[kept_k, torch.arange(k, device=kept_k.device)] = 0
    return cost_nk


def cosine(view: CostView, kept_k: Tensor) -> Tensor:
    """Return 1 − cos of the features, in [0, 2]; dead channels are 0 apart, 1 from all others."""

    def block(rows_F: Tensor, kept_kF: Tensor) -> Tensor:
        cost = (rows_F @ kept_kF.T).neg_().add_(1)
        dead, dead_k = ~rows_F.any(1), ~kept_kF.any(1)
        return cost.masked_fill_(dead[:, None] & dead_k, 0)

    return _by_rows(view, kept_k, block)


def sqeuclidean(view: CostView, kept_k: Tensor) -> Tensor:
    """Return ‖x − y‖² = ‖x‖² + ‖y‖² − 2 x·y of the features, in [0, 4]."""

    def block(rows_F: Tensor, kept_kF: Tensor) -> Tensor:
        cost = (rows_F @ kept_kF.T).mul_(-2)
        return cost.add_(rows_F.square().sum(1)[:, None]).add_(kept_kF.square().sum(1))

    return _by_rows(view, kept_k, block)


def cityblock(view: CostView, kept_k: Tensor) -> Tensor:
    """Return Σ |x − y| of the features: the seed's cost, n k F operations without a GEMM."""
    return _by_rows(view, kept_k, lambda rows_F, kept_kF: torch.cdist(rows_F, kept_kF, p=1))


def activation(view: CostView, kept_k: Tensor) -> Tensor:
    """Return 1 − |corr(h_i, h_j)|, in [0, 1]: channels that fire alike, up to sign and scale.

    Raises:
        InputError: if there are no activations.
    """
    if view.correlation is None:
        raise InputError(
            "the transport cost 'activation' needs channels' correlations on calibration text"
            f" (allowed without them: {', '.join(COSTS)})"
        )
    correlation_nk = view.correlation(kept_k).double()
    cost_nk = (1 - correlation_nk).clamp_(0, 1)
    cost_nk[kept_k, torch.arange(len(kept_k), device=kept_k.device)] = 0
    return cost_nk


# A cost is one function of what is known of the channels, and one entry in the registry of what it
# reads: weights alone, or the channels' correlations on calibration text too.
COSTS: dict[str, Callable[[CostView, Tensor], Tensor]] = {
    "cosine": cosine,
    "sqeuclidean": sqeuclidean,
    "cityblock": cityblock,
}
ACTIVATION_COSTS: dict[str, Callable[[CostView, Tensor], Tensor]] = {
    "activation": activation,
}


def costs(name: str, view: CostView, kept_k: Tensor) -> np.ndarray:
    """Return a registered cost as float64 (n, k) on the CPU, checked.

    Raises:
        InputError: for an unknown name, and for a function that doesn't give n × k finite,
            non-negative numbers.
    """
    known = COSTS | ACTIVATION_COSTS
    if name not in known:
        raise InputError(f"transport cost {name!r} is unknown (allowed: {', '.join(known)})")
    cost_nk = known[name](view, kept_k).double().cpu().numpy()
    shape = (len(view.features_nF), len(kept_k))
    if cost_nk.shape != shape:
        wrong = f"shape {cost_nk.shape}"
    elif not np.isfinite(cost_nk.sum()):
        wrong = "numbers that are not finite"
    elif cost_nk.min() < 0:
        wrong = "negative numbers"
    else:
        return cost_nk
    raise InputError(
        f"transport cost {name!r} gave {wrong} (allowed: {shape[0]} × {shape[1]} finite,"
        " non-negative numbers)"
    )


def exact(a_n: np.ndarray, b_k: np.ndarray, cost_nk: np.ndarray, settings: Mapping) -> csr_array:
    """Return a plan T of least Σ T C with the marginals a and b, at most n + k − 1 nonzeros.

    Sending each channel to its nearest kept one costs least of all, so where that meets b (target
    ``pushforward``) it is taken; else POT's network simplex (Bonneel et al. 2011) is run.

    Raises:
        InputError: if it stops early.
    """
    n, k = cost_nk.shape
    rows, columns, shares = nearest(cost_nk)
    mass = a_n[rows] * shares
    pushed_k = np.bincount(columns, mass, minlength=k)
    if len(rows) <= n + k - 1 and np.allclose(pushed_k, b_k, rtol=1e-9, atol=1e-15):
        return coo_array((mass, (rows, columns)), shape=(n, k)).tocsr()
    import ot

    iterations = int(_setting(settings, "iterations"))
    _quiet()
    plan_nk, log = ot.emd(a_n, b_k, cost_nk, numItermax=iterations, log=True)
    missed = max(np.abs(plan_nk.sum(1) - a_n).max(), np.abs(plan_nk.sum(0) - b_k).max())
    # 1 is the solver's code for "optimal"
    if log["warning"] is not None or log["result_code"] != 1 or not missed <= MARGINAL:
        raise InputError(_stopped("exact", iterations, log["warning"]))
    return csr_array(plan_nk)


def partial(a_n: np.ndarray, b_k: np.ndarray, cost_nk: np.ndarray, settings: Mapping) -> csr_array:
    """Return the plan of least cost that moves the share m of the mass: T 1 ≤ a, Tᵀ 1 ≤ b, ΣT = m.

    What has no near neighbour stays behind. Exact, by a dummy point on each side (Chapel et al.
    2020, Caffarelli & McCann 2010).

    Raises:
        InputError: if it stops early, and for a share outside (0, 1].
    """
    share = float(_setting(settings, "mass"))
    if not 0 < share <= 1 + MARGINAL:
        raise InputError(f"ffn.transport.mass is {share:g} (allowed: above 0, at most 1)")
    share = min(share, 1.0)  # a share that was computed may be one and a rounding
    import ot

    iterations = int(_setting(settings, "iterations"))
    whole = min(a_n.sum(), b_k.sum())
    # the dummies cost 2 max C; a constant more leaves the plan as it is, as its mass is given
    cost_nk = cost_nk if cost_nk.max() > 0 else np.ones_like(cost_nk)
    _quiet()
    try:
        plan_nk = ot.partial.partial_wasserstein(
            a_n, b_k, cost_nk, m=share * whole, numItermax=iterations
        )
    except ValueError as error:
        raise InputError(_stopped("partial", iterations, error)) from error
    over = max((plan_nk.sum(1) - a_n).max(), (plan_nk.sum(0) - b_k).max())
    if not max(over, abs(plan_nk.sum() - share * whole)) <= MARGINAL:
        raise InputError(_stopped("partial", iterations, "its mass is not the one asked for"))
    return csr_array(plan_nk)


def sinkhorn(a_n: np.ndarray, b_k: np.ndarray, cost_nk: np.ndarray, settings: Mapping) -> csr_array:
    """Return the entropic plan, minimum of Σ T C + ε Σ T log T, rounded to the marginals.

    ε = ``epsilon`` · mean cost. What the plan then misses is rounded (Altschuler et al. 2017). A
    setting ``device`` moves the iterations to an accelerator.

    Raises:
        InputError: if the plan misses the marginals by more than ``tolerance`` (L2), and for
            settings that aren't above 0.
    """
    epsilon, tolerance = (float(_setting(settings, key)) for key in ("epsilon", "tolerance"))
    for key, value in (("epsilon", epsilon), ("tolerance", tolerance)):
        if not value > 0:
            raise InputError(f"ffn.transport.{key} is {value:g} (allowed: above 0)")
    iterations = int(_setting(settings, "sinkhorn_iterations"))
    device = settings.get("device", "cpu")
    a, b, cost = (torch.as_tensor(x, dtype=torch.float64).to(device) for x in (a_n, b_k, cost_nk))
    plan, error = _entropic(a, b, cost, epsilon, iterations, tolerance)
    if not error <= tolerance:
        raise InputError(
            f"sinkhorn missed the marginals by {error:.1e} > ffn.transport.tolerance"
            f" {tolerance:g} after ffn.transport.sinkhorn_iterations = {iterations} (allowed: more"
            " of them, a larger tolerance or a larger ffn.transport.epsilon)"
        )
    kept = plan >= SHARE * a[:, None]
    rows, columns = (index.cpu().numpy() for index in kept.nonzero(as_tuple=True))
    values = plan[kept].cpu().numpy()
    return rounded(coo_array((values, (rows, columns)), shape=cost_nk.shape).tocsr(), a_n, b_k)


def _entropic(
    a: Tensor, b: Tensor, cost: Tensor, epsilon: float, iterations: int, tolerance: float
) -> tuple[Tensor, float]:
    """Return POT's log-domain plan and the L2 error of its marginals.

    ε goes down by factors of 4 from the largest cost, each step starting from the last one's
    potentials (ε-scaling, Schmitzer 2019): from zero, a small ε takes many more iterations.
    """
    import ot

    ladder = [epsilon * float(cost.mean()) or 1.0]  # all costs zero: any ε
    while ladder[-1] * 4 <= float(cost.max()):
        ladder.append(ladder[-1] * 4)
    u, v = torch.zeros_like(a), torch.zeros_like(b)
    for step in reversed(ladder):
        plan, log = ot.bregman.sinkhorn_log(
            a,
            b,
            cost,
            step,
            numItermax=iterations,
            stopThr=tolerance,
            warn=False,
            log=True,
            warmstart=(u / step, v / step),
        )
        u, v = log["log_u"] * step, log["log_v"] * step
    return plan, float(log["err"][-1])


SOLVERS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray, Mapping], csr_array]] = {
    "exact": exact,
    "sinkhorn": sinkhorn,
    "partial": partial,
}


def solve(
    name: str, a_n: np.ndarray, b_k: np.ndarray, cost_nk: np.ndarray, settings: Mapping
) -> csr_array:
    """Return the plan (n, k) of a registered solver, checked.

    Raises:
        InputError: for an unknown name, a solver that doesn't converge, and a function whose plan
            has a wrong shape, entries that aren't finite and non-negative, or more than a or b.
    """
    if name not in SOLVERS:
        raise InputError(f"transport solver {name!r} is unknown (allowed: {', '.join(SOLVERS)})")
    plan = csr_array(SOLVERS[name](a_n, b_k, cost_nk, settings))
    if plan.shape != cost_nk.shape:
        wrong = f"shape {plan.shape}"
    elif not np.isfinite(plan.data).all():
        wrong = "numbers that are not finite"
    elif plan.data.min(initial=0) < 0:
        wrong = "negative numbers"
    elif max((plan.sum(1) - a_n).max(), (plan.sum(0) - b_k).max()) > MARGINAL:
        wrong = "more mass than the marginals hold"
    else:
        return plan
    raise InputError(
        f"transport solver {name!r} gave {wrong} (allowed: {cost_nk.shape[0]} ×"
        f" {cost_nk.shape[1]} finite, non-negative numbers, row sums ≤ a, column sums ≤ b)"
    )


def rounded(plan: csr_array, a_n: np.ndarray, b_k: np.ndarray) -> csr_array:
    """Return a plan near another one that has the marginals a and b exactly.

    Rows, then columns, with too much are scaled down; what is missing is added as a coupling of
    the residuals (Altschuler et al. 2017, algorithm 2). Theirs is the outer product; here it is the
    north-west corner one, as good for their bound, with n + k − 1 nonzeros at most.
    """
    for axis, wanted in ((1, a_n), (0, b_k)):
        sums = plan.sum(axis)
        ratio = np.divide(wanted, sums, out=np.ones_like(sums), where=sums > wanted)
        scale = diags_array(ratio)
        plan = scale @ plan if axis else plan @ scale
    missing_n = np.maximum(a_n - plan.sum(1), 0)
    missing_k = np.maximum(b_k - plan.sum(0), 0)
    ends_n, ends_k = np.cumsum(missing_n), np.cumsum(missing_k)
    ends_k *= ends_n[-1] / ends_k[-1] if ends_k[-1] > 0 else 0
    ends = np.concatenate([[0], np.sort(np.concatenate([ends_n, ends_k]))])
    mass, middle = np.diff(ends), (ends[1:] + ends[:-1]) / 2
    some = mass > 0
    rows = np.searchsorted(ends_n, middle[some]).clip(max=len(a_n) - 1)
    columns = np.searchsorted(ends_k, middle[some]).clip(max=len(b_k) - 1)
    return csr_array(plan + coo_array((mass[some], (rows, columns)), shape=plan.shape).tocsr())


def _setting(settings: Mapping, key: str) -> float:
    return settings.get(key, DEFAULTS[key])


def _quiet() -> None:
    # once and for all: catch_warnings would restore the filters of another thread
    warnings.filterwarnings("ignore", message="numItermax reached before optimality")


def _stopped(solver: str, iterations: int, why: object) -> str:
    return (
        f"the {solver} transport stopped early with ffn.transport.iterations = {iterations}:"
        f" {str(why).splitlines()[0]} (allowed: more iterations)"
    )
