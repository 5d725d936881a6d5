"""Every example plans, the cluster's profile asks for what it should, recipes compose."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
import yte
from transformers import LlamaConfig, LlamaForCausalLM

from .conftest import ROOT, SMALL, Workflow, changed

pytestmark = pytest.mark.workflow
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_examples_plan(empty, example):
    planned = empty.planned("--configfile", f"examples/{example.name}")
    if "translators" in yaml.safe_load(example.read_text()):
        assert planned["gate_heads"] > 10 and planned["gates_figures"] == 1
        assert "train_checkpoint" not in planned, "an example replaces the default"
        return
    if "branches" in example.name:
        stacks = {"branches-full": (54, 54 * 7), "branches-day": (24, 24 * 6)}[example.stem]
        assert (planned["train_stack"], planned["evaluate_stack"]) == stacks
        return
    assert planned["import_checkpoint"] == 1
    if "lima" in example.name:
        assert (planned["gradient_dots"], planned["paraphrase_pairs"]) == (16, 1)
        assert not {"reduce_heads", "ffn_sweep", "evaluate"} & set(planned)
        return
    assert planned["reduce_heads"] > 5
    assert "train_checkpoint" not in planned, "an example replaces the default"


@pytest.mark.parametrize("profile", ["slurm", "profiles/slurm"])
def test_the_cluster_profile_asks_for_what_jobs_need(empty, profile, monkeypatch):
    monkeypatch.setenv("SBATCH_PARTITION", "big")
    monkeypatch.setenv("SBATCH_ACCOUNT", "lab")
    result = empty.run(
        "--profile", profile, "-n", "--configfile", "examples/llama-3-8b.yaml"
    ).stdout
    blocks = dict(re.findall(r"^rule (\w+):\n((?:    .*\n)+)", result, flags=re.M))
    evaluate = blocks["evaluate"]
    assert "gpu=1" in evaluate and "runtime=240" in evaluate
    assert "slurm_partition=big" in evaluate and "slurm_account=lab" in evaluate
    assert "gpu=" not in blocks["text_documents"]


def test_the_profile_is_right_without_a_cluster_of_ones_own(empty, monkeypatch):
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    monkeypatch.delenv("SBATCH_ACCOUNT", raising=False)
    result = empty.run("--profile", "slurm", "-n").stdout
    assert "slurm_partition" not in result and "disk_mb=2000" in result


@pytest.mark.parametrize(
    ("arguments", "profile", "limited"),
    [
        (["--cores", "all"], None, True),
        (["--profile=slurm"], None, False),
        (["-e", "slurm"], None, False),
        (["--cores", "all"], "slurm", False),
    ],
)
def test_gpu_jobs_take_turns_on_one_machine_but_not_on_a_cluster(
    monkeypatch, arguments, profile, limited
):
    monkeypatch.setattr(sys, "argv", ["snakemake", *arguments])
    monkeypatch.delenv("SNAKEMAKE_PROFILE", raising=False)
    if profile:
        monkeypatch.setenv("SNAKEMAKE_PROFILE", profile)
    found = yte.process_yaml((ROOT / "profiles/default/config.yaml").read_text())
    assert ("resources" in found) == limited
    assert not limited or found["resources"]["gpu"] == 1


def small_llama(folder):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def test_a_checkpoint_with_dots_in_its_name_and_a_second_corpus(empty):
    small_llama(empty.folder / "model")
    config = copy.deepcopy(SMALL)
    config["checkpoints"]["llama-3.2-1b"] = {"path": "model"}
    config["checkpoints"]["small.1"] = {"train": SMALL["checkpoints"]["tiny"]["train"]}
    config["corpora"]["other"] = {"packages": ["numpy"]}
    config["evaluation"]["corpora"] = ["other"]
    empty.configure(config)
    result = empty.run("-n").stdout
    blocks = re.findall(r"^rule evaluate:\n((?:    .*\n)+)", result, flags=re.M)
    inputs = {re.search("recipe=(.*), ", block)[1]: block.split("output:")[0] for block in blocks}
    docs = "results/corpora/docs/"
    assert docs not in inputs["llama-3.2-1b"]
    assert f"{docs}calibration.parquet" in inputs["llama-3.2-1b+merge-error-refit-b2x1"]
    assert f"{docs}train.parquet" in inputs["small.1"]
    assert "results/provenance/checkpoints/llama-3.2-1b.json" in result


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_three_lines_are_enough_for_every_family(empty, family):
    """The README's own-model configuration: what defaults ask for, every family can do."""
    from transformers import AutoConfig

    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, num_key_value_heads=2, num_hidden_layers=2, **sizes)
    config.save_pretrained(empty.folder / "model")
    empty.configure({"checkpoints": {"mine": {"path": "model"}}})
    assert {"ffn_sweep", "prune_channels", "head_similarity"} <= set(empty.planned())


