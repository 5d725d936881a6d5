"""Tables of the gates study: every run, and every way to the same number of heads over its seeds.

A run is held against the λ = 0 control of its seed, which trained as long, and against the
translator that it started from; a control against the gated run with as many heads.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from headroom.evaluation.translation import COUNTS, bleu_difference, bleu_interval
from headroom.gates.methods import UNTOUCHED, styles
from headroom.recipes import Gate, canonical, parse_step
from headroom.statistics import Interval, verdict

CONTROL = f"l{canonical(0)}"


def method_of(step: str) -> tuple[str, float, int | None, int]:
    """Return a step's method, λ (or NaN), number of heads asked for (or None) and seed."""
    if not step:
        return UNTOUCHED, np.nan, None, 0
    parsed = parse_step(step)
    seed = int(parsed.resolved("seed")[1:])
    if not isinstance(parsed, Gate):
        return parsed.choice, np.nan, int(parsed.count[1:]), seed
    if parsed.strength.startswith("l"):
        return "lambda", float(parsed.strength[1:]), None, seed
    return "target", np.nan, int(parsed.strength[1:]), seed


def runs_table(
    scores: Mapping[str, Mapping],
    counts: Mapping[str, pd.DataFrame],
    removals: Mapping[str, Mapping],
    beams: int,
    bootstrap: Mapping,
) -> pd.DataFrame:
    """Return a row a run, the untouched translator first.

    Args:
        scores: of each step ("" is the translator), as the translation job writes them.
        counts: sentence counts of each step, a row a sentence and beam size.
        removals: what was removed, by step.
        beams: whose translations are compared.
        bootstrap: resamples, confidence and seed.
    """
    sentences = {step: counts_of(table, beams) for step, table in counts.items()}
    any_removal = next(iter(removals.values()))
    rows = []
    for step in sentences:
        method, strength, _, seed = method_of(step)
        found = scores[step][f"beam{beams}"]
        row = {"step": step, "method": method, "strength": strength, "seed": seed}
        row |= _interval("bleu", bleu_interval(sentences[step], bootstrap))
        row |= {"chrf": found["chrf"], "signature": found["bleu_signature"]}
        if step:
            removal = removals[step]
            row |= {name: removal[name] for name in ("open_heads", "heads", "parameters", "flops")}
        else:
            row |= {"open_heads": any_removal["heads"], "heads": any_removal["heads"]}
            row |= {name: any_removal[f"{name}_before"] for name in ("parameters", "flops")}
        against = control_of(step, sentences)
        if against is not None:
            change = bleu_difference(sentences[against][None], sentences[step][None], bootstrap)
            row |= _interval("difference", change)
            row["verdict"] = verdict(change, [change.value])
        rows.append(row)
    wanted = ["difference", "difference_low", "difference_high", "verdict"]
    return pd.DataFrame(rows).reindex(columns=[*dict.fromkeys([*rows[0], *wanted])])


def control_of(step: str, steps: Mapping) -> str | None:
    """Return the λ = 0 control of a run's seed; None of a control itself and of the translator."""
    method, strength, _, seed = method_of(step)
    if method == UNTOUCHED or strength == 0:
        return None
    name = f"gate-{CONTROL}" + (f"-s{seed}" if seed else "")
    return name if name in steps else None


def counts_of(table: pd.DataFrame, beams: int) -> np.ndarray:
    """Return the counts (N, 10) of the translations with one beam size, in sentence order."""
    rows = table[table.beams == beams].sort_values("sentence")
    return rows[list(COUNTS)].to_numpy()


