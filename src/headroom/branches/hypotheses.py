"""The six hypotheses of the branches study, each held against its closest rival.

Only the study's own runs count, no controls. An effect is a sum of mean losses on the same texts
(nats a token), positive where it supports the hypothesis. The rival is the closest one by the point
estimate on the same texts, which pulls effects down: a verdict ``holds`` is conservative. (In the
fourth the best dynamic training is chosen alike, which pulls the other way.)
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pandas as pd

from headroom.branches.runs import TRAINED, Architecture, Group, Rotation, Run, is_main
from headroom.branches.tables import Losses, is_dynamic, train_order
from headroom.pages import page
from headroom.statistics import interval_over_seeds, verdict

HOLDS, FAILS, UNDECIDED, NOT_TESTED = "holds", "fails", "undecided", "not tested"
VERDICTS = {"better": HOLDS, "worse": FAILS, "undecided": UNDECIDED}
OVERALL = "overall"
COLUMNS = ("hypothesis", "statement", "where", "candidate", "rival", "effect", "low", "high")
COLUMNS += ("seeds", "verdict", "reason")
STYLE = (
    "<style>table.overall th,table.overall td{text-align:left}"
    "table.overall td:nth-child(2){white-space:normal;min-width:20em}</style>"
)


class Cell(NamedTuple):
    """A point of the grid: its runs differ in the seed alone."""

    architecture: Architecture
    ratio: float
    train_branch: str

    def run(self, seed: int) -> Run:
        """Return the run of a seed."""
        return Run(
            Group(self.architecture, self.train_branch, seed=seed), Rotation(ratio=self.ratio)
        )


Terms = tuple[tuple[float, Cell, int], ...]  # factor, cell, evaluation count


class Case(NamedTuple):
    """What a row compares.

    ``scores``: of each name a sum of losses, the lower the better; of several sums the largest one
    counts. ``pairs``: candidates and rivals; the best of each are compared, and of several pairs
    the one with the smallest effect counts.
    """

    where: str
    scores: Mapping[str, Sequence[Terms]]
    pairs: Sequence[tuple[Sequence[str], Sequence[str]]]


class Grid:
    """The study's own runs: which cells were asked for, and which seeds of them trained."""

    def __init__(self, wanted: Iterable[tuple[Run, int]], statuses: Mapping[str, Mapping]):
        """Sort runs into cells; only evaluation counts that all of them share are compared."""
        counts: dict[Run, set[int]] = {}
        for run, count in wanted:
            if is_main(run):
                counts.setdefault(run, set()).add(count)
        self.counts = sorted(set.intersection(*counts.values())) if counts else []
        self.trained: dict[Cell, set[int]] = {}
        for run in sorted(counts):
            cell = Cell(run.group.architecture, run.rotation.ratio, run.group.train_branch)
            seeds = self.trained.setdefault(cell, set())
            if statuses[run.name]["status"] == TRAINED:
                seeds.add(run.group.seed)

    def lines(self, *kept: str) -> Iterator[tuple[tuple, list[Cell]]]:
        """Yield the values of these fields, and the cells that share them, in a fixed order."""
        lines: dict[tuple, list[Cell]] = {}
        for cell in sorted(self.trained, key=lambda c: (c[:2], train_order(c.train_branch))):
            lines.setdefault(tuple(getattr(cell, name) for name in kept), []).append(cell)
        yield from lines.items()

    def mean(self, cell: Cell) -> Terms:
        """Return the loss averaged over all evaluation counts."""
        return tuple((1 / len(self.counts), cell, count) for count in self.counts)


def _single_branch(grid: Grid) -> Iterator[Case]:
    for (architecture, train), cells in grid.lines("architecture", "train_branch"):
        scores = {_ratio(cell): [((1.0, cell, 1),)] for cell in cells}
        if 1 in grid.counts:
            yield from _against_all(_trained_on(architecture.name, train), scores, "ratio 0")


def _slowest_rise(grid: Grid) -> Iterator[Case]:
    for (architecture, train), cells in grid.lines("architecture", "train_branch"):
        if 1 in grid.counts and len(grid.counts) > 1:
            ends = ((1.0, grid.counts[-1]), (-1.0, 1))
            scores = {
                _ratio(cell): [tuple((sign, cell, count) for sign, count in ends)] for cell in cells
            }
            yield from _against_all(_trained_on(architecture.name, train), scores, "ratio 1")


def _own_count(grid: Grid) -> Iterator[Case]:
    for (architecture, ratio), cells in grid.lines("architecture", "ratio"):
        for own in cells:
            count = train_order(own.train_branch)[1]
            if not is_dynamic(own.train_branch) and count in grid.counts:
                scores = {cell.train_branch: [((1.0, cell, count),)] for cell in cells}
                branches = "1 branch" if count == 1 else f"{count} branches"
                where = f"{architecture.name}, ratio {ratio:g}, at {branches}"
                yield from _against_all(where, scores, own.train_branch)


