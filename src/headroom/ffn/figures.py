"""Figures of the ffn study: pure functions from tables and plans to matplotlib figures.

Colour says what becomes of the pruned channels, the marker which score chose them, the line (and
the marker where there is one score) which variant it is. n channels of a layer, k kept.
"""

from collections.abc import Mapping, Sequence
from textwrap import fill

import numpy as np
import pandas as pd

from headroom.ffn.families import DENSE, SEQUENTIAL
from headroom.ffn.tables import step_fields, transports
from headroom.plotting import COLOURS, MARKERS, NEUTRAL, figure
from headroom.recipes import Prune

METHOD = ["score", "fusion", "strategy", "cost", "solver"]
FUSION_COLOURS = {
    "drop": COLOURS[6],
    "bias": NEUTRAL,
    "ot_column": COLOURS[4],
    "ot_mass": COLOURS[1],
    "ridge": COLOURS[0],
    "ot_ridge": COLOURS[2],
}
LINES = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 3)), (0, (8, 3)))
FLOOR = -1.0  # of the functional rescue shown: as much harm again as dropping does
POINTS = 200_000  # of a plan that are drawn
TAKEN = 0.01  # share of its mass that a source gives to count as taken in
LETTERS = 90  # of a title's line beside a legend
LEGEND = 28  # letters of a legend's line
NAMED = 22  # methods that a legend has room for
FEW = 40  # as many bars a histogram shows singly


def styles(methods: pd.DataFrame) -> tuple[dict[tuple, dict], str]:
    """Return how each method is drawn (colour, marker, linestyle, label), and the legend's title.

    As in recipe steps, a label leaves out defaults; the title holds what no label names.

    Args:
        methods: columns ``METHOD``, rows in any order.
    """
    rows = methods[METHOD].drop_duplicates()
    used = {name: [v for v in dict.fromkeys(rows[name]) if v] for name in METHOD}
    unnamed = {name: values[0] for name, values in used.items() if len(values) == 1}
    for name, default in Prune.defaults.items():
        if default in used.get(name, ()):
            unnamed[name] = default
    scores, seen, found = used["score"], {}, {}
    for row in rows.itertuples(index=False):
        base = row.fusion.removesuffix(SEQUENTIAL)
        line = seen[row.score, base] = seen.get((row.score, base), -1) + 1
        values = [getattr(row, name) for name in METHOD]
        words = [v for name, v in zip(METHOD, values, strict=True) if v != unnamed.get(name)]
        marker = scores.index(row.score) if len(scores) > 1 else line
        found[tuple(row)] = {
            "color": FUSION_COLOURS.get(base, COLOURS[3]),
            "marker": MARKERS[marker % len(MARKERS)],
            "linestyle": LINES[line % len(LINES)],
            "label": ", ".join(filter(None, words)).replace(SEQUENTIAL, " sequential")
            or row.fusion,
        }
    told = ", ".join(unnamed[name] for name in METHOD if name in unnamed)
    return found, f"unless named:\n{told}" if told else ""


