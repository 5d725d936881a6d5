"""What becomes of pruned channels: mass rescue, dilution, functional rescue, and the report.

Shapes: n channels of a layer, k kept ones; a plan is n × k. Only numpy and scipy. The seed's rescue
(the share of a column-normalised map) is 1 for every balanced plan, so figures are defined anew.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import sparray

from headroom.errors import InputError

WIDTH = 70  # of the rulers


def mass_rescue(plan: sparray, a_n: np.ndarray, kept: Sequence[int]) -> float | None:
    """Return Σ_{i∈P} Σ_j T_ij / Σ_{i∈P} a_i: the share of the pruned mass that is transported.

    One for balanced plans; only a partial one leaves mass behind. None where nothing is pruned.

    Args:
        plan: T (n, k).
        a_n: the sources' marginal.
        kept: the kept channels' numbers.
    """
    pruned_n = np.ones(plan.shape[0], dtype=bool)
    pruned_n[np.asarray(kept)] = False
    total = np.asarray(a_n)[pruned_n].sum()
    return float(plan.sum(1)[pruned_n].sum() / total) if total > 0 else None


def dilution(plan: sparray, kept: Sequence[int]) -> float:
    """Return 1 − mean_j B_jj over kept channels, with the row-normalised map B = diag(1/b) Tᵀ.

    b are the plan's own column sums; a kept channel that receives nothing counts as wholly diluted.

    Args:
        plan: T (n, k), column j that of channel kept[j].
        kept: the kept channels' numbers.
    """
    own_k = np.asarray(plan.tocsr()[np.asarray(kept), np.arange(plan.shape[1])]).ravel()
    b_k = plan.sum(0)
    return float(1 - np.divide(own_k, b_k, out=np.zeros_like(b_k), where=b_k > 0).mean())


def functional_rescue(error_fused: float, error_drop: float) -> float | None:
    """Return 1 − ‖Y − Y_fused‖² / ‖Y − Y_drop‖²: 1 lossless, 0 as good as dropping, < 0 harmful.

    Args:
        error_fused, error_drop: squared errors of the layer's output on the same held-out text.

    Returns:
        None where dropping loses nothing, so that there is nothing to rescue.
    """
    return 1 - error_fused / error_drop if error_drop > 0 else None


def rescue_verdict(rescue: float) -> str:
    """Return the seed's verdict on a rescue: above .5 good, above .2 moderate, else limited."""
    return "good" if rescue > 0.5 else "moderate" if rescue > 0.2 else "limited"


def dilution_verdict(diluted: float) -> str:
    """Return the seed's verdict on a dilution: below .2 low, below .5 moderate, else high."""
    return "low" if diluted < 0.2 else "moderate" if diluted < 0.5 else "high"


def report(layers: list[dict], names: dict) -> str:
    """Return the seed's report: a line a layer, summary, statistics over layers, interpretation.

    Global figures pool: mass rescue weighs layers by pruned channels, dilution by kept ones,
    functional rescue is that of the summed errors. std is the population's.

    Args:
        layers: each with ``pruned`` and ``kept`` (counts) and, or None, ``mass_rescue``,
            ``dilution``, ``error_fused``, ``error_drop``; ``layer`` (default: its place).
        names: what stands at the top, label to value, e.g. model, score, fusion, strategy.

    Raises:
        InputError: if there is no layer.
    """
    if not layers:
        raise InputError("a rescue report needs at least one layer (allowed: a model with layers)")
    rows = [
        {"layer": place, "functional": _functional([layer]), **layer}
        for place, layer in enumerate(layers)
    ]
    pooled = {
        "functional": _functional(layers),
        "mass_rescue": _pooled(layers, "mass_rescue", "pruned"),
        "dilution": _pooled(layers, "dilution", "kept"),
    }
    ruler = "=" * WIDTH
    parts = [
        [_layer_line(row) for row in rows],
        [ruler, "RESCUE EFFECT SUMMARY REPORT", ruler],
        ["Model Overview:", *_overview(layers, names)],
        *_global_lines(pooled),
        ["Per-Layer Statistics:", *_spread_lines(rows)],
        ["Interpretation:", *_interpretation(pooled), ruler],
    ]
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def _functional(layers: list[dict]) -> float | None:
    """Return the functional rescue of the summed errors of the layers that have them."""
    pairs = [(layer.get("error_fused"), layer.get("error_drop")) for layer in layers]
    known = [pair for pair in pairs if None not in pair]
    return functional_rescue(*map(sum, zip(*known, strict=True))) if known else None


