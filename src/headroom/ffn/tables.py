"""Tables of the ffn study: a row for the dense model and each pruning, and what beats what.

A sweep's documents are a table a calibration seed: step (``dense`` or a recipe step without its
seed), document, nll (a sum, nats), tokens, correct, parameters, ffn_parameters and
effective_parameters. S seeds, N documents.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from headroom.errors import InputError
from headroom.ffn.families import DENSE, baseline
from headroom.pages import page
from headroom.recipes import parse_step
from headroom.statistics import seeded_loss_difference, verdict

FIELDS = ("score", "fusion", "selection", "ratio", "strategy", "cost", "solver")
SETTING = ("corpus", "split", "window", "windows", "choice", "boundary", "dtype")
SIZES = ("ffn_parameters", "effective_parameters")
SHOWN = {
    "step": "step",
    "perplexity": "perplexity",
    "spread": "over seeds",
    "change": "change of perplexity (%)",
    "accuracy": "accuracy",
    "ffn_parameters_percent_removed": "FFN parameters removed (%)",
    "parameters_percent_removed": "parameters removed (%)",
    "seeds": "seeds",
}
CHANGES = tuple(f"perplexity_change_percent{end}" for end in ("", "_low", "_high"))
ENOUGH = 10  # documents that an interval over them needs to say something
FEW = (
    "Only {} documents were read: intervals over so few say little "
    "(evaluation.choice: spread, or more evaluation.sequences, reads more)."
)


def step_fields(step: str) -> dict:
    """Return what a step is made of; strategy, cost and solver are empty without a transport.

    selection is as written (``r0.30``), ratio its number.
    """
    if step == DENSE:
        return dict.fromkeys(FIELDS, "") | {"ratio": 0.0}
    parsed = parse_step(step)
    transport = {
        name: parsed.resolved(name) if transports(parsed.fusion) else ""
        for name in ("strategy", "cost", "solver")
    }
    return {
        "score": parsed.score,
        "fusion": parsed.fusion,
        "selection": parsed.ratio,
        "ratio": float(parsed.ratio[1:]),
    } | transport


def transports(fusion: str) -> bool:
    """Return whether a fusion moves pruned channels by a transport plan."""
    return fusion.startswith("ot_")


class Losses:
    """Sums of nll and of correct tokens by seed, step and document, on the same documents."""

    def __init__(self, documents: Mapping[int, pd.DataFrame]):
        self.nll: dict[int, pd.DataFrame] = {}
        self.correct: dict[int, pd.Series] = {}
        self.sizes: dict[int, pd.DataFrame] = {}
        tokens = None
        for seed, table in documents.items():
            self.nll[seed] = table.pivot(index="document", columns="step", values="nll")
            self.correct[seed] = table.groupby("step").correct.sum()
            self.sizes[seed] = table.groupby("step")[list(SIZES)].max()
            found = table.pivot(index="document", columns="step", values="tokens")
            tokens = found[DENSE] if tokens is None else tokens
            if not found.index.equals(tokens.index) or not found.eq(tokens, axis=0).all(axis=None):
                raise InputError(
                    f"a table can't mix evaluation settings: seed {seed} or a step of it was "
                    f"scored on other documents or tokens"
                )
        self.tokens = tokens
        self.steps = list(dict.fromkeys(s for table in documents.values() for s in table.step))

    def seeds(self, *steps: str) -> list[int]:
        """Return the seeds that hold all of these steps."""
        return [seed for seed, nll in self.nll.items() if {*steps} <= {*nll.columns}]

    def sums(self, step: str, seeds: Sequence[int]) -> np.ndarray:
        """Return a step's sums of nll, (S, N)."""
        return np.stack([self.nll[seed][step].to_numpy(float) for seed in seeds])

    def by_seed(self, step: str, seeds: Sequence[int]) -> np.ndarray:
        """Return a step's mean nll, nats a token, (S,)."""
        return self.sums(step, seeds).sum(1) / self.tokens.sum()


def one_setting(settings: Mapping[int, Mapping]) -> Mapping:
    """Return the evaluation setting that all calibration seeds share.

    Raises:
        InputError: if the seeds mix settings.
    """
    first = next(iter(settings.values()))
    for setting in settings.values():
        names = sorted(k for k in {*first, *setting} if first.get(k) != setting.get(k))
        if names:
            raise InputError(
                f"a table can't mix evaluation settings: {', '.join(names)} differ over "
                f"calibration seeds"
            )
    return first


