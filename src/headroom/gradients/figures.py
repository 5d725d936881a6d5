"""Maps and bars of the gradients study: where in the model gradients recognise an original.

A map has a row a component and a column a decoder block; the column "–" is what lies outside of
blocks. Frames are those of ``tables``, as made or as read back from their CSV.

Shapes: R rows, K columns of a map.
"""

from collections.abc import Callable, Sequence
from textwrap import fill
from typing import NamedTuple

import numpy as np
import pandas as pd

from headroom.gradients.pairs import COMPONENTS, block, component
from headroom.gradients.tables import SAID
from headroom.plotting import COLOURS, MARKERS, NEUTRAL, figure, interval

OUTSIDE = "–"
MOST_NUMBERED = 17  # columns whose cells have room for a number: 16 blocks and what is outside
MOST_TICKS = 40
LEAST_SPAN = 10.0  # points of top-1 that the colours span at least: noise shall not look like much
DECADES = 1e4  # the smallest share that has a colour of its own, as a part of the largest
BEST, WORST = 5, 3
BAR = {"pad": 0.02, "aspect": 32}
POOLED = {"mean": "mean of state", "last": "last token of state"}
KINDS = ("full", "component", "layer", "state", "baseline")


class Cells(NamedTuple):
    """Where layers lie in a map."""

    rows: list[str]  # names within a block, in the order of ``COMPONENTS``
    columns: list[str]
    row_L: np.ndarray
    column_L: np.ndarray


def short_names(layers: Sequence[str]) -> list[str]:
    """Return what layers are called within their block: q, down, q.bias, input_layernorm.

    Norms and unknown modules keep their own name, all others have that of their component. Where
    two layers of one block would be called the same, their kind has the module's path.
    """
    short = [_short_name(layer) for layer in layers]
    blocks = [block(layer) for layer in layers]
    seen, twice = set(), set()
    for key in zip(blocks, short, strict=True):
        if key in seen:
            twice.add(key[1])
        seen.add(key)
    return [
        _path(layer, number) if name in twice else name
        for layer, number, name in zip(layers, blocks, short, strict=True)
    ]


def _short_name(layer: str) -> str:
    stem = layer.removesuffix(".bias").removesuffix(".weight")
    kind = component(f"{stem}.weight")
    name = stem.rsplit(".", 1)[-1] if kind in ("norm", "other") else kind
    return f"{name}.bias" if layer.endswith(".bias") else name


def _path(layer: str, number: int | None) -> str:
    inside = layer if number is None else layer.split(f".{number}.", 1)[1]
    return inside.removesuffix(".weight")


def layer_labels(layers: Sequence[str]) -> list[str]:
    """Return short names with their block: 3.down for model.layers.3.mlp.down_proj.weight."""
    blocks = [block(layer) for layer in layers]
    pairs = zip(blocks, short_names(layers), strict=True)
    return [name if number is None else f"{number}.{name}" for number, name in pairs]


def cells(layers: Sequence[str]) -> Cells:
    """Return rows and columns of a map of these layers, and each layer's place in it."""
    short, blocks = short_names(layers), [block(layer) for layer in layers]
    kinds = [COMPONENTS.index(component(layer)) for layer in layers]
    first = {name: kind for name, kind in zip(reversed(short), reversed(kinds), strict=True)}
    rows = sorted(dict.fromkeys(short), key=first.__getitem__)
    inside = [str(number) for number in sorted({own for own in blocks if own is not None})]
    columns = [OUTSIDE] * (None in blocks) + inside
    return Cells(
        rows,
        columns,
        np.array([rows.index(name) for name in short]),
        np.array([columns.index(OUTSIDE if own is None else str(own)) for own in blocks]),
    )


def spread(places: Cells, values_L: Sequence[float]) -> np.ndarray:
    """Return the map of layers' values, NaN where there is no layer, (R, K)."""
    found_RK = np.full((len(places.rows), len(places.columns)), np.nan)
    found_RK[places.row_L, places.column_L] = values_L
    return found_RK


def heatmap(table: pd.DataFrame, setting: str = ""):
    """Draw top-1 of every single layer: a row a component, a column a decoder block.

    Args:
        table: of ``tables.retrieval_table``.
        setting: model, instructions and backend in words, for the title.
    """
    layers = table[table.kind == "layer"]
    places = cells(list(layers.name))
    top1_RK = spread(places, 100 * layers.top1.to_numpy(float))
    fig, axes = figure(*_map_size(places, 1))
    low, high = np.nanmin(top1_RK), np.nanmax(top1_RK)
    low = max(0.0, min(low, (low + high - LEAST_SPAN) / 2, 100 - LEAST_SPAN))
    bounds = {"vmin": low, "vmax": max(high, low + LEAST_SPAN)}
    mesh = _map(axes[0, 0], top1_RK, places, "{:.1f}".format, **bounds)
    fig.colorbar(mesh, ax=axes[0, 0], label="top-1 (%)", **BAR)
    titles(fig, "Top-1 of each layer's gradient alone", _searched(table), setting)
    return fig


