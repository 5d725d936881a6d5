"""A rerun does exactly what is stale: real DAGs, and the list of jobs looked at."""

import copy
import os
import shutil
from collections import Counter

import pytest

from .conftest import SMALL, changed

pytestmark = pytest.mark.workflow

MERGES, PRUNES, SEEDS = 2, 1, 2  # derived checkpoints of the small experiment, draws of text
GATES = 4  # runs of its translator, one of them a control


def test_a_second_run_does_nothing(finished):
    result = finished.run("--cores", "2")
    assert "Nothing to be done" in result.stdout + result.stderr


def test_comments_docstrings_touch_and_a_fresh_clone_rerun_nothing(copied):
    copied.edit("src/headroom/heads/similarity.py", '"""', '"""Other words. ')
    copied.edit("src/headroom/evaluation/perplexity.py", "\nimport", "\n# a comment\nimport")
    for path in (copied.folder / "workflow").rglob("*"):
        os.utime(path)
    text = (copied.folder / "config.yaml").read_text()
    (copied.folder / "config.yaml").write_text("# another comment\n" + text)
    assert copied.planned() == {}
    clone = copied.folder.with_name("clone")
    shutil.copytree(copied.folder, clone, symlinks=True)
    copied.folder = clone
    assert copied.planned() == {}


