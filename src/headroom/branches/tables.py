"""Tables of the branches study: a row a run and evaluation count, and means over seeds.

N documents, C columns (a run at an evaluation count), R resamples of the documents, S seeds. Losses
are in nats a token, Σ nll / Σ tokens over the evaluation texts; each column saw the same texts.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from headroom.branches.runs import (
    DIVERGED,
    MASKS,
    TRAINED,
    Architecture,
    Run,
    branch_range,
    is_main,
    parse_run,
)
from headroom.statistics import interval, interval_over_seeds, resampled_sums

SETTINGS = ("coordinate", "band", "stride", "mask")  # what sets a control apart


class Losses:
    """Loss of each run and evaluation count, and its bootstrap resamples of shared documents.

    All columns are resampled together, so that any sum of them has a paired interval.
    """

    def __init__(self, frames: Iterable[pd.DataFrame], bootstrap: Mapping):
        """Sum texts to documents and resample these.

        Args:
            frames: run (a name), branches (evaluation count), text, document, nll (nats, summed
                over the text), tokens (predicted); any number of runs and counts in each.
            bootstrap: ``resamples``, ``confidence`` and ``seed``.

        Raises:
            ValueError: if texts or tokens differ between two columns, a column comes twice or a
                nll is not finite.
            InputError: with fewer than two documents.
        """
        self.bootstrap = bootstrap
        sums, first, places = {}, None, np.empty(0, int)
        for key, block in (found for frame in frames for found in _blocks(frame)):
            if first is None:
                first, places = block, pd.factorize(block["document"], sort=True)[0]
                if len(np.unique(block["text"])) < len(places):
                    raise ValueError(f"{_named(key)}: a text comes twice")
            _require_same(key, block, first)
            if key in sums:
                raise ValueError(f"{_named(key)} comes twice")
            sums[key] = np.bincount(places, weights=block["nll"])
        self.texts, self.documents = len(places), int(places.max(initial=-1)) + 1
        self.tokens = int(first["tokens"].sum()) if first else 0
        self._column = {key: place for place, key in enumerate(sums)}
        self._every_RC = np.empty((1 + bootstrap["resamples"], 0))
        if sums:
            columns = np.stack([*sums.values(), np.bincount(places, first["tokens"])], axis=1)
            columns = columns[columns[:, -1] > 0]
            drawn = resampled_sums(columns, bootstrap["resamples"], bootstrap["seed"])
            every = np.vstack([columns.sum(0), drawn])
            self._every_RC = every[:, :-1] / every[:, -1:]

    @property
    def runs(self) -> list[str]:
        """Return the names of the runs that hold a loss."""
        return list(dict.fromkeys(run for run, _ in self._column))

    def of(self, run: str, branches: int) -> np.ndarray:
        """Return a run's loss at an evaluation count, then its resamples: (1 + R,).

        Raises:
            ValueError: where a run that trained was not evaluated.
        """
        key = (run, branches)
        if key not in self._column:
            raise ValueError(f"{_named(key)} was not evaluated")
        return self._every_RC[:, self._column[key]]


def _named(key: tuple[str, int]) -> str:
    return f"{key[0]} at {key[1]} evaluation branches"


def _blocks(frame: pd.DataFrame) -> Iterator[tuple[tuple[str, int], dict[str, np.ndarray]]]:
    """Yield run and count with their rows in the order of the texts."""
    runs, names = pd.factorize(frame["run"])
    counts, values = pd.factorize(frame["branches"])
    columns = {name: frame[name].to_numpy() for name in ("text", "document", "nll", "tokens")}
    code = runs.astype(np.int64) * max(1, len(values)) + counts
    order = np.argsort(code, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(code[order])) + 1):
        if len(rows):
            rows = rows[np.argsort(columns["text"][rows], kind="stable")]
            key = (str(names[runs[rows[0]]]), int(values[counts[rows[0]]]))
            yield key, {name: column[rows] for name, column in columns.items()}


def _require_same(key: tuple[str, int], block: Mapping, first: Mapping) -> None:
    for name in ("text", "document", "tokens"):
        if not np.array_equal(block[name], first[name]):
            raise ValueError(f"{_named(key)} was evaluated on other texts: {name} differs")
    if not np.isfinite(block["nll"]).all():
        raise ValueError(f"{_named(key)}: nll is not finite")


def leading_columns(architectures: Iterable[Architecture]) -> list[str]:
    """Return the columns that name an architecture: of what differs, none where there is one."""
    found = {*architectures}
    if len(found) < 2:
        return []
    if len({architecture.head_size for architecture in found}) > 1:
        return ["head_dim", "num_heads"]
    return ["num_heads", "hidden_size"]


def train_order(train_branch: str) -> tuple:
    """Return a sort key of training counts: fixed ones, then dynamic ones, few branches first."""
    low, high = branch_range(train_branch)
    return is_dynamic(train_branch), high, low


def is_dynamic(train_branch: str) -> bool:
    """Return whether a training config draws its number of branches anew for each sample."""
    return not train_branch.startswith("fixed")


def architecture_fields(architecture: Architecture) -> dict:
    """Return the columns that an architecture may be told by."""
    return {
        "head_dim": architecture.head_size,
        "num_heads": architecture.heads,
        "hidden_size": architecture.hidden,
    }


def _settings(run: Run) -> dict:
    values = (run.rotation.coordinate, run.rotation.band, run.rotation.stride, run.group.mask)
    return dict(zip(SETTINGS, values, strict=True))


def _place(wanted: tuple[Run, int], leading: Sequence[str] = ()) -> tuple:
    """Sort key of a row: the study's own runs first, then a control after another."""
    run, count = wanted
    fields = architecture_fields(run.group.architecture)
    *kind, ratio = run.rotation.place
    return (
        not is_main(run),
        MASKS.index(run.group.mask),
        kind,
        [fields[name] for name in (*leading, "head_dim", "num_heads")],
        ratio,
        train_order(run.group.train_branch),
        run.group.seed,
        count,
    )


