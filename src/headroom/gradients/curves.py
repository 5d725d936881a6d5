"""Curves of the gradients study: layers over depth, greedy selection, self-similarity.

A component has the same colour and marker in all figures; biases are dashed and hollow. Frames are
those of ``tables``, as made or as read back from their CSV.

Shapes: L layers, Q queries, K columns: decoder blocks, and before them what lies outside.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from headroom.gradients.figures import (
    OUTSIDE,
    Cells,
    cells,
    layer_labels,
    percent,
    short_names,
    spread,
    titles,
)
from headroom.gradients.pairs import block, component
from headroom.plotting import COLOURS, NEUTRAL, figure

DIVERGENT = 3
BESIDE = 10  # steps of greedy selection up to which its panels stand side by side
LEAST_SPAN = 0.05  # of an axis, as a part of 1 or 100 %
BAND = (0.1, 0.5, 0.9)
PANELS = 4  # side by side
LONGEST = 30  # characters of an id
ELSEWHERE, SPAN = "outside of blocks", "10 to 90 %"
STYLES = {
    "embed": (NEUTRAL, "*"),
    "position": ("#44AA99", "p"),
    "head": ("#882255", "h"),
    "q": (COLOURS[0], "o"),
    "qkv": (COLOURS[0], "o"),
    "k": (COLOURS[1], "s"),
    "v": (COLOURS[2], "^"),
    "o": (COLOURS[3], "D"),
    "gate": (COLOURS[4], "v"),
    "up": (COLOURS[5], "P"),
    "down": (COLOURS[6], "X"),
}
OTHERS = tuple((grey, marker) for marker in "<>d8" for grey in ("#9A9A9A", "#B5651D"))
CRITERIA = {
    "similarity": "uncentred cosine\nto the full gradient's similarities",
    "accuracy": "top-1 (%)",
}


def greedy(table: pd.DataFrame, setting: str = ""):
    """Draw greedy forward selection: a panel a criterion, lines of both halves of the queries.

    Args:
        table: of ``tables.greedy_table``.
        setting: model, instructions and backend in words, for the title.
    """
    steps = int(table.step.max())
    rows, columns = (1, 2) if steps <= BESIDE else (2, 1)
    labels = {name: layer_labels(list(part.layer)) for name, part in table.groupby("criterion")}
    longest = max(len(label) for part in labels.values() for label in part)
    size = max(4.4, 1.2 + 0.42 * steps) * columns, 0.8 + (3.5 + 0.05 * longest) * rows
    fig, axes = figure(*size, rows, columns)
    for axis, (criterion, words) in zip(axes.flat, CRITERIA.items(), strict=True):
        part = table[table.criterion == criterion]
        scale = 100 if criterion == "accuracy" else 1
        for half, label, colour, marker, line in (
            ("chosen", "half that chose", NEUTRAL, "o", "--"),
            ("held_out", "held-out half", COLOURS[0], "s", "-"),
        ):
            style = {"color": colour, "marker": marker, "linestyle": line, "label": label}
            axis.plot(part.step, scale * part[half], **style, markersize=5)
        turned = {"rotation": 45, "ha": "right", "rotation_mode": "anchor", "fontsize": 8.5}
        axis.set_xticks(part.step, labels[criterion], **turned)
        axis.set(xlabel="layer added", ylabel=words, title=f"chosen by {criterion}")
        axis.grid(alpha=0.25)
        low, high = axis.get_ylim()
        top = min(high, 1.01 * scale)
        axis.set_ylim(min(low, top - LEAST_SPAN * scale), top)
        _shares_above(axis, part)
    handles = axes.flat[0].get_legend_handles_labels()
    fig.legend(*handles, loc="outside lower center", ncols=2)
    titles(fig, "Greedy forward selection of layers", setting)
    return fig


def _shares_above(axis, part: pd.DataFrame) -> None:
    """Write the share of all parameters that the layers so far have above each step."""
    above = axis.secondary_xaxis("top")
    shares = [percent(100 * share) for share in part.parameters_share]
    above.set_xticks(part.step, shares, fontsize=8)
    above.set_xlabel("parameters so far (% of all)", fontsize=9)
    above.spines["top"].set_visible(False)
    above.tick_params(length=0)


def layers(table: pd.DataFrame, setting: str = ""):
    """Draw each layer's likeness to the full gradient over depth, and how it separates pairs.

    Left: uncentred cosine of a layer's similarities to the full gradient's, a line a component.
    Right: mean cosine of queries with their originals against that with other candidates.

    Args:
        table: of ``tables.layers_table``.
        setting: as in ``greedy``.
    """
    places = cells(list(table.layer))
    styles = _styles(places, list(table.layer))
    fig, axes = figure(
        max(11.5, 7 + 0.2 * len(places.columns)), 4.9, columns=2, width_ratios=(3, 2)
    )
    over, against = axes[0]
    cosine_RK = spread(places, table.cosine_to_full)
    for row, name in enumerate(places.rows):
        over.plot(*_over_depth(places, cosine_RK[row]), **styles[name], label=name)
        own = table[places.row_L == row]
        style = styles[name] | {"linestyle": "none"}
        against.plot(own.others, own.matching, **style)
    _depth_axis(over, places)
    over.set(ylabel="uncentred cosine", title="likeness to the full gradient's similarities")
    # The line of no difference may lie far from all points.
    against.set(xlim=against.get_xlim(), ylim=against.get_ylim())
    against.axline((0, 0), slope=1, color=NEUTRAL, linewidth=1, linestyle=":", zorder=1)
    against.set(xlabel="mean cosine with other candidates", ylabel="mean cosine with the original")
    against.set_title("matching and other pairs")
    against.grid(alpha=0.25)
    handles, labels = over.get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside right center", fontsize=8.5, handlelength=2.6)
    titles(fig, "What each layer's gradient alone sees", setting)
    return fig


def _styles(places: Cells, names: Sequence[str]) -> dict[str, dict]:
    """Return how the line of each row looks; a bias like its weight, dashed and hollow."""
    found, others = {}, 0
    stems = {row: name for row, name in zip(places.row_L, names, strict=True)}
    looks: dict[str, tuple] = {}
    for row, name in enumerate(places.rows):
        weight, hollow = name.removesuffix(".bias"), name.endswith(".bias")
        kind = component(f"{stems[row].removesuffix('.bias').removesuffix('.weight')}.weight")
        if weight not in looks:
            looks[weight] = STYLES.get(kind) or OTHERS[others % len(OTHERS)]
            others += kind not in STYLES
        colour, marker = looks[weight]
        style = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.2}
        hollow_style = {"linestyle": (0, (4, 2)), "markerfacecolor": "white"}
        found[name] = style | (hollow_style if hollow else {"linestyle": "-"})
    return found


def _over_depth(places: Cells, value_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return places and values of a line; no line leads from outside of blocks into the first."""
    x_K = np.arange(len(value_K), dtype=float)
    if places.columns[0] == OUTSIDE:
        return np.insert(x_K, 1, np.nan), np.insert(value_K, 1, np.nan)
    return x_K, value_K


