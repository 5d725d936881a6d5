"""Tables of the gradients study: what figures and pages read, a row a measure or layer.

Q queries, C candidates a query. Measures are similarities of gradients (full, components, blocks,
single layers), of hidden states, and baselines that need no model.
"""

from collections.abc import Mapping
from html import escape

import numpy as np
import pandas as pd

from headroom.gradients.analysis import (
    CRITERIA,
    Hubs,
    accuracies,
    greedy_forward_selection,
    layer_comparison,
    matching_and_others,
    parameter_distribution,
    self_similarity,
)
from headroom.gradients.pairs import Pairs, block, component, groups, similarity
from headroom.gradients.pools import Pool
from headroom.gradients.retrieval import ENDS, RECALLS, Best, ranks, summaries
from headroom.pages import page as html_page

METRICS = ("top1", "mrr", *(f"recall{k}" for k in RECALLS))
COMPARED = ("difference", "mrr_difference")
SHOWN_LAYERS = 10
SAID = {
    "bm25_prompt": "BM25 on the prompt",
    "bm25_prompt_answer": "BM25 on prompt and answer",
    "length": "length alone",
    "random": "random numbers",
}
HEADINGS = {
    "full": "Full gradient",
    "component": "Components",
    "block": "Blocks",
    "layer": "Best layers",
    "state": "Hidden states",
    "baseline": "Baselines",
}


def retrieval_table(
    pairs: Pairs, states: Pairs | None, baselines: Mapping[str, np.ndarray], settings: Mapping
) -> pd.DataFrame:
    """Return a row a measure: how well it finds each query's original, and against the full one.

    kind (full, component, block, layer, state, baseline), name, block, component, parameters,
    queries, candidates, then top1, mrr, recall5 and recall10, difference (top1 minus the full
    gradient's, paired) and mrr_difference, each with _low and _high, and verdict.

    Args:
        pairs: of gradients.
        states: of hidden states, with the same queries and pools; None: not measured.
        baselines: similarity of all queries with all originals, (Q, N), by name.
        settings: ``confidence``, ``resamples`` and ``seed`` of the intervals.

    Raises:
        ValueError: if states or baselines are of other queries, originals or pools.
        InputError: with fewer than two queries.
    """
    rows, found = [], []
    for (kind, name), places in groups(pairs).items():
        rows.append(_measure(kind, name, pairs, places))
        found.append(ranks(similarity(pairs, places), pairs.truth_Q))
    for place, name in enumerate(pairs.layers):
        named = {"block": block(name), "component": component(name)}
        rows.append(_measure("layer", name, pairs, [place]) | named)
        found.append(ranks(similarity(pairs, [place]), pairs.truth_Q))
    if states is not None:
        _require_same_pools(pairs, states)
        for place, name in enumerate(states.layers):
            number, pooling = name.split(".", 1)
            named = {"block": int(number), "component": pooling}
            rows.append(_measure("state", name, states, []) | named)
            found.append(ranks(similarity(states, [place]), pairs.truth_Q))
    for name, similarity_QN in baselines.items():
        if similarity_QN.shape != (len(pairs.queries), len(pairs.originals)):
            raise ValueError(f"baseline {name}: shape {similarity_QN.shape}")
        own_QC = np.take_along_axis(similarity_QN, pairs.candidate_QC, axis=1)
        rows.append(_measure("baseline", name, pairs, []))
        found.append(ranks(own_QC, pairs.truth_Q))
    names = ("confidence", "resamples", "seed")
    compared = summaries(np.stack(found), 0, **{name: settings[name] for name in names})
    columns = [f"{name}{end}" for name in (*METRICS, *COMPARED) for end in ENDS] + ["verdict"]
    rows = [
        row | {name: measure[name] for name in columns}
        for row, measure in zip(rows, compared, strict=True)
    ]
    return pd.DataFrame(rows).astype({"block": "Int64", "parameters": "Int64"})


def _measure(kind: str, name: str, pairs: Pairs, places: list[int]) -> dict:
    """Return the first columns of a row; hidden states and baselines have no parameters."""
    return {
        "kind": kind,
        "name": name,
        "block": int(name) if kind == "block" else None,
        "component": name if kind == "component" else None,
        "parameters": sum(pairs.sizes[place] for place in places) if places else None,
        "queries": len(pairs.queries),
        "candidates": pairs.candidate_QC.shape[1],
    }


