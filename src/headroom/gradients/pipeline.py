"""From merged dot products to the study's tables, page and exports."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from headroom.checkpoints import read_json, write_json
from headroom.corpora.instructions import read_samples
from headroom.gradients import dots as results
from headroom.gradients import export
from headroom.gradients.analysis import hubness
from headroom.gradients.dots import Dots
from headroom.gradients.pairs import Pairs, from_dots, truths
from headroom.gradients.pools import BASELINES, aligned, bm25_prompt, pool
from headroom.gradients.retrieval import best_of_all, nearest_by_layer
from headroom.gradients.tables import (
    greedy_table,
    layers_table,
    page,
    retrieval_table,
    self_similarity_table,
)

NOISE = 1e-12  # of ‖g‖²: a layer below has no gradient but rounding (keys' biases under softmax)

MOST_EXPORTED = 1_000_000  # dot products that are written as JSON (some 60 bytes each)


def merge_parts(parts: Mapping[str, Sequence[str]], outputs: Mapping[str, str]) -> None:
    """Write the partitions of each kind (dots, states) as one result.

    Raises:
        InputError: for gaps, overlaps and parts of another run.
    """
    for kind, paths in parts.items():
        results.write(outputs[kind], results.merge(paths))


def write_retrieval(
    inputs: Mapping[str, str], settings: Mapping, title: str, outputs: Mapping[str, str]
) -> None:
    """Write who finds the originals: tables, page, exports.

    Args:
        inputs: files ``dots``, ``states``, ``originals`` and ``queries``, and ``read`` and
            ``paraphrased``, the counts of samples read and rewritten.
        settings: sections ``gradients`` (candidates, permutations, greedy) and ``evaluation``
            (bootstrap).
        title: of the page.
        outputs: files ``retrieval``, ``layers``, ``greedy``, ``self_similarity``, ``summary``,
            ``page``, and the folder ``export``.
    """
    own, bootstrap = settings["gradients"], settings["evaluation"]["bootstrap"]
    seed, chosen = bootstrap["seed"], own["candidates"]
    measured, states = (_known(results.read(inputs[name])) for name in ("dots", "states"))
    samples = {
        name: aligned(read_samples(inputs[name]), getattr(measured, name))
        for name in ("originals", "queries")
    }
    scores_QN = bm25_prompt(samples["originals"], samples["queries"], seed)
    truth_Q = truths(measured.queries, measured.originals)
    found = pool(chosen["pool"], chosen["k"], chosen["inject_truth"], scores_QN, truth_Q)
    places = None if chosen["pool"] == "all" else found.candidate_QC
    pairs, hidden = (from_dots(part, places) for part in (without_noise(measured), states))
    baselines = {
        name: measure(samples["originals"], samples["queries"], seed)
        for name, measure in BASELINES.items()
    }
    table = retrieval_table(pairs, hidden, baselines, bootstrap)
    best = best_of_all(
        nearest_by_layer(pairs), pairs, own["permutations"], bootstrap["confidence"], seed
    )
    hubs = hubness(pairs)
    frames = {
        "retrieval": table,
        "layers": layers_table(pairs),
        "greedy": greedy_table(pairs, own["greedy"], seed),
    }
    for name, frame in frames.items():
        _write_csv(frame, outputs[name])
    self_similarity_table(pairs).to_parquet(outputs["self_similarity"], index=False)
    said = bootstrap | {"permutations": own["permutations"]}
    text = page(title, table, best, found, chosen, hubs, said)
    text = _with_notes(text, measured, _samples_said(inputs))
    Path(outputs["page"]).write_text(text, encoding="utf-8")
    write_json(Path(outputs["summary"]), _summary(measured, table, best, found))
    _export(Path(outputs["export"]), pairs)


def _write_csv(frame: pd.DataFrame, path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(path, index=False)


def _known(found: Dots) -> Dots:
    """Leave out queries whose original was not measured: nobody could find it."""
    kept_Q = np.flatnonzero(truths(found.queries, found.originals) >= 0)
    if len(kept_Q) == len(found.queries):
        return found
    return replace(
        found,
        queries=tuple(found.queries[place] for place in kept_Q),
        dot_LQN=found.dot_LQN[:, kept_Q],
        query_LQ=found.query_LQ[:, kept_Q],
        notes=found.notes | {"without_original": len(found.queries) - len(kept_Q)},
    )


def without_noise(found: Dots) -> Dots:
    """Set to 0 what is rounding: a layer's gradient below a millionth of the sample's whole one.

    Keys' biases have no gradient (softmax doesn't see them); the cosine of what rounding leaves
    there would look like a measurement.
    """
    query_LQ, original_LN = found.query_LQ.copy(), found.original_LN.copy()
    dot_LQN = found.dot_LQN
    for squares in (query_LQ, original_LN):
        squares[squares < NOISE * squares.sum(0)] = 0
    silent_L = (query_LQ == 0).any(1) | (original_LN == 0).any(1)
    if silent_L.any():
        dot_LQN = dot_LQN.copy()
        for layer in np.flatnonzero(silent_L):
            dot_LQN[layer][query_LQ[layer] == 0] = 0
            dot_LQN[layer][:, original_LN[layer] == 0] = 0
    return replace(found, dot_LQN=dot_LQN, query_LQ=query_LQ, original_LN=original_LN)


def _samples_said(inputs: Mapping[str, str]) -> str:
    """Say what became of the samples before any was measured."""
    read, rewritten = (read_json(inputs[name]) for name in ("read", "paraphrased"))
    refused = {f"refused by {gate}": n for gate, n in rewritten.get("left_out", {}).items()}
    counts = {"empty": read["empty"], "duplicates": read["duplicates"], **refused}
    counts["without a paraphrase of yours"] = rewritten.get("missing", 0)
    lost = ", ".join(f"{n} {reason}" for reason, n in counts.items() if n)
    with Path(inputs["queries"]).open(encoding="utf-8", newline="\n") as file:
        cut = sum(not json.loads(line).get("ended", True) for line in file)
    said = f"Of the source's samples were lost on the way: {lost or 'none'}."
    return said + (f" {cut} of the model's answers were cut before they ended." if cut else "")


def _with_notes(text: str, measured: Dots, samples: str) -> str:
    """Add to the page what was measured and what was left out."""
    notes = measured.notes
    left = [
        f"{count} {reason} ({name})"
        for name, reasons in notes["skipped"].items()
        for reason, count in sorted(reasons.items())
    ]
    without = notes.get("without_original", 0)
    left += [f"{without} queries whose original was left out"] if without else []
    backends = sorted({*notes["choice"].values()})
    said = (
        f"<p>Backend {notes['backend']} ({', '.join(backends)}), {notes['dtype']}; loss: "
        f"{notes['loss']}. {len(measured.originals):,} originals, {len(measured.queries):,} "
        f"queries; left out: {'; '.join(left) or 'nothing'}. {samples}</p>"
    )
    return text.replace("</h2>", f"</h2>{said}", 1)


def _summary(measured: Dots, table: pd.DataFrame, best, found) -> dict:
    """Return the study's numbers in one small file."""
    names = list(table[table.kind == "layer"].name)
    full = table[table.kind == "full"].iloc[0]
    return {
        "queries": len(measured.queries),
        "originals": len(measured.originals),
        "candidates": int(found.candidate_QC.shape[1]),
        "pool_recall": found.found / len(measured.queries),
        "full": {name: float(full[name]) for name in ("top1", "top1_low", "top1_high", "mrr")},
        "best": {
            "layer": names[best.layer],
            "top1": best.top1,
            "chosen_on_half": names[best.chosen],
            "held_out": list(best.held_out),
            "held_out_mean": best.held_out_mean,
            "null_quantile": best.null_quantile,
            "p_value": best.p_value,
        },
        "notes": {name: measured.notes[name] for name in ("backend", "dtype", "skipped")},
    }