ALL_ABLATIONS = {"branch_results": 2, "branch_figures": 3, "branch_architectures": 1}
HEADS_ABLATION = {"branch_results": 1, "branch_figures": 2, "branch_architectures": 1}
BRANCH_ABLATION = {"branch_results": 1, "branch_figures": 1}
READ = {"gradient_retrieval": 1, "gradient_figures": 1}
# A setting, and the jobs that its change reruns.
CASES = {
    "partition_added": (
        ("gradients.partitions", 3),
        {"plan_gradients": 1, "gradient_dots": 3, "merge_dots": 1, **READ},
    ),
    "setting_added": (
        ("gradients.settings", ["model_generated", "paraphrased"]),
        {"gradient_dots": 2, "merge_dots": 1, **READ},
    ),
    "backend_added": (
        ("gradients.backends", ["two_sided", "auto"]),
        {"plan_gradients": 1, "gradient_dots": 2, "merge_dots": 1, **READ},
    ),
    "disk_changes_no_dot_product": (("gradients.disk_gb", 0), {"plan_gradients": 1}),
    "ratio_added": (
        ("branches.ablations.branch.ratios", [0, 0.5, 1]),
        {"train_stack": 1, "evaluate_stack": 2, **BRANCH_ABLATION},
    ),
    "ratio_removed": (("branches.ablations.branch.ratios", [1]), BRANCH_ABLATION),
    "branch_seed_added": (
        ("branches.seeds", [0, 1]),
        {"train_stack": 3, "evaluate_stack": 5, **ALL_ABLATIONS},
    ),
    "branch_count_added": (
        ("branches.ablations.branch.evaluation_branches", [1, 2, 4]),
        {"evaluate_stack": 2, **BRANCH_ABLATION},
    ),
    "a_stack_keeps_its_members": (("branches.stack", 1), {}),
    "rate_of_a_width": (
        ("branches.train.learning_rates", {64: 1.0e-3}),
        {"train_stack": 1, "evaluate_stack": 1, **HEADS_ABLATION},
    ),
    "branch_evaluation_texts": (
        ("branches.texts.evaluation", 24),
        {"branch_texts": 1, "evaluate_stack": 5, **ALL_ABLATIONS},
    ),
    "threshold_added": (
        ("heads.thresholds", [0.99, 0.5]),
        {"similar_heads": 2, "similarity_distribution": 1},
    ),
    "metric_added": (
        ("heads.metrics", ["relu", "relu_random", "scores"]),
        {
            "head_similarity": 1,
            "similar_heads": 1,
            "similarity_maps": 1,
            "similarity_distribution": 1,
        },
    ),
    "ridge": (
        ("heads.ridge", 0.01),
        {
            "reduce_heads": MERGES,
            "head_controls": 1,
            "evaluate": MERGES,
            "compare_heads": MERGES,
            "decode_latency": 1,
            "latency_figure": 1,
            "head_figures": 1,
        },
    ),
    "bootstrap": (
        ("evaluation.bootstrap.resamples", 300),
        {
            "evaluate": MERGES + PRUNES + 1,
            "compare_heads": MERGES,
            "head_figures": 1,
            "ffn_figures": 1,
            "gates_figures": 1,
            **ALL_ABLATIONS,
            **READ,
        },
    ),
    "latency": (
        ("evaluation.latency.runs", 4),
        {"decode_latency": 1, "latency_figure": 1},
    ),
    "batch_changes_no_number": (("evaluation.batch", 2), {}),
    "memory_changes_no_number": (("compute.mem_mb", 1600), {}),
    "recipe_added": (
        ("evaluation.recipes", ["tiny+merge-relu-average-t0.99+remove-flap-drop-b2x1"]),
        {"attention_inputs": 1, "reduce_heads": 1, "evaluate": 1},
    ),
    "ffn_ridge": (
        ("ffn.ridge", 0.01),
        {
            "ffn_activations": SEEDS,
            "ffn_sweep": SEEDS,
            "ffn_figures": 1,
            "prune_channels": PRUNES,
            "evaluate": PRUNES,
            "plan_figure": 1,
        },
    ),
    "pruning_ratio_added": (
        ("ffn.ratios", [0.5, 0.25]),
        {"ffn_sweep": SEEDS, "ffn_figures": 1},
    ),
    "calibration_seed_added": (
        ("ffn.calibration.seeds", [0, 1, 2]),
        {"ffn_activations": 1, "ffn_gradients": 1, "ffn_sweep": 1, "ffn_figures": 1},
    ),
    "price_added": (
        ("gates.lambdas", [0.1, 0.2]),
        {"gate_heads": 1, "translate": 1, "run_figures": 1, "gates_figures": 1},
    ),
    "gate_seed_added": (
        ("gates.seeds", [0, 1]),
        {"gate_heads": GATES, "translate": GATES, "run_figures": GATES - 1, "gates_figures": 1},
    ),
    "gate_learning_rate": (
        ("gates.gate_learning_rate", 0.1),
        {
            "gate_heads": GATES,
            "translate": GATES,
            "run_figures": GATES - 1,
            "translation_latency": 1,
            "gates_figures": 1,
        },
    ),
    "bleu_tokenizer": (
        ("pairs.cldr.tokenize", "intl"),
        {
            "train_translator": 1,
            "training_figures": 1,
            "head_roles": 1,
            "gate_heads": GATES,
            "translate": GATES + 1,
            "run_figures": GATES - 1,
            "translation_latency": 1,
            "gates_figures": 1,
        },
    ),
    "saved_pruning_added": (
        ("ffn.saved", ["prune-flap-ot_mass-r0.50", "prune-flap-ridge-r0.25-s1"]),
        {"prune_channels": 1, "evaluate": 1},
    ),
}


# Sections that only one study reads.
STUDIES = {"translators": "gates", "pairs": "gates", "instructions": "gradients"}


def waves(settings):
    """Cases to be planned in one run: at most one a study, since studies share no job."""
    found = []
    for name, path in settings.items():
        section = path.split(".")[0]
        study = STUDIES.get(section, section)
        alone = study in ("corpora", "checkpoints", "evaluation")
        wave = next((w for w in found if not alone and study not in w and None not in w), None)
        if wave is None:
            found.append(wave := {})
        wave[None if alone else study] = name
    return [tuple(wave.values()) for wave in found]


@pytest.mark.parametrize("cases", waves({name: c[0][0] for name, c in CASES.items()}), ids="-".join)
def test_changed_settings_rerun_exactly_their_jobs(copied, cases):
    config, jobs = SMALL, Counter()
    for case in cases:
        setting, own = CASES[case]
        config = changed(*setting, config=config)
        jobs.update(own)
    copied.configure(config)
    assert copied.planned() == jobs


