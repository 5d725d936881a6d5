"""Tables of the heads study: one row for the original, each merge and each control."""

from collections.abc import Mapping

import pandas as pd

from headroom.errors import InputError
from headroom.heads.study import MEASURES
from headroom.pages import page
from headroom.recipes import Merge, parse_step

SHOWN = {
    "step": "merge",
    "kind": "heads chosen",
    "perplexity": "perplexity",
    "perplexity_change_percent": "change of perplexity (%)",
    "accuracy": "accuracy",
    "accuracy_change_percent": "change of accuracy (%)",
    "pairs": "pairs merged",
    "threshold": "threshold",
    "effective_parameters": "effective parameters",
    "parameters_saved_percent": "parameters saved (%)",
    "checkpoint_bytes": "bytes",
    "kv_cache_bytes_per_token": "KV-cache bytes a token",
}


def table(results: Mapping[str, Mapping]) -> pd.DataFrame:
    """Return one row for the original, each merge and each of its controls.

    Args:
        results: contents of ``evaluation_results.json`` by recipe step.
    """
    rows: list[dict] = []
    for name, result in results.items():
        step = parse_step(name)
        original = result["original_metrics"]
        if not rows:
            rows.append(_row("original", "original", original, None, original))
        row = _row(name, "chosen", result["merged_metrics"], result["metrics_change"], original)
        shared = {"threshold": result["merge_info"].get("threshold"), **_fields(step)}
        rows.append(row | shared | {"pairs": result["merge_info"]["total_merged_pairs"]})
        for control in result.get("controls", []):
            other = _row(name, control["control"], control, control["metrics_change"], original)
            rows.append(other | shared)
    return pd.DataFrame(rows)


def _fields(step: Merge) -> dict:
    return {"criterion": step.criterion, "method": step.method, "selection": step.selection}


def _row(name: str, kind: str, metrics: Mapping, change: Mapping | None, original: Mapping) -> dict:
    saved = 1 - metrics["effective_parameters"] / original["effective_parameters"]
    row = {
        "step": name,
        "kind": kind,
        "perplexity": metrics["perplexity"],
        "accuracy": metrics["accuracy"],
        "effective_parameters": metrics["effective_parameters"],
        "parameters_saved_percent": 100 * saved,
        "kv_cache_bytes_per_token": metrics.get("kv_cache_bytes_per_token"),
        "checkpoint_bytes": metrics.get("checkpoint_bytes"),
    }
    for measure in MEASURES:
        row[f"{measure}_low"], row[f"{measure}_high"] = metrics.get(
            f"{measure}_interval", (float("nan"),) * 2
        )
        key = f"{measure}_change_percent"
        values = [change[key], *change[f"{key}_interval"]] if change else [0.0] * 3
        for suffix, value in zip(("", "_low", "_high"), values, strict=True):
            row[f"{key}{suffix}"] = float("nan") if value is None else value
    return row


def describe(results: Mapping[str, Mapping]) -> str:
    """Return the evaluation setting in words, for titles.

    Raises:
        InputError: if the results mix settings.
    """
    settings = [result["setting"] for result in results.values()]
    if not settings:
        return "nothing merged"
    if any(setting != settings[0] for setting in settings):
        raise InputError("a table can't mix evaluation settings")
    one = settings[0]
    return (
        f"{one['corpus']}, held out: {one['documents']} documents, {one['tokens']} tokens, "
        f"window {one['window']}, {100 * one['bootstrap']['confidence']:g} % intervals"
    )


def pairs_by_layer(results: Mapping[str, Mapping]) -> dict[str, list[int]]:
    """Return the number of merged pairs of each layer, by recipe step."""
    counts = {}
    for step, result in results.items():
        layers = result["merge_info"]["merged_layers"]
        counts[step] = [layers[str(i)]["num_pairs_merged"] for i in range(len(layers))]
    return counts


def verdicts(results: Mapping[str, Mapping]) -> dict[str, str]:
    """Return for each merge with controls whether similar < random < dissimilar in damage."""
    return {
        step: result["ordering"]["similar < random < dissimilar"]
        for step, result in results.items()
        if "ordering" in result
    }


def as_html(table: pd.DataFrame, results: Mapping[str, Mapping]) -> str:
    """Return the table as a page of its own, with every comparison of controls in words."""
    shown = pd.DataFrame({label: table[name] for name, label in SHOWN.items() if name in table})
    shown[SHOWN["pairs"]] = table.pairs.astype("Int64")
    for measure in MEASURES:
        change = f"{measure}_change_percent"
        shown[SHOWN[change]] = [
            f"{row[change]:+.2f} [{row[change + '_low']:+.2f}, {row[change + '_high']:+.2f}]"
            if pd.notna(row[change])
            else "of 0: none"
            for _, row in table.iterrows()
        ]
    formats = {"perplexity": "{:.3f}".format, "accuracy": "{:.4f}".format}
    formats |= {"parameters saved (%)": "{:.2f}".format, "threshold": "{:.4f}".format}
    body = shown.to_html(index=False, border=0, na_rep="", formatters=formats)
    lines = [
        f"<li><b>{step}</b>: {name}: difference {found['difference']:+.4f} nats a token "
        f"[{found['low']:+.4f}, {found['high']:+.4f}], {found['draws']} draws: "
        f"<b>{found['verdict']}</b></li>"
        for step, result in results.items()
        for name, found in result.get("ordering", {}).get("comparisons", {}).items()
    ]
    return page(
        "Merged heads",
        f"<h2>Merged heads and their controls</h2><p>{describe(results)}</p>",
        f"{body}<h2>Is the choice of heads better than chance?</h2><p>A &lt; B: A does less damage "
        f"than B. Holds where the interval of the difference lies above zero.</p>",
        f"<ul>{''.join(lines)}</ul>",
    )
