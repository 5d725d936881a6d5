"""p_open of every head over training as a GIF: a frame a report, step and epoch on each."""

import io
from pathlib import Path

import numpy as np
import pandas as pd

from headroom.errors import InputError
from headroom.gates.maps import ATTENTIONS, MAP, attentions, cells, grid, open_bar
from headroom.plotting import NEUTRAL, figure

CELL = 0.46  # inches
DPI = 130
GREYS = 64  # of a GIF's 256 colours; the others are the map's
TICK = 0.01  # seconds: what a GIF counts in


def p_open_gif(gates: pd.DataFrame, path: str | Path, seconds_per_frame: float = 0.6) -> None:
    """Write p_open over training as a GIF that loops for ever; a step of the table is a frame.

    The colours run from 0 to 1 on each frame. Step and epoch stand on it, so no two frames are
    equal and none is merged with the one before.

    Args:
        gates: step, epoch, attention, layer, head, p_open, gate; step 0 is the initial frame.
        path: of the GIF.
        seconds_per_frame: a multiple of 0.01 s, the format's unit.

    Raises:
        InputError: if the table is empty or a frame would take less than 0.02 s.
    """
    if gates.empty:
        raise InputError("gates: an animation needs at least one report")
    ticks = round(seconds_per_frame / TICK)
    if ticks < 2:
        raise InputError("seconds_per_frame: at least 0.02; players slow shorter frames down")
    frames = _frames(gates)
    written = io.BytesIO()
    options = {"duration": 10 * ticks, "loop": 0, "disposal": 1, "optimize": False}
    frames[0].save(written, "GIF", save_all=True, append_images=frames[1:], **options)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(written.getvalue())


def _frames(gates: pd.DataFrame) -> list:
    """One image a step, all with one palette, so that equal colours stay equal bytes."""
    import matplotlib.pyplot as plt
    from PIL import Image

    steps = sorted(set(gates.step))
    fig, panels, stamp, bar = _canvas(gates, steps[0])
    palette_C3 = _palette()
    frames = []
    for step in steps:
        now = gates[gates.step == step]
        for name, (image, marks) in panels.items():
            image.set_data(grid(gates, name, step, "p_open").to_numpy(float))
            closed_LH = grid(gates, name, step, "gate").to_numpy(float) <= 0
            for mark, closed in zip(marks, closed_LH.ravel(), strict=True):
                mark.set_visible(bool(closed))
        opened = int((now.gate > 0).sum())
        when = f"step {step:,}, epoch {now.epoch.iloc[0]:.2f}"
        stamp.set_text(f"{when}\n{opened} of {len(now)} heads open (×: closed)")
        bar.set_width(step / max(1, steps[-1]))
        fig.canvas.draw()
        picture = Image.fromarray(_nearest(np.asarray(fig.canvas.buffer_rgba()), palette_C3))
        picture.putpalette(palette_C3.tobytes())
        frames.append(picture)
    plt.close(fig)
    return frames


def _palette() -> np.ndarray:
    """The map's colours and greys."""
    from matplotlib import colormaps

    map_C3 = colormaps[MAP](np.linspace(0, 1, 256 - GREYS))[:, :3]
    greys_C3 = np.linspace(0, 1, GREYS)[:, None].repeat(3, axis=1)
    return np.round(255 * np.vstack([map_C3, greys_C3])).astype(np.uint8)


def _nearest(pixels_YX4: np.ndarray, palette_C3: np.ndarray) -> np.ndarray:
    """The number of each pixel's colour; exact where the palette has it, unlike a GIF writer's."""
    packed_YX = pixels_YX4[..., :3].astype(np.int32) @ [65536, 256, 1]
    found_F, which = np.unique(packed_YX, return_inverse=True)
    colours_F3 = np.stack([found_F >> 16, found_F >> 8 & 255, found_F & 255], axis=1)
    distance_FC = ((colours_F3[:, None] - palette_C3.astype(np.int32)) ** 2).sum(2)
    return distance_FC.argmin(1).astype(np.uint8)[which].reshape(packed_YX.shape)


def _canvas(gates: pd.DataFrame, step: int) -> tuple:
    """The figure of all frames: panels by attention, the stamp, and the bar of what is done."""
    from matplotlib.patches import Rectangle

    names = attentions(gates)
    layers, heads = len(set(gates.layer)), len(set(gates["head"]))
    width = max(CELL * heads + 2.0, 4.6)
    height = len(names) * (max(CELL * layers, 0.95) + 0.6) + 1.05
    fig, axes = figure(width, height, len(names), 1)
    fig.set_dpi(DPI)
    panels = {}
    for name, axis in zip(names, axes[:, 0], strict=True):
        open_LH = grid(gates, name, step, "p_open")
        image = cells(axis, open_LH, last=name == names[-1])
        open_bar(axis, image)
        marks = [
            axis.text(column, row, "×", ha="center", va="center", color="white", fontsize=12)
            for row, column in np.ndindex(open_LH.shape)
        ]
        axis.set_title(ATTENTIONS[name], fontsize=10)
        panels[name] = image, marks
    stamp = fig.suptitle("\n", fontsize=11, family="DejaVu Sans Mono")
    style = {"transform": fig.transFigure, "linewidth": 0, "zorder": 9}
    bar = Rectangle((0, 0), 0, 0.06 / height, color=NEUTRAL, **style)
    bar.set_in_layout(False)
    fig.get_layout_engine().set(rect=(0, 0.12 / height, 1, 1 - 0.12 / height))
    fig.add_artist(bar)
    return fig, panels, stamp, bar
