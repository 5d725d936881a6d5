"""Configurations: defaults of their own, errors in one line that name the key."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from headroom import experiment
from headroom.configuration import filled, load_schema
from headroom.errors import InputError

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "workflow" / "schemas" / "config.schema.yaml"
MINIMAL = {"checkpoints": {"tiny": {"train": {}}}}


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


def test_an_unserved_architecture_is_refused_before_any_job(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(InputError, match="model_type 'gpt2' is not served"):
        load(changed("checkpoints.m", {"path": str(tmp_path)}))
