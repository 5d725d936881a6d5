"""Marginals of the transport: how much mass each channel brings, how much each kept one takes.

Shapes: n channels of a layer, k kept ones. Only numpy here, in float64, so that the grammar and
jobs that read plans stay light. Your own distribution is one function and one registry entry.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from headroom.errors import InputError

SOURCE_TEMPERATURE = 0.5
TARGET_TEMPERATURE = 1.0
FLOOR = 1e-6  # of the uniform share 1/n: what a softmax underflow is raised to
TIE = 1e-9  # costs this close count as equally near
ENTROPY = 0.1  # weight of the entropy term
CHUNK = 2**24  # elements of a cost matrix looked at in one go


@dataclass(frozen=True)
class Evidence:
    """What is known of a layer's n channels.

    ``score_n`` is the selection's importance (higher is more important); ``statistics`` the
    weight-level ones of both gradients, ``fo.max``, ``snip.p95``, …, empty where not measured.
    """

    score_n: np.ndarray
    statistics: Mapping[str, np.ndarray] = field(default_factory=dict)

    def of(self, statistic: str) -> np.ndarray:
        """Return one statistic (n,) in float64; InputError where it was not measured."""
        if statistic not in self.statistics:
            raise InputError(
                f"the channel statistic {statistic!r} was not measured (allowed: a distribution of"
                " DISTRIBUTIONS, or one of GRADIENT_DISTRIBUTIONS after the gradients' job)"
            )
        return np.asarray(self.statistics[statistic], dtype=np.float64)

    def sum_of(self, statistic: str) -> np.ndarray:
        """Return FO + SNIP of one statistic, as they are."""
        return self.of(f"fo.{statistic}") + self.of(f"snip.{statistic}")


# evidence, the blend's name, temperature -> n shares; the floor comes after
Distribution = Callable[[Evidence, str, float], np.ndarray]


@dataclass(frozen=True)
class Strategy:
    """Which distribution the sources follow, which the targets, and of which blended score."""

    source: str
    target: str
    blend: str = "comprehensive"


def standardised(x_n: np.ndarray) -> np.ndarray:
    """Return z(x) = (x − mean) / std with the unbiased std; zero where all entries are equal."""
    x_n = np.asarray(x_n, dtype=np.float64)
    centred_n = x_n - x_n.mean()
    spread = np.sqrt(np.square(centred_n).sum() / max(len(x_n) - 1, 1))
    # the mean of equal numbers is not always that number: a std of rounding errors is none
    if spread <= 1e-14 * np.abs(x_n).max(initial=0):
        return np.zeros_like(x_n)
    return centred_n / spread


def softmax(x_n: np.ndarray) -> np.ndarray:
    """Return exp(x) / Σ exp(x). Entries 745 below the largest underflow to zero (hence FLOOR)."""
    exponential_n = np.exp(x_n - x_n.max())
    return exponential_n / exponential_n.sum()


def blended(evidence: Evidence, blend: str) -> np.ndarray:
    """Return I = z(Σ w · FO statistic) + z(Σ w · SNIP statistic) with the weights of a blend."""
    return sum(
        standardised(sum(w * evidence.of(f"{of}.{name}") for name, w in BLENDS[blend].items()))
        for of in ("fo", "snip")
    )


def uniform(evidence: Evidence, blend: str, temperature: float) -> np.ndarray:
    """Return 1 / n each."""
    return np.full(len(evidence.score_n), 1 / len(evidence.score_n))


def importance(evidence: Evidence, blend: str, temperature: float) -> np.ndarray:
    """Return s / Σ s of the selection's score, shifted by its minimum where that is negative."""
    score_n = np.asarray(evidence.score_n, dtype=np.float64)
    score_n = score_n - min(score_n.min(), 0)
    total = score_n.sum()
    return uniform(evidence, blend, temperature) if total == 0 else score_n / total


def weight_aware(evidence: Evidence, blend: str, temperature: float) -> np.ndarray:
    """Return softmax(z(FOmax + .5 FOstd) + z(SNmax + .5 SNstd) + .3 z(FOimp + SNimp))."""
    peaks = [
        standardised(evidence.of(f"{of}.max") + 0.5 * evidence.of(f"{of}.std"))
        for of in ("fo", "snip")
    ]
    return softmax(sum(peaks) + 0.3 * standardised(evidence.sum_of("important_ratio")))


