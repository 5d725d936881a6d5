"""Words beside points of a figure, where nothing else stands."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

MARK = np.array([7, 6])  # half a mark, pixels
DASH = np.array([12, 4])  # half the dash of a mean


def write_beside(
    fig,
    axis,
    words: Mapping[tuple[float, float], str],
    bars: Sequence[np.ndarray],
    lines: Sequence[np.ndarray],
    colour: str,
) -> None:
    """Write words near their points, clear of bars, lines, level lines and one another.

    Args:
        fig: laid out as it will be saved.
        axis: whose data the coordinates are.
        words: text by point.
        bars: lower and upper ends of vertical bars, each (n, 2).
        lines: corners of each line, (n, 2).
        colour: of words and leaders.
    """
    fig.canvas.draw()
    low_n2, high_n2 = (axis.transData.transform(np.asarray(ends, float)) for ends in bars)
    taken = [np.hstack([low_n2 - MARK, high_n2 + MARK])]
    for line in lines:
        corners = axis.transData.transform(line)
        taken.append(np.hstack([corners - DASH, corners + DASH]))
        for start, end in pairwise(corners):
            number = max(2, int(np.abs(end - start).max() / 4))
            points = start + np.linspace(0, 1, number)[:, None] * (end - start)
            taken.append(np.hstack([points - 2, points + 2]))
    left, _, right, _ = axis.bbox.extents
    for level in axis.lines:
        x, y = level.get_xdata(), level.get_ydata()
        if list(x) == [0, 1] and y[0] == y[1]:
            height = axis.transData.transform((0, y[0]))[1]
            taken.append(np.array([[left, height - 3, right, height + 3]]))
    boxes = np.vstack(taken)
    for place, text in words.items():
        boxes = np.vstack([boxes, _write(fig, axis, place, text, boxes, colour)])


def _write(fig, axis, place, words: str, boxes: np.ndarray, colour: str) -> np.ndarray:
    """Write words at the nearest free place; return their box (left, bottom, right, top)."""
    style = {"fontsize": 9, "color": colour, "ha": "center", "va": "center", "zorder": 6}
    line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 2}
    text = axis.annotate(
        words, place, xytext=(0, 0), textcoords="offset points", arrowprops=line, **style
    )
    text.set_in_layout(False)
    own = text.get_window_extent(fig.canvas.get_renderer()).extents
    half = (own[2:] - own[:2]) / 2 + 2
    inside, anchor = axis.bbox.extents, axis.transData.transform(place)
    shifts = np.array([(x, y) for x in range(-200, 201, 8) for y in range(-300, 301, 6)])
    for shift in shifts[np.argsort((shifts**2).sum(1), kind="stable")]:
        box = np.hstack([anchor + shift - half, anchor + shift + half])
        apart = (boxes[:, :2] > box[2:]) | (boxes[:, 2:] < box[:2])
        if apart.any(1).all() and (box[:2] > inside[:2]).all() and (box[2:] < inside[2:]).all():
            text.set_position(tuple(shift * 72 / fig.dpi))
            return box
    return own