def _pooled(layers: list[dict], figure: str, weight: str) -> float | None:
    known = [layer for layer in layers if layer.get(figure) is not None and layer[weight] > 0]
    if not known:
        return None
    total = sum(layer[weight] for layer in known)
    return sum(layer[figure] * layer[weight] for layer in known) / total


def _share(value: float) -> str:
    return f"{value:.3f} ({value:.1%})"


def _layer_line(row: dict) -> str:
    if not row["pruned"]:
        return f"Layer {row['layer']:02d}: nothing pruned"
    figures = [
        (_rescued(row["functional"]), row["functional"]),
        ("Transported {} of pruned mass", row.get("mass_rescue")),
        ("Diluted: {} of a fused row from other channels", row.get("dilution")),
    ]
    said = [text.format(_share(value)) for text, value in figures if value is not None]
    return f"Layer {row['layer']:02d}: {', '.join(said) or 'not measured'}"


def _rescued(rescue: float | None) -> str:
    """Return what a functional rescue means; below 0 it is a harm, not a negative share."""
    if rescue is None or rescue >= 0:
        return "Rescued {} of the squared error of dropping"
    return f"Harmed (rescue {rescue:.3f}: {1 - rescue:.3g} times the squared error of dropping)"


def _overview(layers: list[dict], names: dict) -> list[str]:
    return [
        *(f"  {label}: {value}" for label, value in names.items()),
        f"  Total layers analyzed: {len(layers)}",
        f"  Total pruned channels: {sum(layer['pruned'] for layer in layers):,}",
        f"  Total kept channels: {sum(layer['kept'] for layer in layers):,}",
    ]


def _global_lines(pooled: dict) -> list[list[str]]:
    """Return a paragraph for each global figure that exists."""
    wording = [
        (
            "Global Rescue Effect",
            "Functional rescue",
            "functional",
            "of the squared error of dropping is undone (1 − ‖Y − Y_fused‖² / ‖Y − Y_drop‖²)",
        ),
        (
            "Global Mass Rescue",
            "Mass rescue",
            "mass_rescue",
            "of the pruned channels' mass is transported (1 unless the plan is partial)",
        ),
        (
            "Global Dilution Effect",
            "Dilution ratio",
            "dilution",
            "of a fused gate or up row comes from other channels than the kept one",
        ),
    ]
    found = []
    for title, label, key, meaning in wording:
        if (value := pooled[key]) is None:
            continue
        share, said = f" ({value:.2%})", f"  → {value:.2%} {meaning}"
        if value < 0:
            share, said = "", f"  → harm: {1 - value:.3g} times the squared error of dropping"
        found.append([f"{title}:", f"  {label}: {value:.4f}{share}", said])
    return found


def _spread_lines(rows: list[dict]) -> list[str]:
    lines = []
    for label, key in (
        ("Functional rescue", "functional"),
        ("Mass rescue", "mass_rescue"),
        ("Dilution ratio", "dilution"),
    ):
        values = [row[key] for row in rows if row["pruned"] and row.get(key) is not None]
        if values:
            lines += [
                f"  {label} - Mean: {np.mean(values):.4f}, Std over layers: {np.std(values):.4f}",
                f"  {label} - Range: [{min(values):.4f}, {max(values):.4f}]",
            ]
    return lines or ["  nothing measured"]


def _interpretation(pooled: dict) -> list[str]:
    """Return the verdicts: on the functional rescue, as balance makes the other 1, and dilution."""
    marks = {"good": "✓", "low": "✓", "moderate": "~", "limited": "✗", "high": "✗"}
    lines = []
    if (rescue := pooled["functional"]) is not None:
        verdict = rescue_verdict(rescue)
        said = (
            f"{verdict.capitalize()} rescue effect: {rescue:.1%} of the squared error of dropping"
        )
        if rescue < 0:
            said = f"Harmful: {1 - rescue:.3g} times the squared error of dropping"
        lines.append(f"  {marks[verdict]} {said}{' is undone' if rescue >= 0 else ''}")
    if (diluted := pooled["dilution"]) is not None:
        verdict = dilution_verdict(diluted)
        lines.append(
            f"  {marks[verdict]} {verdict.capitalize()} dilution cost: {diluted:.1%} of a"
            " fused row comes from other channels"
        )
    return lines or ["  nothing measured"]