def describe(settings: Mapping[int, Mapping]) -> str:
    """Return the evaluation setting in words, for titles.

    Raises:
        InputError: if the calibration seeds mix settings.
    """
    one, seeds = one_setting(settings), sorted(settings)
    names = ", ".join(map(str, seeds))
    several = "s" if len(seeds) > 1 else ""
    return (
        f"{one['corpus']}, {one['split']} split: {one['windows']} windows of {one['window']} "
        f"tokens in {one['documents']} documents, {one['dtype']}, calibration seed{several} {names}"
    )


def describe_heldout(settings: Mapping[int, Mapping]) -> str:
    """Return in words what functional rescue is measured on."""
    count, window = one_setting(settings)["heldout"]
    names = ", ".join(map(str, sorted(settings)))
    return (
        f"first {count} held-out windows of {window} tokens of the calibration corpus, "
        f"calibration seeds {names}"
    )


def table(
    documents: Mapping[int, pd.DataFrame],
    settings: Mapping[int, Mapping],
    bootstrap: Mapping,
) -> pd.DataFrame:
    """Return the dense model's row and one for each step, over calibration seeds.

    perplexity = exp(mean_s Σ nll / Σ tokens), the geometric mean over seeds; _min and _max are the
    seeds' own. The change is against dense, with a bootstrap over documents and seeds. Shares
    removed count effective parameters, so that channels that only pad a layer are gone.

    Args:
        documents: the sweep's documents, by seed.
        settings: what each seed was evaluated on; equal, else InputError.
        bootstrap: resamples, confidence, seed.

    Raises:
        InputError: if the seeds mix evaluation settings.
    """
    setting = one_setting(settings)
    losses = Losses(documents)
    steps = [DENSE, *(step for step in losses.steps if step != DENSE)]
    rows = [_row(losses, step, bootstrap) for step in steps]
    return pd.DataFrame(rows).assign(**{name: setting.get(name) for name in SETTING})


def _row(losses: Losses, step: str, bootstrap: Mapping) -> dict:
    seeds = losses.seeds(step, DENSE)
    mean_S = losses.by_seed(step, seeds)
    pair = losses.sums(DENSE, seeds), losses.sums(step, seeds)
    change = seeded_loss_difference(*pair, losses.tokens.to_numpy(), **bootstrap)
    # exp is monotone, so it takes the bounds of a difference of nll to those of a ratio.
    percents = [100 * math.expm1(value) for value in change]
    sizes = [losses.sizes[seed].loc[[DENSE, step]].to_numpy(float) for seed in seeds]
    (ffn, effective), (_, left) = np.mean(sizes, axis=0)
    total = int(losses.tokens.sum())
    return {
        "step": step,
        **step_fields(step),
        "seeds": len(seeds),
        "perplexity": float(np.exp(mean_S.mean())),
        "perplexity_min": float(np.exp(mean_S.min())),
        "perplexity_max": float(np.exp(mean_S.max())),
        **dict(zip(CHANGES, percents, strict=True)),
        "accuracy": float(np.mean([losses.correct[seed][step] / total for seed in seeds])),
        "effective_parameters": left,
        "ffn_parameters_percent_removed": 100 * (effective - left) / ffn,
        "parameters_percent_removed": 100 * (effective - left) / effective,
        "documents": len(losses.tokens),
        "tokens": total,
    }


def verdicts(documents: Mapping[int, pd.DataFrame], bootstrap: Mapping) -> pd.DataFrame:
    """Return for each step whose baseline is in the sweep too whether it does less damage.

    difference = mean over seeds of (nll of the baseline − nll of the step), nats a token: positive
    is better. *better* where the interval lies above zero and every seed's own difference does;
    *worse* alike below; else *undecided*. Steps without a baseline in the sweep have no row.

    Args:
        documents: the sweep's documents, by seed.
        bootstrap: resamples, confidence, seed.
    """
    losses, rows = Losses(documents), []
    for step in losses.steps:
        other = baseline(step)
        if not (seeds := losses.seeds(step, other or step)) or other is None:
            continue
        pair = losses.sums(step, seeds), losses.sums(other, seeds)
        found = seeded_loss_difference(*pair, losses.tokens.to_numpy(), **bootstrap)
        own_S = losses.by_seed(other, seeds) - losses.by_seed(step, seeds)
        names = {"step": step, "baseline": other, "difference": found.value}
        bounds = {"low": found.low, "high": found.high, "seeds": len(seeds)}
        rows.append(names | bounds | {"verdict": verdict(found, own_S)})
    columns = ("step", "baseline", "difference", "low", "high", "seeds", "verdict")
    return pd.DataFrame(rows, columns=list(columns))


