"""Jobs: written checkpoints, sweeps in memory, plans on disk, families of steps."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from headroom.attention import replaced
from headroom.checkpoints import Tensors, geometry, load_model, read_config, write_manifest
from headroom.corpora.tokens import Stream, load_stream, save_stream, windows
from headroom.errors import InputError
from headroom.evaluation.cost import effective_parameters, sizes
from headroom.evaluation.perplexity import score_documents
from headroom.ffn import families, tables
from headroom.ffn import sweep as job
from headroom.ffn.gradients import measure_gradients
from headroom.ffn.observe import calibration_windows, heldout_windows, measure_activations
from headroom.ffn.prune import prune_checkpoint
from headroom.ffn.store import load_plan, save_plan
from headroom.ffn.sweep import pruned_in_groups
from headroom.recipes import FUSIONS, GRADIENT_SCORES, parse_recipe, parse_step

from .small_ffns import VOCABULARY, build, logits, pruned, source_of, tokens, weight

WINDOW = 12
SETTINGS = {
    "compute": {"threads": 1, "device": "cpu", "dtype": "float32"},
    "ffn": {
        "calibration": {
            "window": WINDOW,
            "sequences": 6,
            "gradient_sequences": 2,
            "heldout": 4,
        },
        "ridge": 1e-3,
        "multiple": 1,
        "transport": {"mass": 0.8},
    },
    "evaluation": {"window": WINDOW, "sequences": 7, "choice": "first"},
    "corpus": "toy",
}


def write_stream(path, seed, length=150):
    generator = np.random.default_rng(seed)
    found = generator.integers(0, VOCABULARY, length).astype(np.int32)
    owners = (np.arange(length) // 31).astype(np.int32)
    save_stream(Stream(found, owners, "bos", 0), path)
    return str(path)


class Study:
    """A parent on disk, its streams and statistics."""

    def __init__(self, folder, model, **saving):
        folder.mkdir()
        self.folder, self.model, self.parent = folder, model, folder / "parent"
        model.save_pretrained(self.parent, **saving)
        write_manifest(self.parent)
        self.inputs = {
            name: write_stream(folder / f"{name}.safetensors", number)
            for number, name in enumerate(("calibration", "heldout", "evaluation"))
        }
        self.inputs["documents"] = ""  # nothing else was seen
        self.statistics(0)

    def sweep(self, steps, seed, state, halvings=0):
        common = {"batch": 3, "halvings": halvings, "held": 1e9, "state": state}
        return job.sweep(str(self.parent), steps, seed, self.inputs, SETTINGS, **common)

    def statistics(self, seed):
        """Measure the channels on the calibration windows of a seed."""
        tokens, self.inputs["activations"] = self.inputs["calibration"], str(self.folder / "a.st")
        measure_activations(str(self.parent), tokens, seed, SETTINGS, 0, self.inputs["activations"])
        self.inputs["gradients"] = str(self.folder / "g.st")
        measure_gradients(str(self.parent), tokens, seed, SETTINGS, self.inputs["gradients"])

    def prune(self, step, name=None, settings=SETTINGS):
        """Write the checkpoint of a step."""
        child = self.folder / (name or step)
        child.mkdir()
        record = {n: str(child) + end for n, end in
                  (("rescue", ".json"), ("report", ".txt"), ("plan", ".plan"))}  # fmt: skip
        prune_checkpoint(str(self.parent), step, self.inputs, settings, 0, child, record)
        return child, {n: Path(path) for n, path in record.items()}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    torch.set_num_threads(1)
    return Study(tmp_path_factory.mktemp("ffn") / "llama", build(dtype=torch.float32))


def formula(model, width, biases=False):
    """Parameters of the parent with FFNs of another width."""
    config = model.config
    old = 3 * config.hidden_size * config.intermediate_size
    new = 3 * config.hidden_size * width + (2 * width + config.hidden_size if biases else 0)
    return sum(p.numel() for p in model.parameters()) + config.num_hidden_layers * (new - old)


# spec 2 and 8


@pytest.mark.parametrize("fusion", FUSIONS)
def test_ratio_zero_writes_the_parent(study, fusion):
    child, record = study.prune(f"prune-flap-{fusion}-r0.00")
    old, new = (load_file(folder / "model.safetensors") for folder in (study.parent, child))
    assert old.keys() == new.keys() and all(torch.equal(old[n], new[n]) for n in old)
    assert read_config(child) == read_config(study.parent)
    assert "nothing pruned" in record["report"].read_text()
    with pytest.raises(InputError, match=r"holds no transport plan"):
        load_plan(record["plan"])


PARENTS = {
    "plain": ({"family": "llama"}, {}, "prune-flap-ot_mass-r0.30"),
    "bias": ({"family": "llama"}, {}, "prune-flap-bias-r0.30"),
    "padded": ({"family": "llama", "layers": 3}, {}, "prune-flap-ridge-g0.30"),
    "sharded": ({"family": "mistral", "sliding_window": 6}, {"max_shard_size": "12KB"},
                "prune-fo_snip-ot_ridge-r0.50-balanced-activation-s3"),
    "sharded_bias": ({"family": "llama"}, {"max_shard_size": "12KB"}, "prune-flap-bias-r0.50"),
    "tied": ({"family": "qwen2", "tie_word_embeddings": True}, {},
             "prune-leverage-ridge_sequential-r0.25"),
    "bf16": ({"family": "qwen3", "dtype": torch.bfloat16}, {}, "prune-wanda_sp-ot_mass-r0.30"),
    "biased": ({"family": "llama", "mlp_bias": True}, {}, "prune-flap-ot_ridge-r0.30-uniform"),
}  # fmt: skip

FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM
found = {}
for name, folder in json.load(open("folders.json")).items():
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype="auto", trust_remote_code=False)
    assert not any(info.values()), (name, info)
    with torch.no_grad():
        y = model.eval()(torch.load("tokens.pt")).logits
    found[name] = (y, model.config.intermediate_size, sum(p.numel() for p in model.parameters()))
assert not any("headroom" in name for name in sys.modules)
torch.save(found, "found.pt")
"""


