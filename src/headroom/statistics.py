"""Intervals and paired tests, in float64 NumPy with an explicit seed.

Resampling is over documents, the units that were drawn independently; tokens of one document are
not. One document has no interval, so two are asked for.
"""

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from headroom.errors import InputError

Transform = Callable[[np.ndarray], np.ndarray]  # of a ratio


class Interval(NamedTuple):
    """A point estimate and the bounds of its confidence interval, in the estimate's own unit."""

    value: float
    low: float
    high: float


def resampled_sums(columns_nC: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Column sums of bootstrap samples of the rows.

    S_r = Σ_i w_ri · columns_i with w_r multinomial(n; 1/n, …, 1/n). Row r depends on the seed, n
    and r alone, so calls with the same seed and n see the same resamples (what pairing needs).

    Args:
        columns_nC: one row a document.
        resamples: R, the number of bootstrap samples.

    Returns:
        float64 (R, C).

    Raises:
        InputError: with fewer than two documents or resamples.
    """
    n = len(columns_nC)
    if n < 2:
        raise InputError(f"an interval over documents needs at least 2 documents (found {n})")
    if resamples < 2:
        raise InputError(f"evaluation.resamples is {resamples} (allowed: at least 2)")
    rng = np.random.default_rng(seed)
    weights = (np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(resamples))
    return np.stack([weight @ columns_nC for weight in weights])


def bootstrap_ratio(
    numerator: np.ndarray,
    denominator: np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    transform: Transform | None = None,
) -> Interval:
    """Percentile bootstrap of transform(Σ numerator / Σ denominator) over documents.

    Args:
        numerator: a sum per document (total NLL in nats, correct tokens).
        denominator: its weight per document (tokens); documents of weight 0 are left out.
        confidence: of the two-sided interval, in (0, 1).
        transform: monotone; ``np.exp`` makes a perplexity of a mean NLL.

    Raises:
        InputError: with fewer than two documents that hold a token.
    """
    columns = _columns(numerator, denominator)
    columns = columns[columns[:, 1] > 0]
    every = np.vstack([columns.sum(0), resampled_sums(columns, resamples, seed)])
    ratio = _ratio(*every.T, transform)
    return interval(ratio[0], ratio[1:], confidence)


def paired_bootstrap_ratio_difference(
    before: np.ndarray,
    after: np.ndarray,
    denominator: np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    transform: Transform | None = None,
    relative: bool = False,
) -> Interval | None:
    """Bootstrap of t(Σ after / Σ w) − t(Σ before / Σ w) on the same resamples of documents.

    Both systems were scored on the same tokens, so the document effect cancels and the interval is
    far narrower than that of the difference of two unpaired estimates.

    Args:
        before, after: a sum per document of the original and of the changed system.
        denominator: w, tokens per document; documents of weight 0 are left out.
        transform: monotone; ``np.exp`` makes a perplexity of a mean NLL.
        relative: divide the difference by t(Σ before / Σ w) (1 = 100 %). Resamples where that is 0
            are left out.

    Returns:
        None where the change is relative to 0.

    Raises:
        InputError: with fewer than two documents that hold a token.
    """
    columns = _columns(before, after, denominator)
    columns = columns[columns[:, 2] > 0]
    every = np.vstack([columns.sum(0), resampled_sums(columns, resamples, seed)])
    base, changed = _ratio(every[:, 0], every[:, 2], transform), _ratio(*every.T[1:], transform)
    change = changed - base
    if relative:
        if base[0] == 0:
            return None
        change = change[base != 0] / base[base != 0]
    return interval(change[0], change[1:], confidence)


def seeded_loss_difference(
    first_SN: np.ndarray,
    second_SN: np.ndarray,
    tokens_N: np.ndarray,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Bootstrap over documents and seeds of what ``second`` loses more, in nats a token.

    mean_s d_s with d_s = Σ_i (second_si − first_si) / Σ_i tokens_i. A resample draws documents i
    and, independently, seeds s with replacement, the same ones for both systems: seed s calibrated
    both on the same text, and all were scored on the same documents. One seed leaves only the
    documents' spread. A bootstrap over S seeds holds (S − 1)/S of their variance, so that at three
    it is too narrow: read it with the signs of the single d_s.

    Args:
        first_SN, second_SN: sums of nll (nats) by seed and document.
        tokens_N: predicted tokens by document; documents without any are left out.

    Raises:
        InputError: with fewer than two documents that hold a token.
    """
    difference_SN = np.asarray(second_SN, np.float64) - np.asarray(first_SN, np.float64)
    columns = _columns(*difference_SN, tokens_N)
    columns = columns[columns[:, -1] > 0]
    every = np.vstack([columns.sum(0), resampled_sums(columns, resamples, seed)])
    return interval_over_seeds(every[:, :-1] / every[:, -1:], seed, confidence)


def interval_over_seeds(every_RS: np.ndarray, seed: int, confidence: float) -> Interval:
    """Interval of a mean over seeds, seeds drawn with replacement in each resample.

    Args:
        every_RS: (1 + R, S), the estimate of each seed first, then its resamples.
        seed: of the draw.
    """
    resamples, seeds = len(every_RS) - 1, every_RS.shape[1]
    chosen_RS = np.random.default_rng((seed, seeds)).integers(seeds, size=(resamples, seeds))
    samples = np.take_along_axis(every_RS[1:], chosen_RS, axis=1).mean(1)
    return interval(every_RS[0].mean(), samples, confidence)


def verdict(difference: Interval, by_seed: Sequence[float]) -> str:
    """Return ``better``, ``worse`` or ``undecided``.

    Better where the interval of the difference lies above 0 and every seed's own difference does,
    worse alike below: the interval alone is too narrow at a few seeds.
    """
    for name, sign in (("better", 1), ("worse", -1)):
        if all(sign * value > 0 for value in (difference.low, difference.high, *by_seed)):
            return name
    return "undecided"


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion.

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n), p = k/n (Wilson 1927). Inside [0, 1], and of
    positive width even at k = 0 or n.

    Raises:
        InputError: without 0 ≤ k ≤ n, n > 0.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise InputError(f"a proportion of {successes} in {trials} (allowed: 0 <= k <= n, n > 0)")
    p, z = successes / trials, normal_quantile(confidence)
    centre = p + z * z / (2 * trials)
    half = z * (p * (1 - p) / trials + z * z / (4 * trials * trials)) ** 0.5
    scale = 1 + z * z / trials
    return Interval(p, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))


def normal_quantile(confidence: float) -> float:
    """z with P(|N(0, 1)| ≤ z) = confidence.

    Raises:
        InputError: outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise InputError(f"evaluation.confidence is {confidence} (allowed: between 0 and 1)")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _columns(*arrays: np.ndarray) -> np.ndarray:
    columns = [np.asarray(array, dtype=np.float64) for array in arrays]
    if len({column.shape for column in columns}) > 1 or columns[0].ndim != 1:
        raise ValueError(f"one value a document each; shapes {[c.shape for c in columns]}")
    return np.stack(columns, axis=1)


def _ratio(numerator: np.ndarray, denominator: np.ndarray, transform: Transform | None):
    ratio = numerator / denominator
    return ratio if transform is None else transform(ratio)


def interval(value: float, samples: np.ndarray, confidence: float) -> Interval:
    """Percentile interval of an estimate from its resamples."""
    normal_quantile(confidence)  # the range check
    tail = (1 - confidence) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return Interval(float(value), float(low), float(high))