def _export(folder: Path, pairs: Pairs) -> None:
    """Write the study's results as JSON by ids; dot products by layer where they are few."""
    folder.mkdir(parents=True, exist_ok=True)
    export.similarities(folder / "similarities.json", pairs)
    export.query_norms(folder / "query_dot_products.json", pairs)
    export.original_norms(folder / "original_dot_products.json", pairs)
    if pairs.dot_LQC.size <= MOST_EXPORTED:
        export.dot_products(folder / "dot_products.json", pairs)
    else:
        (folder / "dot_products.txt").write_text(
            f"{pairs.dot_LQC.size:,} dot products are too many for JSON: read dots.safetensors "
            f"(headroom.gradients.dots.read), or set gradients.candidates.pool to bm25.\n"
        )


def draw(inputs: Mapping[str, str], setting: str, outputs: Mapping[str, str]) -> None:
    """Draw the study's figures.

    Args:
        inputs: files ``retrieval``, ``layers``, ``greedy`` and ``self_similarity``.
        setting: what was looked up and how it was measured, for the titles.
        outputs: a PNG for each of :data:`families.FIGURES`; SVGs are written beside them.
    """
    from headroom import plotting
    from headroom.gradients import curves, figures

    frames = {
        name: pd.read_csv(inputs[name]).astype({"block": "Int64"})
        for name in ("retrieval", "layers")
    }
    frames["greedy"] = pd.read_csv(inputs["greedy"])
    frames["self_similarity"] = pd.read_parquet(inputs["self_similarity"])
    drawn = {
        "heatmap": (figures.heatmap, "retrieval"),
        "accuracy": (figures.accuracy, "retrieval"),
        "greedy": (curves.greedy, "greedy"),
        "layers": (curves.layers, "layers"),
        "parameters": (figures.parameters, "layers"),
        "self_similarity": (curves.self_similarity, "self_similarity"),
    }
    for name, (figure, table) in drawn.items():
        plotting.save(figure(frames[table], setting), outputs[name])
