"""Configurations: defaults of their own, errors in one line that name the key."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from headroom import experiment
from headroom.configuration import filled, load_schema
from headroom.errors import InputError
from headroom.gates import families as gate_families

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.yaml"
MINIMAL = {"checkpoints": {"tiny": {"train": {}}}}
TRANSLATED = {"pairs": {"cldr": {"cldr": {}}}, "translators": {"small": {"train": {}}}}
BOTH = MINIMAL | TRANSLATED


def load(config):
    return experiment.load(copy.deepcopy(config), SCHEMA)


def changed(path, value, config=None):
    config = copy.deepcopy(config or MINIMAL)
    node = config
    *keys, last = path.split(".")
    for key in keys:
        node = node.setdefault(key, {})
    node[last] = value
    return config


def merges(**family):
    return changed("heads.merges", [{"criterion": "relu", "methods": ["refit"], **family}])


def test_every_key_is_described():
    def leaves(node, path):
        for key, part in node.get("properties", {}).items():
            yield f"{path}.{key}", part
            yield from leaves(part, f"{path}.{key}")
        for inner in ("additionalProperties", "items"):
            if isinstance(node.get(inner), dict):
                yield from leaves(node[inner], f"{path}.*")

    undescribed = [
        path for path, part in leaves(load_schema(SCHEMA), "") if "description" not in part
    ]
    assert undescribed == []


def test_defaults_are_filled_and_not_shared():
    schema = load_schema(SCHEMA)
    full = filled({"checkpoints": {"a": {"train": {}}, "b": {"train": {}}}}, schema)
    assert full["compute"]["device"] == "auto"
    full["checkpoints"]["a"]["train"]["layers"] = 99
    assert full["checkpoints"]["b"]["train"]["layers"] != 99
    again = filled({"checkpoints": {"a": {"train": {}}}}, schema)
    assert again["checkpoints"]["a"]["train"]["layers"] != 99


def test_three_lines_are_enough():
    full = load({"checkpoints": {"mine": {"hub": "someone/model"}}})
    assert full["heads"]["checkpoints"] == ["mine"]
    assert full["heads"]["calibration"]["corpus"] == "docs"
    assert all(full["corpora"]["docs"]["versions"].values())


def test_the_default_config_is_complete_and_plain():
    full = experiment.sanitised(load(yaml.safe_load((ROOT / "config.yaml").read_text())))
    assert json.loads(json.dumps(full)) == full
    assert list(full) == sorted(full)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (changed("heads.tyle", 3), "config key heads.tyle is unknown"),
        (changed("heads.metric", []), "did you mean metrics?"),
        (changed("heads.thresholds", [1.2]), "heads.thresholds.0 is 1.2: at most 1"),
        (changed("heads.ridge", "3e-4"), "write 3.0e-4"),
        (changed("heads.metrics", ["rely"]), "rely is unknown (allowed: "),
        (changed("heads.calibration.corpus", "c4"), "c4 is not among corpora"),
        (changed("heads.checkpoints", ["small"]), "small is not among checkpoints"),
        (changed("compute.device", "tpu"), "allowed: auto, cpu, cuda"),
        (
            changed("corpora.books", {"path": "/nowhere/*.txt"}),
            "corpora.books.path: there is no file",
        ),
        (
            changed("corpora.books", {"packages": ["no_such_thing"]}),
            "no_such_thing is not installed",
        ),
        (changed("corpora.books", {"path": "x", "hub": "y"}), "corpora.books"),
        (changed("corpora.books", {"boundary": "bos"}), "needs exactly one of packages, path, hub"),
        (changed("checkpoints.m", {"path": "/nowhere"}), "checkpoints.m.path: there is no folder"),
        (changed("checkpoints.m", {}), "needs exactly one of train, path, hub"),
        (changed("checkpoints.tiny.train.heads", 5), "heads 5 is not a multiple of groups 4"),
        (
            changed("checkpoints.tiny.train.heads", 16),
            "hidden 144 is not a multiple of twice heads 16",
        ),
        (changed("evaluation.recipes", ["tiny+merge-relu-avg-t0.99"]), "method 'avg'"),
        (changed("evaluation.recipes", ["tiny+merge-relu-average-b5x2"]), "b5x2"),
        (changed("evaluation.window", 0), "evaluation.window is 0: at least 2"),
        (
            changed(
                "heads.merges", [{"criterion": "error", "methods": ["refit"], "thresholds": [0.9]}]
            ),
            "criterion error",
        ),
        (
            changed("heads.merges", [{"criterion": "relu", "methods": ["refit"]}]),
            "needs thresholds",
        ),
        (
            merges(thresholds=[0.9], budgets=["2x2"], controls=["random0", "flap"]),
            "heads.merges.0.controls: flap removes heads down to a budget (allowed: in a family",
        ),
        (
            merges(criterion="error", budgets=["2x4"], controls=["wanda_sp"]),
            "heads.merges, controls: recipe tiny+remove-wanda_sp-drop-b2x4: recipe part 'b2x4': "
            "not possible with 12 query heads in 4 key/value heads",
        ),
        (
            merges(thresholds=[0.9], control_methods=["refit", "aligned"]),
            "heads.merges.0.control_methods: aligned is not among the family's methods "
            "(allowed: refit)",
        ),
        (
            merges(criterion="output_nosink", thresholds=[0.9]),
            "heads.merges.0.criterion: output_nosink is unknown (allowed: ",
        ),
        (
            changed("evaluation.window", 513),
            "evaluation.window is 513, but checkpoint tiny takes 512",
        ),
        (
            changed("heads.calibration.window", 2048),
            "heads.calibration.window is 2048, but checkpoint tiny takes 512",
        ),
        ({"checkpoints": {}}, "checkpoints"),
        ({}, "checkpoints"),
    ],
)
def test_bad_input_is_one_line_that_names_the_key(config, said):
    with pytest.raises(InputError) as error:
        load(config)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_controls_that_can_be_made_are_allowed():
    load(merges(criterion="error", budgets=["2x4"], controls=["random0", "dissimilar"]))
    load(merges(criterion="error", budgets=["4x2"], controls=["wanda_sp", "flap"]))
    load(merges(criterion="softmax_nosink", thresholds=[0.9], control_methods=["refit"]))


def test_checkpoints_alone_need_no_translator():
    full = load(MINIMAL)
    assert full["translators"] == full["pairs"] == {} and full["gates"]["translators"] == []
    assert full["heads"]["checkpoints"] == full["ffn"]["checkpoints"] == ["tiny"]
    assert "tiny" in experiment.all_recipes(full)


def test_translators_alone_need_no_checkpoint():
    full = load(TRANSLATED)
    assert full["checkpoints"] == {} and experiment.all_recipes(full) == []
    assert full["heads"]["checkpoints"] == full["ffn"]["checkpoints"] == []
    assert full["gates"]["translators"] == ["small"]
    assert full["translators"]["small"]["pairs"] == "cldr"
    assert full["pairs"]["cldr"]["versions"].keys() == {"babel", "num2words"}
    plain = experiment.sanitised(full)
    assert json.loads(json.dumps(plain)) == plain


def test_what_is_left_out_of_pairs_and_translators_has_a_default():
    full = load(TRANSLATED)
    pairs, translator, gates = full["pairs"]["cldr"], full["translators"]["small"], full["gates"]
    assert pairs["cldr"] == {"locales": ["en", "de"], "pairs": 20000, "seed": 0}
    assert pairs["split"] == {"train": 0.9, "validation": 0.05, "test": 0.05}
    assert (pairs["lowercase"], pairs["tokenize"]) == (False, "13a")
    assert translator["longest"] == 128
    train = translator["train"]
    assert [train[key] for key in ("hidden", "layers", "heads", "ffn")] == [128, 2, 8, 256]
    assert (train["schedule"], train["report"], train["dropout"]) == ("inverse_sqrt", None, 0.1)
    assert (gates["attentions"], gates["trains"], gates["penalty"]) == (["encoder"], "all", "seed")
    assert (gates["lambdas"], gates["target_heads"], gates["seeds"]) == ([0, 0.05, 0.1], [], [0])
    assert (gates["beta"], gates["log_a"], gates["gate_learning_rate"]) == (0.5, 2.0, 0.05)
    assert gates["controls"] == ["michel", "random", "scratch"]
    assert full["evaluation"]["translation"]["beams"] == [1, 4]


def test_the_runs_of_a_translator_are_those_that_were_asked_for():
    asked = {"lambdas": [0.1, 0.05], "target_heads": [6], "seeds": [0, 2]}
    gates = load(TRANSLATED | {"gates": asked})["gates"]
    once = ["gate-l0.00", "gate-l0.05", "gate-l0.10", "gate-k6"]
    once += [f"mask-{choice}-k6" for choice in ("michel", "random", "scratch")]
    assert gate_families.steps(gates) == [*once, *(f"{step}-s2" for step in once)]
    others = gate_families.steps(gates, trained=False)
    assert others == [s for s in gate_families.steps(gates) if "scratch" not in s]


@pytest.mark.parametrize(
    ("attentions", "most"),
    [(["encoder"], 16), (["cross"], 16), (["encoder", "decoder", "cross"], 48)],
)
def test_no_more_heads_can_be_kept_than_are_gated(attentions, most):
    config = changed("gates.attentions", attentions, TRANSLATED)
    for count in (0, most):
        load(changed("gates.target_heads", [count], config))
    said = f"gates.target_heads: {most + 1} heads, but {most} heads of small are gated"
    with pytest.raises(InputError, match=said):
        load(changed("gates.target_heads", [most + 1], config))


def test_a_published_translator_is_looked_at_before_any_job(tmp_path):
    sizes = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "x")}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "model_type": "marian"}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    config = changed("translators", {"opus": {"path": str(tmp_path)}}, TRANSLATED)
    assert load(config)["translators"]["opus"]["path"] == str(tmp_path)
    with pytest.raises(InputError, match="9 heads, but 8 heads of opus are gated"):
        load(changed("gates.target_heads", [9], config))
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": "t5"}))
    with pytest.raises(InputError, match=r"translators.opus: model_type 't5' is no translator"):
        load(config)


def aligned(folder):
    paths = {}
    for split in ("train", "validation", "test"):
        paths[split] = [str(folder / f"{split}.{side}") for side in ("en", "de")]
        for path in paths[split]:
            Path(path).write_text("one\n")
    return paths


def test_files_of_pairs_are_found(tmp_path):
    paths = aligned(tmp_path)
    config = changed("pairs", {"mine": {"path": paths}}, TRANSLATED)
    assert load(config)["pairs"]["mine"]["path"] == paths
    Path(paths["test"][1]).unlink()
    with pytest.raises(InputError, match=r"config key pairs.mine.path.test: there is no file .*de"):
        load(config)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("gates.lambdas", [-0.1], "config key gates.lambdas.0 is -0.1: at least 0 is allowed"),
        (
            "gates.lambdas",
            [0.0000001],
            "config key gates.lambdas: 1e-07 has more than six decimals",
        ),
        ("gates.lambdas", [0.1234567], "config key gates.lambdas: 0.1234567 has more than six"),
        ("gates.target_heads", [-1], "config key gates.target_heads.0 is -1"),
        (
            "gates.translators",
            ["large"],
            "gates.translators: large is not among translators (small)",
        ),
        (
            "gates.controls",
            ["best"],
            "config key gates.controls is 'best' (allowed: michel, random",
        ),
        ("gates.attentions", ["self"], "gates.attentions.0 is 'self': allowed: encoder, decoder"),
        ("gates.seeds", [], "config key gates.seeds"),
        ("gates.lamdas", [0.1], "config key gates.lamdas is unknown; did you mean lambdas?"),
        (
            "translators.small.pairs",
            "wmt",
            "translators.small.pairs: wmt is not among pairs (cldr)",
        ),
        ("pairs", {}, "translators.small.pairs: (none) is not among pairs (none are given)"),
        ("translators.tiny", {"train": {}}, "translators.tiny: checkpoints has the same name"),
        ("translators.x", {}, "translators.x needs exactly one of train, path, hub; it has none"),
        (
            "translators.x",
            {"path": "/nowhere", "hub": "a/b"},
            "translators.x needs exactly one of train, path, hub; it has ['hub', 'path']",
        ),
        ("translators.x", {"path": "/nowhere"}, "translators.x.path: there is no folder /nowhere"),
        (
            "translators.small.train.hidden",
            136,
            "translators.small.train: hidden 136 is not a multiple of twice heads 8",
        ),
        ("translators.small.train.schedule", "linear", "allowed: inverse_sqrt, noam, constant"),
        ("pairs.x", {}, "config key pairs.x needs exactly one of cldr, path, hub; it has none"),
        ("pairs.x", {"path": {"train": ["a", "b"]}}, "config key pairs.x.path lacks test"),
        (
            "pairs.cldr.cldr.locales",
            ["en", "xx"],
            "pairs.cldr.cldr.locales: CLDR knows no locale 'xx'",
        ),
        ("pairs.cldr.cldr.locales", ["en"], "config key pairs.cldr.cldr.locales"),
        ("evaluation.translation.beams", [0], "evaluation.translation.beams.0 is 0: at least 1"),
        (
            "evaluation.recipes",
            ["tiny+gate-l0.05"],
            "recipe tiny+gate-l0.05: step gate-l0.05 is for translators, tiny is a decoder "
            "(allowed: merge, remove, prune)",
        ),
        ("evaluation.recipes", ["tiny+mask-random-k3"], "is for translators, tiny is a decoder"),
        ("heads.checkpoints", ["small"], "small is not among checkpoints"),
    ],
)
def test_bad_input_of_translators_is_one_line_that_names_the_key(key, value, said):
    with pytest.raises(InputError) as error:
        load(changed(key, value, BOTH))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_study_needs_a_model():
    for config in ({}, {"checkpoints": {}}, {"pairs": {"cldr": {"cldr": {}}}}):
        with pytest.raises(
            InputError, match=r"config needs checkpoints, translators or branches\.ablations"
        ):
            load(config)


def test_an_unserved_architecture_is_refused_before_any_job(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(InputError, match="model_type 'gpt2' is not served"):
        load(changed("checkpoints.m", {"path": str(tmp_path)}))