def _plain_log(axis, low: float, high: float) -> None:
    """A logarithmic vertical axis with numbers as one writes them, enough of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis.set_yscale("log")
    if high < 4 * low:
        axis.yaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10]))
    else:
        subs = (1, 2, 3, 5) if high < 30 * low else (1, 2, 5) if high < 1e4 * low else (1,)
        axis.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def perplexity_ratio(table: pd.DataFrame, setting: str):
    """Draw perplexity against the share of the FFN that is gone, a line a method.

    Bars reach from the lowest to the highest calibration seed. Lines join equal widths in all
    layers (r); widths by layer (g, a) are hollow markers with that letter. The right panel shows
    the better half of the methods closer, since the worst ones stretch the left one.

    Args:
        table: as :func:`headroom.ffn.tables.table` makes it.
        setting: the evaluation setting in words.
    """
    rows, dense = table[table.step != DENSE], table[table.step == DENSE]
    fig, axes = figure(12.5, 5.4, 1, 2)
    drawn, title = styles(rows)
    for axis in axes[0]:
        _method_lines(axis, rows, drawn)
        for value in dense.perplexity:
            style = {"color": NEUTRAL, "linestyle": ":", "linewidth": 1.4, "zorder": 1}
            axis.axhline(value, label="not pruned", **style)
        axis.set_xlabel("FFN parameters removed with their channels (%)")
        axis.grid(alpha=0.25)
    axes[0, 0].set(ylabel="perplexity (lower is better)", title="all methods")
    axes[0, 1].set(title="the better half, closer")
    if len(table):
        low, high = table.perplexity_min.min(), table.perplexity_max.max()
        ends = rows.groupby(METHOD).perplexity_max.max() if len(rows) else table.perplexity_max
        near = max(float(ends.median()), 1.01 * low)
        _plain_log(axes[0, 0], low, high)
        _plain_log(axes[0, 1], low, near)
        axes[0, 1].set_ylim(low - 0.04 * (near - low), near + 0.04 * (near - low))
    fig.suptitle(f"Perplexity after pruning FFN channels\n{fill(f'({setting})', LETTERS)}")
    if not rows.selection.str.startswith("r").all():
        style = {"marker": "o", "linestyle": "none", "color": NEUTRAL, "markerfacecolor": "white"}
        axes[0, 0].plot([], [], **style, label="widths differ by layer\n(g global, a angular)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if len(labels) > NAMED:  # the best ones, at the end; all of them are in the table
        more = len(labels) - NAMED
        handles, labels = handles[-NAMED:], labels[-NAMED:]
        title = f"{title}\n(the best; {more} more in the table)".strip()
    labels = [label if "\n" in label else fill(label, LEGEND) for label in labels]
    style = {"title": title, "fontsize": 9, "alignment": "left"}
    fig.legend(handles, labels, loc="outside right center", **style)
    return fig


def _method_lines(axis, rows: pd.DataFrame, drawn: Mapping[tuple, Mapping]) -> None:
    """One line a method, in the order of the right ends, so that the eye finds the legend's."""
    parts = dict(list(rows.sort_values("ratio").groupby(METHOD, sort=False)))
    for key, part in sorted(parts.items(), key=lambda item: -item[1].perplexity.iloc[-1]):
        even = part.selection.str.startswith("r")
        style, label = drawn[key], drawn[key]["label"]
        for group, hollow in ((part[even], False), (part[~even], True)):
            if group.empty:
                continue
            face = {"markerfacecolor": "white", "linestyle": "none"} if hollow else {}
            _ranged(axis, group, style | face | {"label": "" if hollow and even.any() else label})
            for row in group.itertuples() if hollow else ():
                place = row.ffn_parameters_percent_removed, row.perplexity
                offset = {"xytext": (7, -3), "textcoords": "offset points", "fontsize": 8}
                text = axis.annotate(row.selection[0], place, **offset, color=style["color"])
                text.set_clip_on(True)


def _ranged(axis, part: pd.DataFrame, style: Mapping) -> None:
    """Points with bars from the lowest to the highest seed; no bar takes a negative length."""
    value = part.perplexity
    bars = [value - part.perplexity_min, part.perplexity_max - value]
    axis.errorbar(
        part.ffn_parameters_percent_removed,
        value,
        yerr=np.maximum(bars, 0),
        **style,
        markersize=6,
        linewidth=1.5,
        elinewidth=1.2,
        capsize=3,
    )


def shown_selection(steps: Sequence[str]) -> str:
    """Return the selection whose transports are drawn by layer: r before g and a, ≤ .5 before more.

    Among those the largest, where most has to be rescued; empty without a transport.
    """
    fields = [step_fields(step) for step in steps]
    found = {(f["selection"], f["ratio"]) for f in fields if transports(f["fusion"])}

    def rank(pair: tuple[str, float]) -> tuple:
        selection, ratio = pair
        return selection[0] == "r", ratio <= 0.5, ratio if ratio <= 0.5 else -ratio, selection

    return max(found, key=rank)[0] if found else ""


PANELS = {
    "functional_rescue": "functional rescue\n(1 lossless, 0 as dropping)",
    "mass_rescue": "mass rescue\n(share of pruned mass)",
    "dilution": "dilution\n(share from other channels)",
}


