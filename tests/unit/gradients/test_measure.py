"""Partitions: the same bytes however the work is cut, stored or tiled; nothing is done twice."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from headroom.errors import InputError
from headroom.gradients import dots, measure
from headroom.gradients.setup import prepare
from headroom.gradients.similarity import Measurer

from .small_models import by_autograd, small

pytestmark = pytest.mark.usefixtures("one_thread")
OWN = {
    "template": {"prompt": "{prompt} :"},
    "length": 24,
    "too_long": "skip",
    "batch": 2,
    "block": 4,
    "memory_gb": 1.0,
    "disk_gb": 1.0,
    "ghost_speed": 0.5,
    "projection": {"dimension": 16, "seed": 0},
    "two_sided": {"inner": 4, "outer": 4, "seed": 0},
}
WORDS = [f"w{number}" for number in range(30)]


def settings(backend="auto", **changes):
    compute = {"device": "cpu", "dtype": "float32", "threads": 1}
    return {"compute": compute, "gradients": OWN | changes, "backend": backend}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, eleven originals and seven queries of uneven lengths."""
    folder = tmp_path_factory.mktemp("measure")
    vocabulary = {word: place for place, word in enumerate(["<pad>", "</s>", ":", "<u>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<u>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")
    small("llama_tied").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    for name, count in (("originals", 11), ("queries", 7)):
        rows = [
            {
                "id": f"s{number}",
                "prompt": " ".join(rng.choice(WORDS, rng.integers(2, 6))),
                "answer": " ".join(rng.choice(WORDS, rng.integers(2, 12))),
            }
            for number in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def run(folder, output, wanted, parts=1, numbers=None, store=None):
    """Measure partitions and merge them; the bytes of both results, and the passes made."""
    sets = {name: str(folder / f"{name}.jsonl") for name in ("originals", "queries")}
    output.mkdir(parents=True, exist_ok=True)
    passes, files = 0, {"dots": [], "states": []}
    made = Measurer.measure

    def counting(self, samples, *others):
        nonlocal passes
        passes += len(samples)
        return made(self, samples, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Measurer, "measure", counting)
        for number in numbers or range(parts):
            outputs = {kind: str(output / f"{number}-of-{parts}.{kind}") for kind in files}
            place = store or output / "store"
            checkpoint = str(folder / "model")
            measure.measure_part(checkpoint, sets, wanted, (number, parts), 0, place, outputs)
            for kind, path in outputs.items():
                files[kind].append(path)
    found = {}
    for kind, paths in files.items():
        dots.write(output / kind, dots.merge(paths))
        found[kind] = (output / kind).read_bytes()
    return found, passes


@pytest.mark.parametrize("backend", ["exact", "ghost", "auto", "projection", "two_sided"])
def test_partitions_tiles_and_the_store_give_the_same_bytes(folder, tmp_path, backend):
    wanted, passes = run(folder, tmp_path / "one", settings(backend))
    assert passes == 11 + 7
    for parts in (2, 14):
        found, passes = run(folder, tmp_path / str(parts), settings(backend), parts)
        assert found == wanted
        assert passes == 11 + 7, "stored features are made once for all partitions"
    tiled = settings(backend, disk_gb=0.0)
    found, passes = run(folder, tmp_path / "tiled", tiled)
    assert (found, passes) == (wanted, 11 + 7)
    found, passes = run(folder, tmp_path / "tiles", tiled, parts=3)
    assert found == wanted and passes == 11 + 3 * 7


def test_layers_go_in_groups_where_memory_is_short(folder, tmp_path):
    wanted, _ = run(folder, tmp_path / "one", settings("exact"))
    short = settings("exact", disk_gb=0.0, memory_gb=1.2e-5)  # the embedding of four originals
    found, passes = run(folder, tmp_path / "short", short)
    assert found == wanted and passes > 3 * (11 + 7)
    with pytest.raises(InputError, match=r"memory_gb is 1e-06.*projection"):
        run(folder, tmp_path / "less", settings("exact", memory_gb=1e-6))


def test_the_result_is_the_autograd_loop(folder, tmp_path):
    run(folder, tmp_path, settings("auto"))
    found = dots.read(tmp_path / "dots")
    model = small("llama_tied")
    setup = prepare(
        str(folder / "model"),
        {name: str(folder / f"{name}.jsonl") for name in ("originals", "queries")},
        settings(),
        (0, 1),
        0,
        tmp_path / "other",
    )
    sides = {"query": setup.queries.encoded, "original": setup.originals.encoded}
    loops = {
        name: [by_autograd(model, sample)[1] for sample in side.samples]
        for name, side in sides.items()
    }
    assert found.queries == tuple(sides["query"].ids)
    assert found.originals == tuple(sides["original"].ids)
    for place, layer in enumerate(found.layers):
        g, h = (torch.stack([one[layer] for one in loops[name]]).double() for name in loops)
        scale = (g.norm(dim=1)[:, None] * h.norm(dim=1)).numpy()
        assert (np.abs(found.dot_LQN[place] - (g @ h.T).numpy()) <= 1e-5 * scale).all()
        assert np.allclose(found.original_LN[place], h.square().sum(1).numpy(), rtol=1e-5)
        assert found.sizes[place] == g.shape[1]


def test_what_was_made_is_not_made_again(folder, tmp_path):
    store = tmp_path / "store"
    wanted, _ = run(folder, tmp_path / "one", settings("auto"), store=store)
    heads = sorted(store.rglob("*.head"))
    assert len(heads) == 6 + 4
    heads[0].unlink()  # what a kill leaves: a batch without its last file
    found, passes = run(folder, tmp_path / "two", settings("auto"), store=store)
    assert found == wanted and passes == 2
    found, passes = run(folder, tmp_path / "three", settings("auto"), store=store)
    assert found == wanted and passes == 0


def test_stored_features_of_another_run_are_refused(folder, tmp_path):
    store = tmp_path / "store"
    run(folder, tmp_path / "one", settings("exact"), store=store)
    _, passes = run(folder, tmp_path / "two", settings("ghost"), store=store)
    assert passes == 18, "another backend has features of its own"
    manifest = next(store.rglob("identity.json"))
    manifest.write_text(manifest.read_text().replace("torch.float32", "torch.bfloat16"))
    with pytest.raises(InputError, match=r"features of another run: dtype is torch\.bfloat16"):
        run(folder, tmp_path / "three", settings("exact"), store=store)
        run(folder, tmp_path / "four", settings("ghost"), store=store)


def test_halved_batches_change_nothing_but_rounding(folder, tmp_path, monkeypatch):
    run(folder, tmp_path / "one", settings("auto"))
    made = Measurer._measure

    def out_of_memory(self, samples, *others):
        if self.size > 1:
            made(self, samples, *others)  # some layers were handed over
            raise torch.cuda.OutOfMemoryError("no room")
        return made(self, samples, *others)

    monkeypatch.setattr(Measurer, "_measure", out_of_memory)
    for name, disk in (("stored", 1.0), ("tiled", 0.0)):
        run(folder, tmp_path / name, settings("auto", disk_gb=disk))
        first, second = (dots.read(tmp_path / part / "dots") for part in ("one", name))
        assert np.allclose(first.dot_LQN, second.dot_LQN, rtol=1e-4, atol=1e-7)