def _dynamic(grid: Grid) -> Iterator[Case]:
    for (architecture, ratio), cells in grid.lines("architecture", "ratio"):
        scores = {cell.train_branch: [grid.mean(cell)] for cell in cells}
        dynamic = [name for name in scores if is_dynamic(name)]
        fixed = [name for name in scores if not is_dynamic(name)]
        if dynamic and fixed and len(grid.counts) > 1:
            yield Case(f"{architecture.name}, ratio {ratio:g}", scores, [(dynamic, fixed)])


def _more_heads(grid: Grid) -> Iterator[Case]:
    sizes = {cell.architecture.head_size for cell in grid.trained}
    for (ratio, train), cells in grid.lines("ratio", "train_branch"):
        for size in sorted(sizes):
            own = [cell for cell in cells if cell.architecture.head_size == size]
            own.sort(key=lambda cell: cell.architecture.heads)
            scores = {f"{cell.architecture.heads} heads": [grid.mean(cell)] for cell in own}
            where = _trained_on(f"head size {size}, ratio {ratio:g}", train)
            if grid.counts:
                yield from _upwards(where, scores)


def _finer_control(grid: Grid) -> Iterator[Case]:
    widths = {cell.architecture.hidden for cell in grid.trained}
    for (train,), cells in grid.lines("train_branch"):
        for width in sorted(widths):
            own = [cell for cell in cells if cell.architecture.hidden == width]
            scores = {}
            for size in sorted({cell.architecture.head_size for cell in own}):
                line = [cell for cell in own if cell.architecture.head_size == size]
                if len(line) > 2 and grid.counts:
                    scores[f"head size {size}"] = _jumps(line, grid.counts[-1])
            yield from _upwards(_trained_on(f"hidden {width}", train), scores)


def _jumps(cells: Sequence[Cell], count: int) -> list[Terms]:
    """Both signs of each difference between neighbours: the largest is the largest jump."""
    return [
        ((sign, after, count), (-sign, before, count))
        for before, after in pairwise(cells)
        for sign in (1.0, -1.0)
    ]


def _against_all(where: str, scores: Mapping, own: str) -> Iterator[Case]:
    others = [name for name in scores if name != own]
    if own in scores and others:
        yield Case(where, scores, [([own], others)])


def _upwards(where: str, scores: Mapping) -> Iterator[Case]:
    """Each name must beat the one before."""
    if len(scores) > 1:
        yield Case(where, scores, [([later], [sooner]) for sooner, later in pairwise(scores)])


def _ratio(cell: Cell) -> str:
    return f"ratio {cell.ratio:g}"


def _trained_on(where: str, train: str) -> str:
    return f"{where}, trained on {train}"


class Hypothesis(NamedTuple):
    """What is claimed, where the grid tests it, and what a grid needs for that."""

    statement: str
    cases: Callable[[Grid], Iterator[Case]]
    needs: str


HYPOTHESES = (
    Hypothesis(
        "Ratio 0 has the lowest loss at one evaluation branch.",
        _single_branch,
        "ratio 0, another ratio, one evaluation branch",
    ),
    Hypothesis(
        "With ratio 1 the loss rises least from one to the most evaluation branches.",
        _slowest_rise,
        "ratio 1, another ratio, one evaluation branch and more",
    ),
    Hypothesis(
        "Training on a fixed number of branches is best at that number.",
        _own_count,
        "a fixed training count that is evaluated at, another training config",
    ),
    Hypothesis(
        "Dynamic training generalises: the best of it beats the best fixed count on average over "
        "all evaluation counts.",
        _dynamic,
        "fixed and dynamic training, two evaluation counts",
    ),
    Hypothesis(
        "More heads of one size are better at every step, on average over all evaluation counts.",
        _more_heads,
        "two numbers of heads at one head size",
    ),
    Hypothesis(
        "Larger heads give finer control: the largest jump of the loss between neighbouring "
        "ratios, at the most evaluation branches, is smaller.",
        _finer_control,
        "two head sizes at one hidden size, three ratios",
    ),
)


def hypotheses(
    wanted: Iterable[tuple[Run, int]], statuses: Mapping[str, Mapping], losses: Losses
) -> pd.DataFrame:
    """Return rows of each hypothesis with effect, interval and verdict, and an overall one first.

    Intervals are over documents and paired seeds, those at which all compared runs trained; a
    verdict also needs the sign of every seed. A hypothesis fails if any row fails, holds if all
    rows hold, and is undecided otherwise.

    Args:
        wanted: runs with the counts that they were evaluated at.
        statuses: ``{"status": "trained" | "diverged"}`` of each run's name.

    Returns:
        hypothesis (from 1), statement, where (``overall``: no effect), candidate, rival, effect,
        low, high (nats a token), seeds, verdict (holds, fails, undecided, not tested), reason.
    """
    grid, table = Grid(wanted, statuses), []
    for number, hypothesis in enumerate(HYPOTHESES, 1):
        rows = [_row(case, grid, losses) for case in hypothesis.cases(grid)]
        common = {"hypothesis": number, "statement": hypothesis.statement}
        table += [common | row for row in (_overall(rows, hypothesis.needs), *rows)]
    return pd.DataFrame(table, columns=list(COLUMNS)).astype({"seeds": "Int64"})


