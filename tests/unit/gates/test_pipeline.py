"""The jobs of the study from files to files: trained, gated, removed, translated, recorded."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import MarianMTModel

from headroom import experiment
from headroom.checkpoints import check_manifest, load_tokenizer
from headroom.corpora.pair_tokens import encode_pairs, save, train_joint_tokenizer
from headroom.corpora.pairs import read_pairs, write_pairs
from headroom.evaluation.translation import COUNTS, bleu, translate
from headroom.gates import pipeline, record, removal

SCHEMA = Path(__file__).parents[3] / "workflow" / "schemas" / "config.schema.yaml"
WORDS = {"three": "drei", "Red": "Rote", "cold": "kalte", "dogs": "Hunde", "birds": "Vögel"}
WORDS |= {"sing": "singen", "run": "laufen"}
RUNS = ("gate-l5.00", "gate-k3", "mask-scratch-k3")
OUTPUTS = ("checkpoint", "removed", "record", "events")
STEPS, REPORT, HEADS = 24, 12, 8  # 2 layers of 4 heads in the encoder


def corpus(folder):
    """Three words, translated one by one, in three aligned pairs of files."""
    sentences = [" ".join(some) + "." for some in itertools.permutations(WORDS, 3)]
    parts = {"validation": sentences[:24], "test": sentences[24:40], "train": sentences[40:]}
    paths = {}
    for split, part in parts.items():
        lines = [part, [" ".join(WORDS[w] for w in s[:-1].split()) + "." for s in part]]
        paths[split] = [str(folder / f"{split}.{side}") for side in ("en", "de")]
        for path, side in zip(paths[split], lines, strict=True):
            Path(path).write_text("".join(line + "\n" for line in side))
    return paths


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The settings, and the files that a translator's jobs read."""
    root = tmp_path_factory.mktemp("prepared")
    sizes = {"vocabulary": 48, "hidden": 32, "layers": 2, "heads": 4, "ffn": 48, "warmup": 20}
    train = sizes | {"steps": 60, "report": 30, "learning_rate": 0.01, "dropout": 0.02}
    gates = {"steps": STEPS, "report": REPORT, "learning_rate": 5e-3, "gate_learning_rate": 0.5}
    config = {
        "pairs": {"toy": {"path": corpus(root)}},
        "translators": {"toy": {"train": train | {"batch_tokens": 256}, "longest": 16}},
        "evaluation": {"translation": {"validation": 12, "batch_tokens": 256}},
        "gates": gates | {"batch_tokens": 256, "lambdas": [5], "target_heads": [3]},
    }
    settings = experiment.load(config, SCHEMA)
    settings["compute"]["device"] = "cpu"
    files = {split: root / f"{split}.parquet" for split in ("train", "validation", "test")}
    write_pairs(settings["pairs"]["toy"], files, "toy")
    pairs = read_pairs(files["train"])
    train_joint_tokenizer([*pairs[0], *pairs[1]], 48, root / "tokenizer")
    save(encode_pairs(*pairs, load_tokenizer(root / "tokenizer"), 16), root / "tokens.safetensors")
    inputs = {"tokens": root / "tokens.safetensors", "validation": files["validation"]}
    return settings, inputs, root


def study(prepared, root, steps=RUNS):
    """Train and gate; return the folders of each run, "" being the translator."""
    settings, inputs, source = prepared

    def empty(name, kinds):
        folders = {kind: root / (name or "base") / kind for kind in kinds}
        for folder in folders.values():
            folder.mkdir(parents=True)
        return folders

    made = {"": empty("", ("checkpoint", "record", "events"))}
    base = {**inputs, "tokenizer": source / "tokenizer"}
    pipeline.train_translator(settings, base, made[""], root / "state" / "base", 0)
    for step in steps:
        made[step] = empty(step, OUTPUTS)
        given = {**inputs, "checkpoint": made[""]["checkpoint"]}
        if step.startswith("mask-scratch"):
            given["kept"] = made["gate-k3"]["record"]
        pipeline.gate_translator(settings, step, given, made[step], root / "state" / step, 0)
    return made


@pytest.fixture(scope="module")
def made(prepared, tmp_path_factory):
    return study(prepared, tmp_path_factory.mktemp("once"))


def removal_of(folders):
    return json.loads((folders["record"] / "removal.json").read_text())