def methods_table(
    runs: pd.DataFrame, counts: Mapping[str, pd.DataFrame], beams: int, bootstrap: Mapping
) -> pd.DataFrame:
    """Return a row a method: heads left, mean BLEU, and three paired differences over its seeds.

    ``translator``: minus the untouched one. ``control``: minus the λ = 0 control. ``gated``: minus
    the gated run that ends with as many heads. Intervals are over sentences and seeds; a verdict
    also needs the sign of every seed.
    """
    sentences = {step: counts_of(table, beams) for step, table in counts.items()}
    groups: dict[tuple, list[str]] = {}
    for step in sorted(sentences, key=lambda step: method_of(step)[3]):  # seeds are paired by place
        method, strength, count, _ = method_of(step)
        key = (method, None if np.isnan(strength) else strength, count)
        groups.setdefault(key, []).append(step)
    by_step = runs.set_index("step")
    rows = []
    for (method, strength, count), steps in groups.items():
        if method == UNTOUCHED:
            continue
        part = by_step.loc[steps]
        row = {
            "method": method,
            "strength": strength,
            "seeds": len(steps),
            "heads_low": part.open_heads.min(),
            "heads_high": part.open_heads.max(),
            "heads": part.heads.iloc[0],
            "bleu": part.bleu.mean(),
            "chrf": part.chrf.mean(),
        }
        others = {
            "translator": [""],
            "control": groups.get(("lambda", 0.0, None), []) if strength != 0 else [],
            "gated": groups.get(("target", None, count), []) if method != "target" else [],
        }
        for name, other in others.items():
            if other and (name != "gated" or count is not None):
                row |= _difference(name, other, steps, sentences, bootstrap)
        rows.append(row)
    return pd.DataFrame(rows)


def _difference(
    name: str, first: Sequence[str], second: Sequence[str], sentences: Mapping, bootstrap: Mapping
) -> dict:
    """What the second runs have more than the first, seed by seed."""
    before, after = (np.stack([sentences[step] for step in steps]) for steps in (first, second))
    change = bleu_difference(before, after, bootstrap)
    single = [
        bleu_difference(before[[place % len(before)]], after[[place]], _once(bootstrap)).value
        for place in range(len(after))
    ]
    return _interval(name, change) | {f"{name}_verdict": verdict(change, single)}


def _once(bootstrap: Mapping) -> dict:
    """The cheapest resampling: only the estimate is read."""
    return {**bootstrap, "resamples": 2}


def _interval(name: str, found: Interval) -> dict[str, float]:
    return {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}


def describe(scores: Mapping[str, Mapping], beams: int, bootstrap: Mapping) -> str:
    """Return the evaluation setting of all runs in words.

    Raises:
        ValueError: if runs were scored differently.
    """
    found = {(s[f"beam{beams}"]["bleu_signature"], s["sentences"]) for s in scores.values()}
    if len(found) > 1:
        raise ValueError(f"runs were scored in different settings: {sorted(found)}")
    signature, sentences = found.pop()
    return (
        f"{sentences} held-out test sentences, beam {beams}, {signature}; "
        f"{bootstrap['confidence']:.0%} intervals over sentences"
    )


def methods_html(methods: pd.DataFrame) -> str:
    """Return the table of methods as HTML."""

    words = {name: style[0] for name, style in styles(methods.method).items()}

    def heads(row) -> str:
        low, high = int(row.heads_low), int(row.heads_high)
        return (f"{low}" if low == high else f"{low}–{high}") + f" of {int(row.heads)}"

    def change(row, name: str) -> str:
        if name not in row or pd.isna(row[name]):
            return ""
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        told = f"{row[name]:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−")
        return f"{told} {row[f'{name}_verdict']}"

    rows = [
        {
            "heads chosen by": words[row.method]
            + (f" = {row.strength:g}" if row.method == "lambda" else ""),
            "seeds": row.seeds,
            "heads left": heads(row),
            "BLEU": f"{row.bleu:.2f}",
            "chrF": f"{row.chrf:.2f}",
            "minus the λ = 0 control": change(row, "control"),
            "minus the untouched translator": change(row, "translator"),
            "minus gates with as many heads": change(row, "gated"),
        }
        for _, row in methods.iterrows()
    ]
    return pd.DataFrame(rows).to_html(index=False, border=0)