EDITS = {
    # file, old, new, rules that must run, rules that must not
    "per_sample_gradients": (
        "src/headroom/gradients/capture.py",
        "return sums_n / inside_nT.sum(1)",
        "return 1.0 * sums_n / inside_nT.sum(1)",
        {"gradient_dots", "merge_dots", "projection_errors", "gradient_retrieval"},
        {"instruction_pairs", "paraphrase_pairs", "answer_prompts", "train_checkpoint"},
    ),
    "paraphrase_rules": (
        "src/headroom/corpora/paraphrase_words.py",
        "accelerate: speed up",
        "accelerate: hasten",
        {"paraphrase_pairs", "answer_prompts", "gradient_dots"},
        {"instruction_pairs", "train_checkpoint", "text_documents"},
    ),
    "rope": (
        "src/headroom/branches/rope.py",
        "torch.arange(0, head_size, 2",
        "1 * torch.arange(0, head_size, 2",
        {"train_stack", "evaluate_stack", "branch_results"},
        {"branch_texts", "train_branch_tokenizer", "train_checkpoint", "gate_heads"},
    ),
    "similarity": (
        "src/headroom/heads/similarity.py",
        "torch.relu_",
        "torch.relu6",
        {"head_similarity", "similar_heads", "reduce_heads", "evaluate"},
        {"train_checkpoint", "tokenize", "attention_inputs", "text_documents"},
    ),
    "figures": (
        "src/headroom/heads/figures.py",
        "Pairs of heads merged",
        "Head pairs merged",
        {"head_figures"},
        {"reduce_heads", "evaluate", "compare_heads", "head_similarity", "train_checkpoint"},
    ),
    "fusion": (
        "src/headroom/ffn/fusion.py",
        "layer.weight > 0",
        "layer.weight > 0.0",
        {"prune_channels", "ffn_sweep", "evaluate", "ffn_figures"},
        {"ffn_activations", "ffn_gradients", "reduce_heads", "train_checkpoint"},
    ),
    "channel_score": (
        "src/headroom/ffn/importance.py",
        "channels.norm_n *",
        "1.0 * channels.norm_n *",
        {"prune_channels", "ffn_sweep"},
        {"ffn_activations", "ffn_gradients", "reduce_heads", "head_similarity"},
    ),
    "hard_concrete": (
        "src/headroom/gates/hard_concrete.py",
        "(u_H.log()",
        "(1.0 * u_H.log()",
        {"gate_heads", "translate", "run_figures", "gates_figures"},
        {"sentence_pairs", "tokenize_pairs", "train_checkpoint", "reduce_heads"},
    ),
    "bleu": (
        "src/headroom/evaluation/translation.py",
        "CASE_GAIN, CASE_FLOOR = 1.02, 5.0",
        "CASE_GAIN, CASE_FLOOR = 1.02, 6.0",
        {"translate", "gates_figures"},
        {"sentence_pairs", "tokenize_pairs", "evaluate"},
    ),
    "study": (
        "src/headroom/heads/study.py",
        "(1 - confidence) / 2",
        "(1.0 - confidence) / 2.0",
        {"compare_heads", "head_figures"},
        {"reduce_heads", "evaluate", "head_similarity", "train_checkpoint"},
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_a_changed_function_reruns_its_jobs_and_no_other(copied, case):
    name, old, new, wanted, unwanted = EDITS[case]
    copied.edit(name, old, new)
    planned = set(copied.planned())
    assert wanted <= planned
    assert not unwanted & planned


# A setting for every rule whose change must rerun it.
RULE_SETTINGS = {
    "text_documents": ("corpora.docs.characters", 200000),
    "train_tokenizer": ("checkpoints.tiny.train.vocabulary", 400),
    "tokenize": ("corpora.docs.boundary", "eos"),
    "train_checkpoint": ("checkpoints.tiny.train.seed", 7),
    "head_similarity": ("heads.calibration.sequences", 7),
    "attention_inputs": ("heads.calibration.inputs", 7),
    "reduce_heads": ("heads.cross_group", "refuse"),
    "head_controls": ("evaluation.window", 16),
    "evaluate": ("evaluation.sequences", 60),
    "compare_heads": ("evaluation.bootstrap.seed", 1),
    "decode_latency": ("evaluation.latency.prompt", 5),
    "ffn_activations": ("ffn.calibration.sequences", 7),
    "ffn_gradients": ("ffn.calibration.gradient_sequences", 3),
    "prune_channels": ("ffn.multiple", 4),
    "ffn_sweep": ("ffn.transport.iterations", 20000000),
    "ffn_figures": ("ffn.calibration.seeds", [0]),
    "plan_figure": ("ffn.saved", ["prune-flap-ot_mass-r0.25"]),
    "sentence_pairs": ("pairs.cldr.cldr.seed", 1),
    "train_pair_tokenizer": ("translators.phrases.train.vocabulary", 330),
    "tokenize_pairs": ("translators.phrases.longest", 36),
    "train_translator": ("translators.phrases.train.dropout", 0.2),
    "head_roles": ("gates.attentions", ["encoder", "cross"]),
    "gate_heads": ("gates.beta", 0.33),
    "translate": ("evaluation.translation.beams", [1]),
    "translation_latency": ("evaluation.translation.latency.source", 5),
    "training_figures": ("translators.phrases.train.report", 2),
    "run_figures": ("gates.log_a", 1.5),
    "gates_figures": ("evaluation.bootstrap.seed", 1),
    "train_branch_tokenizer": ("branches.vocabulary", 310),
    "branch_texts": ("branches.length", 10),
    "train_stack": ("branches.theta", 20000.0),
    "evaluate_stack": ("branches.offsets.evaluation", True),
    "branch_results": ("evaluation.bootstrap.seed", 1),
    "branch_figures": ("branches.seeds", [0, 1]),
    "branch_architectures": ("branches.layers", 2),
    "instruction_pairs": ("instructions.objects.characters", 100),
    "paraphrase_pairs": ("instructions.objects.paraphraser", {"rules": {"strength": 0.5}}),
    "answer_prompts": ("gradients.answers.new_tokens", 5),
    "plan_gradients": ("gradients.memory_gb", 3.0),
    "gradient_dots": ("gradients.batch", 4),
    "merge_dots": ("gradients.partitions", 3),
    "gradient_retrieval": ("gradients.permutations", 30),
    "gradient_figures": ("gradients.greedy", 3),
    "projection_errors": ("gradients.two_sided.inner", 3),
}


@pytest.mark.parametrize("rules", waves({r: s[0] for r, s in RULE_SETTINGS.items()}), ids="-".join)
def test_every_rule_reruns_for_a_setting_of_its_own(copied, rules):
    config = SMALL
    for rule in rules:
        config = changed(*RULE_SETTINGS[rule], config=config)
    copied.configure(config)
    assert set(rules) <= set(copied.planned())


def test_adding_a_model_leaves_the_first_alone(copied):
    config = copy.deepcopy(SMALL)
    config["checkpoints"]["other"] = {"path": str(copied.folder / "results/checkpoints/tiny")}
    config["heads"]["checkpoints"] = config["ffn"]["checkpoints"] = ["tiny", "other"]
    copied.configure(config)
    planned = copied.planned()
    assert planned["import_checkpoint"] == 1
    assert planned["evaluate"] == MERGES + PRUNES + 1
    assert "train_checkpoint" not in planned and "text_documents" not in planned
    wanted = {"import_checkpoint", "reduce_heads", "evaluate", "head_figures", "ffn_figures"}
    assert wanted <= set(planned)


def test_a_real_rerun_does_what_was_planned_and_the_next_one_nothing(copied):
    config = copy.deepcopy(SMALL)
    config["heads"]["merges"][0]["thresholds"] = [0.99, 0.5]
    copied.configure(config)
    planned = copied.planned()
    assert planned == {
        "reduce_heads": 1,
        "evaluate": 1,
        "compare_heads": 1,
        "head_figures": 1,
    }
    result = copied.run("--cores", "2")
    assert copied.counted(result.stdout + result.stderr) == planned
    assert copied.planned() == {}