def test_stock_transformers_reads_them_in_a_fresh_process(tmp_path):
    """Spec 8: equal logits, the right width, as many parameters as the formula says."""
    folders, wanted = {}, {}
    for name, (sizes_, saving, step) in PARENTS.items():
        model = build(**{"dtype": torch.float32} | sizes_)
        one = Study(tmp_path / name, model, **saving)
        if "-s3" in step:
            one.statistics(3)
        child, record = one.prune(step)
        assert ("sharded" in name) == (len(list(child.glob("*.safetensors"))) > 1)
        folders[name] = str(child)
        stored = Tensors(child)
        mlp = {n: stored[n] for n in stored.names() if ".mlp." in n}
        parent = load_model(one.parent, dtype="auto")
        with replaced(parent, mlp):
            y = logits(parent)
        assert not torch.equal(y, logits(parent))
        layers = json.loads(record["rescue"].read_text())["layers"]
        width = max(entry["kept"] for entry in layers)
        count = formula(model, width, biases="bias-" in step or "mlp_bias" in sizes_)
        if "mlp_bias" in sizes_:
            count -= 2 * (2 * 24 + 16)  # the parent's own
        wanted[name] = (y, width, count)
        shapes = stored.shapes().values()
        assert {dtype for _, dtype in shapes} == {"BF16" if name == "bf16" else "F32"}
        if name != "padded":
            kept = 24 - int(24 * float(parse_step(step).ratio[1:]))
            assert width == kept and {entry["kept"] for entry in layers} == {kept}
        else:
            assert len({entry["kept"] for entry in layers}) > 1
        found = sizes(child, WINDOW)
        assert found["parameters"] == count
        live = sum(entry["kept"] for entry in layers)
        each = 3 * 16 + (2 if "model.layers.0.mlp.up_proj.bias" in stored else 0)
        dead = (len(layers) * width - live) * each
        assert found["effective_parameters"] == count - dead
    (tmp_path / "folders.json").write_text(json.dumps(folders))
    torch.save(tokens(seed=3), tmp_path / "tokens.pt")
    command = [sys.executable, "-c", "import torch; torch.set_num_threads(1)\n" + FRESH]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "found.pt")
    for name, (y, width, count) in wanted.items():
        assert torch.equal(found[name][0], y), name
        assert found[name][1:] == (width, count), name


