"""An ablation of the branches study, from the files of its stacks to tables and figures."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from headroom.branches import grid, hypotheses, tables
from headroom.checkpoints import read_json, write_json


def tabulate(
    branches: Mapping,
    name: str,
    bootstrap: Mapping,
    stacks: Sequence[str],
    losses: Iterable[str],
    outputs: Mapping[str, str],
) -> None:
    """Write results, means over seeds, hypotheses and the setting that they were found in.

    Args:
        branches: section of the configuration with this ablation and its seeds.
        name: of the ablation.
        stacks: folders of its runs.
        losses: files of their losses.
        outputs: ``results``, ``means`` and ``csv`` (tables), ``hypotheses`` (a page), ``setting``.
    """
    counts = branches["ablations"][name]["evaluation_branches"]
    wanted = [(run, count) for run in grid.ablation_runs(branches, name) for count in counts]
    statuses, owned = _statuses(stacks, {run.name for run, _ in wanted})
    found = tables.Losses(_frames(losses, owned), bootstrap)
    leading = tables.leading_columns(run.group.architecture for run, _ in wanted)
    setting = tables.describe(found)
    verdicts = hypotheses.hypotheses(wanted, statuses, found)
    tables.results(wanted, statuses, found, leading).to_csv(outputs["results"], index=False)
    tables.means(wanted, statuses, found).to_csv(outputs["means"], index=False)
    verdicts.to_csv(outputs["csv"], index=False)
    page = hypotheses.as_html(verdicts, f"Hypotheses: {name}", setting)
    Path(outputs["hypotheses"]).write_text(page, encoding="utf-8")
    write_json(Path(outputs["setting"]), {"setting": setting})


def _statuses(stacks: Sequence[str], wanted: set[str]) -> tuple[dict, dict]:
    """Return what became of each run, and which runs are read from which (group, stack).

    A run may lie in two stacks; the first is read.
    """
    statuses: dict[str, dict] = {}
    owned: dict[tuple[str, str], set[str]] = {}
    for folder in map(Path, stacks):
        found = {path.parent.name: read_json(path) for path in sorted(folder.glob("*/run.json"))}
        own = {name: found[name] for name in found if name in wanted and name not in statuses}
        owned[folder.parts[-2:]] = set(own)
        statuses |= own
    return statuses, owned


def _frames(paths: Iterable[str], owned: Mapping[tuple, set[str]]) -> Iterable[pd.DataFrame]:
    """Read losses without the runs that another ablation asked for or another stack gave."""
    for path in map(Path, paths):
        frame = pd.read_parquet(path)
        yield frame[frame["run"].isin(owned[path.parts[-3:-1]])]