def _depth_axis(axis, places: Cells) -> None:
    step = -(-len(places.columns) // 18)
    inside = int(places.columns[0] == OUTSIDE)
    ticks = [*range(inside), *range(inside, len(places.columns), step)]
    axis.set_xticks(ticks, [places.columns[tick] for tick in ticks], fontsize=9)
    axis.set_xlabel(f"decoder block ({OUTSIDE}: outside of blocks)")
    axis.grid(alpha=0.25)


def self_similarity(table: pd.DataFrame, setting: str = ""):
    """Draw queries' cosines with their originals over depth: a panel a component.

    Median and the band from 10 to 90 % over queries, and the queries that are least like their
    originals by the mean over layers. What lies outside of blocks has a panel of its own.

    Args:
        table: of ``tables.self_similarity_table``.
        setting: as in ``greedy``.
    """
    cosine_QL = _by_query(table)
    names = list(table.drop_duplicates("place").sort_values("place").layer)
    mean_Q = cosine_QL.mean(axis=1).sort_values(kind="stable")
    panels = _panels(names)
    columns = min(PANELS, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    size = max(7.2, 3.0 * columns + 0.4), 1.9 + 2.1 * rows
    fig, axes = figure(*size, rows, columns, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, (layer_P, ticks)) in zip(axes.flat, panels.items(), strict=False):
        inside = title != ELSEWHERE
        _draw_queries(axis, cosine_QL.iloc[:, layer_P], mean_Q.index[:DIVERGENT], inside)
        step = -(-len(ticks) // 9) if inside else 1
        turned = {} if inside else {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
        axis.set_xticks(range(0, len(ticks), step), ticks[::step], fontsize=8.5, **turned)
        axis.set(
            title=title, xlabel="decoder block" if inside else "", xlim=(-0.5, len(ticks) - 0.5)
        )
        axis.grid(alpha=0.25)
    for axis in axes[:, 0]:
        axis.set_ylabel("cosine")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=9)
    said = f"{len(cosine_QL):,} queries; by name those least like their originals over all layers"
    if cosine_QL.empty:
        said = "no query has its original among its candidates"
    titles(fig, "Cosine of queries with their originals over depth", said, setting)
    return fig


def _by_query(table: pd.DataFrame) -> pd.DataFrame:
    """Return cosines as (Q, L), queries in the table's order, layers in the model's."""
    texts = table.assign(query=table["query"].astype(str))
    wide = texts.pivot(index="query", columns="place", values="cosine")
    return wide.loc[list(dict.fromkeys(texts["query"]))]


def _panels(names: Sequence[str]) -> dict[str, tuple[list[int], list[str]]]:
    """Return layers and tick labels by the title of a panel."""
    places, short, found = cells(names), short_names(names), {}
    for row, title in enumerate(places.rows):
        own = [p for p in np.flatnonzero(places.row_L == row) if block(names[p]) is not None]
        if own:
            found[title] = ([int(p) for p in own], [str(block(names[p])) for p in own])
    outside = [p for p, name in enumerate(names) if block(name) is None]
    return found | ({ELSEWHERE: (outside, [short[p] for p in outside])} if outside else {})


def _draw_queries(axis, cosine_QP: pd.DataFrame, divergent: Sequence[str], inside: bool) -> None:
    """Draw a panel: band and median over depth; bars and points where places have no order."""
    low_P, median_P, high_P = cosine_QP.quantile(BAND).to_numpy()
    x_P = np.arange(len(median_P))
    joined = inside and len(x_P) > 1
    line = "-" if joined else "none"
    style = {"color": COLOURS[0], "linestyle": line, "marker": "o", "markersize": 3}
    axis.plot(x_P, median_P, **style, label="median", zorder=3)
    if joined:
        axis.fill_between(x_P, low_P, high_P, color=COLOURS[0], alpha=0.2, linewidth=0, label=SPAN)
    else:
        axis.vlines(x_P, low_P, high_P, color=COLOURS[0], alpha=0.3, linewidth=8, label=SPAN)
    colours, aside = (COLOURS[1], *COLOURS[3:5]), (0, 0, 0) if joined else (-0.14, 0.14, 0.24)
    for query, colour, marker, shift in zip(divergent, colours, "s^D", aside, strict=False):
        style = {"color": colour, "marker": marker, "markersize": 3, "linewidth": 1.1}
        label = f"query {_shortened(query)}"
        axis.plot(x_P + shift, cosine_QP.loc[query], **style, linestyle=line, label=label)


def _shortened(name: str) -> str:
    """Return an id that a legend has room for, without what matplotlib reads as mathematics."""
    half = LONGEST // 2
    return (name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}").replace("$", r"\$")
