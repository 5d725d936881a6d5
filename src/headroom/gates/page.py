"""Pages of the gates study: a run's GIF and figures, its translations, all runs as a table."""

import base64
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import pandas as pd

from headroom.gates.figures import strength_words
from headroom.gates.methods import UNTOUCHED, styles
from headroom.pages import page

LAYOUT = (
    "<style>.row{display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start}"
    ".row figure{flex:1 1 0}figure{margin:0 0 1em}img{width:100%;height:auto;display:block}"
    "figcaption{color:#555;font-size:13px;margin-top:.3em;max-width:60em}"
    "table.sentences td{white-space:normal;vertical-align:top;text-align:left;padding:.2em .7em}"
    "table.sentences th{text-align:left}table.sentences tr.source td{border-top:2px solid #888}"
    "table.sentences td:first-child{width:13em;color:#555}"
    ".same{color:#00624a}table.runs{font-size:12.5px}"
    "table.runs th,table.runs td{padding:.25em .45em;white-space:normal}"
    "table.runs td:nth-child(6),table.runs td:nth-child(8){white-space:nowrap}"
    "table.runs th:nth-child(9),table.runs td:nth-child(9){text-align:left;min-width:8em}</style>"
)
SHRUNK = 0.58  # a page's pixels a pixel of a figure: letters are as large as the page's own
NARROW = 300  # pixels below which no figure goes


LEAST = 5.0  # BLEU of a translator worth gating
METHODS_SAID = (
    "Means over seeds; differences with intervals over sentences and seeds. Seeds vary gate noise, "
    "dropout and order (from scratch: the weights too), on one translator. A verdict needs the "
    "interval and the sign of every seed."
)


def _picture(data: bytes, kind: str, alt: str, caption: str) -> str:
    """A figure as large as its letters ask for; in a row it may shrink, not below two thirds."""
    wide = int.from_bytes(data[6:8], "little") if kind == "gif" else int.from_bytes(data[16:20])
    most = max(NARROW, round(SHRUNK * wide))
    size = f"max-width:{most}px;min-width:min(100%,{max(NARROW, 2 * most // 3)}px)"
    source = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return (
        f"<figure style='{size}'><img src='{source}' alt='{escape(alt, quote=True)}'>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def run_page(
    title: str, gif: bytes, heat_png: bytes, layers_png: bytes, curves_png: bytes, facts: str
) -> str:
    """Return a run's page: the GIF plays beside the final map, then p_open by layer and curves.

    Args:
        title: names translator and step, plain text.
        gif: p_open over training.
        heat_png: the final map with the roles.
        layers_png: mean p_open by layer.
        curves_png: losses, learning rates, BLEU and chrF.
        facts: what the run came to, plain text.
    """
    film = "p_open of each head over training, a frame a report; it starts again at the end."
    still = "The end of training: p_open and gate of each head, and the heads' roles before gating."
    return page(
        escape(title),
        LAYOUT,
        f"<h2>{escape(title)}</h2><p>{escape(facts)}</p><div class='row'>",
        _picture(gif, "gif", "p_open of each head over training", film),
        _picture(heat_png, "png", "final p_open and role of each head", still),
        "</div>",
        _picture(layers_png, "png", "mean p_open by layer", "Mean p_open of each layer's heads."),
        _picture(curves_png, "png", "training curves", "Losses, learning rates and quality."),
    )


def translations_page(
    title: str,
    sources: Sequence[str],
    references: Sequence[str],
    by_report: Mapping[str, Sequence[str]],
    final: Mapping[str, Sequence[str]],
    shown: int,
) -> str:
    """Return a page of source, reference and how the translation changed from report to report.

    Reports in a row with equal translations share a line.

    Args:
        title: names translator, step and split, plain text.
        sources: all sentences of the split.
        references: as many.
        by_report: translations by the report's name, in the order of time; as many each.
        final: translations by the name of what made them, after the reports.
        shown: sentences on the page, spread evenly over the split.
    """
    count = len(sources)
    places = sorted({round(x) for x in np.linspace(0, count - 1, min(shown, count))})
    bodies = []
    for place in places:
        truth = references[place]
        rows = [("source", sources[place]), ("reference", truth)]
        named = [(name, texts[place]) for name, texts in by_report.items()]
        rows += _in_a_row(named) + [(name, texts[place]) for name, texts in final.items()]
        bodies.append(f"<tbody>{''.join(_line(*row, place, truth) for row in rows)}</tbody>")
    said = f"{len(places):,} of {count:,} sentences, spread evenly. = reference: word for word."
    head = "<thead><tr><th>by</th><th>text</th></tr></thead>"
    return page(
        escape(title),
        LAYOUT,
        f"<h2>{escape(title)}</h2><p>{said}</p>",
        f"<table class='sentences'>{head}{''.join(bodies)}</table>",
    )


