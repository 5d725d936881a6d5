"""What a user sees of a mistake: one line that names the key, before jobs start where possible."""

import copy
import functools
import json
import re

import pytest

from headroom import experiment
from headroom.errors import InputError

from .conftest import ALONE, ROOT, SMALL, changed

pytestmark = pytest.mark.workflow


alone = functools.partial(changed, config=ALONE)
BEFORE = {
    "unknown_key": (changed("heads.tyle", 1), "config key heads.tyle is unknown"),
    "ratio": (changed("heads.quantiles", [1.2]), "heads.quantiles.0 is 1.2"),
    "threshold_above_one": (changed("heads.thresholds", [1.01]), "at most 1 is allowed"),
    "missing_path": (changed("checkpoints.x", {"path": "nowhere"}), "there is no folder nowhere"),
    "budget": (changed("evaluation.recipes", ["tiny+merge-error-refit-b3x1"]), "b3x1"),
    "pruning_ratio": (changed("ffn.ratios", [1.2]), "ffn.ratios.0 is 1.2"),
    "everything_pruned": (
        changed("evaluation.recipes", ["tiny+prune-flap-drop-r1.00"]),
        "ratio 1.00 leaves no channel",
    ),
    "fusion": (
        changed("ffn.prunes", [{"scores": ["flap"], "fusions": ["ot_row"]}]),
        "config key ffn.prunes.0: recipe step 'prune-flap-ot_row-r0.50': fusion 'ot_row'",
    ),
    "no_prune_step": (changed("ffn.saved", ["remove-flap-drop-b2x1"]), "is no prune step"),
    "branch_corpus": (
        changed("branches.corpus", "doks"),
        "corpus: doks is not among corpora",
    ),
    "branch_ratio": (
        changed("branches.ablations.branch.ratios", [1.2]),
        "branches.ablations.branch.ratios.0 is 1.2",
    ),
    "branch_heads": (
        changed("branches.ablations.heads.architectures", [{"hidden": 64, "heads": 3}]),
        "branches.ablations.heads.architectures: 3 heads don't divide hidden 64",
    ),
    "branch_head_size": (
        changed("branches.ablations.heads.architectures", [{"hidden": 34, "heads": 2}]),
        "is a head size of 17 (allowed: even and at least 16)",
    ),
    "branches_above_texts": (
        changed("branches.ablations.branch.evaluation_branches", [1, 96]),
        "96 branches, but there are 48 texts",
    ),
    "gradient_backend": (
        changed("gradients.backends", ["vmap"]),
        "gradients.backends: vmap is unknown (allowed: auto, exact, ghost",
    ),
    "gradient_block": (changed("gradients.block", 5), "not a multiple of gradients.batch 2"),
    "gradient_length": (changed("gradients.length", 4096), "checkpoint tiny takes 512 tokens"),
    "template": (
        changed("gradients.template", {"prompt": "Say:"}),
        "template.prompt lacks {prompt}",
    ),
    "instructions": (
        changed("gradients.instructions", ["lima"]),
        "gradients.instructions: lima is not among instructions (objects)",
    ),
    "a_key_in_the_configuration": (
        changed(
            "instructions.objects.paraphraser", {"endpoint": {"model": "m", "key": "sk-1-secret"}}
        ),
        "endpoint.key is no name of an environment variable",
    ),
    "typo": (changed("evaluation.recipes", ["tiny+merge-relu-averge-t0.99"]), "method 'averge'"),
    "gates_price": (
        alone("gates.lambdas", [-0.1]),
        "gates.lambdas.0 is -0.1: at least 0 is allowed",
    ),
    "gates_heads": (alone("gates.target_heads", [5]), "gates.target_heads: 5 heads, but 4 heads"),
    "gates_pairs": (alone("translators.phrases.pairs", "wmt"), "wmt is not among pairs (cldr)"),
    "gates_locale": (alone("pairs.cldr.cldr.locales", ["en", "xx"]), "no locale 'xx'"),
    "gates_file": (
        alone("pairs.cldr", {"path": {s: ["gone.en"] for s in ("train", "validation", "test")}}),
        "there is no file gone.en",
    ),
    "gates_nothing": ({"gates": {}}, "config needs checkpoints, translators or"),
}


@pytest.mark.parametrize("case", BEFORE)
def test_named_in_one_line(case, tmp_path, monkeypatch):
    config, said = BEFORE[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        experiment.load(copy.deepcopy(config), ROOT / "workflow/schemas/config.schema.yaml")
    line = str(error.value)
    assert said in line and "\n" not in line and "secret" not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["unknown_key", "missing_path", "a_key_in_the_configuration"])