def max_preserving(evidence: Evidence, blend: str, temperature: float) -> np.ndarray:
    """Return softmax(FOmax + SNmax), raw: near uniform where |w · ∂L/∂w| is far below 1."""
    return softmax(evidence.sum_of("max"))


def diversity_aware(evidence: Evidence, blend: str, temperature: float) -> np.ndarray:
    """Return softmax(FOstd + SNstd + FOimp + SNimp), raw."""
    return softmax(evidence.sum_of("std") + evidence.sum_of("important_ratio"))


def adaptive(evidence: Evidence, blend: str, temperature: float) -> np.ndarray:
    """Return softmax(I / (T (1 + std I))) of the blended score I, std unbiased."""
    score_n = blended(evidence, blend)
    spread = score_n.std(ddof=1) if len(score_n) > 1 else 0.0
    return softmax(score_n / (temperature * (1 + spread)))


def robust(evidence: Evidence, blend: str, temperature: float) -> np.ndarray:
    """Return softmax(rank / T) of the blended score, ranks 0 (least) to n − 1, ties their mean.

    A rank below the largest costs a factor exp(1/T): at T = .5 about 370 channels, at T = 1 about
    750 are above zero and hardly 20 matter; the floor keeps the others' weights finite.
    """
    _, place_n, count = np.unique(blended(evidence, blend), return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - count + (count - 1) / 2
    return softmax(rank[place_n] / temperature)


def entropy_regularized(evidence: Evidence, blend: str, temperature: float) -> np.ndarray:
    """Return softmax((I − .1 p0 log(p0 + 1e-8)) / T) with p0 = softmax(I / T)."""
    score_n = blended(evidence, blend)
    p0_n = softmax(score_n / temperature)
    return softmax((score_n - ENTROPY * p0_n * np.log(p0_n + 1e-8)) / temperature)


DISTRIBUTIONS: dict[str, Distribution] = {
    "uniform": uniform,
    "importance": importance,
}
# those that read Evidence.statistics, hence need the gradients' job
GRADIENT_DISTRIBUTIONS: dict[str, Distribution] = {
    "weight_aware": weight_aware,
    "max_preserving": max_preserving,
    "diversity_aware": diversity_aware,
    "adaptive": adaptive,
    "robust": robust,
    "entropy_regularized": entropy_regularized,
}
BLENDS: dict[str, dict[str, float]] = {
    "comprehensive": {
        "max": 0.2,
        "mean": 0.15,
        "p95": 0.2,
        "consistency": 0.15,
        "structural": 0.15,
        "mutual": 0.15,
    },
    "conservative": {"max": 0.4, "consistency": 0.3, "p95": 0.3},
    "balanced": {"max": 0.4, "mean": 0.3, "structural": 0.3},
}
# A distribution's own name is a strategy too (source and target alike), as is any SOURCE_to_TARGET.
# comprehensive, conservative and balanced are what the seed calls strategy_idx 0, 1 and 2.
STRATEGIES: dict[str, Strategy] = {
    "pushforward": Strategy("uniform", "pushforward"),
    "comprehensive": Strategy("entropy_regularized", "adaptive", "comprehensive"),
    "conservative": Strategy("robust", "adaptive", "conservative"),
    "balanced": Strategy("adaptive", "robust", "balanced"),
}


def resolve(name: str) -> Strategy:
    """Return the strategy of a name: of STRATEGIES, of a distribution, ``{source}_to_{target}``.

    Raises:
        InputError: if it is none of them.
    """
    if name in STRATEGIES:
        return STRATEGIES[name]
    known = [*DISTRIBUTIONS, *GRADIENT_DISTRIBUTIONS]
    if name in known:
        return Strategy(name, name)
    source, _, target = name.partition("_to_")
    if source in known and target in (*known, "pushforward"):
        return Strategy(source, target)
    raise InputError(
        f"ffn strategy {name!r} is unknown (allowed: {', '.join([*STRATEGIES, *known])}, or"
        " SOURCE_to_TARGET of the distributions; pushforward only as TARGET)"
    )


def needs_gradients(name: str) -> bool:
    """Say whether a strategy reads the gradients' statistics.

    Raises:
        InputError: if the strategy is unknown.
    """
    strategy = resolve(name)
    return not GRADIENT_DISTRIBUTIONS.keys().isdisjoint((strategy.source, strategy.target))


def nearest(cost_nk: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each channel's nearest kept channels: (rows, columns, shares), sorted by row.

    Those within 1e-9 of a row's least cost share it equally, so shares of a row add up to one.
    """
    n, k = cost_nk.shape
    step = max(1, CHUNK // k)
    found = []
    for start in range(0, n, step):
        part = cost_nk[start : start + step]
        near = part <= part.min(1, keepdims=True) + TIE
        rows, columns = np.nonzero(near)
        found.append((rows + start, columns, 1 / near.sum(1)[rows]))
    rows, columns, shares = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rows, columns, shares


def pushforward(a_n: np.ndarray, cost_nk: np.ndarray) -> np.ndarray:
    """Return b_j = Σ a_i over the sources whose nearest kept channel is j, ties split equally.

    The one target that is lossless on any set of duplicates: each kept channel takes the mass of
    what it stands for.
    """
    rows, columns, shares = nearest(cost_nk)
    return np.bincount(columns, a_n[rows] * shares, minlength=cost_nk.shape[1])


def marginals(
    name: str, evidence: Evidence, kept_k: np.ndarray, cost_nk: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (a_n, b_k), the masses that a strategy gives to the sources and to the targets.

    A distribution is floored at 1e-6 / n and renormalised before the kept channels' part is taken
    (and renormalised), so both are positive and finite and sum to one.

    Args:
        name: a strategy's name (see ``resolve``).
        evidence: of the layer.
        kept_k: the kept channels' numbers, in the order of the cost's columns.
        cost_nk: what moving a channel's mass to a kept one costs; only ``pushforward`` reads it.

    Raises:
        InputError: for an unknown strategy, a statistic that was not measured, and a distribution
            that isn't n finite, non-negative numbers.
    """
    strategy = resolve(name)
    a_n = _shares(name, strategy.source, strategy.blend, evidence, SOURCE_TEMPERATURE)
    if strategy.target == "pushforward":
        return a_n, _floored(pushforward(a_n, cost_nk), len(a_n))
    b_n = _shares(name, strategy.target, strategy.blend, evidence, TARGET_TEMPERATURE)
    b_k = b_n[np.asarray(kept_k)]
    return a_n, b_k / b_k.sum()


def _shares(
    name: str, distribution: str, blend: str, evidence: Evidence, temperature: float
) -> np.ndarray:
    """Return a distribution's n floored shares, or say which strategy went wrong."""
    function = {**DISTRIBUTIONS, **GRADIENT_DISTRIBUTIONS}[distribution]
    n = len(evidence.score_n)
    # overflow and NaN are found below, by name
    with np.errstate(all="ignore"):
        p_n = np.asarray(function(evidence, blend, temperature), dtype=np.float64)
    if p_n.shape != (n,):
        wrong = f"shape {p_n.shape}"
    elif not np.isfinite(p_n).all():
        wrong = "numbers that are not finite"
    elif p_n.min() < 0:
        wrong = "negative numbers"
    elif not 0 < p_n.sum() < np.inf:
        wrong = f"a sum of {p_n.sum():g}"
    else:
        return _floored(p_n, n)
    raise InputError(
        f"ffn strategy {name!r}: its distribution {distribution!r} gave {wrong} (allowed: {n}"
        " finite, non-negative numbers, not all zero)"
    )


def _floored(p: np.ndarray, n: int) -> np.ndarray:
    """Return shares of which none is below 1e-6 / n (up to the renormalisation, ≤ 1e-6 of it)."""
    share = p / p.sum()
    # what was floored and renormalised once stays as it is, so that pushed masses stay exact
    if share.min() >= FLOOR / n * (1 - 1e-5):
        return share
    share = np.maximum(share, FLOOR / n)
    return share / share.sum()