def without_baseline(steps: Iterable[str]) -> list[str]:
    """Return the steps that have a baseline to beat which isn't among the steps."""
    known = list(steps)
    return [step for step in known if (other := baseline(step)) and other not in known]


def summary(verdicts: pd.DataFrame, bootstrap: Mapping, documents: int) -> str:
    """Return in a sentence or two how many transports beat their baseline."""
    of = verdicts[[transports(step_fields(step)["fusion"]) for step in verdicts.step]]
    if of.empty:
        return "No transport was compared with a baseline of the same keep set."
    better, worse, open_ = (
        int((of.verdict == name).sum()) for name in ("better", "worse", "undecided")
    )
    chance, fewest = len(of) * (1 - bootstrap["confidence"]) / 2, of.seeds.min()
    seeds = f"{fewest}{' or more' if of.seeds.max() > fewest else ''} calibration seed"
    return (
        f"Transport beat its baseline in {better} of {len(of)} comparisons, lost to it in {worse}; "
        f"{open_} undecided. By chance alone, about {chance:.1f} of as many intervals would favour "
        f"it. Each comparison rests on {seeds}{'' if fewest == 1 else 's'}"
        + (", too few to tell a method from its calibration text." if fewest == 1 else ".")
        + (f" {FEW.format(documents)}" if documents < ENOUGH else "")
    )


def as_html(
    table: pd.DataFrame,
    verdicts: pd.DataFrame,
    settings: Mapping[int, Mapping],
    bootstrap: Mapping,
) -> str:
    """Return table and verdicts as a page of its own, the finding first.

    Raises:
        InputError: if the calibration seeds mix settings.
    """
    setting = one_setting(settings)
    percent = f"{100 * bootstrap['confidence']:g} %"
    finding = summary(verdicts, bootstrap, table.documents.iloc[0])
    return page(
        "Pruned FFN channels",
        f"<h2>Pruned FFN channels</h2><p><b>{finding}</b></p>",
        f"<p>{describe(settings)}; {table.tokens.iloc[0]} predicted tokens, boundary token: "
        f"{setting['boundary']}. Perplexity is the geometric mean over "
        f"calibration seeds, weighted by tokens; changes have {percent} intervals over "
        f"documents and seeds. Parameters are effective ones.</p>",
        _shown(table).to_html(index=False, border=0, na_rep=""),
        "<h2>What beats its baseline?</h2><p>The same channels stay in both. A transport has to "
        "beat dropping the rest, a transport with a refit that refit alone. Difference: nats a "
        "token saved, positive is better. Better: the interval and every seed's own difference "
        "lie above zero.</p>",
        _compared(table, verdicts).to_html(index=False, border=0, na_rep=""),
    )


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    spread = [f"{r.perplexity_min:.3f}–{r.perplexity_max:.3f}" for r in table.itertuples()]
    shown = table.assign(spread=spread, change=_bounded(table, CHANGES, "{:+.2f}"))
    for name, digits in (("perplexity", 3), ("accuracy", 4)):
        shown[name] = table[name].map(f"{{:.{digits}f}}".format)
    for name in ("ffn_parameters_percent_removed", "parameters_percent_removed"):
        shown[name] = table[name].map("{:.2f}".format)
    return shown[list(SHOWN)].rename(columns=SHOWN)


def _bounded(table: pd.DataFrame, columns: Sequence[str], form: str) -> list[str]:
    values = zip(*(table[column] for column in columns), strict=True)
    return [f"{form} [{form}, {form}]".format(*three) for three in values]


def _compared(table: pd.DataFrame, verdicts: pd.DataFrame) -> pd.DataFrame:
    """The verdicts, and below them the steps that nothing in the sweep can be held against."""
    missing = without_baseline(table.step)
    saved, bounds = "difference (nats a token)", ("difference", "low", "high")
    rows = verdicts.assign(**{saved: _bounded(verdicts, bounds, "{:+.4f}")})
    alone = [{"step": step, "baseline": baseline(step)} for step in missing]
    lone = pd.DataFrame(alone, columns=["step", "baseline"]).assign(verdict="no baseline")
    every = pd.concat([rows, lone])[["step", "baseline", saved, "seeds", "verdict"]]
    return every.assign(seeds=[f"{n:.0f}" if pd.notna(n) else "" for n in every.seeds])