def test_what_a_pruning_writes_beside_the_checkpoint(study):
    """The rescue figures, the report that prints them, keep sets, scores and the plan."""
    step = "prune-flap-ot_mass-r0.30"
    child, record = study.prune(step)
    found = json.loads(record["rescue"].read_text())
    assert found["step"]["verb"] == "prune" and found["step"]["fusion"] == "ot_mass"
    assert found["original_model"] == "parent"
    assert found["calibration"] == {"sequences": 6, "window": WINDOW, "seed": 0, "heldout": 4}
    assert [entry["pruned"] for entry in found["layers"]] == [7, 7]
    text = record["report"].read_text()
    assert "RESCUE EFFECT SUMMARY REPORT" in text and "Total pruned channels: 14" in text
    plan, kept, scores, layer = load_plan(record["plan"])
    assert (layer, plan.shape, kept.shape, scores.shape) == (1, (24, 17), (17,), (24,))
    np.testing.assert_allclose(plan.sum(1), 1 / 24, atol=1e-12)
    assert kept.tolist() == sorted(np.argsort(-scores)[:17].tolist())
    old, new = Tensors(study.parent), Tensors(child)
    rest = [n for n in old.names() if ".mlp." not in n]
    assert rest and all(torch.equal(old[n], new[n]) for n in rest)
    plain, _ = study.prune("prune-flap-drop-r0.30")
    gates = [Tensors(folder)[weight(1, "gate")] for folder in (study.parent, plain)]
    assert torch.equal(gates[0][torch.from_numpy(kept)], gates[1])
    again, _ = study.prune(step, "again")
    assert (again / "manifest.json").read_text() == (child / "manifest.json").read_text()


def test_plans_of_some_layers_alone(tmp_path):
    """The plan nearest to the middle layer is kept, where that one loses nothing."""
    one = pruned(source_of(build(layers=3)), "prune-flap-ot_mass-r0.30")[0]
    kept = [k.numpy() for k in one.selection.kept]
    scores = [s.numpy() for s in one.selection.scores]
    save_plan(tmp_path / "all", kept, scores, one.plans)
    save_plan(tmp_path / "last", kept, scores, {2: one.plans[2]})
    assert [load_plan(tmp_path / name)[3] for name in ("all", "last")] == [1, 2]
    back = load_plan(tmp_path / "last")[0]
    assert (back != one.plans[2]).nnz == 0


