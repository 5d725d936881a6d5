"""Per-layer gradients: targets, inputs and how the report shows a figure."""

GRADIENTS = config["gradients"]
ROOT = "results/gradients/{recipe}/{instructions}/{setting}/{backend}"
ERRORS = "results/gradients/{recipe}/{instructions}/errors"
# What decides a sample's gradient; the rest of the section is about how the work is cut.
MEASURED = [
    f"gradients.{name}"
    for name in (
        *("template", "length", "too_long", "batch", "block"),
        *("ghost_speed", "projection", "two_sided"),
    )
]


def gradients_shown(name, caption, figure):
    """A figure or page of a setting that the report shows.

    Settings and backends stand in the figure's label: labels of their own would be switches of the
    report's page, which goes blank for combinations that a figure hasn't.
    """
    return report(
        f"{ROOT}/{name}",
        caption=f"../report/{caption}.rst",
        category="Gradients",
        subcategory="{recipe}, {instructions}",
        labels={
            "checkpoint": "{recipe}",
            "figure": f"{figure}: {{setting}}, {{backend}}",
        },
    )


def gradients_targets():
    """Everything that the gradients study shows."""
    targets = []
    for recipe, instructions, backend in itertools.product(
        *(GRADIENTS[name] for name in ("checkpoints", "instructions", "backends"))
    ):
        names = {
            "recipe": recipe,
            "instructions": instructions,
            "backend": backend,
        }
        targets += [
            f"{ROOT.format(setting=setting, **names)}/figures/accuracy.png"
            for setting in GRADIENTS["settings"]
        ]
        if backend not in gradient_families.EXACT:
            targets.append(f"{ERRORS.format(**names)}/{backend}.csv")
    return targets


def instruction_files(wildcards):
    """The local files that a set of samples is read from."""
    return config["instructions"][wildcards.instructions].get("path", [])


def instruction_settings(wildcards):
    """What decides a set of samples; its paraphraser doesn't."""
    found = settings(("instructions", wildcards.instructions))
    del found["instructions"][wildcards.instructions]["paraphraser"]
    return found


def brought_files(wildcards):
    """The local files that paraphrases are brought in."""
    source = config["instructions"][wildcards.instructions]
    kind, own = gradient_families.paraphraser_of(source)
    return own["path"] if kind == "path" else []


PASSING = (
    "concurrency",
    "timeout",
    "max_retries",
)  # decide no text, so they rerun nothing


def paraphraser_settings(wildcards):
    """What decides the paraphrases: not how many requests run at once, nor how long they may."""
    source = config["instructions"][wildcards.instructions]
    kind, own = gradient_families.paraphraser_of(source)
    kept = {key: value for key, value in own.items() if key not in PASSING}
    return experiment.sanitised({"kind": kind, kind: kept})


def paraphraser_resource(name):
    """A setting of an endpoint that decides no text; 0 for what has none."""

    def found(wildcards):
        source = config["instructions"][wildcards.instructions]
        _, own = gradient_families.paraphraser_of(source)
        return int(own.get(name, 0))

    return found


def paraphraser_memory(wildcards, attempt):
    """Megabytes: little, unless a model rewrites."""
    kind, own = gradient_families.paraphraser_of(
        config["instructions"][wildcards.instructions]
    )
    size = config["compute"]["mem_mb"] if kind == "model" else 700
    folder = own.get("path") if kind == "model" else None
    if folder:
        size += 3 * sum(file.stat().st_size for file in Path(folder).iterdir()) / 1e6
    return int(size) * 2 ** (attempt - 1)


def queries_of(wildcards):
    """The samples that are looked up among the originals."""
    if wildcards.setting == "paraphrased":
        return f"results/instructions/{wildcards.instructions}/paraphrased.jsonl"
    return f"results/gradients/{wildcards.recipe}/{wildcards.instructions}/model_generated.jsonl"


def gradient_settings(*keys):
    """What decides the dot products of a backend's features."""

    def found(wildcards):
        return model_settings(*MEASURED, *keys) | {"backend": wildcards.backend}

    return found


def gradient_parts(kind):
    """The partitions' files of a kind."""

    def found(wildcards):
        names = gradient_families.parts(GRADIENTS["partitions"])
        return [f"{ROOT}/parts/{name}.{kind}" for name in names]

    return found


def gradient_memory(wildcards, input, attempt):
    """Megabytes: the model, a batch, and what may be held beside them."""
    held = int(1000 * GRADIENTS["memory_gb"])
    return memory(3)(wildcards, input, attempt) + held * 2 ** (attempt - 1)


def merged_memory(wildcards, input, attempt):
    """Megabytes of a job that holds dot products twice: as they are, and what is made of them."""
    return int(700 + 3 * input.size_mb) * 2 ** (attempt - 1)