def _row(case: Case, grid: Grid, losses: Losses) -> dict:
    """Return a comparison; who has no trained run at all is left out, and said so."""
    scores = {name: sums for name, sums in case.scores.items() if _seeds({name: sums}, grid)}
    pairs = [[[name for name in names if name in scores] for names in pair] for pair in case.pairs]
    pairs = [pair for pair in pairs if all(pair)]
    lost = [name for name in case.scores if name not in scores]
    seeds = _seeds(scores, grid) if pairs else []
    row = {"where": case.where, "seeds": len(seeds)}
    if not seeds:
        return row | {"verdict": NOT_TESTED, "reason": "no seed at which all compared runs trained"}
    found = {
        name: max((_sum(terms, seeds, losses) for terms in sums), key=_point)
        for name, sums in scores.items()
    }
    points = {name: _point(every_RS) for name, every_RS in found.items()}
    compared = [tuple(min(names, key=points.__getitem__) for names in pair) for pair in pairs]
    candidate, rival = min(compared, key=lambda pair: points[pair[1]] - points[pair[0]])
    effect_RS = found[rival] - found[candidate]
    bootstrap = losses.bootstrap
    effect = interval_over_seeds(effect_RS, bootstrap["seed"], bootstrap["confidence"])
    row |= {"candidate": candidate, "rival": rival}
    row |= {"effect": effect.value, "low": effect.low, "high": effect.high}
    reason = f"without {', '.join(lost)}, which diverged" if lost else ""
    return row | {"verdict": VERDICTS[verdict(effect, effect_RS[0])], "reason": reason}


def _seeds(scores: Mapping[str, Sequence[Terms]], grid: Grid) -> list[int]:
    """Return the seeds at which all these runs trained."""
    cells = {cell for sums in scores.values() for terms in sums for _, cell, _ in terms}
    return sorted(set.intersection(*(grid.trained[cell] for cell in cells))) if cells else []


def _point(every_RS: np.ndarray) -> float:
    return float(every_RS[0].mean())


def _sum(terms: Terms, seeds: Sequence[int], losses: Losses) -> np.ndarray:
    """Σ factor · loss by seed and resample, (1 + R, S)."""
    by_seed = [
        sum(factor * losses.of(cell.run(seed).name, count) for factor, cell, count in terms)
        for seed in seeds
    ]
    return np.stack(by_seed, axis=1)


def _overall(rows: Sequence[Mapping], needs: str) -> dict:
    found = [row["verdict"] for row in rows]
    if not rows:
        return {"where": OVERALL, "verdict": NOT_TESTED, "reason": f"the grid lacks {needs}"}
    counts = {name: found.count(name) for name in (HOLDS, FAILS, UNDECIDED, NOT_TESTED)}
    if counts[FAILS]:
        whole = FAILS
    elif counts[HOLDS] == len(rows):
        whole = HOLDS
    else:
        whole = NOT_TESTED if counts[NOT_TESTED] == len(rows) else UNDECIDED
    told = ", ".join(f"{name} in {count}" for name, count in counts.items() if count)
    return {"where": OVERALL, "verdict": whole, "reason": f"{told} of {len(rows)} comparisons"}


def as_html(table: pd.DataFrame, title: str, setting: str) -> str:
    """Return a page: the six verdicts, then each comparison with its effect and interval.

    Args:
        table: of ``hypotheses``.
        title, setting: plain text.
    """
    overall = table[table["where"] == OVERALL]
    names = {"hypothesis": "", "statement": "hypothesis", "verdict": "verdict", "reason": "from"}
    parts = [
        f"{STYLE}<h2>{escape(title)}</h2><p>{escape(setting)}. Effects are in nats a token, "
        f"positive where they support the hypothesis, against the closest rival. A hypothesis "
        f"fails if any comparison fails, and holds if all hold; a comparison is decided where its "
        f"interval and every seed lie on one side of 0 (with one seed it says nothing of what "
        f"another training would give).</p>",
        overall[[*names]].rename(columns=names).to_html(index=False, border=0, classes="overall"),
    ]
    for number, rows in table[table["where"] != OVERALL].groupby("hypothesis"):
        shown = pd.DataFrame(
            {
                "where": rows["where"],
                "claimed": rows["candidate"].fillna(""),
                "rival": rows["rival"].fillna(""),
                "effect": [_told(row) for _, row in rows.iterrows()],
                "seeds": rows["seeds"],
                "verdict": rows["verdict"],
            }
        )
        parts += [
            f"<h2>{number}. {escape(rows.statement.iloc[0])}</h2>",
            shown.to_html(index=False, border=0),
        ]
    return page(escape(title), *parts)


def _told(row: pd.Series) -> str:
    if pd.isna(row.effect):
        return row.reason
    return f"{row.effect:+.4f} [{row.low:+.4f}, {row.high:+.4f}]".replace("-", "−")
