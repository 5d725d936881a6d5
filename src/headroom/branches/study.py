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
    statuses = {
        path.parent.name: read_json(path)
        for folder in stacks
        for path in sorted(Path(folder).glob("*/run.json"))
    }
    found = tables.Losses(_frames(losses, {run.name for run, _ in wanted}), bootstrap)
    leading = tables.leading_columns(run.group.architecture for run, _ in wanted)
    setting = tables.describe(found)
    verdicts = hypotheses.hypotheses(wanted, statuses, found)
    tables.results(wanted, statuses, found, leading).to_csv(outputs["results"], index=False)
    tables.means(wanted, statuses, found).to_csv(outputs["means"], index=False)
    verdicts.to_csv(outputs["csv"], index=False)
    page = hypotheses.as_html(verdicts, f"Hypotheses: {name}", setting)
    Path(outputs["hypotheses"]).write_text(page, encoding="utf-8")
    write_json(Path(outputs["setting"]), {"setting": setting})


def _frames(paths: Iterable[str], wanted: set[str]) -> Iterable[pd.DataFrame]:
    """Read losses without the runs of a stack that another ablation asked for."""
    for path in paths:
        frame = pd.read_parquet(path)
        yield frame[frame["run"].isin(wanted)]