def results(
    wanted: Iterable[tuple[Run, int]],
    statuses: Mapping[str, Mapping],
    losses: Losses,
    leading: Sequence[str],
) -> pd.DataFrame:
    """Return a row a run and evaluation count: loss, its interval over documents, setting, status.

    ppl = exp(loss), never clipped. A run that diverged has no loss. The study's own runs come
    first, by ``leading``, ratio, training count, seed and evaluation count; then the controls.

    Args:
        wanted: runs with the counts to evaluate them at.
        statuses: ``{"status": "trained" | "diverged"}`` of each run's name.
        leading: of ``leading_columns``.

    Raises:
        ValueError: where a run that trained was not evaluated.
    """
    rows = []
    for run, count in sorted({*wanted}, key=lambda pair: _place(pair, leading)):
        fields = architecture_fields(run.group.architecture)
        row = {name: fields[name] for name in leading}
        row |= {"rope_ratio": float(run.rotation.ratio), "train_branch": run.group.train_branch}
        row |= {"eval_branch": count} | _loss(run, count, statuses, losses)
        row |= {"tokens": losses.tokens, "texts": losses.texts, "seed": run.group.seed}
        status = statuses[run.name]
        row |= _settings(run) | {"status": status["status"]}
        rows.append(row | {"train_tokens": status.get("tokens")})
    return pd.DataFrame(rows)


def _loss(run: Run, count: int, statuses: Mapping[str, Mapping], losses: Losses) -> dict:
    if statuses[run.name]["status"] == DIVERGED:
        return dict.fromkeys(("loss", "ppl", "low", "high"), np.nan)
    every = losses.of(run.name, count)
    found = interval(every[0], every[1:], losses.bootstrap["confidence"])
    with np.errstate(over="ignore"):  # beyond float64 a perplexity is inf
        ppl = float(np.exp(found.value))
    return {"loss": found.value, "ppl": ppl, "low": found.low, "high": found.high}


def means(
    wanted: Iterable[tuple[Run, int]], statuses: Mapping[str, Mapping], losses: Losses
) -> pd.DataFrame:
    """Return a row a point of the figures: the mean loss over seeds, over documents and seeds.

    ``trained`` of ``seeds`` runs hold a loss; those that diverged are left out of the mean, and
    where none is left loss, low and high are empty.

    Args:
        wanted, statuses: as in ``results``.
    """
    groups: dict[tuple, list[tuple[Run, int]]] = {}
    for run, count in sorted({*wanted}, key=_place):
        group = run.group
        key = (group.architecture, group.mask, group.train_branch, run.rotation, count)
        groups.setdefault(key, []).append((run, count))
    bootstrap, rows = losses.bootstrap, []
    for pairs in groups.values():
        run, count = pairs[0]
        every = [
            losses.of(own.name, count)
            for own, _ in pairs
            if statuses[own.name]["status"] == TRAINED
        ]
        found = (np.nan,) * 3
        if every:
            stacked = np.stack(every, axis=1)
            found = interval_over_seeds(stacked, bootstrap["seed"], bootstrap["confidence"])
        architecture = run.group.architecture
        row = {"architecture": architecture.name} | architecture_fields(architecture)
        row |= {"rope_ratio": float(run.rotation.ratio), "train_branch": run.group.train_branch}
        row |= {"eval_branch": count} | _settings(run) | {"control": not is_main(run)}
        row |= dict(zip(("loss", "low", "high"), found, strict=True))
        rows.append(row | {"trained": len(every), "seeds": len(pairs)})
    return pd.DataFrame(rows)


def describe(losses: Losses) -> str:
    """Return the evaluation setting in words, for titles."""
    seeds = len({parse_run(run).group.seed for run in losses.runs})
    over = f"documents and {seeds} seeds" if seeds > 1 else "documents (one seed)"
    return (
        f"{losses.texts:,} evaluation texts of {losses.documents:,} documents, "
        f"{losses.tokens:,} predicted tokens; "
        f"{losses.bootstrap['confidence']:.0%} intervals over {over}"
    )
