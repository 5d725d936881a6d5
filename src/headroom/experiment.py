"""From a configuration to an experiment: references resolved, impossible wishes refused.

This runs while Snakemake reads the workflow, so it imports nothing heavy and starts no job. What a
value means only to one study is asked of that study's own light functions.
"""

import copy
import glob
from pathlib import Path

from headroom.branches import grid
from headroom.checkpoints import POSITIONS, Geometry, geometry, read_config
from headroom.configuration import filled, load_schema
from headroom.corpora.documentation import installed_version
from headroom.corpora.forms import check_locales
from headroom.errors import InputError
from headroom.ffn import families as ffn_families
from headroom.gates import families as gate_families
from headroom.gradients import families as gradient_families
from headroom.heads import families
from headroom.imports import check_folder
from headroom.recipes import TRANSLATOR_STEPS, Recipe, format_step, parse_recipe

STUDIES = ("heads", "ffn")  # those that are made of a checkpoint and calibration text
COUNTED_BYTES = 50_000_000  # of a file whose lines are counted while the workflow is read
WINDOW = 1024  # tokens of a window where the configuration names none


def load(config: dict, schema: Path) -> dict:
    """Return the complete configuration: defaults, references and versions filled in.

    Raises:
        InputError: one line that names the key, what was given and what is allowed.
    """
    full = filled(config, load_schema(schema))
    if not any((full["checkpoints"], full["translators"], full["branches"]["ablations"])):
        raise InputError(
            "config needs checkpoints, translators or branches.ablations: there is nothing to study"
        )
    first = next(iter(full["corpora"]))
    full["evaluation"].setdefault("corpora", [first])
    full["branches"].setdefault("corpus", first)
    for study in STUDIES:
        full[study].setdefault("checkpoints", list(full["checkpoints"]))
        full[study]["calibration"].setdefault("corpus", first)
    for name, source in full["corpora"].items():
        _complete_corpus(name, source)
    for name, source in full["checkpoints"].items():
        _check_base(name, source, full)
    _check_references(full)
    _complete_windows(full)
    families.check(full["heads"])
    ffn_families.check(full["ffn"])
    _complete_translators(full)
    grid.check(full["branches"])
    _complete_instructions(full)
    for recipe in all_recipes(full):
        check_recipe(recipe, full)
    _check_controls(full)
    return full


def _complete_corpus(name: str, corpus: dict) -> None:
    """Check a corpus' sources and note the versions of packages whose documentation it reads."""
    splits = [split for split in ("train", "calibration", "evaluation") if split in corpus]
    own = [key for key in ("packages", "path", "hub") if key in corpus]
    if len(own) > 1 or (own and splits):
        raise InputError(
            f"config key corpora.{name} has {own + splits}: give one source for all splits, "
            f"or one a split"
        )
    if not own and not splits:
        raise InputError(
            f"config key corpora.{name} needs exactly one of packages, path, hub, or a "
            f"source for each of train, calibration, evaluation"
        )
    for key, source in [(name, corpus)] if own else [(f"{name}.{s}", corpus[s]) for s in splits]:
        if "path" in source:
            source["path"] = _files(f"corpora.{key}.path", source["path"])
        if "packages" in source:
            source["versions"] = {
                package: installed_version(package, f"corpora.{key}.packages")
                for package in source["packages"]
            }


def _complete_translators(config: dict) -> None:
    """Check sentence pairs and translators, fill in what they leave out."""
    gates, pairs = config["gates"], config["pairs"]
    gates.setdefault("translators", list(config["translators"]))
    gate_families.check(gates)
    for name in gates["translators"]:
        if name not in config["translators"]:
            known = ", ".join(config["translators"])
            raise InputError(
                f"config key gates.translators: {name} is not among translators ({known})"
            )
    for name, source in pairs.items():
        _complete_pairs(name, source)
    for name, source in config["translators"].items():
        chosen = source.setdefault("pairs", next(iter(pairs), "(none)"))
        if chosen not in pairs:
            raise InputError(
                f"config key translators.{name}.pairs: {chosen} is not among pairs "
                f"({', '.join(pairs) or 'none are given'})"
            )
        if name in config["checkpoints"]:
            raise InputError(
                f"config key translators.{name}: checkpoints has the same name (allowed: another)"
            )
        _check_translator(name, source, gates if name in gates["translators"] else None)