def _require_same_pools(pairs: Pairs, states: Pairs) -> None:
    same = pairs.queries == states.queries and pairs.originals == states.originals
    if not same or not np.array_equal(pairs.candidate_QC, states.candidate_QC):
        raise ValueError("hidden states are of other queries, originals or pools than gradients")


def layers_table(pairs: Pairs) -> pd.DataFrame:
    """Return a row a layer, in the model's order.

    layer, block, component, parameters, share (of all parameters), norm_share (of ‖g‖², mean over
    originals), cosine_to_full (uncentred, of the similarities), matching and others (mean cosine
    of queries with their truths and with other candidates), top1.
    """
    shares = parameter_distribution(pairs)
    matching_L, others_L = matching_and_others(pairs)
    frame = pd.DataFrame(
        {
            "layer": pairs.layers,
            "block": [block(name) for name in pairs.layers],
            "component": [component(name) for name in pairs.layers],
            "parameters": shares.elements,
            "share": shares.share,
            "norm_share": shares.norm_share,
            "cosine_to_full": layer_comparison(pairs),
            "matching": matching_L,
            "others": others_L,
            "top1": accuracies(pairs),
        }
    )
    return frame.astype({"block": "Int64"})


def greedy_table(pairs: Pairs, steps: int, seed: int = 0) -> pd.DataFrame:
    """Return a row a criterion and step of greedy forward selection.

    criterion, step (from 1), layer (its name), chosen and held_out (the criterion on the half of
    the queries that chose and on the other one), parameters_share (of the layers so far).

    Raises:
        InputError: with fewer than one step or two queries.
    """
    rows = [
        {"criterion": criterion, "step": step, **one._asdict(), "layer": pairs.layers[one.layer]}
        for criterion in CRITERIA
        for step, one in enumerate(greedy_forward_selection(pairs, criterion, steps, seed), 1)
    ]
    return pd.DataFrame(rows)


def self_similarity_table(pairs: Pairs) -> pd.DataFrame:
    """Return a row a query and layer: query, layer, place (of the layer), cosine with the truth.

    Queries whose truth is not in their pool are left out.
    """
    self_QL = self_similarity(pairs)
    rows, L = np.flatnonzero(pairs.truth_Q >= 0), len(pairs.layers)
    return pd.DataFrame(
        {
            "query": np.repeat(np.array(pairs.queries, dtype=object)[rows], L),
            "layer": np.tile(np.array(pairs.layers, dtype=object), len(rows)),
            "place": np.tile(np.arange(L), len(rows)),
            "cosine": self_QL[rows].ravel(),
        }
    )


def page(
    title: str,
    table: pd.DataFrame,
    best: Best,
    pool: Pool,
    candidates: Mapping,
    hubs: Hubs,
    settings: Mapping,
) -> str:
    """Return the study's page: who finds the originals, and whether gradients beat what is cheaper.

    Args:
        title: model, instructions, setting and backend, plain text.
        table: of ``retrieval_table``.
        best: the best of all layers.
        pool: what the queries were looked up in.
        candidates: ``pool``, ``k`` and ``inject_truth`` of the configuration.
        hubs: of the full gradient.
        settings: ``confidence``, ``resamples`` and ``permutations``.
    """
    parts = [f"<h2>{escape(title)}</h2>", f"<p>{_pool_said(pool, candidates)}</p>"]
    parts += [f"<p>{_baselines_said(table)}</p>"]
    parts += [f"<p>{_best_said(table, best, settings)}</p>"]
    parts += [
        f"<p>The original that is nearest most often is so for {hubs.most:,} queries; skewness of "
        f"these counts {hubs.skew:.2f}.</p>",
        f"<p>{settings['confidence']:.0%} intervals: Wilson's for top-1 and recall, bootstrap over "
        f"queries ({settings['resamples']:,} resamples) for MRR and differences, these paired. "
        f"Ties get mid-ranks; a tie at the top is no hit.</p>",
    ]
    for kind, heading in HEADINGS.items():
        rows = table[table.kind == kind]
        if kind == "layer":
            order = {"by": ["top1", "parameters"], "ascending": [False, True], "kind": "stable"}
            heading = f"{heading} ({min(SHOWN_LAYERS, len(rows))} of {len(rows)})"
            rows = rows.sort_values(**order).head(SHOWN_LAYERS)
        if len(rows):
            html = _shown(rows).to_html(index=False, border=0, na_rep="")
            parts.append(f"<h2>{heading}</h2>{html}")
    return html_page(escape(title), *parts)


