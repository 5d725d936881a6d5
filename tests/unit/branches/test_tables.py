"""Losses of runs on texts made by hand, against means and intervals computed another way."""

import io

import numpy as np
import pandas as pd
import pytest

from headroom.branches import tables
from headroom.branches.runs import Architecture, Run, group, rotation
from headroom.statistics import bootstrap_ratio, seeded_loss_difference

BOOTSTRAP = {"resamples": 60, "confidence": 0.9, "seed": 3}
RATIOS, COUNTS = (0, 0.25, 0.5, 0.75, 0.875, 1), (1, 2, 4, 8, 16, 24, 32)
TRAINS = ("fixed1", "fixed2", "fixed4", "fixed8", "fixed16", "1-3", "1-7", "1-15", "1-31")
BASE = Architecture(512, 8)
TEXTS = 12


def run_of(ratio=0.5, train="fixed4", architecture=BASE, mask="columns", seed=0, **turned):
    return Run(group(architecture, train, mask, seed), rotation(ratio, **turned))


def frame(run, count, shift=0.0, texts=TEXTS):
    """Two texts a document, of unequal length; ``shift`` nats a token more."""
    text = np.arange(texts)
    tokens = 3 + text % 5
    own = np.random.default_rng([round(1000 * run.rotation.ratio), count, run.group.seed])
    nll = tokens * (own.uniform(1, 4, texts) + shift)
    return pd.DataFrame(
        {
            "run": run.name,
            "branches": count,
            "text": text,
            "document": 100 + text // 2,
            "nll": nll,
            "tokens": tokens,
        }
    )


def trained(wanted, *diverged):
    status = {run.name: {"status": "trained"} for run, _ in wanted}
    return status | {run.name: {"status": "diverged", "step": 7} for run in diverged}


def test_losses_are_weighted_by_tokens_and_intervals_are_over_documents():
    wanted = [(run_of(ratio), count) for ratio in (0, 1) for count in (1, 2)]
    frames = {pair: frame(*pair) for pair in wanted}
    together = pd.concat(frames.values()).sample(frac=1, random_state=0)
    by_count = [part for _, part in together.groupby("branches")]
    for parts in (list(frames.values()), [together], [together[:0], *by_count]):
        losses = tables.Losses(parts, BOOTSTRAP)
        table = tables.results(wanted, trained(wanted), losses, [])
        for place, pair in enumerate(wanted):
            own, row = frames[pair], table.iloc[place]
            documents = own.groupby("document")[["nll", "tokens"]].sum()
            expected = bootstrap_ratio(*documents.to_numpy().T, **BOOTSTRAP)
            assert row.loss == pytest.approx(own.nll.sum() / own.tokens.sum(), rel=1e-12)
            assert (row.low, row.high) == pytest.approx(expected[1:], rel=1e-12)
            assert row.ppl == pytest.approx(np.exp(row.loss))
            assert (row.tokens, row.texts) == (own.tokens.sum(), TEXTS)


def test_what_was_measured_on_other_texts_is_refused():
    one, two = frame(run_of(0), 1), frame(run_of(1), 1)
    for wrong in (
        two.assign(tokens=two.tokens + (two.text == 3)),
        two.assign(text=two.text + 1),
        two.assign(document=two.document % 4),
        two[1:],
        two.assign(nll=np.nan),
        one,
    ):
        with pytest.raises(ValueError, match="at 1 evaluation branches"):
            tables.Losses([one, wrong], BOOTSTRAP)
    with pytest.raises(ValueError, match="a text comes twice"):
        tables.Losses([pd.concat([one, one])], BOOTSTRAP)
    losses = tables.Losses([one], BOOTSTRAP)
    wanted = [(run_of(1), 1)]
    with pytest.raises(ValueError, match="512-h8-r10-bfixed4 at 1 evaluation"):
        tables.results(wanted, trained(wanted), losses, [])


