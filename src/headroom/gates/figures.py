"""Figures of the gates study: pure functions from tables to matplotlib figures.

L layers (numbered from 1), H heads (from 1). p_open is the chance that a sampled gate is not 0; a
head is open where the gate of evaluation is above 0.
"""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
import pandas as pd

from headroom.gates.labels import write_beside
from headroom.gates.maps import (
    ATTENTIONS,
    attentions,
    cells,
    grid,
    open_bar,
    roles_key,
    roles_panel,
    write_gates,
)
from headroom.gates.methods import UNTOUCHED, styles
from headroom.plotting import COLOURS, MARKERS, NEUTRAL, figure

BESIDE = 8  # heads up to which roles of several attentions stand beside the maps, else below
CELL = 0.62  # inches


def curves(log: pd.DataFrame, reports: pd.DataFrame, title: str):
    """Draw losses, penalty, learning rates, BLEU, chrF and open heads against steps and epochs.

    Panels without data (no penalty, no gates) are left out.

    Args:
        log: step, loss (label-smoothed), nll, penalty (all nats a token), learning_rate and
            gate_learning_rate.
        reports: step, epoch, bleu, chrf, open_heads, heads; ``sentences`` where known.
        title: names translator, step and what was trained on.
    """
    lines = {"loss": "with label smoothing", "nll": "without (negative log-likelihood)"}
    rates = {"learning_rate": "weights", "gate_learning_rate": "gates"}
    wanted = [
        (log, lines, "cross-entropy (nats a token)", "training loss"),
        (log, {"penalty": ""}, "price of open heads (nats a token)", "λ · penalty, or Lagrangian"),
        (log, rates, "learning rate", "learning rates"),
        (reports, {"bleu": ""}, f"BLEU{_sentences(reports)}", "validation BLEU, greedy"),
        (reports, {"chrf": ""}, f"chrF{_sentences(reports)}", "validation chrF, greedy"),
        (reports, {"open_heads": ""}, "open heads", "heads with a gate above 0"),
    ]
    panels = [
        (table, {name: label for name, label in names.items() if _has(table, name)}, *words)
        for table, names, *words in wanted
    ]
    panels = [panel for panel in panels if panel[1]]
    columns = 2 if len(panels) == 4 else min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    fig, axes = figure(4.1 * columns, 3.2 * rows + 0.4, rows, columns)
    last = max([*log.step, *reports.step], default=1)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (table, names, label, head) in zip(axes.flat, panels, strict=False):
        _curve_panel(axis, table, names, label)
        axis.set_title(head)
        axis.set_xlim(-0.03 * last, 1.03 * last)
        _epochs(axis, reports)
    fig.suptitle(title, fontsize=12)
    return fig


def _has(table: pd.DataFrame, name: str) -> bool:
    return name in table and bool(pd.notna(table[name]).any())


def _sentences(reports: pd.DataFrame) -> str:
    return (
        f" (n = {int(reports.sentences.max()):,} sentences)" if _has(reports, "sentences") else ""
    )


def _curve_panel(axis, table: pd.DataFrame, names: Mapping[str, str], label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, (name, words) in enumerate(names.items()):
        style = {"color": COLOURS[number], "linewidth": 1.5, "linestyle": ("-", "--")[number]}
        if len(table) <= 30:
            style |= {"marker": MARKERS[number], "markersize": 4}
        known = table[pd.notna(table[name])]
        axis.plot(known.step, known[name].astype(float), **style, label=words)
    axis.set(xlabel="step", ylabel=label)
    axis.grid(alpha=0.25)
    axis.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if len(names) > 1:
        axis.legend(fontsize=8.5)
    if "open_heads" in names:
        heads = table.heads.max()
        axis.yaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 4, 5, 10], integer=True))
        axis.set(ylim=(-0.04 * heads, 1.08 * heads), ylabel=f"open heads (of {heads:.0f})")
    elif "penalty" in names and not table.penalty.astype(float).any():
        axis.set_ylim(-0.5, 1)
        axis.set_yticks([0])
        axis.text(0.5, 0.6, "none: λ = 0", transform=axis.transAxes, ha="center", color=NEUTRAL)
    elif "penalty" in names:
        axis.set_ylim(min(0, 1.08 * table.penalty.min()), max(0, 1.08 * table.penalty.max()))
    elif "gate_learning_rate" in names:
        positive = table[list(names)].astype(float).to_numpy()
        if (positive > 0).any() and np.nanmax(positive) > 10 * np.nanmin(positive[positive > 0]):
            axis.set_yscale("log")


