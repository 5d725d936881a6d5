"""Pins: the conda environments, the container and the lock file say what pyproject says."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA_NAMES = {"torch": "pytorch"}
CONDA_NAMES |= {"matplotlib": "matplotlib-base", "pot": "pot"}


def pins(lines, separator):
    found = {}
    for line in lines:
        name, _, version = re.sub(r"[\s\"',]", "", line).partition(separator)
        if version:
            found[name.lower()] = version
    return found


WANTED = pins(PROJECT["dependencies"], "==")


@pytest.mark.parametrize("path", sorted((ROOT / "envs").glob("*.yaml")), ids=lambda p: p.name)
def test_conda_environments_hold_the_same_pins(path):
    environment = yaml.safe_load(path.read_text())
    found = pins([d for d in environment["dependencies"] if not d.startswith("python >=")], "=")
    wanted = {CONDA_NAMES.get(name, name): version for name, version in WANTED.items()}
    assert found and found.items() <= wanted.items()


def test_the_lock_holds_the_same_pins_and_no_places():
    text = (ROOT / "requirements.lock").read_text()
    lock = {k.replace("_", "-"): v for k, v in pins(text.splitlines(), "==").items()}
    extras = [pin for part in PROJECT["optional-dependencies"].values() for pin in part]
    for name, version in (WANTED | pins(extras, "==")).items():
        assert lock[name] == version
    assert "://" not in text and "@" not in text


def test_the_container_is_made_from_the_lock():
    assert "requirements.lock" in (ROOT / "envs" / "headroom.def").read_text()


def test_every_rule_names_an_environment_that_exists():
    for path in (ROOT / "workflow" / "rules").glob("*.smk"):
        for name in re.findall(r"conda:\n\s+\"([^\"]+)\"", path.read_text()):
            assert (path.parent / name).resolve().is_file()


def test_snakemake_is_pinned_once():
    assert f'min_version("{WANTED["snakemake"]}")' in (ROOT / "Snakefile").read_text()