# the sweep


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sweep_scores_what_would_be_written(tmp_path, dtype):
    """Same nll, tokens and sizes as the checkpoints on disk, with the calibration's seed."""
    model = build("llama", layers=3, dtype=dtype)
    one = Study(tmp_path / "sweep", model)
    one.statistics(2)
    steps = ["prune-flap-drop-r0.30", "prune-flap-ridge-r0.50", "prune-flap-ot_mass-r0.30-uniform",
             "prune-flap-bias-g0.30", "prune-random-ot_ridge_sequential-r0.30",
             "prune-flap-ridge-r0.00"]  # fmt: skip
    state = tmp_path / "state"
    state.mkdir()
    documents, layers, setting = one.sweep(steps, 2, state)
    assert list(dict.fromkeys(documents.step)) == ["dense", *steps]
    found = windows(load_stream(one.inputs["evaluation"]), WINDOW)
    text = [part[:7] for part in found]
    for step in ["dense", *steps]:
        seeded = families.seeded(step, 2) if step != "dense" else ""
        child = one.prune(seeded)[0] if seeded else one.parent
        wanted = score_documents(load_model(child, dtype="float32"), *text, 3)
        found = documents[documents.step == step].reset_index(drop=True)
        pd.testing.assert_frame_equal(found[wanted.columns.tolist()], wanted, check_exact=True)
        known = sizes(child, WINDOW)
        for name in ("parameters", "ffn_parameters", "effective_parameters"):
            assert set(found[name]) == {known[name]}, (step, name)
        if seeded:
            entries = json.loads(Path(f"{child}.json").read_text())["layers"]
            same = layers[layers.step == step].drop(columns="step").to_dict("records")
            for entry, row in zip(entries, same, strict=True):
                assert {n: None if pd.isna(v) else v for n, v in row.items()} == entry
    dense = documents[documents.step == "dense"]
    worse = documents[documents.step == steps[0]]
    assert worse.nll.sum() != dense.nll.sum() and worse.tokens.sum() == dense.tokens.sum() == 77
    assert setting == {
        "corpus": "toy",
        "split": "evaluation",
        "window": WINDOW,
        "windows": 7,
        "choice": "first",
        "boundary": "bos",
        "dtype": "float32",
        "documents": len(dense),
        "tokens": 77,
        "heldout": [4, WINDOW],
    }
    assert set(tables.SETTING) <= set(setting)
    (tmp_path / "empty").mkdir()
    halved = one.sweep(steps[:3], 2, tmp_path / "empty", halvings=2)[0]
    both = [t[t.step.isin(steps[:3])].nll.to_numpy() for t in (documents, halved)]
    np.testing.assert_allclose(*both, rtol=1e-5)


def test_a_killed_sweep_goes_on_behind_its_finished_steps(tmp_path, monkeypatch):
    one = Study(tmp_path / "sweep", build("llama"))
    one.statistics(0)
    steps = [f"prune-flap-{fusion}-r0.30" for fusion in ("drop", "ridge", "ot_mass")]
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = one.sweep(steps, 0, tmp_path / "whole")
    real, calls = job.score_documents, []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 4:  # the dense model, two steps, then the end
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(job, "score_documents", dying)
    with pytest.raises(KeyboardInterrupt):
        one.sweep(steps, 0, tmp_path / "killed")
    found = one.sweep(steps, 0, tmp_path / "killed")
    assert len(calls) == 6, "the dense model and the one step that was not done"
    for before, after in zip(whole[:2], found[:2], strict=True):
        pd.testing.assert_frame_equal(before, after)


def test_a_sweep_refuses_what_was_seen_and_what_the_family_can_not_hold(tmp_path):
    one = Study(tmp_path / "sweep", build("qwen2"))
    one.statistics(0)
    with pytest.raises(InputError, match=r"^ffn\.prunes: fusion bias .*qwen2"):
        one.sweep(["prune-flap-bias-r0.30"], 0, tmp_path)
    for corpus in ("toy", "other"):
        (tmp_path / corpus).mkdir()
        texts = pd.DataFrame({"id": [f"{i}" for i in range(9)], "text": ["x"] * 9})
        texts.to_parquet(tmp_path / corpus / "evaluation.parquet")
    one.inputs["documents"] = str(tmp_path / "toy/evaluation.parquet")
    one.inputs["seen"] = [str(tmp_path / "other/evaluation.parquet")]
    with pytest.raises(InputError, match="toy are also in the evaluation split of corpus other"):
        one.sweep(["prune-flap-drop-r0.30"], 0, tmp_path)