def _shown(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a table's rows as they are read: percentages with their intervals."""
    shown = pd.DataFrame({"measure": [SAID.get(name, name) for name in rows.name]})
    if rows.parameters.notna().any():
        shown["parameters"] = [f"{count:,}" for count in rows.parameters]
    labels = ("top-1 (%)", "MRR", *(f"recall@{k} (%)" for k in RECALLS))
    for name, label in zip(METRICS, labels, strict=True):
        scale, digits = (1, 3) if name == "mrr" else (100, 1)
        shown[label] = _with_interval(rows, name, scale, f".{digits}f")
    shown["top-1 minus full (points)"] = _with_interval(rows, "difference", 100, "+.1f")
    shown["verdict"] = list(rows.verdict)
    return shown


def _with_interval(rows: pd.DataFrame, name: str, scale: float, form: str) -> list[str]:
    triples = rows[[f"{name}{end}" for end in ENDS]].to_numpy(float) * scale
    return [f"{value:{form}} [{low:{form}}, {high:{form}}]" for value, low, high in triples]


def _pool_said(pool: Pool, candidates: Mapping) -> str:
    """Say what was searched, how often the truth was in it, and loudly if it was put there."""
    Q, C = pool.candidate_QC.shape
    chance, present = 1 / C, int((pool.truth_Q >= 0).sum())
    kind = "all originals" if candidates["pool"] == "all" else f"the {C:,} best by BM25 on prompts"
    said = (
        f"{Q:,} queries, {C:,} candidates each ({kind}; chance {100 * chance:.2g} %). The pool "
        f"holds the truth of {pool.found:,} queries (recall {100 * pool.found / Q:.1f} %)"
    )
    if present > pool.found:
        said += (
            f". <b>Truth injected: for {present - pool.found:,} queries the truth was put into the "
            f"last slot, so every number below is better than it would be in use</b>"
        )
    elif candidates["inject_truth"]:
        said += "; injecting truths was allowed, and none was missing"
    if present < Q:
        said += f"; the other {Q - present:,} count as misses of every measure"
    return said + "."


def _baselines_said(table: pd.DataFrame) -> str:
    """Say whether the full gradient beats each baseline by the paired interval."""
    full = table[table.kind == "full"].iloc[0]
    said = [
        f"The full gradient finds {100 * full.top1:.1f} % of the originals "
        f"[{100 * full.top1_low:.1f}, {100 * full.top1_high:.1f}]"
    ]
    words = {"worse": "beats", "better": "is beaten by", "undecided": "can't be told apart from"}
    for row in table[table.kind == "baseline"].itertuples():
        lead = (0 - value for value in (row.difference, row.difference_high, row.difference_low))
        points = "{:+.1f} points [{:+.1f}, {:+.1f}]".format(*(100 * value for value in lead))
        name = escape(SAID.get(row.name, row.name))
        said.append(f"it {words[row.verdict]} {name} ({100 * row.top1:.1f} %; {points})")
    return "; ".join(said) + "."


def _best_said(table: pd.DataFrame, best: Best, settings: Mapping) -> str:
    names = list(table[table.kind == "layer"].name)
    held = "{:.1f} % [{:.1f}, {:.1f}]".format(*(100 * value for value in best.held_out))
    return (
        f"The best of {len(names)} layers, {escape(names[best.layer])}, finds "
        f"{100 * best.top1:.1f} %, but it was chosen on these queries. Chosen on a random half "
        f"({escape(names[best.chosen])}), the best finds {held} of the other half (mean over "
        f"splits {100 * best.held_out_mean:.1f} %). Were no layer to know a truth, the best would "
        f"stay below {100 * best.null_quantile:.1f} % in 95 of 100 cases "
        f"(p = {best.p_value:.2g}, {settings['permutations']:,} permutations)."
    )
