"""The house: arrows go down only, rooms stay small, scripts hold no functions."""

import ast
import re
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
SCRIPTS = sorted((ROOT / "workflow" / "scripts").glob("*.py"))
RULES = sorted((ROOT / "workflow" / "rules").glob("*.smk"))

# From the top down; a module may import from its own floor's same room or from lower floors.
FLOORS = (
    ("experiment", "verify"),
    ("heads", "ffn", "gates", "branches", "gradients"),
    ("evaluation", "training", "language_model", "attention", "corpora"),
    ("attempts", "jobs", "sums", "plotting", "pages", "configuration", "locks", "failures"),
    (
        "accumulators",
        "checkpoints",
        "imports",
        "progress",
        "recipes",
        "statistics",
        "digest",
        "errors",
    ),
)


def test_arrows_go_down_and_studies_never_meet():
    graph = grimp.build_graph("headroom", cache_dir=None)
    floor = {f"headroom.{name}": level for level, names in enumerate(FLOORS) for name in names}

    def room(module):
        return ".".join(module.split(".")[:2])

    unplaced = {room(m) for m in graph.modules if m != "headroom"} - set(floor)
    assert not unplaced, f"give these modules a floor: {unplaced}"
    upwards = []
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            if imported == "headroom" or room(imported) == room(module):
                continue
            same_floor_studies = floor[room(imported)] == floor[room(module)] == 1
            if floor[room(imported)] < floor[room(module)] or same_floor_studies:
                upwards.append((module, imported))
    assert upwards == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_rooms_are_small(path):
    text = path.read_text()
    assert len(text.splitlines()) < 400
    assert "snakemake." not in text, "the library never sees snakemake"
    if path.name == "__init__.py":
        assert text == "", "digests follow imports, so __init__ files stay empty"
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 < 50, node.name
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_short_and_define_nothing(path):
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) < 40
    assert ast.get_docstring(tree)
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    assert "snakemake.config" not in text, "a change read there would not rerun the job"


def test_each_rule_has_its_script_and_what_a_job_needs():
    text = "\n".join(path.read_text() for path in RULES)
    rules = dict(re.findall(r"^rule (\w+):\n((?:    .*\n|\n)+)", text, flags=re.M))
    assert len(rules) > 8
    for name, body in rules.items():
        for part in ("log", "benchmark", "conda", "threads", "resources", "params", "script"):
            assert re.search(rf"^    {part}:", body, flags=re.M), f"rule {name} lacks {part}"
        assert f"scripts/{name}.py" in body
        assert f'code_digest("{name}")' in body
        assert f"results/logs/{name}/" in body and f"results/benchmarks/{name}/" in body
    assert {path.stem for path in SCRIPTS} == set(rules)
    assert len((ROOT / "Snakefile").read_text().splitlines()) < 90