def _complete_instructions(config: dict) -> None:
    """Find the files of samples, note package versions, fill in what the study leaves out."""
    own, sets = config["gradients"], config["instructions"]
    own.setdefault("checkpoints", list(config["checkpoints"]) if sets else [])
    own.setdefault("instructions", list(sets))
    for name, source in sets.items():
        key = f"instructions.{name}"
        if "path" in source:
            source["path"] = _files(f"{key}.path", source["path"])
        if brought := source["paraphraser"].get("path"):
            brought["path"] = _files(f"{key}.paraphraser.path.path", brought["path"])
        if "packages" in source:
            source["versions"] = {
                package: installed_version(package, f"{key}.packages")
                for package in source["packages"]
            }
        if "path" in source["paraphraser"].get("model", {}):
            own_model = source["paraphraser"]["model"]
            own_model["path"] = str(Path(own_model["path"]).expanduser())
            if Path(own_model["path"]).is_dir():
                check_folder(Path(own_model["path"]), None, f"{key}.paraphraser.model")
    bases = {recipe.split("+")[0] for recipe in own["checkpoints"]} & set(config["checkpoints"])
    known = {name: _positions(name, config) for name in sorted(bases)}
    limits = {name: limit for name, limit in known.items() if limit is not None}
    _complete_length("gradients.length", own, "length", limits)
    gradient_families.check(config)


def _complete_pairs(name: str, source: dict) -> None:
    """Find the files of sentence pairs, note the versions of the packages that make phrases."""
    for split, files in source.get("path", {}).items():
        source["path"][split] = [
            file for part in files for file in _files(f"pairs.{name}.path.{split}", part)
        ]
        _check_aligned(f"pairs.{name}.path.{split}", source["path"][split])
    if "cldr" in source:
        check_locales(source["cldr"]["locales"], f"pairs.{name}.cldr.locales")
        source["versions"] = {
            package: installed_version(package, f"pairs.{name}.cldr")
            for package in ("babel", "num2words")
        }


def _check_aligned(key: str, files: list[str]) -> None:
    """Refuse two files of unequal length before a job runs; huge ones are counted in the job."""
    if len(files) != 2 or max(Path(file).stat().st_size for file in files) > COUNTED_BYTES:
        return
    texts = [Path(file).read_bytes() for file in files]
    lines = [text.count(b"\n") + (not text.endswith(b"\n") and bool(text)) for text in texts]
    if lines[0] != lines[1]:
        raise InputError(
            f"config key {key}: {files[0]} has {lines[0]} lines and {files[1]} {lines[1]} (allowed:"
            f" as many)"
        )


def _check_translator(name: str, source: dict, gates: dict | None) -> None:
    """Check a translator's sizes, and against the study where it is studied."""
    if "train" in source:
        train = source["train"]
        if train["hidden"] % (2 * train["heads"]):
            raise InputError(
                f"config key translators.{name}.train: hidden {train['hidden']} is not a multiple "
                f"of twice heads {train['heads']}"
            )
        known = gate_families.marian_config(train)
    elif "path" in source:
        folder = Path(source["path"]).expanduser()
        if not folder.is_dir():
            raise InputError(f"config key translators.{name}.path: there is no folder {folder}")
        if not (folder / "config.json").is_file():
            raise InputError(f"config key translators.{name}.path: {folder} has no config.json")
        check_folder(folder, source, f"translators.{name}")
        source["path"], known = str(folder), read_config(folder)
    else:
        return  # what a hub holds is known in the job that fetches it
    gate_families.check_translator(name, gates, known)


def _files(key: str, patterns: str | list[str]) -> list[str]:
    files: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
        if not found:
            raise InputError(f"config key {key}: there is no file {pattern}")
        files += found
    return files


def _check_base(name: str, source: dict, config: dict) -> None:
    if "path" in source:
        folder = Path(source["path"]).expanduser()
        if not folder.is_dir():
            raise InputError(f"config key checkpoints.{name}.path: there is no folder {folder}")
        check_folder(folder, source, f"checkpoints.{name}")
        config_of = read_config(folder)
        if name in _reduced(config):
            geometry(config_of, f"config key checkpoints.{name}")
        source["path"] = str(folder)
    if "train" in source:
        source["train"].setdefault("corpus", next(iter(config["corpora"])))
        base_geometry(name, config)


def _reduced(config: dict) -> set[str]:
    """Base checkpoints whose heads or channels are studied: only some families are served there."""
    recipes = [name for study in STUDIES for name in config[study]["checkpoints"]]
    return {name.split("+")[0] for name in (*recipes, *config["evaluation"]["recipes"])}


def base_geometry(name: str, config: dict) -> Geometry | None:
    """Return the sizes of a base checkpoint where they can be known before any job (not on a hub).

    Raises:
        InputError: if the sizes don't fit each other, naming the key.
    """
    source = config["checkpoints"][name]
    if "path" in source:
        return geometry(read_config(source["path"]), f"config key checkpoints.{name}")
    if "hub" in source:
        return None
    train = source["train"]
    for whole, part, times in (("heads", "groups", 1), ("hidden", "heads", 2)):
        if train[whole] % (times * train[part]):
            twice = "twice " if times == 2 else ""  # rotary planes pair a head's dimensions
            raise InputError(
                f"config key checkpoints.{name}.train: {whole} {train[whole]} is not a multiple of "
                f"{twice}{part} {train[part]}"
            )
    return Geometry(
        family="llama",
        layers=train["layers"],
        heads=train["heads"],
        groups=train["groups"],
        head_dim=train["hidden"] // train["heads"],
        hidden=train["hidden"],
        vocabulary=train["vocabulary"],
        qk_norm=False,
    )


