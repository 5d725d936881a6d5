"""Figures of the branches study: pure functions from means over seeds to matplotlib figures.

A line is a training config: fixed numbers of branches in blue, dynamic ones in orange, the darker
the more branches. Controls keep the colour of their training and differ in the line's style.
"""

from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill

import numpy as np
import pandas as pd

from headroom.branches.runs import COMMON_MASK, STRIDE, rotation
from headroom.branches.tables import SETTINGS, is_dynamic, train_order
from headroom.plotting import MARKERS, NEUTRAL, figure

FAMILIES = {False: "Blues", True: "Oranges"}  # of fixed and of dynamic training
DASHES = ((0, (5, 2)), (0, (1, 1.4)), (0, (5, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 3)))
MASK_WORDS = {"isolated": "own branch only (isolated)"}
LOSS = "loss (nats a token)"
PANELS = 4  # side by side at most


def loss_figure(means: pd.DataFrame, architecture: str, setting: str = ""):
    """Draw loss against evaluation branches: a panel a ratio, a line a training config.

    Args:
        means: of ``tables.means``.
        architecture: whose rows are drawn, a name.
        setting: texts and intervals in words, for the title.
    """
    rows = _one_kind(means[means.architecture == architecture])
    ratios = sorted(set(rows.rope_ratio))
    columns = len(ratios) if len(ratios) <= PANELS else -(-len(ratios) // 2)
    fig, axes = _panels(len(ratios), min(columns, PANELS), 3.4, beside=1.9)
    for axis, ratio in zip(axes.flat, ratios, strict=False):
        part = rows[rows.rope_ratio == ratio]
        for style, line in _lines(part, rows):
            _draw(axis, line.eval_branch, line, style)
        axis.set_title(f"ratio {ratio:g}{_lost(part)}")
        _count_axis(axis, sorted(set(rows.eval_branch)))
    _shared(axes)
    _titles(fig, f"{architecture}: loss against evaluation branches", setting)
    _legend(fig, rows)
    return fig


def ratio_figure(means: pd.DataFrame, architecture: str, setting: str = ""):
    """Draw loss at the most evaluation branches against the ratio, a line a training config.

    Args:
        means, architecture, setting: as in ``loss_figure``.
    """
    rows = _one_kind(means[means.architecture == architecture])
    most = rows.eval_branch.max()
    last = rows[rows.eval_branch == most]
    fig, axes = figure(8.4, 5.2)
    axis, ratios = axes[0, 0], sorted(set(rows.rope_ratio))
    for style, line in _lines(_completed(last), rows):
        line = line.sort_values("rope_ratio")
        _draw(axis, line.rope_ratio, line, style, bars=True)
    axis.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
    axis.set(xlabel=f"ratio of two-dimensional frequency pairs{_lost(last)}", ylabel=LOSS)
    axis.grid(alpha=0.25)
    head = f"{architecture}: loss at {most} evaluation branches against the ratio"
    _titles(fig, head, setting)
    _legend(fig, rows)
    return fig


def architecture_figure(means: pd.DataFrame, setting: str = ""):
    """Draw loss at the most evaluation branches by architecture: a panel a training config.

    Args:
        means: of ``tables.means``; controls are left out.
        setting: as in ``loss_figure``.
    """
    from matplotlib import colormaps

    rows = means[~means.control]
    most, trains, ratios = rows.eval_branch.max(), _trains(rows), sorted(set(rows.rope_ratio))
    last = rows[rows.eval_branch == most]
    names, ticks, label = _architectures(last)
    fig, axes = _panels(len(trains), min(len(trains), 5), 2.9)
    shades = colormaps["viridis"](np.linspace(0, 0.88, len(ratios)))
    for axis, train in zip(axes.flat, trains, strict=False):
        for number, ratio in enumerate(ratios):
            line = last[(last.train_branch == train) & (last.rope_ratio == ratio)]
            line = line.set_index("architecture").reindex(names)
            style = {"color": shades[number], "marker": MARKERS[number % len(MARKERS)]}
            style |= {"label": f"{ratio:g}", "linewidth": 1.5, "markersize": 4.5}
            _draw(axis, np.arange(len(names)), line, style, bars=True)
        axis.set_title(f"trained on {train}{_lost(last[last.train_branch == train])}")
        axis.set_xticks(range(len(names)), ticks)
        axis.set(xlabel=label, xlim=(-0.3, len(names) - 0.7))
    _shared(axes)
    _titles(fig, f"Loss at {most} evaluation branches by architecture", setting)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    place = {"loc": "outside lower center", "ncols": len(ratios), "fontsize": 9.5}
    fig.legend(handles, labels, title="ratio", **place)
    return fig


def _trains(rows: pd.DataFrame) -> list[str]:
    return sorted(set(rows.train_branch), key=train_order)


def train_styles(trains: Sequence[str]) -> dict[str, dict]:
    """Return colour and marker of each training config, in the order of a legend."""
    from matplotlib import colormaps

    styles = {}
    for dynamic, family in FAMILIES.items():
        own = [train for train in trains if is_dynamic(train) == dynamic]
        shades = np.linspace(0.45, 0.95, len(own)) if len(own) > 1 else [0.75]
        for number, train in enumerate(own):
            marker = MARKERS[number % len(MARKERS)]
            styles[train] = {"color": colormaps[family](shades[number]), "marker": marker}
    return styles


def control_words(row: Mapping) -> str:
    """Return in words how a control differs from the study's own runs."""
    words = []
    if row["coordinate"] != "flat":
        words.append("time instead of flat index")
    if row["band"] != "low":
        words.append("high band")
    if row["stride"] != STRIDE:
        words.append(f"stride {row['stride']}")
    if row["mask"] != COMMON_MASK:
        words.append(MASK_WORDS.get(row["mask"], f"mask {row['mask']}"))
    return ", ".join(words)


def _controls(rows: pd.DataFrame) -> dict[str, tuple]:
    """Dashes of each control."""
    found = rows[rows.control].drop_duplicates(list(SETTINGS)).to_dict("records")
    words = dict.fromkeys(control_words(row) for row in found)
    return {name: DASHES[number % len(DASHES)] for number, name in enumerate(words)}


def _lines(part: pd.DataFrame, rows: pd.DataFrame) -> Iterator[tuple[dict, pd.DataFrame]]:
    """Yield style and points of each line of a part of the rows, controls first: they lie below."""
    colours, dashes = train_styles(_trains(rows)), _controls(rows)
    groups = dict(list(part.groupby(["control", *SETTINGS, "train_branch"], sort=False)))
    for key in sorted(groups, key=lambda key: (not key[0], train_order(key[-1]))):
        style = {**colours[key[-1]], "linewidth": 1.7, "markersize": 4.5, "zorder": 3}
        if key[0]:
            line = dashes[control_words(groups[key].iloc[0])]
            style |= {"linestyle": line, "linewidth": 1.3, "marker": "", "zorder": 2}
        yield style, groups[key]


def _one_kind(rows: pd.DataFrame) -> pd.DataFrame:
    """Give a control one name at all ratios.

    At ratio 1 there is no flat index to replace, at ratio 0 no band and no stride: there a control
    has the name of a simpler one, which is nothing of its own if it is at no other ratio.
    """
    ratios = {key: {*part.rope_ratio} for key, part in rows[rows.control].groupby([*SETTINGS])}
    rows = rows.copy()
    for simple, own in ratios.items():
        for key in ratios:
            same = all(rotation(ratio, *key[:3]) == rotation(ratio, *simple[:3]) for ratio in own)
            if key != simple and key[3] == simple[3] and same:
                rows.loc[(rows[[*SETTINGS]] == simple).all(axis=1), [*SETTINGS]] = key
                break
    return rows


def _completed(rows: pd.DataFrame) -> pd.DataFrame:
    """Add to the controls' lines the points where a control is one of the study's own runs."""
    parts = [rows]
    for key in rows[rows.control].groupby([*SETTINGS, "train_branch"], sort=False).groups:
        own = rows[~rows.control & (rows.train_branch == key[-1]) & (rows["mask"] == key[3])]
        same = [rotation(ratio, *key[:3]) == rotation(ratio) for ratio in own.rope_ratio]
        parts.append(own[same].assign(**dict(zip(SETTINGS, key, strict=False)), control=True))
    return pd.concat(parts, ignore_index=True)


def _draw(axis, x, line: pd.DataFrame, style: Mapping, bars: bool = False) -> None:
    """Draw a line with its intervals: a band, or bars where points lie far apart."""
    x, loss, low, high = (np.asarray(v, float) for v in (x, line.loss, line.low, line.high))
    if len(x) == 1 and "marker" not in style:  # a line of one point shows nothing
        style = {**style, "marker": "D", "markerfacecolor": "white"}
    axis.plot(x, loss, **style)
    if bars:
        spans = {"elinewidth": 1.1, "capsize": 2.5, "fmt": "none", "ecolor": style["color"]}
        axis.errorbar(x, loss, yerr=np.maximum([loss - low, high - loss], 0), **spans)
    else:
        axis.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0, zorder=1)