def test_passes_hold_as_many_prunings_as_memory_does(monkeypatch):
    source = source_of(build(dtype=torch.float32))

    class Counted(dict):
        def counts(self):
            return {name: tensor.numel() for name, tensor in self.items()}

    source = source.__class__(**{**vars(source), "tensors": Counted(source.tensors)})
    steps = [parse_step(f"prune-flap-{fusion}-r0.30") for fusion in FUSIONS]
    calls = []
    real = job.prune_model
    monkeypatch.setattr(
        job, "prune_model", lambda s, part, p: calls.append(len(part)) or real(s, part, p)
    )
    numbers = 2 * 3 * 16 * 24
    for held, wanted in ((8e9, [8]), (4 * numbers * 3.5, [3, 3, 2]), (1, [1] * 8)):
        found = list(pruned_in_groups(source, steps, held))
        assert calls == wanted and [one.step for one in found] == steps
        calls.clear()


# text


def test_calibration_windows_are_drawn_by_seed(study):
    path = study.inputs["calibration"]
    stream = load_stream(path).tokens
    one, same, other = (calibration_windows(path, WINDOW, 9, seed) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other) and one.dtype == torch.int64
    text = {tuple(stream[i : i + WINDOW].tolist()) for i in range(len(stream) - WINDOW + 1)}
    assert all(tuple(row.tolist()) in text for row in one)
    whole = calibration_windows(path, 150, 3, 0)
    assert (whole.numpy() == stream).all()
    assert heldout_windows(path, WINDOW, 4).flatten().tolist() == stream[: 4 * WINDOW].tolist()
    assert len(heldout_windows(path, WINDOW, 99)) == 12


@pytest.mark.parametrize("job", [calibration_windows, heldout_windows])
def test_text_shorter_than_a_window_is_said(study, job):
    more = (0,) if job is calibration_windows else ()
    with pytest.raises(InputError, match=r"^config key ffn\.calibration\.window is 151: ") as error:
        job(study.inputs["calibration"], 151, 2, *more)
    assert "(allowed: 2 to 150)" in str(error.value) and "\n" not in str(error.value)


def test_checkpoints_without_gates_are_said(tmp_path, study):
    """A plain two-matrix FFN under a served family's name."""
    state = load_file(study.parent / "model.safetensors")
    del state[weight(1, "gate")]
    from safetensors.torch import save_file

    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((study.parent / "config.json").read_text())
    with pytest.raises(
        InputError, match=r"^layer 1 has no model\.layers\.1\.mlp\.gate_proj"
    ) as error:
        measure_activations(
            str(tmp_path), study.inputs["calibration"], 0, SETTINGS, 0, str(tmp_path / "out")
        )
    assert "\n" not in str(error.value)


def test_idle_channels_count_for_nothing():
    """effective_parameters against a count a channel at a time."""
    model = build(mlp_bias=True)
    state = model.state_dict()
    with torch.no_grad():
        state[weight(0, "down")][:, [2, 3]] = 0
        state[weight(1, "up")][[4, 5]] = 0
        state[weight(1, "up", "bias")][4] = 0
    whole = sum(t.numel() for t in state.values())
    assert effective_parameters(state, model.config.to_dict()) == whole - 3 * (3 * 16 + 2)


# families

FAMILY = {
    "scores": ["flap"],
    "fusions": ["drop"],
    "strategies": ["pushforward"],
    "costs": ["cosine"],
    "solvers": ["exact"],
    "allocations": ["uniform"],
}


def study_of(*prunes, ratios=(0.1, 0.3), saved=()):
    found = [FAMILY | family for family in prunes]
    return {"prunes": found, "ratios": list(ratios), "saved": list(saved)}