def test_a_study_without_merges_shows_its_similarities(empty):
    config = copy.deepcopy(SMALL)
    config["heads"]["merges"] = []
    empty.configure(config)
    planned = empty.planned()
    assert {"head_similarity", "similarity_maps", "latency_figure"} <= set(planned)
    assert not {"head_figures", "reduce_heads", "compare_heads"} & set(planned)


def test_latency_takes_one_checkpoint_a_shape_and_asks_for_their_memory(empty):
    config = copy.deepcopy(SMALL)
    config["heads"]["merges"][1]["methods"] = ["aligned", "refit"]
    empty.configure(config)
    recipes = ("tiny", "tiny+merge-error-aligned-b2x1")
    for recipe in recipes:  # files of holes
        folder = empty.folder / "results/checkpoints" / recipe
        folder.mkdir(parents=True)
        with (folder / "model.safetensors").open("wb") as file:
            file.truncate(10**9)
    with (empty.folder / "model.safetensors").open("wb") as file:  # the working directory's own
        file.truncate(10**9)
    target = "results/latency/tiny.json"
    result = empty.run("-n", "--cores", "8", target).stdout
    (block,) = re.findall(r"^rule decode_latency:\n((?:    .*\n)+)", result, flags=re.M)
    inputs = re.search("input: (.*)", block)[1]
    assert inputs.split(", ") == [f"results/checkpoints/{recipe}" for recipe in recipes]
    assert "threads: 8" in block and "mem_mb=6500" in block


@pytest.mark.parametrize("target", ["heads", "all", "evaluations"])
def test_targets_plan(empty, target):
    empty.configure(changed("evaluation.recipes", ["tiny+merge-relu-average-t0.99"]))
    empty.run("-n", target)


