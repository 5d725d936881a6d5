"""Stacks in training: as if each member were alone, whatever becomes of the others."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM

from headroom.branches import pipeline
from headroom.branches.batches import Draws
from headroom.branches.judge import evaluate_stack
from headroom.branches.model import Stack
from headroom.branches.pipeline import train_stack
from headroom.branches.runs import Rotation, parse_stack
from headroom.branches.stack import Members, member_norms, sum_of_losses
from headroom.branches.texts import Texts
from headroom.checkpoints import write_manifest
from headroom.errors import InputError
from headroom.training import Plan

VOCABULARY = 64
SETTINGS = {
    "compute": {"device": "cpu", "threads": 1},
    "branches": {
        "layers": 2,
        "kv_heads": 2,
        "theta": 1e4,
        "offsets": {"train": True, "evaluation": False},
        "evaluation": {"micro_texts": 8},
        "train": {
            "texts": 6,
            "micro_texts": 4,
            "steps": 12,
            "learning_rate": 5e-3,
            "weight_decay": 0.01,
            "warmup": 3,
            "clip": 0.5,
            "precision": "auto",
            "threads": 1,
        },
    },
}
GROUP, NAMES = "64-d16-h4-b1-3-s2", ["r00", "r05", "r10", "r05-time"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Texts of 3 to 12 tokens that can be learned, and a tokenizer of as many words."""
    folder = tmp_path_factory.mktemp("texts")
    draw = np.random.default_rng(0)
    lengths = draw.integers(3, 13, 96)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.concatenate([(draw.integers(60) + np.arange(n)) % VOCABULARY for n in lengths])
    found = Texts(tokens.astype(np.uint16), starts, np.arange(96) // 2)
    (folder / "texts").mkdir()
    for name, array in found._asdict().items():
        np.save(folder / "texts" / f"{name}.npy", array)
    write_manifest(folder / "texts")
    words = ["<s>", "</s>", "<pad>", *map(str, range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    (folder / "words").mkdir()
    tokenizer.save(str(folder / "words" / "tokenizer.json"))
    (folder / "words" / "tokenizer_config.json").write_text("{}")
    return folder


def trained(folders, output, names=NAMES, state=None, settings=SETTINGS, group=GROUP):
    output.mkdir(parents=True)
    stack = parse_stack(group, "_".join(names))
    texts, words = str(folders / "texts"), str(folders / "words")
    state = state or output.with_name(f"{output.name}.state")
    train_stack(settings, stack, texts, words, output, state)
    return {run.rotation.name: output / run.name for run in stack.runs}


def changed(**train):
    settings = copy.deepcopy(SETTINGS)
    settings["branches"]["train"] |= train
    return settings


def same(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


@pytest.fixture(scope="module")
def stacked(folders, tmp_path_factory):
    return trained(folders, tmp_path_factory.mktemp("stack") / "all")


def test_a_member_is_what_it_would_be_alone_to_the_byte(folders, stacked, tmp_path):
    for name in NAMES:
        assert same(trained(folders, tmp_path / name, [name])[name], stacked[name])
    weights = [load_file(folder / "model.safetensors") for folder in stacked.values()]
    largest = max(weights[0][n].sub(weights[1][n]).abs().max() for n in weights[0])
    assert largest > 1e-4, "the members learned different things"
    log = json.loads((stacked["r00"] / "training_log.json").read_text())
    assert log[-1]["step"] == 12 and log[-1]["loss"] < log[0]["loss"]


def test_clipping_knows_no_siblings():
    torch.manual_seed(0)
    members = Members(Stack(sizes(), [Rotation(0.0), Rotation(0.5), Rotation(1.0)]))
    gradients = {}
    for name, parameter in members.stack.named_parameters():
        scale = torch.tensor([1e-3, 1.0, 50.0]).view(-1, *[1] * (parameter.ndim - 1))
        parameter.grad = torch.randn(parameter.shape) * scale
        gradients[name] = parameter.grad.clone()
    optimizer = torch.optim.SGD(members.stack.parameters(), lr=1.0)
    found = members.clip(optimizer, 2.0)
    norms = []
    for k in range(3):
        alone = [torch.nn.Parameter(g[k].clone()) for g in gradients.values()]
        for parameter in alone:
            parameter.grad = parameter.detach().clone()
        norms.append(float(torch.nn.utils.clip_grad_norm_(alone, 2.0)))
        for (name, parameter), expected in zip(
            members.stack.named_parameters(), alone, strict=True
        ):
            torch.testing.assert_close(parameter.grad[k], expected.grad, msg=name)
    assert found == pytest.approx(max(norms))
    torch.testing.assert_close(member_norms(list(gradients.values())), torch.tensor(norms))


def sizes():
    return {
        "vocabulary": VOCABULARY,
        "hidden": 64,
        "heads": 4,
        "kv_heads": 2,
        "layers": 2,
        "theta": 1e4,
        "positions": 512,
    }


@pytest.fixture
def spoiled(monkeypatch):
    """From a step on, the losses of the member at ratio .5 are no numbers."""

    def spoil(step, rotation="r05"):
        def losses(members, nll_KP, whole=Members.sum_losses):
            factors = torch.ones(len(members.stack.rotations), 1)
            if int(members.step) >= step:
                for k, own in enumerate(members.stack.rotations):
                    if own.name == rotation or rotation == "all":
                        factors[k] = float("nan")
            return whole(members, nll_KP * factors)

        monkeypatch.setattr(Members, "sum_losses", losses)

    return spoil


def test_a_diverging_member_takes_no_sibling_with_it(folders, stacked, tmp_path, spoiled, capsys):
    spoiled(4)
    found = trained(folders, tmp_path / "a")
    assert "diverged at step 5: r05\n" in capsys.readouterr().err
    assert all(same(found[name], stacked[name]) for name in NAMES if name != "r05")
    assert sorted(p.name for p in found["r05"].iterdir()) == ["run.json", "training_log.json"]
    assert json.loads((found["r05"] / "run.json").read_text()) == {
        "run": "64-d16-h4-r05-b1-3-s2",
        "status": "diverged",
        "step": 5,
    }
    rows = evaluate_stack(
        SETTINGS,
        parse_stack(GROUP, "_".join(NAMES)),
        str(tmp_path / "a"),
        str(folders / "texts"),
        2,
        0,
    )
    assert set(rows.run) == {found[name].name for name in NAMES if name != "r05"}


def test_a_stack_in_which_all_diverged_says_so_of_each(folders, stacked, tmp_path, spoiled):
    spoiled(10, "all")
    found = trained(folders, tmp_path / "a")
    facts = [json.loads((folder / "run.json").read_text()) for folder in found.values()]
    assert [(row["status"], row["step"]) for row in facts] == [("diverged", 11)] * len(NAMES)
    for name, folder in found.items():  # what was logged before is kept
        whole = json.loads((stacked[name] / "training_log.json").read_text())
        assert json.loads((folder / "training_log.json").read_text()) == whole[:1]


class Killed(Exception):
    """The job dies."""


@pytest.mark.parametrize("diverged", [False, True])
def test_a_killed_stack_goes_on_to_the_same_bytes(
    folders, tmp_path, monkeypatch, spoiled, diverged
):
    if diverged:
        spoiled(4)
    whole = trained(folders, tmp_path / "whole")
    monkeypatch.setattr(
        pipeline, "Plan", lambda **given: Plan(**given, save_seconds=-1.0, log_every=5)
    )
    take, calls = Draws.step, []

    def dying(self, number):
        calls.append(number)
        if len(calls) == 8:
            raise Killed
        return take(self, number)

    monkeypatch.setattr(Draws, "step", dying)
    with pytest.raises(Killed):
        trained(folders, tmp_path / "a", state=tmp_path / "state")
    found = trained(folders, tmp_path / "b", state=tmp_path / "state")
    assert calls[8:] == [7, 8, 9, 10, 11]
    for name in NAMES:
        for file in ("model.safetensors", "run.json"):
            one, other = whole[name] / file, found[name] / file
            assert one.is_file() == other.is_file()
            assert not one.is_file() or one.read_bytes() == other.read_bytes()


def test_halved_micro_batches_give_equal_gradients(folders):
    texts = pipeline.load_texts(folders / "texts")
    draws = Draws(texts.lengths, (1, 3), 12, 0, True)
    samples = list(zip(*draws.step(0), strict=True))
    gradients = []
    for size in (len(samples), 1):
        members = Members(Stack(sizes(), [Rotation(0.0), Rotation(1.0)], seed=1))
        loss_sum = sum_of_losses(texts, "cpu", torch.float32)
        for start in range(0, len(samples), size):
            loss_sum(members, samples[start : start + size])[0].backward()
        gradients.append([p.grad for p in members.stack.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_memory_that_suffices_for_no_sample_is_said(folders, tmp_path, monkeypatch):
    def never(members, nll_KP):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Members, "sum_losses", never)
    with pytest.raises(InputError, match="too little memory for a micro-batch of 1"):
        trained(folders, tmp_path / "a")


@pytest.mark.parametrize("branches", [1, 4])
def test_losses_hang_on_no_portion(folders, stacked, branches):
    stack, folder = parse_stack(GROUP, "_".join(NAMES)), str(stacked["r00"].parent)
    tables = []
    for portion in (4, 32, 96):
        settings = copy.deepcopy(SETTINGS)
        settings["branches"]["evaluation"]["micro_texts"] = portion
        texts = str(folders / "texts")
        tables.append(evaluate_stack(settings, stack, folder, texts, branches, 0))
    for table in tables[1:]:
        np.testing.assert_allclose(table.nll, tables[0].nll, rtol=1e-5)
    assert len(tables[0]) == 96 * len(NAMES) and (tables[0].tokens > 1).all()
    assert set(tables[0].branches) == {branches}


def test_one_branch_of_ratio_0_is_judged_as_stock_llama_is(folders, stacked):
    texts = pipeline.load_texts(folders / "texts")
    stock = AutoModelForCausalLM.from_pretrained(stacked["r00"]).eval()
    table = evaluate_stack(
        SETTINGS, parse_stack(GROUP, "_".join(NAMES)), str(stacked["r00"].parent),
        str(folders / "texts"), 1, 0,
    )  # fmt: skip
    own = table[table.run == stacked["r00"].name]
    for row in own.itertuples():
        ids = texts.tokens[texts.starts[row.text] : texts.starts[row.text + 1]]
        ids = torch.from_numpy(ids.astype(np.int64))[None]
        with torch.no_grad():
            loss = stock(input_ids=ids, labels=ids).loss
        assert row.nll == pytest.approx(float(loss) * row.tokens, rel=1e-4)
    with pytest.raises(ValueError, match="headroom_branches"):
        AutoModelForCausalLM.from_pretrained(stacked["r10"])