def _lost(rows: pd.DataFrame) -> str:
    """Say how many runs have no loss."""
    runs = rows.groupby([*SETTINGS, "architecture", "rope_ratio", "train_branch"])
    lost, every = (runs.seeds.first() - runs.trained.first()).sum(), runs.seeds.first().sum()
    return f"\n({lost} of {every} runs diverged)" if lost else ""


def _panels(panels: int, columns: int, size: float, beside: float = 0.0) -> tuple:
    rows = max(1, -(-panels // columns))
    fig, axes = figure(size * columns + 0.6 + beside, 3.1 * rows + 1.2, rows, columns, sharey=True)
    for axis in axes.flat[panels:]:
        axis.set_axis_off()
    return fig, axes


def _shared(axes) -> None:
    for axis in axes.flat:
        axis.grid(alpha=0.25)
    for axis in axes[:, 0]:
        axis.set_ylabel(LOSS)


def _count_axis(axis, counts: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(count) for count in counts])
    axis.minorticks_off()
    axis.set_xlabel("evaluation branches")


def _architectures(rows: pd.DataFrame) -> tuple[list[str], list[str], str]:
    """Return the architectures in order, their tick labels and the label of the axis."""
    order = ["head_dim", "num_heads"]
    found = rows.drop_duplicates("architecture").sort_values(order)
    names = found.architecture.tolist()
    if found.head_dim.nunique() == 1:
        return (
            names,
            found.num_heads.astype(str).tolist(),
            f"heads of size {found.head_dim.iloc[0]}",
        )
    if found.hidden_size.nunique() == 1:
        words = f"head size (hidden size {found.hidden_size.iloc[0]})"
        return names, found.head_dim.astype(str).tolist(), words
    return names, [name.replace("-", "\n") for name in names], "architecture"


def _titles(fig, head: str, setting: str) -> None:
    wide = int(fig.get_size_inches()[0] * 11)
    parts = [setting] if len(setting) <= wide else setting.split("; ")
    fig.suptitle("\n".join([head, *(fill(part, wide) for part in parts if part)]), fontsize=11)


def _legend(fig, rows: pd.DataFrame) -> None:
    """Training configs, and below the controls' dashes where there are any, beside the panels."""
    from matplotlib.lines import Line2D

    controls = _controls(rows)
    handles = [
        Line2D([], [], **style, label=train) for train, style in train_styles(_trains(rows)).items()
    ]
    if controls:
        handles += [Line2D([], [], color="none", label=text) for text in ("", "control")]
        handles += [
            Line2D([], [], color=NEUTRAL, linestyle=line, label=fill(name, 26))
            for name, line in ({"none": "-"} | controls).items()
        ]
    place = {"loc": "outside right center", "alignment": "left", "fontsize": 9.5}
    fig.legend(handles=handles, title="trained on (branches)", **place)
