"""Maps of heads, layers down and heads across: what is drawn in figures and frames alike."""

import numpy as np
import pandas as pd

from headroom.plotting import COLOURS

ATTENTIONS = {
    "encoder": "encoder self-attention",
    "decoder": "decoder self-attention",
    "cross": "cross-attention",
}
MAP = "cividis"  # dark blue at 0, yellow at 1; reads the same to the colour-blind
LIGHT = 0.45  # of a map's values: black letters above, white ones below
SHADES = ("#F4F4F4", "#A3A3A3")  # of the roles; black letters can be read on all of them


def attentions(gates: pd.DataFrame) -> list[str]:
    """Return the gated attentions in their fixed order: encoder, decoder, cross."""
    found = set(gates.attention)
    return [name for name in ATTENTIONS if name in found]


def grid(gates: pd.DataFrame, name: str, step: int, column: str) -> pd.DataFrame:
    """Return a column's values at a step as a table of layers down and heads across."""
    found = gates[(gates.attention == name) & (gates.step == step)]
    return found.pivot(index="layer", columns="head", values=column).sort_index().sort_index(axis=1)


def cells(axis, table_LH: pd.DataFrame, colours=MAP, last: bool = True):
    """Draw a table as cells coloured from 0 to 1, layers named down and heads across."""
    image = axis.imshow(table_LH.to_numpy(float), cmap=colours, vmin=0, vmax=1, aspect="auto")
    layers, heads = table_LH.shape
    axis.set_yticks(range(layers), [f"layer {layer}" for layer in table_LH.index])
    axis.set_xticks(range(heads), [str(head) for head in table_LH.columns])
    axis.set_xlabel("head" if last else "")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    for border in range(1, layers):
        axis.axhline(border - 0.5, color="white", linewidth=2)
    for border in range(1, heads):
        axis.axvline(border - 0.5, color="white", linewidth=2)
    return image


def open_bar(axis, image) -> None:
    """Add the colour bar of p_open, which says in words which colour is open."""
    bar = axis.figure.colorbar(image, ax=axis, ticks=[0, 0.5, 1], aspect=12)
    names = ["0: closed\n(dark blue)", "0.5", "1: open\n(yellow)"]
    labels = bar.ax.set_yticklabels(names, fontsize=8.5)
    labels[0].set_verticalalignment("bottom")
    labels[-1].set_verticalalignment("top")
    bar.ax.set_title("p_open", fontsize=9)


def write_gates(axis, open_LH: pd.DataFrame, gate_LH: pd.DataFrame) -> None:
    """Write each gate of evaluation, or that it is closed, into a map of p_open."""
    for (row, column), gate in np.ndenumerate(gate_LH.to_numpy(float)):
        words = "closed" if gate <= 0 else f"{gate:.2f}" if gate >= 0.005 else "<.01"
        colour = "black" if open_LH.to_numpy()[row, column] > LIGHT else "white"
        axis.text(column, row, words, ha="center", va="center", fontsize=9, color=colour)


def roles_panel(axis, roles: pd.DataFrame, gate_LH: pd.DataFrame, name: str) -> None:
    """Draw confidence as shade, with offset, confidence and rare-token share in figures."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    found = roles.set_index(["layer", "head"])
    confidence_LH = gate_LH.astype(float) * np.nan
    for place in found.index.intersection(gate_LH.stack().index):
        confidence_LH.loc[place] = found.confidence[place]
    image = cells(axis, confidence_LH, LinearSegmentedColormap.from_list("roles", SHADES))
    bar = axis.figure.colorbar(image, ax=axis, ticks=[0, 0.5, 1], aspect=12)
    bar.ax.set_title("confidence", fontsize=9)
    for row, layer in enumerate(gate_LH.index):
        for column, head in enumerate(gate_LH.columns):
            if (layer, head) not in found.index:
                continue
            role = found.loc[(layer, head)]
            text = {"ha": "center", "va": "center", "fontsize": 8}
            axis.text(column, row, _role_words(role), **text, linespacing=1.15)
            if pd.notna(role.is_positional) and role.is_positional:
                place, size = (column - 0.44, row - 0.44), 0.88
                style = {"edgecolor": "black", "linewidth": 2, "fill": False}
                axis.add_patch(Rectangle(place, size, size, **style))
            if not gate_LH.loc[layer, head] > 0:
                corner = [(column + 0.24, row - 0.5), (column + 0.5, row - 0.5)]
                corner += [(column + 0.5, row - 0.24)]
                axis.fill(*zip(*corner, strict=True), color=COLOURS[1], linewidth=0, zorder=3)
    axis.set_title(f"{ATTENTIONS[name]}\nroles before gating", fontsize=10)


def _role_words(role) -> str:
    """Only what is known of a head's kind: no offset in cross-attention, no rarity of targets."""
    lines = []
    if pd.notna(role.offset):
        offset = f"{int(role.offset):+d}".replace("-", "−").replace("+0", "0")
        lines.append(f"{offset}: {100 * role.positional:.0f}%")
    for letter, value in (("c", role.confidence), ("r", role.rare)):
        if pd.notna(value):
            lines.append(f"{letter} {value:.2f}".replace(" 0.", " ."))
    return "\n".join(lines)


def roles_key(roles: pd.DataFrame) -> str:
    """Say what the figures and marks in the cells of roles mean."""
    known = roles.rare_baseline.astype(float).dropna()
    if known.empty:
        rare = ""
    elif known.max() - known.min() < 0.005:
        rare = f", r share on rarest source tokens (by chance {known.iloc[0]:.2f})"
    else:
        chance = f"{known.min():.2f} to {known.max():.2f}"
        rare = f", r share on rarest source tokens (by chance {chance})"
    offsets = roles.offset.notna().any()
    first = "the offset looked at most often and its share of tokens (black frame: positional),\n"
    return (
        f"roles: {first if offsets else ''}c confidence (mean of the largest weight){rare},\n"
        "orange corner: closed by the gates"
    )
