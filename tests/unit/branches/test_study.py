"""An ablation from the files of its stacks, as jobs leave them."""

import json

import numpy as np
import pandas as pd

from headroom.branches.runs import parse_stack
from headroom.branches.study import tabulate

BRANCHES = {
    "seeds": [0],
    "ablations": {
        "mine": {
            "architectures": [{"hidden": 64, "heads": 4}],
            "ratios": [0, 0.5, 1],
            "train_branches": ["1-3"],
            "evaluation_branches": [1, 4],
        }
    },
}
GROUP = "64-d16-h4-b1-3"


def stack(root, name, losses, diverged=()):
    """A stack's run files and losses: a loss a token of every run."""
    found = parse_stack(GROUP, name)
    rows = []
    for run in found.runs:
        folder = root / "stacks" / GROUP / name / run.name
        folder.mkdir(parents=True)
        lost = run.rotation.name in diverged
        facts = {"status": "diverged"} if lost else {"status": "trained", "tokens": 100}
        (folder / "run.json").write_text(json.dumps(facts))
        if not lost:
            tokens = np.arange(2, 10)
            rows.append(
                pd.DataFrame(
                    {
                        "run": run.name,
                        "text": np.arange(8),
                        "document": np.arange(8) // 2,
                        "nll": losses[run.rotation.name] * tokens,
                        "tokens": tokens,
                    }
                )
            )
    (root / "losses" / GROUP / name).mkdir(parents=True)
    for count in (1, 4):
        frame = pd.concat(rows).assign(branches=count)
        frame["nll"] *= 1 + count / 10
        frame.to_parquet(root / "losses" / GROUP / name / f"{count}.parquet")
    return root / "stacks" / GROUP / name


def tabulated(root, folders):
    outputs = {
        name: str(root / name) for name in ("results", "means", "csv", "hypotheses", "setting")
    }
    losses = [
        root / "losses" / folder.parent.name / folder.name / f"{count}.parquet"
        for folder in folders
        for count in (1, 4)
    ]
    bootstrap = {"resamples": 100, "confidence": 0.9, "seed": 0}
    tabulate(BRANCHES, "mine", bootstrap, folders, losses, outputs)
    return pd.read_csv(root / "results"), pd.read_csv(root / "csv")


def test_a_run_that_lies_in_two_stacks_is_read_from_the_first(tmp_path):
    folders = [
        stack(tmp_path, "r00_r05", {"r00": 3.0, "r05": 2.0}),
        stack(tmp_path, "r05_r10_r10-stride64", {"r05": 9.0, "r10": 1.0, "r10-stride64": 8.0}),
    ]
    results, _ = tabulated(tmp_path, folders)
    assert results.loss.round(6).tolist() == [3.3, 4.2, 2.2, 2.8, 1.1, 1.4]
    assert set(results.train_tokens) == {100}


def test_a_diverged_rival_is_left_out_and_named(tmp_path):
    losses = {"r00": 1.0, "r05": 2.0, "r10": 3.0}
    results, verdicts = tabulated(tmp_path, [stack(tmp_path, "r00_r05_r10", losses, {"r05"})])
    lost = results[results.rope_ratio == 0.5]
    assert lost.loss.isna().all() and set(lost.status) == {"diverged"}
    first = verdicts[(verdicts.hypothesis == 1) & (verdicts["where"] != "overall")].iloc[0]
    assert (first.rival, first.verdict) == ("ratio 1", "holds")
    assert first.reason == "without ratio 0.5, which diverged"
    assert abs(first.effect - 2.2) < 1e-9
