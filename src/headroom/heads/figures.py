"""Figures of the heads study: pure functions from tables and arrays to matplotlib figures."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd

from headroom.plotting import BETTER, COLOURS, MARKERS, NEUTRAL, WORSE, figure, interval

METHOD_COLOURS = {"average": COLOURS[1], "aligned": COLOURS[0], "refit": COLOURS[2]}
PANELS_A_ROW = 6
BOUNDED = ("relu", "relu_random", "softmax")  # non-negative maps: cosines lie in 0-1


def similarity_maps(metric: str, variants: Mapping[str, np.ndarray], groups: int):
    """Draw one heat map a layer, a block of rows a variant (all entries; without the sink).

    Args:
        metric: name of the metric.
        variants: similarities by variant, each of shape (layers, heads, heads).
        groups: key/value heads; white lines separate the query heads that share one.
    """
    layers, heads, _ = next(iter(variants.values())).shape
    columns = min(layers, PANELS_A_ROW)
    rows_each = math.ceil(layers / columns)
    rows = rows_each * len(variants)
    fig, axes = figure(2.1 * columns + 1.2, 2.25 * rows + 0.5, rows, columns)
    low = 0.0 if metric in BOUNDED else -1.0
    style = {"vmin": low, "vmax": 1.0, "cmap": "cividis" if low == 0 else "PuOr", "origin": "upper"}
    image = None
    for block, (variant, similarity_LHH) in enumerate(variants.items()):
        for layer in range(rows_each * columns):
            axis = axes[block * rows_each + layer // columns, layer % columns]
            if layer >= layers:
                axis.set_axis_off()
                continue
            image = axis.imshow(similarity_LHH[layer], **style)
            axis.set_title(f"layer {layer}" + (f", {variant}" if variant else ""), fontsize=9)
            _head_axis(axis, heads, groups)
            if layer % columns == 0:
                axis.set_ylabel("head")
            if layer + columns >= layers:
                axis.set_xlabel("head")
    fig.colorbar(image, ax=axes, label=f"similarity ({metric}), cosine", shrink=0.8)
    return fig


def _head_axis(axis, heads: int, groups: int) -> None:
    step = max(1, heads // 6)
    ticks = range(0, heads, step)
    axis.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8)
    axis.set_yticks(ticks, [str(tick) for tick in ticks], fontsize=8)
    for border in range(heads // groups, heads, heads // groups):
        if groups < heads:
            axis.axhline(border - 0.5, color="white", linewidth=1.2)
            axis.axvline(border - 0.5, color="white", linewidth=1.2)


def similarity_distribution(similarities: Mapping[str, np.ndarray], thresholds: list[float]):
    """Draw for each metric the share of head pairs at or above a similarity, with thresholds."""
    fig, axes = figure(6.4, 4.0)
    axis = axes[0, 0]
    for number, (metric, similarity_LHH) in enumerate(similarities.items()):
        upper = np.triu_indices(similarity_LHH.shape[-1], 1)
        values = np.sort(similarity_LHH[:, *upper].ravel())
        share = 100 * (1 - np.arange(len(values)) / len(values))
        axis.step(
            values, share, where="pre", color=COLOURS[number % 7], label=metric, linewidth=1.8
        )
    for threshold in thresholds:
        axis.axvline(threshold, color=NEUTRAL, linewidth=0.9, linestyle=":")
    axis.set(
        xlabel="similarity of two heads of a layer (cosine)", ylabel="pairs at or above it (%)"
    )
    axis.set_title("How alike are the heads? Dotted: configured thresholds")
    axis.set_ylim(0, 102)
    axis.legend(title="metric", loc="best")
    return fig


def _chosen(table: pd.DataFrame) -> pd.DataFrame:
    return table[table.kind.isin(["original", "chosen"])].reset_index(drop=True)


def metrics_comparison(table: pd.DataFrame, setting: str):
    """Draw perplexity and accuracy of the original and each merged model, with intervals."""
    rows = _chosen(table)
    fig, axes = figure(9.6, 1.5 + 0.32 * len(rows), 1, 2, sharey=True)
    places = np.arange(len(rows))[::-1]
    for axis, measure in zip(axes[0], ("perplexity", "accuracy"), strict=True):
        scale = 100 if measure == "accuracy" else 1
        for place, row in zip(places, rows.itertuples(), strict=True):
            value, low, high = (
                scale * getattr(row, name)
                for name in (measure, f"{measure}_low", f"{measure}_high")
            )
            colour = NEUTRAL if row.kind == "original" else METHOD_COLOURS[row.method]
            marker = "D" if row.kind == "original" else "o"
            interval(axis, [value], [place], [low], [high], colour, marker)
        original = scale * rows[measure].iloc[0]
        axis.axvline(original, color=NEUTRAL, linewidth=0.9, linestyle="--")
        unit = " (%)" if measure == "accuracy" else ""
        better = "higher" if measure == "accuracy" else "lower"
        axis.set_xlabel(f"{measure}{unit}, {better} is better")
        axis.grid(axis="x", alpha=0.25)
    axes[0, 0].set_yticks(places, list(rows.step), fontsize=9)
    fig.suptitle(f"Before and after merging ({setting})", fontsize=11)
    return fig


def metrics_change(table: pd.DataFrame, setting: str):
    """Draw the change of perplexity and accuracy in per cent; colour says better or worse."""
    rows = _chosen(table).iloc[1:]
    fig, axes = figure(9.6, 1.8 + 0.32 * len(rows), 1, 2, sharey=True)
    places = np.arange(len(rows))[::-1]
    for axis, measure, sign in zip(axes[0], ("perplexity", "accuracy"), (1, -1), strict=True):
        key = f"{measure}_change_percent"
        value, low, high = (
            rows[name].to_numpy(float) for name in (key, f"{key}_low", f"{key}_high")
        )
        colours = [
            WORSE
            if sign * b > 0 and sign * c > 0
            else BETTER
            if sign * b < 0 and sign * c < 0
            else "#B5B5B5"
            for b, c in zip(low, high, strict=True)
        ]
        axis.barh(places, value, color=colours, height=0.7)
        axis.errorbar(
            value,
            places,
            xerr=[value - low, high - value],
            fmt="none",
            ecolor="black",
            elinewidth=1,
            capsize=2,
        )
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(f"relative change of {measure} (%)")
        axis.grid(axis="x", alpha=0.25)
    axes[0, 0].set_yticks(places, list(rows.step), fontsize=9)
    names = (
        ("worse than the original", WORSE),
        ("better", BETTER),
        ("interval covers zero", "#B5B5B5"),
    )
    handles = [_patch(colour, label) for label, colour in names]
    fig.legend(handles=handles, loc="outside lower center", ncols=3)
    fig.suptitle(f"What merging changed ({setting})", fontsize=11)
    return fig


def _patch(colour: str, label: str):
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def merged_pairs(counts: Mapping[str, list[int]]):
    """Draw how many pairs of heads each merge united in each layer, zeros too.

    Args:
        counts: pairs a layer, by recipe step.
    """
    values = np.array(list(counts.values()))
    steps, layers = values.shape
    fig, axes = figure(max(6.4, 3.6 + 0.45 * layers), 1.6 + 0.36 * steps)
    axis = axes[0, 0]
    top = max(1, values.max())
    image = axis.imshow(values, cmap="cividis", vmin=0, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if value < 0.55 * top else "black"
        axis.text(column, row, str(value), ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(layers))
    axis.set_yticks(range(steps), list(counts), fontsize=9)
    axis.set(xlabel="layer", title="Pairs of heads merged in each layer")
    fig.colorbar(image, ax=axis, label="pairs", shrink=0.8, format="%d")
    return fig


CONTROL_STYLE = {
    "random": ("random merge", NEUTRAL, "x"),
    "dissimilar": ("least similar merged", COLOURS[3], "v"),
    "wanda_sp_drop": ("Wanda-sp heads removed", COLOURS[4], "P"),
    "wanda_sp_refit": ("Wanda-sp removed, refit", COLOURS[4], "p"),
    "flap_drop": ("FLAP heads removed", COLOURS[5], "X"),
    "flap_refit": ("FLAP removed, refit", COLOURS[5], "h"),
}


# Heights of kinds in a row of the controls' figure, so that equal values don't hide each other.
LANES = {"chosen": 0.24, "dissimilar": 0.24, "flap_drop": -0.14, "flap_refit": -0.14}
LANES |= {"wanda_sp_drop": -0.26, "wanda_sp_refit": -0.26}


def _control_kind(kind: str) -> str:
    return "random" if kind.startswith("random") else kind


def damage_threshold(table: pd.DataFrame, setting: str):
    """Draw the change of perplexity against the similarity at which heads were merged."""
    rows = table[(table.kind != "original") & table.threshold.notna()].sort_values("threshold")
    chosen, key = rows[rows.kind == "chosen"], "perplexity_change_percent"
    fig, axes = figure(8.4, 4.4)
    axis = axes[0, 0]
    for number, ((criterion, method), part) in enumerate(chosen.groupby(["criterion", "method"])):
        errors = [part[key] - part[f"{key}_low"], part[f"{key}_high"] - part[key]]
        axis.errorbar(
            part.threshold,
            part[key],
            yerr=errors,
            color=METHOD_COLOURS[method],
            marker=MARKERS[number % 7],
            capsize=3,
            label=f"{criterion}, {method}",
        )
    for kind, part in rows[rows.kind != "chosen"].groupby(rows.kind.map(_control_kind)):
        label, colour, marker = CONTROL_STYLE[kind]
        axis.scatter(
            part.threshold, part[key], c=colour, marker=marker, s=34, label=label, zorder=3
        )
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(
        xlabel="similarity at and above which heads were merged (cosine)",
        ylabel="change of perplexity (%)",
        title=f"Damage against threshold\n({setting})",
    )
    axis.grid(alpha=0.25)
    if len(rows):
        fig.legend(loc="outside right upper", title="how heads were merged")
    else:
        axis.text(0.5, 0.5, "no merge by threshold", ha="center", transform=axis.transAxes)
    return fig


def _percent_scale(axis, values: pd.Series) -> None:
    """Per cents around zero: linear, or logarithmic beyond ±1 where they differ too much."""
    if not values.abs().max() >= 20:  # nothing but NaN stays linear too
        return
    from matplotlib.ticker import FuncFormatter, SymmetricalLogLocator

    scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    scale("symlog", linthresh=1.0)
    axis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=1.0, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def damage_parameters(table: pd.DataFrame, setting: str):
    """Draw the change of perplexity against the parameters saved, all methods and controls."""
    fig, axes = figure(9.4, 4.8)
    axis = axes[0, 0]
    rows = table[table.kind != "original"]
    seen: set[str] = set()
    for row in rows.itertuples():
        if row.kind == "chosen":
            label, colour, marker, size = row.method, METHOD_COLOURS[row.method], "o", 46
        else:
            label, colour, marker = CONTROL_STYLE[_control_kind(row.kind)]
            size = 34
        bounds = (row.perplexity_change_percent_low, row.perplexity_change_percent_high)
        axis.vlines(row.parameters_saved_percent, *bounds, color=colour, alpha=0.4, linewidth=1.2)
        axis.scatter(
            row.parameters_saved_percent,
            row.perplexity_change_percent,
            c=colour,
            marker=marker,
            s=size,
            label="" if label in seen else label,
        )
        seen.add(label)
    axis.axhline(0, color="black", linewidth=0.8)
    _percent_scale(axis.yaxis, rows.perplexity_change_percent)
    axis.margins(y=0.08)
    axis.set(
        xlabel="parameters saved (% of the model's effective parameters)",
        ylabel="change of perplexity (%)",
        title=f"Damage against parameters saved\n({setting})",
    )
    axis.grid(alpha=0.25)
    fig.legend(loc="outside right upper", title="how heads were reduced")
    return fig


def controls(table: pd.DataFrame, verdicts: Mapping[str, str], setting: str):
    """Draw each merge beside its controls at equal parameter count, and the verdict in words."""
    steps = [step for step in verdicts if (table.step == step).any()]
    fig, axes = figure(9.2, 2.0 + 0.8 * max(1, len(steps)))
    axis = axes[0, 0]
    seen: set[str] = set()
    for place, step in enumerate(steps[::-1]):
        for row in table[(table.step == step)].itertuples():
            if row.kind == "chosen":
                label, colour, marker = "the merge", COLOURS[0], "o"
            else:
                label, colour, marker = CONTROL_STYLE[_control_kind(row.kind)]
            height = place + LANES.get(row.kind, 0.0)
            bounds = (row.perplexity_change_percent_low, row.perplexity_change_percent_high)
            axis.hlines(height, *bounds, color=colour, alpha=0.4, linewidth=1.2)
            known = "" if label in seen else label
            value = row.perplexity_change_percent
            axis.scatter(value, height, c=colour, marker=marker, s=42, zorder=3, label=known)
            seen.add(label)
    names = [f"{step}\nsimilar < random < dissimilar: {verdicts[step]}" for step in steps[::-1]]
    axis.set_yticks(range(len(steps)), names, fontsize=9)
    axis.set_ylim(-0.6, max(1, len(steps)) - 0.4)
    _percent_scale(axis.xaxis, table.perplexity_change_percent)
    axis.set_xlabel("change of perplexity (%)")
    axis.set_title(f"Merges beside their controls\n({setting})")
    axis.grid(axis="x", alpha=0.25)
    if seen:
        fig.legend(loc="outside lower center", ncols=3)
    return fig


def decode_latency(rows: list[Mapping], setting: str):
    """Draw milliseconds a token of each shape: median and quartiles of alternating runs.

    Args:
        rows: dicts with name, median, low, high (milliseconds).
    """
    fig, axes = figure(7.4, 1.5 + 0.4 * len(rows))
    axis = axes[0, 0]
    places = np.arange(len(rows))[::-1]
    for place, row in zip(places, rows, strict=True):
        interval(axis, [row["median"]], [place], [row["low"]], [row["high"]], COLOURS[0], "o")
    axis.set_yticks(places, [row["name"] for row in rows], fontsize=9)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    axis.set_xlim(0, 1.15 * max(row["high"] for row in rows))
    axis.set_xlabel("milliseconds a token (median, quartiles)")
    axis.set_title(f"Decoding speed\n({setting})")
    axis.grid(axis="x", alpha=0.25)
    return fig