def test_merging_a_merged_checkpoint(copied):
    recipe = "tiny+merge-error-refit-b2x1+merge-relu-aligned-q0.50+remove-flap-refit-b1x1"
    target = f"results/evaluations/{recipe}/docs.json"
    copied.run("--cores", "2", target)
    result = json.loads((copied.folder / target).read_text())
    config = json.loads((copied.folder / f"results/checkpoints/{recipe}/config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (1, 1)
    assert result["recipe"] == recipe and result["perplexity"]["value"] > 1


def test_controls_in_memory_are_the_checkpoints_of_their_recipes(copied):
    """The control's row equals the evaluation of the same control made as a checkpoint."""
    import numpy as np
    import pandas as pd

    step = "merge-error-refit-b2x1"
    root = copied.folder / f"results/heads/tiny/merges/{step}/docs"
    controls = pd.read_parquet(root / "controls.parquet").set_index(["control", "document"])
    made = {"random1": f"{step}-random1", "flap_refit": "remove-flap-refit-b2x1"}
    targets = [f"results/evaluations/tiny+{recipe}/docs.json" for recipe in made.values()]
    copied.run("--cores", "2", *targets)
    for name, recipe in made.items():
        table = pd.read_parquet(copied.folder / f"results/evaluations/tiny+{recipe}/docs.parquet")
        expected = table.set_index("document").nll
        np.testing.assert_allclose(controls.loc[name].nll, expected, rtol=1e-5)
        summary = json.loads(
            (copied.folder / f"results/evaluations/tiny+{recipe}/docs.json").read_text()
        )
        effective = controls.loc[name].effective_parameters.iloc[0]
        assert summary["cost"]["effective_parameters"] == effective


COMPOSED = {
    # heads 4 -> 2, channels 32 -> 24; order matters for the numbers, not for the sizes
    "tiny+merge-error-refit-b2x1+prune-flap-ot_ridge-r0.25": (2, 24),
    "tiny+prune-leverage-bias-r0.25+remove-flap-refit-b2x1": (2, 24),
    "tiny+prune-flap-ot_mass-r0.50+prune-wanda_sp-ridge_sequential-g0.25-s1": (4, None),
}


def test_studies_compose_both_ways_round_and_load_in_stock_transformers(copied):
    """Each recipe is made, judged, and loaded by a process that knows nothing of headroom."""
    targets = [f"results/evaluations/{recipe}/docs.json" for recipe in COMPOSED]
    copied.run("--cores", "2", *targets)
    program = (
        "import json, sys, torch; from transformers import AutoModelForCausalLM as A\n"
        "for path in sys.argv[1:]:\n"
        "    m, info = A.from_pretrained(path, output_loading_info=True)\n"
        "    assert not any(info[k] for k in ('missing_keys', 'unexpected_keys')), info\n"
        "    assert m(torch.arange(9)[None]).logits.isfinite().all()\n"
        "    n = [l.mlp.down_proj.in_features for l in m.model.layers]\n"
        "    assert set(n) == {m.config.intermediate_size}\n"
        "    size = sum(p.numel() for p in m.parameters())\n"
        "    print(json.dumps([m.config.num_attention_heads, n[0], size]))"
    )
    folders = [str(copied.folder / f"results/checkpoints/{recipe}") for recipe in COMPOSED]
    run = subprocess.run(
        [sys.executable, "-c", program, *folders], capture_output=True, text=True, check=True
    )
    for line, (recipe, (heads, channels)) in zip(
        run.stdout.splitlines(), COMPOSED.items(), strict=True
    ):
        found = json.loads(line)
        result = json.loads((copied.folder / f"results/evaluations/{recipe}/docs.json").read_text())
        assert found[0] == heads and channels in (found[1], None)
        assert found[2] == result["cost"]["parameters"] >= result["cost"]["effective_parameters"]


def test_a_sweeps_row_is_the_checkpoint_of_its_recipe(copied):
    """Prunings in memory equal the checkpoints, by seed."""
    import numpy as np
    import pandas as pd

    for seed, step in ((0, "prune-flap-ot_mass-r0.50"), (1, "prune-flap-ridge-r0.50")):
        recipe = f"tiny+{step}" + (f"-s{seed}" if seed else "")
        copied.run("--cores", "2", f"results/evaluations/{recipe}/docs.json")
        table = pd.read_parquet(copied.folder / f"results/evaluations/{recipe}/docs.parquet")
        rows = pd.read_parquet(
            copied.folder / f"results/ffn/tiny/sweep/docs/s{seed}/documents.parquet"
        )
        rows = rows[rows.step == step].set_index("document")
        np.testing.assert_allclose(rows.nll, table.set_index("document").nll, rtol=1e-5)
        text = (copied.folder / f"results/evaluations/{recipe}/docs.json").read_text()
        cost = json.loads(text)["cost"]
        for name in ("parameters", "ffn_parameters", "effective_parameters"):
            assert set(rows[name]) == {cost[name]}


def readme_blocks(heading):
    """The Python blocks below a heading, each with the file that its first line names."""
    text = (ROOT / "README.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        name, _, code = block.partition("\n")
        assert name.startswith("# src/")
        yield name.removeprefix("# "), code


def add_as_written(workflow, heading):
    """Do what the README says: functions go in before the registry, entries into it."""
    for name, code in readme_blocks(heading):
        path = workflow.folder / name
        functions, registry, entries = re.fullmatch(
            r"(.*?)((?:^[A-Z_]+: [^\n]* = \{\n))    \.\.\.\n(.*?)\}\n", code, flags=re.S | re.M
        ).groups()
        text = path.read_text()
        assert text.count(f"\n{registry}") == 1
        path.write_text(text.replace(f"\n{registry}", f"\n{functions}{registry}{entries}"))


def test_the_readmes_own_penalty_and_choice_of_heads_work_as_written(copied):
    add_as_written(copied, "Add your own penalty on gates, or another way to choose heads")
    config = copy.deepcopy(SMALL)
    config["gates"] |= {"penalty": "squared", "controls": ["output_norm"]}
    copied.configure(config)
    copied.run("--cores", "2", "results/gates/phrases/figures/runs.csv")
    runs = (copied.folder / "results/gates/phrases/figures/runs.csv").read_text()
    assert "mask-output_norm-k2,output_norm" in runs


def test_the_readmes_own_mask_works_as_written(copied):
    add_as_written(copied, "Add your own mask between branches")
    config = copy.deepcopy(SMALL)
    config["branches"]["ablations"]["branch"]["controls"] = [{"mask": "neighbours", "ratios": [1]}]
    copied.configure(config)
    copied.run("--cores", "2", "results/branches/branch/results.csv")
    rows = (copied.folder / "results/branches/branch/results.csv").read_text().splitlines()
    assert sum(",neighbours,trained" in row for row in rows) == 2


def test_every_file_of_the_branches_study_is_there(finished):
    root = finished.folder / "results/branches"
    for name in (
        "texts/train/counts.json",
        "branch/hypotheses.html",
        "branch/figures/loss-32-d16-h2.png",
        "branch/figures/ratio-32-d16-h2.svg",
        "heads/figures/architectures.png",
        "stacks/32-d16-h2-b1-3/r00_r10/32-d16-h2-r00-b1-3/model.safetensors",
        "stacks/32-d16-h2-isolated-b1-3/r10/32-d16-h2-r10-isolated-b1-3/run.json",
    ):
        assert (root / name).is_file(), name
    head, *rows = (root / "branch/results.csv").read_text().splitlines()
    assert head.startswith("rope_ratio,train_branch,eval_branch,loss,ppl,")
    assert len(rows) == (2 + 1) * 2, "two ratios and a control at two numbers of branches"
    head, *rows = (root / "heads/results.csv").read_text().splitlines()
    assert head.startswith("num_heads,hidden_size,rope_ratio,") and len(rows) == 2


def test_the_readmes_own_score_distribution_and_strategy_work_as_written(copied):
    add_as_written(copied, "Add your own score, distribution or strategy")
    recipe = "tiny+prune-tail-ot_mass-r0.25-spread_to_pushforward"
    copied.run("--cores", "2", f"results/evaluations/{recipe}/docs.json")
    other = "tiny+prune-tail-ot_mass-r0.25-spread_out"
    copied.run("--cores", "2", f"results/evaluations/{other}/docs.json")
    plans = [
        (copied.folder / f"results/ffn/tiny/prunes/{r.removeprefix('tiny+')}/plan.safetensors")
        for r in (recipe, other)
    ]
    assert plans[0].read_bytes() != plans[1].read_bytes()


def test_every_promised_file_is_there(finished: Workflow):
    root = finished.folder / "results/heads/tiny"
    for metric in SMALL["heads"]["metrics"]:
        lists = root / f"similarity/{metric}/docs"
        for name in ("threshold_0.99", "quantile_0.50"):
            found = json.loads((lists / f"similar_heads_{name}.json").read_text())
            keys = {"model_path", "threshold", "num_layers", "layer_analysis"}
            assert keys | {"total_similar_pairs"} <= set(found)
            layer = found["layer_analysis"]["0"]
            assert {"num_heads", "similar_pairs", "similarity_matrix"} <= set(layer)
    for merge in ("merge-relu-average-t0.99", "merge-error-refit-b2x1"):
        result = json.loads((root / f"merges/{merge}/docs/evaluation_results.json").read_text())
        assert {"original_metrics", "merged_metrics", "metrics_change", "merge_info"} <= set(result)
        assert {"perplexity_change", "accuracy_change_percent"} <= set(result["metrics_change"])
    figures = root / "figures/docs"
    for name in ("metrics_comparison", "merged_pairs_per_layer", "metrics_change"):
        for suffix in (".png", ".svg"):
            assert (figures / name).with_suffix(suffix).stat().st_size > 5000
    root = finished.folder / "results/ffn/tiny"
    for name in ("perplexity", "rescue"):
        for suffix in (".png", ".svg"):
            assert (root / f"figures/docs/{name}").with_suffix(suffix).stat().st_size > 5000
    verdicts = (root / "figures/docs/verdicts.csv").read_text().splitlines()
    assert len(verdicts) == 1 + 2, "ridge and ot_mass have drop to beat"
    assert "Transport beat its baseline in" in (root / "figures/docs/table.html").read_text()
    prune = root / "prunes/prune-flap-ot_mass-r0.50"
    layers = json.loads((prune / "rescue.json").read_text())["layers"]
    assert [layer["pruned"] for layer in layers] == [16, 16]
    assert "RESCUE EFFECT SUMMARY REPORT" in (prune / "rescue.txt").read_text()
    results = [p for p in Path(finished.folder).rglob("*.json") if "provenance" not in p.parts]
    assert not [p for p in results if "seconds" in p.read_text() and "merges" in p.parts]