def test_a_diverged_run_keeps_its_rows_without_a_loss():
    lost, fine = run_of(0.5), run_of(1)
    wanted = [(run, count) for run in (fine, lost) for count in (2, 1)]
    losses = tables.Losses([frame(fine, 1, 800.0), frame(fine, 2)], BOOTSTRAP)
    table = tables.results(wanted, trained(wanted, lost), losses, [])
    read = pd.read_csv(io.StringIO(table.to_csv(index=False)))
    assert read.status.tolist() == ["diverged"] * 2 + ["trained"] * 2
    assert read.eval_branch.tolist() == [1, 2, 1, 2]
    numbers = ["loss", "ppl", "low", "high"]
    assert read[:2][numbers].isna().all(axis=None) and read[2:][numbers].notna().all(axis=None)
    assert read.loss[2] > 800 and read.ppl[2] == np.inf, "perplexity is never clipped"

    nothing = tables.Losses([frame(fine, 1)[:0]], BOOTSTRAP)
    table = tables.results(wanted, trained(wanted, lost, fine), nothing, [])
    assert len(table) == 4 and table.loss.isna().all() and (table.texts == 0).all()


@pytest.mark.parametrize(
    ("architectures", "leading", "rows"),
    [
        ([(512, 8)], [], 378),
        ([(256, 4), (512, 8), (1024, 16), (1536, 24)], ["num_heads", "hidden_size"], 1512),
        ([(512, 16), (512, 8), (512, 4)], ["head_dim", "num_heads"], 1134),
    ],
)
def test_the_full_grid_has_a_row_a_point_in_a_fixed_order(architectures, leading, rows):
    found = [Architecture(*sizes) for sizes in architectures]
    runs = [run_of(r, t, a) for a in found for t in TRAINS for r in RATIOS]
    controls = [run_of(0.5, "1-3", found[0], "isolated"), run_of(0.5, "1-3", found[0], band="high")]
    wanted = [(run, count) for run in runs + controls for count in COUNTS]
    mixed = [wanted[place] for place in np.random.default_rng(0).permutation(len(wanted))]
    losses = tables.Losses([frame(*pair, texts=4) for pair in mixed], BOOTSTRAP)
    assert tables.leading_columns(found) == leading
    table = tables.results(mixed, trained(wanted), losses, leading)
    setting = ["low", "high", "tokens", "texts", "seed", "coordinate", "band", "stride", "mask"]
    seeds = ["rope_ratio", "train_branch", "eval_branch", "loss", "ppl"]
    assert list(table) == [*leading, *seeds, *setting, "status", "train_tokens"]
    own, others = table[:rows], table[rows:]
    assert len(others) == 2 * len(COUNTS)
    assert others["mask"].tolist() == ["columns"] * len(COUNTS) + ["isolated"] * len(COUNTS)
    keys = [*leading, "rope_ratio", "train_branch", "eval_branch"]
    assert not own.duplicated(keys).any()
    order = own.assign(train_branch=own.train_branch.map(TRAINS.index))[keys]
    assert order.equals(order.sort_values(keys))
    assert table.equals(tables.results(wanted, trained(wanted), losses, leading))


def test_means_are_over_the_seeds_that_trained():
    seeds = [run_of(seed=seed) for seed in range(3)]
    wanted = [(run, 2) for run in seeds] + [(run_of(0.25), 2)]
    losses = tables.Losses([frame(run, count) for run, count in wanted], BOOTSTRAP)
    table = tables.means(wanted, trained(wanted, seeds[1], run_of(0.25)), losses)
    assert table.trained.tolist() == [0, 2] and table.seeds.tolist() == [1, 3]
    assert table.loss.isna().tolist() == [True, False]
    sums = np.stack([frame(run, 2).groupby("document").nll.sum() for run in (seeds[0], seeds[2])])
    tokens = frame(seeds[0], 2).groupby("document").tokens.sum().to_numpy()
    expected = seeded_loss_difference(np.zeros_like(sums), sums, tokens, **BOOTSTRAP)
    assert tuple(table.loc[1, ["loss", "low", "high"]]) == pytest.approx(expected)
    only = tables.means(wanted[:1], trained(wanted), losses).iloc[0]
    alone = tables.results(wanted[:1], trained(wanted), losses, []).iloc[0]
    assert only[["loss", "low", "high"]].equals(alone[["loss", "low", "high"]].rename(only.name))