def learnt(model):
    """Parameters but the sinusoids of positions, which are computed, not learnt."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if "embed_positions" not in name)


def test_equal_work_gives_equal_bytes(prepared, made, tmp_path):
    again = study(prepared, tmp_path, RUNS[1:])
    for step, folders in again.items():
        for kind, folder in folders.items():
            if kind == "events":  # they hold the time
                continue
            names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
            assert names == sorted(
                p.relative_to(made[step][kind]) for p in made[step][kind].rglob("*") if p.is_file()
            )
            for name in names:
                assert (folder / name).read_bytes() == (made[step][kind] / name).read_bytes(), name


@pytest.mark.parametrize("step", RUNS)
def test_what_removal_tells_is_what_the_files_hold(made, step):
    """d 32, heads of 8: 3 (32·8 + 8) + 32·8 = 1,048 parameters a head."""
    found, folders = removal_of(made[step]), made[step]
    for kind in ("checkpoint", "removed", "record"):
        check_manifest(folders[kind], hashes=True)
    before = MarianMTModel.from_pretrained(made[""]["checkpoint"])
    smaller = removal.load(folders["removed"])
    assert found["heads"] == HEADS
    assert found["parameters_before"] == learnt(before)
    assert found["parameters"] == learnt(smaller)
    assert learnt(before) - learnt(smaller) == (HEADS - found["open_heads"]) * 1048
    kept = json.loads((folders["removed"] / "config.json").read_text())["kept_heads"]
    assert kept == found["kept"] and sum(map(len, kept.values())) == found["open_heads"]
    assert found["largest_logit_difference"] < 1e-4
    assert found["flops"] < found["flops_before"]
    last = pd.read_parquet(folders["record"] / "gates.parquet").query("step == @STEPS")
    assert last.gate.tolist() == pytest.approx([g for gs in found["gates"].values() for g in gs])


def test_each_run_ends_with_the_heads_it_was_asked_for(made):
    assert removal_of(made["gate-k3"])["open_heads"] == 3
    assert removal_of(made["gate-l5.00"])["open_heads"] <= 1
    assert removal_of(made["mask-scratch-k3"])["kept"] == removal_of(made["gate-k3"])["kept"]
    shared = "model.shared.weight"
    weights = {s: removal.load(made[s]["checkpoint"]).state_dict()[shared] for s in ("", *RUNS)}
    moved = {step: float((weights[step] - weights[""]).norm()) for step in RUNS}
    assert (
        moved["mask-scratch-k3"] > 2 * moved["gate-k3"] > 0
    )  # from elsewhere, from the translator


@pytest.mark.parametrize("step", ["", *RUNS])
def test_what_is_saved_translates_as_what_was_trained(prepared, made, step):
    """The last look was at the model in memory: whatever it learned is in the files."""
    folder = made[step]["removed" if step else "checkpoint"]
    seen = record.read(made[step]["record"])
    last = list(seen.translations.values())[-1]
    model, tokenizer = removal.load(folder), load_tokenizer(folder)
    assert translate(model, tokenizer, seen.sources, 1, 256, 16) == last


@pytest.mark.parametrize("step", RUNS)
def test_stock_transformers_translates_the_export_alike(prepared, made, step):
    sources, _ = read_pairs(prepared[2] / "test.parquet")
    folders = made[step]
    stock = MarianMTModel.from_pretrained(folders["checkpoint"]).eval()
    translations = [
        translate(model, load_tokenizer(folder), sources, beams, 256, 16)
        for model, folder in (
            (stock, folders["checkpoint"]),
            (removal.load(folders["removed"]), folders["removed"]),
        )
        for beams in (1, 4)
    ]
    assert translations[:2] == translations[2:]
    assert learnt(stock) == removal_of(folders)["parameters_before"]


@pytest.mark.parametrize("step", ["", "gate-k3"])
def test_saved_translations_score_the_same_at_the_command_line(prepared, made, step, tmp_path):
    settings, _, root = prepared
    model = made[step]["removed" if step else "checkpoint"]
    scores, rows = pipeline.translate_test(
        settings, model, root / "tokenizer", root / "test.parquet", tmp_path
    )
    check_manifest(tmp_path, hashes=True)
    assert scores["sentences"] == 16
    counts = pd.DataFrame(rows)
    for beams in (1, 4):
        command = [sys.executable, "-m", "sacrebleu", tmp_path / "reference.txt"]
        command += ["-i", tmp_path / f"beam{beams}.txt", "-m", "bleu", "chrf", "-w", "6"]
        told = subprocess.run([*command, "-f", "json"], check=True, capture_output=True, text=True)
        words, characters = json.loads(told.stdout)
        found = scores[f"beam{beams}"]
        assert found["bleu"] == pytest.approx(words["score"], abs=1e-6)
        assert found["chrf"] == pytest.approx(characters["score"], abs=1e-6)
        assert found["bleu"] > 2  # something to compare
        mine = counts[counts.beams == beams]
        assert mine.sentence.tolist() == list(range(16))
        assert bleu(mine[list(COUNTS)].to_numpy().sum(0)) == pytest.approx(words["score"], abs=1e-6)


@pytest.mark.parametrize("step", ["", *RUNS])
def test_a_record_holds_every_look(prepared, made, step):
    seen, (_, _, root) = record.read(made[step]["record"]), prepared
    looks = [0, 30, 60] if not step else [0, 12, 24]
    assert seen.reports.step.tolist() == looks
    assert [when.split(",")[0] for when in seen.translations] == [f"step {n}" for n in looks]
    assert {len(lines) for lines in seen.translations.values()} == {12}
    sources, references = read_pairs(root / "validation.parquet")
    assert (seen.sources, seen.references) == (sources[:12], references[:12])
    assert seen.log.step.tolist() == sorted({*range(10, looks[-1] + 1, 10), looks[-1]})
    if not step:
        assert seen.gates is None and seen.removal is None
        return
    notes = [0, 10, 12, 20, 24]
    assert len(seen.gates) == len(notes) * HEADS
    assert seen.gates.groupby("step").full.all().to_dict() == {n: n in looks for n in notes}
    first = seen.gates.query("step == 0")
    assert list(zip(first.layer, first["head"], strict=True)) == list(
        itertools.product((1, 2), (1, 2, 3, 4))
    )
    assert seen.reports.open_heads.iloc[-1] == seen.removal["open_heads"]
    assert f"{seen.removal['open_heads']} of 8 gated heads are open" in record.facts(seen)


@pytest.mark.parametrize("step", ["", *RUNS])
def test_tensorboard_reads_the_events(made, step):
    events = EventAccumulator(str(made[step]["events"]))
    events.Reload()
    names, seen = set(events.Tags()["scalars"]), record.read(made[step]["record"])
    assert {"train/loss", "train/learning_rate", "validation/bleu", "validation/chrf"} <= names
    told = {event.step: event.value for event in events.Scalars("train/loss")}
    assert told == pytest.approx(dict(zip(seen.log.step, seen.log.loss, strict=True)), rel=1e-6)
    opened = sorted(name for name in names if name.startswith("p_open/"))
    assert opened == (["p_open/attention_1", "p_open/attention_2"] if step else [])
    for place, name in enumerate(opened, 1):
        wanted = seen.gates[seen.gates.layer == place].groupby("step").p_open.mean()
        told = {event.step: event.value for event in events.Scalars(name)}
        assert told == pytest.approx(wanted.to_dict(), rel=1e-5)


@pytest.mark.parametrize(
    ("step", "trains"), [("gate-l0.10-s1", "none"), ("mask-random-k3", "encoder")]
)
def test_what_is_frozen_stays_as_it_was(prepared, made, tmp_path, step, trains):
    settings, inputs, _ = prepared
    base = made[""]["checkpoint"]
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    outputs = {kind: tmp_path / kind for kind in OUTPUTS}
    for folder in outputs.values():
        folder.mkdir()
    part = {**settings, "gates": {**settings["gates"], "steps": 3, "trains": trains}}
    given = {**inputs, "checkpoint": base}
    pipeline.gate_translator(part, step, given, outputs, tmp_path / "state", 0)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    old, new = (removal.load(folder).state_dict() for folder in (base, outputs["checkpoint"]))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    output = {f"model.encoder.layers.{n}.self_attn.out_proj.weight" for n in (0, 1)}
    assert changed >= output if trains == "encoder" else changed == output
    assert all(name.startswith("model.encoder.layers.") for name in changed)
    found = removal_of(outputs)
    assert found["parameters_before"] == learnt(removal.load(base))
    assert found["parameters"] == learnt(removal.load(outputs["removed"]))