def _epochs(axis, reports: pd.DataFrame) -> None:
    """A second scale above that counts epochs, which go on evenly with steps."""
    if not _has(reports, "epoch"):
        return
    last = reports.loc[reports.step.idxmax()]
    if last.step <= 0 or not last.epoch > 0:
        return
    each = last.step / last.epoch
    above = axis.secondary_xaxis("top", functions=(lambda s: s / each, lambda e: e * each))
    above.set_xlabel("epoch", fontsize=8.5, labelpad=2)
    above.tick_params(labelsize=8.5)


def layer_opening(gates: pd.DataFrame):
    """Draw the mean p_open of each layer's heads against steps, a line a layer.

    Args:
        gates: step, epoch, attention, layer, head, p_open; a row a head and report.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    names = attentions(gates)
    fig, axes = figure(2.0 + 5.4 * len(names), 4.2, 1, len(names), sharey=True)
    layers = sorted(set(gates.layer))
    few = len(layers) <= len(COLOURS)
    shades = colormaps["viridis"](np.linspace(0, 0.92, len(layers)))
    for axis, name in zip(axes[0], names, strict=True):
        own = gates[gates.attention == name]
        for place, layer in enumerate(layers):
            mean = own[own.layer == layer].groupby("step").p_open.mean()
            if mean.empty:
                continue
            style = {"color": COLOURS[place] if few else shades[place], "linewidth": 1.6}
            style |= {"marker": MARKERS[place % len(MARKERS)], "markersize": 5}
            named = f"{name} layer {layer}" if len(names) > 1 else f"layer {layer}"
            axis.plot(mean.index, mean.to_numpy(), **style, label=named)
        heads = own.groupby(["step", "layer"]).size().max()
        axis.set_title(f"{ATTENTIONS[name]}, {heads} heads a layer", pad=8)
        axis.set(xlabel="step", ylim=(-0.03, 1.03))
        axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
        axis.grid(alpha=0.25)
        _epochs(axis, own)
        axis.legend(fontsize=9, loc="best", ncols=1 + len(layers) // 8)
    axes[0, 0].set_ylabel("mean p_open of a layer's heads\n(1 = all open, 0 = all closed)")
    return fig


def heat_map(gates: pd.DataFrame, roles: pd.DataFrame | None, title: str):
    """Draw the final p_open of every head and the role that it had before gating.

    Each cell of the map holds the gate of evaluation. The roles' cells hold the offset that a head
    looks at most often with its share of tokens, the confidence c and the share r of rare tokens.

    Args:
        gates: step, attention, layer, head, p_open, gate.
        roles: attention, layer, head, offset, positional, is_positional, confidence, rare,
            rare_baseline, of the heads before gating; None draws the map alone.
        title: names translator and step.
    """
    names, step = attentions(gates), gates.step.max()
    layers, heads = len(set(gates.layer)), len(set(gates["head"]))
    told = roles is not None and len(roles) > 0
    beside = told and len(names) > 1 and heads <= BESIDE
    panels = len(names) * (2 if told and not beside else 1)
    width = (CELL * heads + 1.9) * (2 if beside else 1)
    height = panels * (max(CELL * layers, 1.2) + 0.75) + (0.95 if told else 0.4)
    fig, axes = figure(width, height, panels, 2 if beside else 1)
    places = axes if beside else axes.reshape(len(names), -1)
    for row, name in zip(places, names, strict=True):
        open_LH, gate_LH = (grid(gates, name, step, column) for column in ("p_open", "gate"))
        open_bar(row[0], cells(row[0], open_LH))
        write_gates(row[0], open_LH, gate_LH)
        row[0].set_title(f"{ATTENTIONS[name]}\np_open as colour, gate as number", fontsize=10)
        if told:
            roles_panel(row[1], roles[roles.attention == name], gate_LH, name)
    if told:
        fig.supxlabel(roles_key(roles), fontsize=9)
    fig.suptitle(f"{title}, after step {step:,}", fontsize=12)
    return fig


WIDE = {"linewidth": 2, "zorder": 3}  # of a mean over seeds
DASH = {"marker": "_", "linestyle": "none", "markersize": 15, "markeredgewidth": 2, "zorder": 3}


def strength_words(strength: float) -> str:
    """Return λ as one writes it."""
    return f"{strength:.6g}"


def trade_off(runs: pd.DataFrame, setting: str):
    """Draw test BLEU against the heads left, and methods side by side where they keep as many.

    A mark is a run with its own interval, a dash the mean over seeds. Marks that would hide each
    other stand side by side.

    Args:
        runs: method, strength, seed, open_heads, heads, bleu, bleu_low, bleu_high; a row a run,
            method "none" is the untouched translator.
        setting: test set, sentences, beam, and the interval in words.
    """
    base, rows = runs[runs.method == UNTOUCHED], runs[runs.method != UNTOUCHED]
    control = rows[(rows.method == "lambda") & (rows.strength == 0)]
    equal = rows[rows.method != "lambda"]
    counts = sorted(set(equal.open_heads))
    slots = len(counts) * (equal.method.nunique() + 1)
    if counts:
        ratios = [1, min(0.9, max(0.45, 0.08 * slots))]
        fig, axes = figure(7.6 * sum(ratios) + 0.4, 6.0, 1, 2, sharey=True, width_ratios=ratios)
        _equal_heads(axes[0, 1], equal, counts)
    else:
        fig, axes = figure(8.4, 6.0)
    for axis in axes[0]:
        _level(axis, base, "untouched translator", ":", "black")
        _level(axis, control, "λ = 0 control, trained as long", "--", COLOURS[0])
        axis.grid(axis="both" if axis is axes[0, 0] else "y", alpha=0.25)
    rows = rows.assign(x=_side_by_side(rows))
    _against_heads(axes[0, 0], rows, int(runs.heads.max()) if len(runs) else 0)
    said = "marks: runs with their intervals"
    if rows.seed.nunique() > 1:
        said += "; dashes: means over seeds; band of a level: all that its seeds' intervals cover"
    head = f"Translation quality against heads left\n{fill(f'({setting})', 100)}\n{said}"
    fig.suptitle(head, fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": 3 if counts else 2}
    fig.legend(handles, labels, **place, fontsize=9)
    _label_strengths(fig, axes[0, 0], rows)
    return fig


def _against_heads(axis, rows: pd.DataFrame, heads: int) -> None:
    from matplotlib.ticker import MaxNLocator

    for method, (words, colour, marker) in styles(rows.method).items():
        part = rows[rows.method == method]
        means = _means(part)
        axis.plot(means.x, means.bleu, color=colour, linewidth=1.4, zorder=2)
        if part.seed.nunique() > 1:
            axis.plot(means.x, means.bleu, color=colour, **DASH)
        _run_marks(axis, part, colour, marker, f"{words} ({_seeds(part)})", bars=method == "lambda")
    axis.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axis.set(xlabel=f"heads left (of {heads} gated ones)", ylabel="BLEU (higher is better)")
    axis.margins(x=0.07, y=0.1)


def _equal_heads(axis, rows: pd.DataFrame, counts: Sequence[int]) -> None:
    """A block of columns for each number of heads, a column a method, seeds side by side."""
    methods = styles(rows.method)
    block = len(methods) + 1
    for number, count in enumerate(counts):
        for place, (method, (_, colour, marker)) in enumerate(methods.items()):
            part = rows[(rows.method == method) & (rows.open_heads == count)].sort_values("seed")
            if part.empty:
                continue
            middle = number * block + place
            shifts = np.arange(len(part)) - (len(part) - 1) / 2
            part = part.assign(x=middle + shifts * 0.7 / max(3, len(part)))
            _run_marks(axis, part, colour, marker, "")
            if len(part) > 1:
                axis.plot(
                    [middle - 0.42, middle + 0.42], [part.bleu.mean()] * 2, **WIDE, color=colour
                )
        if number:
            axis.axvline(number * block - 1, color=NEUTRAL, linewidth=0.5)
    axis.set_xticks([n * block + (block - 2) / 2 for n in range(len(counts))], map(str, counts))
    axis.set(xlabel="heads left, methods side by side", xlim=(-0.8, len(counts) * block - 1.2))
    axis.tick_params(axis="x", color="white")


def _seeds(part: pd.DataFrame) -> str:
    number = part.seed.nunique()
    return f"{number} seed{'s' if number != 1 else ''}"


def _level(axis, rows: pd.DataFrame, words: str, line: str, colour: str) -> None:
    """A horizontal line at the mean, a band from the lowest to the highest end of the intervals."""
    if rows.empty:
        return
    value, low, high = rows.bleu.mean(), rows.bleu_low.min(), rows.bleu_high.max()
    told = f"{words}: {value:.1f}"
    if pd.notna(low) and pd.notna(high):
        axis.axhspan(low, high, color=colour, alpha=0.07, linewidth=0, zorder=0)
        told += f" [{low:.1f}, {high:.1f}]"
    axis.axhline(value, color=colour, linestyle=line, linewidth=1.3, label=told, zorder=1)


def _side_by_side(rows: pd.DataFrame) -> pd.Series:
    """Return abscissas: runs with equally many heads in the order of method, λ and seed."""
    counts = np.unique(rows.open_heads)
    span = max(1.0, float(np.ptp(counts))) if len(counts) else 1.0
    gap = float(np.diff(counts).min()) if len(counts) > 1 else span
    x = rows.open_heads.astype(float)
    order = rows.assign(place=rows.method.map(list(styles(rows.method)).index), index=rows.index)
    for count, part in order.sort_values(["place", "strength", "seed"]).groupby("open_heads"):
        each = min(0.02 * span, 0.8 * gap / len(part))
        x[part["index"]] = count + each * (np.arange(len(part)) - (len(part) - 1) / 2)
    return x


def _means(part: pd.DataFrame) -> pd.DataFrame:
    """One row a λ, or a number of heads where there is no λ: means over seeds, from few heads."""
    key = "strength" if part.method.iloc[0] == "lambda" else "open_heads"
    means = part.groupby(key)[["x", "open_heads", "bleu"]].mean()
    return means.rename_axis("key").reset_index().sort_values("open_heads")


def _run_marks(axis, part, colour: str, marker: str, label: str, bars: bool = True) -> None:
    style = {"color": colour, "linestyle": "none", "marker": marker, "markersize": 6}
    style |= {"markerfacecolor": "white", "label": label, "zorder": 4}
    axis.plot(part.x, part.bleu, **style)
    if bars:
        axis.vlines(part.x, part.bleu_low, part.bleu_high, color=colour, linewidth=1, alpha=0.7)


def _label_strengths(fig, axis, rows: pd.DataFrame) -> None:
    """Name each λ near its mean, clear of runs, lines and the other names."""
    part = rows[rows.method == "lambda"]
    if part.empty:
        return
    means = _means(part)
    named = means.groupby([means.x.round(2), means.bleu.round(2)])["key"].apply(list)
    words = {
        place: "λ = " + ", ".join(map(strength_words, sorted(strengths)))
        for place, strengths in named.items()
    }
    low = rows.bleu_low.where(rows.method == "lambda").fillna(rows.bleu)
    high = rows.bleu_high.where(rows.method == "lambda").fillna(rows.bleu)
    bars = [np.column_stack([rows.x, low]), np.column_stack([rows.x, high])]
    lines = [m[["x", "bleu"]].to_numpy(float) for m in map(_means, _by_method(rows))]
    write_beside(fig, axis, words, bars, lines, COLOURS[0])


def _by_method(rows: pd.DataFrame) -> list[pd.DataFrame]:
    return [part for _, part in rows.groupby("method")]


def open_against_lambda(runs: pd.DataFrame):
    """Draw how many heads stay open at each λ, a mark a seed, a line through the means.

    Args:
        runs: method, strength, seed, open_heads, heads; only rows of method "lambda" count.
    """
    from matplotlib.ticker import MaxNLocator

    part = runs[runs.method == "lambda"]
    strengths, seeds = sorted(set(part.strength)), sorted(set(part.seed))
    fig, axes = figure(max(5.6, 2.4 + 0.9 * len(strengths)), 4.4)
    axis = axes[0, 0]
    heads = int(part.heads.max()) if len(part) else 1
    means = part.groupby("strength").open_heads.mean()
    style = {"color": "black", "linewidth": 1.3, "alpha": 0.7, "zorder": 2}
    axis.plot(range(len(means)), means, **style, label="mean over seeds" if len(seeds) > 1 else "")
    for number, seed in enumerate(seeds):
        own = part[part.seed == seed]
        shift = 0.16 * (number - (len(seeds) - 1) / 2) * min(1, 4 / len(seeds))
        places = [strengths.index(strength) + shift for strength in own.strength]
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": "none", "markersize": 7}
        style["marker"] = MARKERS[number % len(MARKERS)]
        axis.plot(places, own.open_heads, **style, label=f"seed {seed}", zorder=3)
    if part.empty:
        axis.text(0.5, 0.5, "no run with a penalty λ", transform=axis.transAxes, ha="center")
    axis.set_xticks(range(len(strengths)), [strength_words(value) for value in strengths])
    axis.set(xlim=(-0.6, max(len(strengths), 1) - 0.4), ylim=(-0.05 * heads, 1.06 * heads))
    axis.yaxis.set_major_locator(MaxNLocator(9, steps=[1, 2, 4, 5, 10], integer=True))
    axis.set(xlabel="λ of the penalty on open heads (not to scale)")
    axis.set_ylabel(f"heads open at the end (of {heads})" if len(part) else "open heads")
    axis.set_title(f"Open heads against λ ({_seeds(part)})")
    axis.grid(axis="y", alpha=0.25)
    if len(seeds) > 1:
        axis.legend(fontsize=9, loc="best")
    return fig