def test_before_any_job(empty, case):
    config, said = BEFORE[case]
    empty.configure(config)
    result = empty.run("--cores", "1", check=False)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("Using workflow")]
    assert result.returncode != 0
    assert len(lines) == 1 and lines[0].startswith("headroom: ") and said in lines[0]
    assert "secret" not in lines[0]
    assert not (empty.folder / "results").exists()


def test_an_unserved_architecture_is_named_before_any_job(empty):
    (empty.folder / "model").mkdir()
    (empty.folder / "model/config.json").write_text(json.dumps({"model_type": "mamba"}))
    empty.configure(changed("checkpoints.m", {"path": "model"}))
    result = empty.run("-n", check=False)
    assert "headroom: config key checkpoints.m: model_type 'mamba' is not served" in result.stderr
    assert "Traceback" not in result.stderr


def failing(workflow, config, *targets):
    workflow.configure(config)
    result = workflow.run("--cores", "2", *targets, check=False)
    assert result.returncode != 0
    return result.stdout + result.stderr


IN_JOBS = {
    "empty_corpus": (
        {"path": "empty.txt"},
        "results/corpora/bad/counts.json",
        r"headroom: config key corpora\.bad.*(empty|no document|no text)",
    ),
    "no_text_field": (
        {"path": "rows.jsonl", "text": "body"},
        "results/corpora/bad/counts.json",
        r"headroom: config key corpora\.bad.*body",
    ),
}


@pytest.mark.parametrize("case", IN_JOBS)
def test_bad_text_is_one_line_in_the_log_and_is_not_tried_three_times(empty, case):
    (empty.folder / "empty.txt").write_text("\n\n   \n")
    (empty.folder / "rows.jsonl").write_text('{"text": "some words"}\n' * 3)
    source, target, pattern = IN_JOBS[case]
    shown = failing(empty, changed("corpora.bad", source), target)
    log = (empty.folder / "results/logs/text_documents/bad.log").read_text()
    assert re.search(pattern, log), log
    assert "Traceback" not in log
    assert "not tried again" in log, "the second attempt must say it at once"
    assert re.search(pattern, shown), "the log must be shown in the terminal"
    assert not list((empty.folder / "results/corpora/bad").glob("*"))


def test_cuda_asked_for_and_absent(copied):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    shown = failing(copied, changed("compute.device", "cuda"))
    assert "compute.device is cuda, but no GPU is visible" in shown


def test_a_tokenizer_without_the_boundary_token(copied):
    folder = copied.folder / "results/tokenizers/tiny"
    for name in ("tokenizer_config.json", "tokenizer.json"):
        text = (folder / name).read_text().replace("</s>", "</t>")
        (folder / name).write_text(text)
    (copied.folder / "results/.sums/tokenizers/tiny").unlink()  # replaced on purpose
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    target = "results/tokens/tiny/docs/evaluation.safetensors"
    shown = failing(copied, changed("corpora.docs.boundary", "eos"), target)
    assert "headroom: config key corpora.docs" in shown and "eos" in shown


def test_a_damaged_checkpoint_is_named_by_the_next_job_and_by_verify(copied):
    import subprocess
    import sys

    weights = copied.folder / "results/checkpoints/tiny/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    shown = failing(copied, SMALL, "-R", "evaluate")
    assert "model.safetensors is damaged" in shown
    verify = subprocess.run(
        [sys.executable, "-m", "headroom.verify", "results/checkpoints"],
        cwd=copied.folder,
        env={"PYTHONPATH": "src"},
        capture_output=True,
        text=True,
    )
    assert verify.returncode == 1 and "tiny/model.safetensors is damaged" in verify.stdout


def test_a_transport_that_stops_early_is_an_error(copied):
    config = changed("ffn.transport.iterations", 1)
    step = "prune-flap-ot_mass-r0.25-uniform"
    shown = failing(copied, config, f"results/checkpoints/tiny+{step}")
    assert re.search(r"headroom: .*ffn\.transport\.iterations = 1", shown)
    assert not (copied.folder / f"results/checkpoints/tiny+{step}").exists()


def test_the_window_must_fit_the_text(copied):
    config = changed("evaluation.window", 400000)
    shown = failing(copied, config, "results/evaluations/tiny/docs.json")
    assert "headroom: config key evaluation.window is 400000" in shown