def rescue_layers(layers: Mapping[int, pd.DataFrame], setting: str):
    """Draw functional rescue, mass rescue and dilution of each layer, a line a transport.

    Points are means over calibration seeds, bars reach from the lowest to the highest. Functional
    rescue below −1 is drawn at −1 with an arrow that points down.

    Args:
        layers: the sweep's layers by seed: step, layer and the three figures (NaN where none).
        setting: the evaluation setting in words.
    """
    every = pd.concat([table.assign(calibration=seed) for seed, table in layers.items()])
    chosen = shown_selection(list(dict.fromkeys(every.step)))
    fig, axes = figure(9.6, 8.0, 3, 1, sharex=True)
    fields = {step: step_fields(step) for step in dict.fromkeys(every.step)}
    steps = [
        step
        for step, found in fields.items()
        if transports(found["fusion"]) and found["selection"] == chosen
    ]
    drawn, title = styles(pd.DataFrame([fields[s] for s in steps], columns=METHOD))
    below: dict[str, float] = {}
    for place, step in enumerate(steps):
        style = drawn[tuple(fields[step][name] for name in METHOD)]
        shift = 0.3 * ((place + 0.5) / len(steps) - 0.5)  # so that bars don't hide each other
        for axis, name in zip(axes[:, 0], PANELS, strict=True):
            values = every[every.step == step].astype({name: float}).groupby("layer")[name]
            label = style["label"] if name == "functional_rescue" else ""
            lowest = _layer_line(axis, values, shift, style | {"label": label})
            if name == "functional_rescue" and lowest < FLOOR:
                below[style["label"]] = lowest
    _rescue_axes(axes[:, 0])
    share = "no transport"
    if chosen:
        share = f"{100 * float(chosen[1:]):g} % of channels removed ({chosen})"
    head = f"What transport rescues by layer, {share}\n{fill(f'({setting})', LETTERS)}"
    axes[0, 0].set_title(head + _harm(below))
    if steps:
        fig.legend(loc="outside lower center", ncols=3, title=title.replace("\n", " "), fontsize=9)
    return fig


def _layer_line(axis, values, shift: float, style: Mapping) -> float:
    """Draw means over seeds with their range, clipped at ``FLOOR``; return the lowest mean."""
    mean, low, high = (series.dropna() for series in (values.mean(), values.min(), values.max()))
    if mean.empty:
        return np.inf
    inside_L, low_L, high_L = (np.maximum(series, FLOOR) for series in (mean, low, high))
    axis.errorbar(
        mean.index + shift,
        inside_L,
        yerr=np.maximum([inside_L - low_L, high_L - inside_L], 0),
        **style,
        markersize=4.5,
        linewidth=1.2,
        elinewidth=1.0,
        capsize=2,
    )
    under = mean[mean < FLOOR].index + shift
    if len(under):
        harm = {"linestyle": "none", "marker": "$↓$", "markersize": 11, "color": style["color"]}
        axis.plot(under, np.full(len(under), FLOOR + 0.07), **harm, zorder=5)
    return float(mean.min())


def _harm(below: Mapping[str, float]) -> str:
    """A line on the layers that are clipped, where there are any."""
    if not below:
        return ""
    worst = min(below, key=below.get)
    words = f"\n↓ below {FLOOR:g}; the lowest is {below[worst]:.3g}".replace("-", "−")
    return f"{words} ({worst})"