def test_families_are_products_without_repeats():
    """Strategies, costs and solvers belong to transports alone; defaults are not spelled out."""
    settings = study_of(
        {"scores": ["random", "flap"], "fusions": ["drop", "ot_mass"],
         "strategies": ["pushforward", "uniform"], "costs": ["cosine", "activation"]},
        {"fusions": ["ridge"], "allocations": ["uniform", "global", "angular"], "ratios": [0.5]},
        {"fusions": ["drop"], "ratios": [0.3]},
        {"fusions": ["ot_ridge"], "ratios": [0.2], "solvers": ["sinkhorn", "partial"]},
    )  # fmt: skip
    found = families.steps(settings)
    ends = ["", "-activation", "-uniform", "-uniform-activation"]
    first = []
    for score in ("random", "flap"):
        first += [f"prune-{score}-drop-{r}" for r in ("r0.10", "r0.30")]
        first += [f"prune-{score}-ot_mass-{r}{end}" for r in ("r0.10", "r0.30") for end in ends]
    rest = [f"prune-flap-ridge-{kind}0.50" for kind in "rga"]
    rest += [f"prune-flap-ot_ridge-r0.20-{solver}" for solver in ("sinkhorn", "partial")]
    wanted = first + rest
    assert found[: len(wanted)] == wanted
    needed = {f"prune-flap-ridge-{r}" for r in ("r0.10", "r0.20", "r0.30")}  # and every baseline
    needed |= {f"prune-{s}-drop-{k}0.50" for s in ("random", "flap") for k in "rga"}
    needed |= {f"prune-{s}-drop-r0.20" for s in ("random", "flap")}
    assert sorted(found[len(wanted) :]) == sorted(needed)
    families.check(settings | {"saved": ["prune-flap-ridge-r0.30-s2"]})


@pytest.mark.parametrize(("family", "said"), [
    ({"scores": ["nothing"]}, r"ffn\.prunes\.1: .*score 'nothing'"),
    ({"fusions": ["glue"]}, r"ffn\.prunes\.1: .*fusion 'glue'"),
    ({"fusions": ["ot_mass"], "strategies": ["fast"]}, r"ffn\.prunes\.1: .*'fast'"),
    ({"ratios": [1.0]}, r"ffn\.prunes\.1: .*ratio 1.00 leaves no channel"),
])  # fmt: skip
def test_families_that_can_not_be_are_named(family, said):
    with pytest.raises(InputError, match=f"^config key {said}") as error:
        families.check(study_of({}, family))
    assert "\n" not in str(error.value)


def test_only_prunings_are_saved():
    with pytest.raises(InputError, match=r"^config key ffn\.saved: remove-flap-drop-b4x2 is no"):
        families.check(study_of({}, saved=["remove-flap-drop-b4x2"]))


def test_seeds_stand_in_the_name():
    for step in ("prune-flap-drop-r0.30", "prune-flap-ot_mass-r0.30-uniform-activation"):
        assert families.seeded(step, 0) == step and families.seeded(step, 12) == f"{step}-s12"
        assert families.seeded(f"{step}-s12", 0) == step
        assert parse_step(families.seeded(step, 3)).resolved("seed") == "s3"


def test_who_reads_gradients():
    reads = [families.reads_gradients(parse_step(step)) for step in (
        "prune-fo_snip-drop-r0.30", "prune-flap-ot_mass-r0.30", "prune-flap-ot_mass-r0.30-balanced",
        "prune-flap-ot_ridge-r0.30-uniform_to_robust", "prune-leverage-ridge-g0.30",
    )]  # fmt: skip
    assert reads == [True, False, True, True, False]
    for score in GRADIENT_SCORES:
        assert families.reads_gradients(parse_step(f"prune-{score}-drop-r0.30"))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_biases_are_for_llama(family):
    chain = parse_recipe("tiny+prune-flap-ridge-r0.30+prune-flap-bias-r0.10").steps
    shape = geometry(build(family).config.to_dict())
    families.check_family("recipe tiny+x", chain[:1], shape.family)
    if family == "llama":
        families.check_family("recipe tiny+x", chain, shape.family)
        return
    with pytest.raises(InputError, match=rf"^recipe tiny\+x: fusion bias .*{family}.*llama\)$"):
        families.check_family("recipe tiny+x", chain, shape.family)
