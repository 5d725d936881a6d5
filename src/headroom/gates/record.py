"""What a training left behind, read back and shown: curves, maps, the GIF, translations."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from headroom import plotting
from headroom.checkpoints import read_json
from headroom.gates import figures
from headroom.gates.animation import p_open_gif
from headroom.gates.page import run_page, translations_page

SHOWN = 24  # sentences whose translations are shown, spread over those that were translated


@dataclass(frozen=True)
class Record:
    """A training's log, its looks at held-out sentences, and where it had gates these."""

    log: pd.DataFrame
    reports: pd.DataFrame
    sources: list[str]
    references: list[str]
    translations: dict[str, list[str]]  # by the words that tell when
    gates: pd.DataFrame | None
    removal: Mapping | None


def read(folder: str | Path) -> Record:
    """Read what :func:`headroom.gates.reports.write_record` wrote, and ``removal.json``."""
    folder = Path(folder)
    texts = folder / "translations"
    gates, removal = folder / "gates.parquet", folder / "removal.json"
    return Record(
        log=pd.read_json(folder / "log.jsonl", lines=True),
        reports=pd.read_json(folder / "reports.jsonl", lines=True),
        sources=_lines(texts / "source.txt"),
        references=_lines(texts / "target.txt"),
        translations={_when(path): _lines(path) for path in sorted(texts.glob("step_*.txt"))},
        gates=pd.read_parquet(gates) if gates.is_file() else None,
        removal=read_json(removal) if removal.is_file() else None,
    )


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _when(path: Path) -> str:
    _, step, _, epoch = path.stem.split("_")
    return f"step {int(step):,}, epoch {epoch}"


def draw_curves(record: Record, title: str, path: str | Path) -> None:
    """Write the training curves as PNG and SVG."""
    plotting.save(figures.curves(record.log, record.reports, title), path)


def draw_run(record: Record, roles: pd.DataFrame, name: str, folder: Path) -> str:
    """Write a gated run's figures into a folder and return the page that shows them together."""
    full = record.gates[record.gates.full]
    p_open_gif(full, folder / "p_open.gif")
    plotting.save(figures.heat_map(full, roles, name), folder / "p_open.png")
    plotting.save(figures.layer_opening(record.gates), folder / "layers.png")
    draw_curves(record, name, folder / "curves.png")
    pictures = ("p_open.gif", "p_open.png", "layers.png", "curves.png")
    return run_page(name, *((folder / file).read_bytes() for file in pictures), facts(record))


def facts(record: Record) -> str:
    """Return in words what a run came to."""
    removal, last = record.removal, record.reports.iloc[-1]
    share = 1 - removal["parameters"] / removal["parameters_before"]
    flops = 1 - removal["flops"] / removal["flops_before"]
    return (
        f"{removal['open_heads']} of {removal['heads']} gated heads are open at the end. Without "
        f"the others the model has {removal['parameters']:,} parameters ({share:.1%} fewer) and "
        f"{flops:.1%} fewer FLOPs a sentence; its logits differ from the gated model's by "
        f"{removal['largest_logit_difference']:.1e} at most. BLEU {last.bleu:.1f} on "
        f"{last.sentences:.0f} validation sentences (greedy); the test set is in the table of runs."
    )


def translations_html(record: Record, title: str) -> str:
    """Return a page of translations at each look, the last one being the final model's."""
    looks = dict(record.translations)
    final = {"at the end": looks.popitem()[1]} if looks else {}
    return translations_page(title, record.sources, record.references, looks, final, SHOWN)