def parameters(table: pd.DataFrame, setting: str = ""):
    """Draw how parameters and the squared norm of gradients are spread over the model.

    Two maps with the same colours on a logarithmic scale; the sums of rows stand at their right.

    Args:
        table: of ``tables.layers_table``.
        setting: as in ``heatmap``.
    """
    from matplotlib.colors import LogNorm

    places = cells(list(table.layer))
    maps = {
        f"of {table.parameters.sum():,} parameters": table.share,
        "of the gradient's squared norm ‖g‖² (mean over originals)": table.norm_share,
    }
    shares = [spread(places, 100 * values.to_numpy(float)) for values in maps.values()]
    highest = np.nanmax(shares)
    lowest = min(share_RK[share_RK > 0].min(initial=highest) for share_RK in shares)
    bounds = LogNorm(max(lowest, highest / DECADES) * 0.999, highest)
    fig, axes = figure(*_map_size(places, 2), rows=2)
    for axis, words, share_RK in zip(axes[:, 0], maps, shares, strict=True):
        mesh = _map(axis, share_RK, places, percent, norm=bounds)
        axis.set_title(f"share {words}", fontsize=10)
        for row, total in enumerate(np.nansum(share_RK, axis=1)):
            place = (len(places.columns) - 0.35, row)
            axis.text(*place, f"Σ {percent(total)}", va="center", fontsize=8, color=NEUTRAL)
    extend = "min" if lowest < highest / DECADES else "neither"
    bar = fig.colorbar(mesh, ax=axes[:, 0], label="share (%)", extend=extend, **BAR)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    titles(fig, "Where parameters and gradients are", setting)
    return fig


def percent(value: float) -> str:
    """Return a share in per cent with two digits and without an exponent."""
    if 0 < value < 0.01:
        return "<.01"
    return f"{value:.2g}" if value < 9.95 else f"{value:.0f}"


def _map_size(places: Cells, maps: int) -> tuple[float, float]:
    each = 0.46 if len(places.columns) <= MOST_NUMBERED else 0.27
    return max(7.2, 3.2 + each * len(places.columns)), 1.3 + maps * (0.65 + 0.27 * len(places.rows))