def _complete_windows(config: dict) -> None:
    """Fill in window lengths that are left out, refuse those longer than a model's positions."""
    limits = {name: _positions(name, config) for name in config["checkpoints"]}
    known = {name: limit for name, limit in limits.items() if limit is not None}
    sections = {"evaluation.window": config["evaluation"]}
    sections |= {f"{study}.calibration.window": config[study]["calibration"] for study in STUDIES}
    for key, section in sections.items():
        _complete_length(key, section, "window", known)


def _complete_length(key: str, section: dict, own: str, limits: dict[str, int]) -> None:
    """Fill in a length in tokens that is left out, refuse one that a checkpoint can't take."""
    length = section.setdefault(own, min([WINDOW, *limits.values()]))
    for name, limit in limits.items():
        if length > limit:
            raise InputError(
                f"config key {key} is {length}, but checkpoint {name} takes {limit} tokens "
                f"(allowed: at most {limit})"
            )


def _positions(name: str, config: dict) -> int | None:
    """The longest window a base checkpoint takes; None where it can't be known before a job."""
    source = config["checkpoints"][name]
    if "train" in source:
        return max(POSITIONS, source["train"]["window"])
    if "path" in source:
        found = read_config(source["path"]).get("max_position_embeddings")
        return found if isinstance(found, int) else None
    return None


def _check_references(config: dict) -> None:
    """Every name that points to another part of the configuration points to something."""
    references = [
        ("evaluation.corpora", name, "corpora") for name in config["evaluation"]["corpora"]
    ]
    references += [
        (f"{study}.calibration.corpus", config[study]["calibration"]["corpus"], "corpora")
        for study in STUDIES
    ]
    references += [
        (f"checkpoints.{name}.train.corpus", source["train"]["corpus"], "corpora")
        for name, source in config["checkpoints"].items()
        if "train" in source
    ]
    references += [
        ("gradients.instructions", name, "instructions")
        for name in config["gradients"].get("instructions", [])
    ]
    references.append(("branches.corpus", config["branches"]["corpus"], "corpora"))
    for key, name, table in references:
        if name not in config[table]:
            raise InputError(
                f"config key {key}: {name} is not among {table} ({', '.join(config[table])})"
            )


def all_recipes(config: dict) -> list[str]:
    """Return every recipe that a target needs, sorted, each once."""
    recipes = set(config["evaluation"]["recipes"])
    recipes |= set(config["gradients"]["checkpoints"])
    made = {"heads": families.steps(config["heads"]), "ffn": config["ffn"]["saved"]}
    made["ffn"] = [*made["ffn"], *ffn_families.steps(config["ffn"])]
    for study, steps in made.items():
        for studied in config[study]["checkpoints"]:
            recipes |= {studied, *(f"{studied}+{step}" for step in steps)}
    return sorted(recipes)


def check_recipe(name: str, config: dict) -> None:
    """Refuse a recipe with an unknown base, an unreadable step, or a budget that can't be met.

    Raises:
        InputError: naming the part that is wrong and what is allowed.
    """
    recipe: Recipe = parse_recipe(name)
    if recipe.base not in config["checkpoints"]:
        known = ", ".join(config["checkpoints"])
        raise InputError(f"recipe {name}: {recipe.base} is not among checkpoints ({known})")
    for step in recipe.steps:
        if step.verb in TRANSLATOR_STEPS:
            raise InputError(
                f"recipe {name}: step {format_step(step)} is for translators, {recipe.base} is a "
                f"decoder (allowed: merge, remove, prune)"
            )
    sizes = base_geometry(recipe.base, config) if recipe.steps else None
    if sizes is not None:
        families.check_budgets(name, recipe.steps, sizes)
        ffn_families.check_family(f"recipe {name}", recipe.steps, sizes.family)


def _check_controls(config: dict) -> None:
    """Refuse a control whose removal can't meet the budget of the merge that it is held against."""
    wanted = families.controls(config["heads"])
    steps = [step for item in wanted.items() for step in families.control_steps(*item).values()]
    for studied in config["heads"]["checkpoints"]:
        recipe = parse_recipe(studied)
        sizes = base_geometry(recipe.base, config)
        for step in steps if sizes is not None else []:
            name = f"{studied}+{format_step(step)}"
            try:
                families.check_budgets(name, (*recipe.steps, step), sizes)
            except InputError as error:
                raise InputError(f"config key heads.merges, controls: {error}") from None


def sanitised(config: dict) -> dict:
    """Return a deep copy with sorted keys and plain values: equal settings compare equal."""
    return _plain(copy.deepcopy(config))


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _plain(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