def _in_a_row(named: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Join neighbours with equal texts under "first to last"."""
    spans: list[list[str]] = []
    for name, text in named:
        if spans and spans[-1][2] == text:
            spans[-1][1] = name
        else:
            spans.append([name, name, text])
    return [(a if a == b else f"{a} to {b}", text) for a, b, text in spans]


def _line(name: str, text: str, place: int, truth: str) -> str:
    first = name == "source"
    label = f"{place + 1}. source" if first else name
    same = " <span class='same'>= reference</span>" if text == truth and name != "reference" else ""
    strong = f"<b>{escape(text)}</b>" if name in ("source", "reference") else escape(text)
    kind = " class='source'" if first else ""
    return f"<tr{kind}><td>{escape(label)}</td><td dir='auto'>{strong}{same}</td></tr>"


def runs_page(
    runs: pd.DataFrame, setting: str, cost: pd.DataFrame | None, methods: str = ""
) -> str:
    """Return a page of all runs with intervals and verdicts, and what removal does to latency.

    Args:
        runs: step, method, strength, seed, open_heads, heads, bleu, chrf, difference (BLEU minus
            the λ = 0 control), each with ``_low`` and ``_high`` where it has an interval, verdict,
            parameters, flops; a row a run, the untouched translator has method "none".
        setting: test set, sentences, beam and the interval in words, plain text.
        cost: name, batch, median, low, high (ms); the first name is what others are held against.
        methods: the table of methods over their seeds, HTML.
    """
    parts = [
        LAYOUT,
        f"<h2>Methods</h2><p>{METHODS_SAID}</p>{methods}" if methods else "",
        f"<h2>All runs</h2><p>{escape(setting)}</p><p>{_seeds_said(runs)} {_warned(runs)}</p>",
        _shown(runs).to_html(index=False, border=0, na_rep="", classes="runs"),
    ]
    if cost is not None and len(cost):
        shown = pd.DataFrame({"model": cost["name"], "batch (sentences)": cost.batch})
        shown["median (ms)"] = cost["median"].map("{:.1f}".format)
        shown["quartiles (ms)"] = _ranges(cost.low, cost.high, "{:.1f}")
        parts.append("<h2>Latency of translating a batch, heads removed</h2>")
        parts.append(f"<p>{escape(_overlaps(cost))}</p>")
        parts.append(shown.to_html(index=False, border=0, na_rep=""))
    return page("Gates: all runs", *parts)


def _ranges(low: pd.Series, high: pd.Series, form: str) -> list[str]:
    return [
        f"[{form.format(a)}, {form.format(b)}]".replace("-", "−") if pd.notna(a + b) else ""
        for a, b in zip(low.astype(float), high.astype(float), strict=True)
    ]


def _with_range(runs: pd.DataFrame, name: str, form: str) -> list[str]:
    values = runs[name].astype(float)
    told = ["" if pd.isna(v) else form.format(v).replace("-", "−") for v in values]
    ranges = _ranges(runs[f"{name}_low"], runs[f"{name}_high"], form)
    return [f"{a} {b}".strip() for a, b in zip(told, ranges, strict=True)]


def _shown(runs: pd.DataFrame) -> pd.DataFrame:
    drawn = styles(runs.method)
    order = runs.method.map({name: place for place, name in enumerate([UNTOUCHED, *drawn])})
    size = runs.open_heads.where(runs.method != "lambda")
    keys = ["order", "strength", "size", "seed"]
    runs = runs.assign(order=order, size=size.astype(float)).sort_values(keys)
    return pd.DataFrame(
        {
            "run": [step or "untouched translator" for step in runs.step],
            "heads chosen by": [drawn[m][0] if m in drawn else "all" for m in runs.method],
            "λ": ["" if pd.isna(v) else strength_words(v) for v in runs.strength.astype(float)],
            "seed": runs.seed.astype("Int64"),
            "heads left": [
                f"{a:.0f} of {b:.0f}" for a, b in zip(runs.open_heads, runs.heads, strict=True)
            ],
            "BLEU": _with_range(runs, "bleu", "{:.2f}"),
            "chrF": runs.chrf.map("{:.2f}".format),
            "BLEU − λ = 0 control": _with_range(runs, "difference", "{:+.2f}"),
            "verdict": runs.verdict.fillna(""),
            "parameters": runs.parameters.map("{:,.0f}".format),
            "FLOPs": runs.flops.map("{:.4g}".format),
        }
    )


def _seeds_said(runs: pd.DataFrame) -> str:
    trained = runs[runs.method != "none"]
    seeds = trained.groupby("method").seed.nunique()
    if not len(seeds) or seeds.min() >= 3:
        return "Intervals are each run's own, over sentences; how far seeds differ is seen by row."
    fewest = int(seeds.min())
    return (
        f"{fewest} seed{'s' if fewest > 1 else ''} of a method at the fewest: intervals, over "
        "sentences, don't cover what another seed would change. Claims need three seeds or more."
    )


def _warned(runs: pd.DataFrame) -> str:
    """Say what makes the table worth little."""
    base, gated = runs[runs.method == UNTOUCHED], runs[runs.method == "lambda"]
    said = []
    if len(base) and base.bleu.iloc[0] < LEAST:
        said.append(
            f"The untouched translator has {base.bleu.iloc[0]:.1f} BLEU: a model that does not "
            "translate tells nothing about its heads."
        )
    if len(gated) > 1 and (gated.open_heads == gated.heads).all():
        said.append("No price closed a head: raise lambdas, steps or gate_learning_rate.")
    return " ".join(said)


def _overlaps(cost: pd.DataFrame) -> str:
    """Say at which batch sizes the quartiles of latency meet those of the first model."""
    first = cost["name"].iloc[0]
    base = cost[cost["name"] == first].set_index("batch")
    others = cost[(cost["name"] != first) & cost.batch.isin(base.index)]
    if others.empty:
        return f"Only {first} was timed."
    own = base.loc[others.batch].reset_index(drop=True)
    meets = (others.low.to_numpy() <= own.high) & (own.low <= others.high.to_numpy())
    if not meets.any():
        faster = bool((others["median"].to_numpy() < own["median"]).all())
        return (
            f"The middle halves of the runs lie apart from those of {first} at each batch size"
            f"{': all are faster' if faster else ', but not all are faster'}."
        )
    sizes = ", ".join(str(size) for size in sorted(set(others.batch[meets.to_numpy()])))
    return (
        f"At batch size {sizes} the middle halves of the runs overlap with those of {first}: no "
        "gain is shown there. Removing heads alone does not promise large gains: FFNs, embeddings "
        "and the decoder's loop over tokens stay as they are."
    )
