"""One look for all figures: colours that the colour-blind tell apart, PNG and SVG, equal bytes."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette (Wong 2011, Nature Methods 8:441), dark ones first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BETTER, WORSE, NEUTRAL = COLOURS[0], COLOURS[1], "#6B6B6B"
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "headroom",
}


def figure(width: float, height: float, rows: int = 1, columns: int = 1, **options) -> tuple:
    """Return a figure of a size in inches and its axes as a two-dimensional array."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, **options)


def save(fig: "Figure", path: str | Path) -> None:
    """Write a figure as PNG at ``path`` and as SVG beside it, without dates in the files."""
    import matplotlib.pyplot as plt

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path.with_suffix(".png"), metadata={"Software": None})
    fig.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
    plt.close(fig)


def interval(axis: "Axes", x, y, low, high, colour: str, marker: str, label: str = "", **options):
    """Draw points with horizontal confidence intervals."""
    return axis.errorbar(
        x,
        y,
        xerr=[
            [a - b for a, b in zip(x, low, strict=True)],
            [b - a for a, b in zip(x, high, strict=True)],
        ],
        fmt=marker,
        color=colour,
        ecolor=colour,
        elinewidth=1.4,
        capsize=3,
        markersize=6,
        label=label,
        **options,
    )