def _rescue_axes(axes) -> None:
    from matplotlib.ticker import MaxNLocator

    for axis, label in zip(axes, PANELS.values(), strict=True):
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    first, *shares = axes
    first.axhline(0, color="black", linewidth=0.9)
    first.annotate(
        "no better than dropping",
        (1, 0),
        xytext=(-2, -4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        zorder=6,
    )
    low, high = first.get_ylim()
    first.set_ylim(max(low, FLOOR - 0.06), max(high, 0.1))
    for axis in shares:
        axis.set_ylim(-0.03, 1.03)
    axes[-1].set_xlabel("layer")


def transport_plan(plan, kept: Sequence[int], scores: np.ndarray, title: str):
    """Draw where each channel's mass goes, and how many sources each kept channel takes in.

    Sources and kept channels stand in the order of their importance, so the kept ones' own mass is
    the diagonal; the line parts kept from pruned sources.

    Args:
        plan: T (n, k), scipy sparse; column j is that of channel kept[j].
        kept: the kept channels' numbers.
        scores: importance (n,), higher is more important.
        title: names model, layer and step.
    """
    plan, kept, scores = plan.tocoo(), np.asarray(kept), np.asarray(scores, float)
    n, k = plan.shape
    stays_n = np.isin(np.arange(n), kept)
    place_n, place_k = np.empty(n, int), np.empty(k, int)
    place_n[np.lexsort((np.arange(n), -scores, ~stays_n))] = np.arange(n)
    place_k[np.lexsort((kept, -scores[kept]))] = np.arange(k)
    sent_n = np.bincount(plan.row, plan.data, minlength=n)
    some = plan.data > 0
    row, column = plan.row[some], plan.col[some]
    share = plan.data[some] / sent_n[row]
    taken_k = np.bincount(column[share >= TAKEN], minlength=k)
    order = np.argsort(share, kind="stable")[-POINTS:]  # the largest, on top of one another
    fig, axes = figure(11.2, 5.4, 1, 2, width_ratios=[3.2, 1])
    axis = axes[0, 0]
    points = axis.scatter(
        place_n[row[order]],
        place_k[column[order]],
        c=share[order],
        s=float(np.clip((260 / n) ** 2, 2.5, 90)),
        cmap="cividis_r",  # whole shares are dark, on white
        vmin=0,
        vmax=1,
        linewidths=0,
        rasterized=True,
    )
    _plan_axis(axis, n, k)
    fig.colorbar(points, ax=axis, label="share of the source's mass", shrink=0.85)
    fig.get_layout_engine().set(wspace=0.06)
    _taken_axis(axes[0, 1], taken_k)
    note = f"\n(the {POINTS:,} largest of {len(share):,} shares)" if len(share) > POINTS else ""
    fig.suptitle(title + note, fontsize=11)
    return fig


def _plan_axis(axis, n: int, k: int) -> None:
    from matplotlib.ticker import MaxNLocator

    margin_n, margin_k = 0.5 + 0.01 * n, 0.5 + 0.01 * k
    axis.set_xlim(-margin_n, n - 1 + margin_n)
    axis.set_ylim(k - 1 + margin_k, -margin_k)
    axis.set(
        xlabel="source channel, most important first",
        ylabel="kept channel, most important first",
    )
    for one in (axis.xaxis, axis.yaxis):
        one.set_major_locator(MaxNLocator(8, integer=True))
        one.set_major_formatter(lambda value, _: f"{value:,.0f}")
    if k < n:
        axis.axvline(k - 0.5, color=COLOURS[1], linewidth=1.2)
        style = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        style |= {"color": COLOURS[1], "fontsize": 9, "annotation_clip": False}
        for word, side, shift in (("kept", "right", -4), ("pruned", "left", 4)):
            axis.annotate(word, (k - 0.5, 1.0), xytext=(shift, 4), ha=side, **style)


def _taken_axis(axis, taken_k: np.ndarray) -> None:
    """The histogram of sources a kept channel takes in: a bar a number, or bins that double."""
    from matplotlib.ticker import MaxNLocator

    most = int(taken_k.max(initial=0))
    axis.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    if most <= FEW:
        axis.bar(np.arange(most + 1), np.bincount(taken_k), width=0.85, color=COLOURS[0])
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    else:
        edges = [0.5, *(2.0**e for e in range(most.bit_length() + 1))]
        counts, _ = np.histogram(np.maximum(taken_k, 0.75), edges)
        axis.stairs(counts, edges, fill=True, color=COLOURS[0])
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "0")
    if len(taken_k) > 200:
        axis.set_yscale("symlog", linthresh=1)
        axis.margins(y=0.08)
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set(
        xlabel=f"sources taken in\n(with ≥ {100 * TAKEN:g} % of their mass)",
        ylabel="kept channels",
        title=f"at most {most:,}",
    )