def _map(axis, values_RK: np.ndarray, places: Cells, form: Callable[[float], str], **colours):
    """Draw a map, with numbers where they fit; cells without a layer are grey."""
    R, K = values_RK.shape
    edges = np.arange(K + 1) - 0.5, np.arange(R + 1) - 0.5
    style = {"cmap": "cividis", "edgecolors": "white", "linewidth": 0.6}
    mesh = axis.pcolormesh(*edges, np.ma.masked_invalid(values_RK), **style, **colours)
    axis.set_facecolor("#E9E9E9")
    if K <= MOST_NUMBERED:
        for (row, column), value in np.ndenumerate(values_RK):
            if not np.isnan(value):
                colour = "white" if mesh.norm(value) < 0.55 else "black"
                style = {"ha": "center", "va": "center", "color": colour, "fontsize": 8}
                axis.text(column, row, form(value), **style)
    step = -(-K // MOST_TICKS)
    axis.set_xticks(range(0, K, step), places.columns[::step], fontsize=8)
    axis.set_yticks(range(R), places.rows, fontsize=9)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set(xlabel=f"decoder block ({OUTSIDE}: outside of blocks)", ylim=(R - 0.5, -0.5))
    return mesh


def accuracy(table: pd.DataFrame, setting: str = ""):
    """Draw top-1 with its interval: full gradient, components, layers, hidden states, baselines.

    Of layers the best and the worst, of hidden states the best of each pooling. A point is filled
    where it differs from the full gradient by the paired interval.

    Args:
        table: of ``tables.retrieval_table``.
        setting: as in ``heatmap``.
    """
    parts = _measures(table)
    lines = sum(len(rows) + bool(heading) for heading, _, rows in parts)
    fig, axes = figure(7.8, 1.9 + 0.215 * lines)
    axis, ticks, y = axes[0, 0], {}, 0
    for heading, kind, rows in parts:
        if heading:
            ticks[y] = heading
            y += 1
        _points(axis, rows, np.arange(y, y + len(rows)), kind)
        ticks |= {y + place: label for place, label in enumerate(rows.label)}
        y += len(rows)
    axis.set_yticks(list(ticks), list(ticks.values()), fontsize=9)
    headings = {heading for heading, _, _ in parts} | {"full gradient"}
    for tick in axis.get_yticklabels():
        tick.set_fontweight("bold" if tick.get_text() in headings else "normal")
    axis.tick_params(axis="y", length=0)
    axis.set(xlabel="top-1 (%), Wilson's interval", xlim=(-2, 102), ylim=(y - 0.4, -0.6))
    axis.grid(alpha=0.25)
    _accuracy_legend(fig, axis, table)
    titles(fig, "Whose similarity finds the original", _searched(table), setting)
    return fig


def _measures(table: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """Return heading, kind and rows (with labels) of each group of points that there is."""
    order = {"by": ["top1", "parameters"], "ascending": [False, True], "kind": "stable"}
    own = {kind: table[table.kind == kind] for kind in KINDS}
    layers = own["layer"].assign(label=layer_labels(list(own["layer"].name)))
    layers = layers.sort_values(**order)
    states = own["state"].sort_values("top1", ascending=False, kind="stable")
    states = states.drop_duplicates("component")
    names = [name.split(".", 1) for name in states.name]
    words = [f"{POOLED.get(pooling, pooling)} {number}" for number, pooling in names]
    said = [SAID.get(name, name) for name in own["baseline"].name]
    few = len(layers) <= BEST + WORST
    parts = [
        ("", "full", own["full"].assign(label="full gradient")),
        ("components", "component", own["component"].assign(label=own["component"].name)),
        (
            "layers" if few else f"best of {len(layers)} layers",
            "layer",
            layers if few else layers.head(BEST),
        ),
        ("worst layers", "layer", layers.iloc[:0] if few else layers.tail(WORST)),
        (f"best of {len(own['state'])} hidden states", "state", states.assign(label=words)),
        ("baselines", "baseline", own["baseline"].assign(label=said)),
    ]
    return [part for part in parts if len(part[2])]


def _points(axis, rows: pd.DataFrame, y_R: np.ndarray, kind: str) -> None:
    place = KINDS.index(kind)
    colour, marker = (NEUTRAL, *COLOURS)[-1 - place], MARKERS[place]
    values = [100 * rows[name].to_numpy(float) for name in ("top1", "top1_low", "top1_high")]
    undecided = (rows.verdict == "undecided").to_numpy()
    for which, fill_colour in ((~undecided, colour), (undecided, "white")):
        if which.any():
            top1, low, high = (part[which] for part in values)
            low, high = np.minimum(low, top1), np.maximum(high, top1)  # they differ by rounding
            interval(axis, top1, y_R[which], low, high, colour, marker, mfc=fill_colour)
    for y, value in zip(y_R, values[0], strict=True):
        right = {"transform": axis.get_yaxis_transform(), "va": "center", "ha": "right"}
        axis.text(1.07, y, f"{value:.1f}", fontsize=8.5, **right)


def _accuracy_legend(fig, axis, table: pd.DataFrame) -> None:
    """Chance and the full gradient as lines through all rows, and what filled points mean."""
    full, chance = table[table.kind == "full"].top1.iloc[0], 1 / table.candidates.iloc[0]
    style = {"color": NEUTRAL, "linewidth": 1.1, "zorder": 1}
    lines = [
        axis.axvline(100 * chance, **style, linestyle="--", label=f"chance ({100 * chance:.2g} %)"),
        axis.axvline(100 * full, **style, linestyle=":", label="full gradient"),
    ]
    point = {"color": "black", "marker": "o", "linestyle": "none", "markersize": 6}
    (filled,) = axis.plot([], [], **point, label="differs from the full gradient")
    (hollow,) = axis.plot([], [], **point, mfc="white", label="undecided (paired interval)")
    handles = [lines[0], filled, lines[1], hollow]
    fig.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=9)


def _searched(table: pd.DataFrame) -> str:
    full, C = table[table.kind == "full"].iloc[0], table.candidates.iloc[0]
    ends = "{:.1f} % [{:.1f}, {:.1f}]".format(
        *(100 * full[name] for name in ("top1", "top1_low", "top1_high"))
    )
    searched = f"{full.queries:,} queries, {C:,} candidates each"
    return f"{searched}; full gradient {ends}; chance {100 / C:.2g} %"


def titles(fig, head: str, *lines: str) -> None:
    """Give a figure its title and below it what it is of, broken where it would not fit."""
    wide = int(fig.get_size_inches()[0] * 11.5)
    fig.suptitle("\n".join([head, *(fill(line, wide) for line in lines if line)]), fontsize=11)
